# Every artefact and the command that makes it. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help all vae vae-best prior gan nf nf-best figures affine uniform cuda trials judge seeds theory bench report explorer test lint clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

$(VENV)/filled: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

all: vae vae-best gan nf theory report explorer  ## data, the report's runs, its computations, the report: about three hours

vae: $(VENV)/filled  ## train both VAEs to the report's 40 epochs and draw everything (figures/vae_*)
	$(PY) code/vae.py
	$(PY) code/vae.py --z-dim 2
	$(PY) report/collect.py

vae-best: $(VENV)/filled  ## train the VAE with a flow as its prior, for the record (figures/vae_best*)
	$(PY) code/vae.py --best
	$(PY) report/collect.py

prior: $(VENV)/filled  ## train the VAE of 20 latents with a flow as its prior, all else alike (figures/vae_z20_flow.json)
	$(PY) code/vae.py --prior flow --out out/prior
	cp out/prior/figures/vae_z20.json figures/vae_z20_flow.json
	$(PY) report/collect.py

gan: $(VENV)/filled  ## train the GAN to the report's 200 epochs and draw everything (figures/gan_*)
	$(PY) code/gan.py
	$(PY) report/collect.py

nf: $(VENV)/filled  ## train the flow to the report's 40 epochs and draw everything (figures/nf_*)
	$(PY) code/nf.py
	$(PY) report/collect.py

figures: $(VENV)/filled  ## draw again what JSON, weights and checkpoints allow, without training; prints the results
	$(PY) code/vae.py --evaluate
	$(PY) code/vae.py --z-dim 2 --evaluate
	$(PY) code/vae.py --best --evaluate
	$(PY) code/gan.py --evaluate
	$(PY) code/nf.py --evaluate
	$(PY) code/nf.py --best --evaluate

nf-best: $(VENV)/filled  ## train a larger flow for the record (figures/nf_best*)
	$(PY) code/nf.py --best
	$(PY) report/collect.py

affine: $(VENV)/filled  ## train the flow with affine maps alone, for as many minutes (figures/nf_affine.json)
	$(PY) code/nf.py --components 0 --epochs 46 --out out/affine
	cp out/affine/figures/nf.json figures/nf_affine.json
	$(PY) report/collect.py

uniform: $(VENV)/filled  ## train the flow with uniform noise, for as many minutes (figures/nf_uniform.json)
	$(PY) code/nf.py --noise uniform --epochs 43 --out out/uniform
	cp out/uniform/figures/nf.json figures/nf_uniform.json
	$(PY) report/collect.py

# What is changed in a trial of the GAN, as flags, from the assignment's dropout and one batch size throughout. The last
# part of a trial's name is its epochs.
trial_assignment_10 :=
trial_other_seed_10 := --seed 1
trial_beta1_half_10 := --betas 0.5 0.999
trial_betas_default_10 := --betas 0.9 0.999
trial_beta2_lower_10 := --betas 0 0.99
trial_not_averaged_10 := --decay 0
trial_lr_double_10 := --lr 1e-3
trial_lr_half_10 := --lr 2.5e-4
trial_batch_half_10 := --batch-size 128
trial_assignment_20 :=
trial_dropout_tenth_20 := --dropout 0.1
trial_dropout_none_20 := --dropout 0
trial_assignment_200 := --fresh-epochs 8
trial_growth_200 := --growth 4
trial_dropout_tenth_200 := --dropout 0.1
trial_seed1_200 := --dropout 0.1 --seed 1
trial_seed2_200 := --dropout 0.1 --seed 2
trial_dropout_twentieth_200 := --dropout 0.05
trial_dropout_fifth_200 := --dropout 0.2
trial_batch_128_200 := --dropout 0.1 --batch-size 128
trial_batch_512_200 := --dropout 0.1 --batch-size 512
trial_batch_512_growth_200 := --dropout 0.1 --batch-size 512 --growth 4 --fresh-epochs 8
trial_batch_512_growth_fifth_200 := --dropout 0.2 --batch-size 512 --growth 4 --fresh-epochs 8
trial_batch_512_double_200 := --dropout 0.1 --batch-size 512 --growth 2 --fresh-epochs 8
trial_growth_8_seed1_200 := --dropout 0.1 --growth 8 --seed 1 --fresh-epochs 8
trial_growth_8_seed2_200 := --dropout 0.1 --growth 8 --seed 2 --fresh-epochs 8
trial_beta2_higher_200 := --dropout 0.1 --betas 0 0.9999
TRIALS := $(patsubst trial_%,%,$(filter trial_%,$(.VARIABLES)))

trials: $(TRIALS:%=trial-%)  ## train the GAN for 10 to 200 epochs, other settings (figures/trials)
	$(PY) report/collect.py

trial-%: $(VENV)/filled
	$(PY) code/gan.py --epochs $(lastword $(subst _, ,$*)) --dropout 0.3 --growth 1 --fresh-epochs 0 $(trial_$*) --out out/trials/$*
	mkdir -p figures/trials
	cp out/trials/$*/figures/gan.json figures/trials/gan_$*.json

judge: $(VENV)/filled  ## judge 10,000 samples of each model (trains the judge only if weights/judge.pt is missing)
	test -f weights/judge.pt || $(PY) code/judge.py --train
	$(PY) code/vae.py --sample 10000
	$(PY) code/vae.py --z-dim 2 --sample 10000
	$(PY) code/vae.py --best --sample 10000
	$(PY) code/gan.py --sample 10000
	$(PY) code/nf.py --sample 10000
	$(PY) code/judge.py --floor
	$(PY) code/judge.py figures/vae_z20_samples.npz figures/vae_z2_samples.npz figures/vae_best_samples.npz figures/gan_samples.npz figures/nf_samples.npz
	$(PY) report/collect.py

cuda: $(VENV)/filled  ## the runs and the bench on a GPU (figures/*_cuda.json)
	$(PY) code/vae.py --device cuda --out out/cuda
	$(PY) code/vae.py --z-dim 2 --device cuda --out out/cuda
	$(PY) code/vae.py --best --device cuda --out out/cuda
	$(PY) code/gan.py --device cuda --out out/cuda
	$(PY) code/nf.py --device cuda --out out/cuda
	$(PY) code/bench.py --device cuda
	for run in vae_z20 vae_z2 vae_best gan nf; do cp out/cuda/figures/$$run.json figures/$${run}_cuda.json || exit; done
	$(PY) report/collect.py

seeds: $(VENV)/filled  ## train all but the flow's record with two more seeds: the spread (figures/*_seed*.json)
	set -e; for seed in 1 2; do \
	  for run in vae.py "vae.py --z-dim 2" "vae.py --best" gan.py nf.py; do \
	    $(PY) code/$$run --seed $$seed --out out/seed$$seed; \
	  done; \
	  for run in vae_z20 vae_z2 vae_best gan nf; do cp out/seed$$seed/figures/$$run.json figures/$${run}_seed$$seed.json; done; \
	done
	$(PY) report/collect.py

bench: $(VENV)/filled  ## measure training's speed against the machine's ceiling (figures/bench*)
	$(PY) code/bench.py --device cpu
	$(PY) report/collect.py

theory: $(VENV)/filled  ## check the report's pen-and-paper answers by computation (figures/theory*)
	$(PY) report/theory.py
	$(PY) report/collect.py

report: $(VENV)/filled  ## build report/report.pdf from what is in figures/
	$(PY) report/collect.py
	@command -v latexmk >/dev/null || { echo "make report: no LaTeX here; install Debian's latexmk texlive-latex-recommended texlive-latex-extra texlive-fonts-recommended lmodern" >&2; exit 2; }
	cd report && SOURCE_DATE_EPOCH=0 FORCE_SOURCE_DATE=1 latexmk -pdf -interaction=nonstopmode -halt-on-error report.tex

explorer: $(VENV)/filled  ## put the models of weights/ into one web page (docs/explorer.html)
	$(PY) code/explorer.py

test: $(VENV)/filled  ## run the tests (fetches MNIST first)
	$(PY) -m pytest

lint: $(VENV)/filled  ## check style
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:  ## remove what can be made again: trials, caches, LaTeX's files (not .venv, data or checkpoints)
	rm -rf out .pytest_cache .ruff_cache code/__pycache__ tests/__pycache__ report/__pycache__
	cd report && rm -f *.aux *.log *.out *.fls *.fdb_latexmk *.bbl *.blg *.toc
