"""Report, README and docs say what the JSON says, and the code cites equations that exist."""

import json
import re

import pytest

import collect
from cli import UserError
from conftest import ROOT


def test_generated_files_are_up_to_date():
    of_makefile = set(re.findall(r"(?m)^trial_(\w+) :=", (ROOT / "Makefile").read_text()))
    made = collect.read(ROOT / "figures" / "trials")
    assert {name.removeprefix("gan_") for name in made} <= of_makefile and len(made) >= 9
    assert all(trial["config"]["epochs"] == int(name.rpartition("_")[2]) for name, trial in made.items())
    for path, text in collect.collect(ROOT).items():
        assert path.read_text() == text, f"run report/collect.py: {path.name} is not what figures/*.json say"


def test_every_cited_equation_has_a_label():
    labels = set(re.findall(r"\\label\{([^}]*)\}", (ROOT / "report/report.tex").read_text()))
    for path in (*(ROOT / "code").glob("*.py"), ROOT / "report" / "theory.py"):
        cited = set(re.findall(r"\beq:[\w-]+", path.read_text()))
        assert cited <= labels, f"{path.name} cites {cited - labels}"


def test_numbers_tex_holds_what_the_report_uses_and_no_more():
    used = set(re.findall(r"\\(?:num|seeds)\{([^}]*)\}", (ROOT / "report/report.tex").read_text())) - {"run.key", "#1"}
    defined = re.findall(r"csname num:(.*?)\\endcsname\{", (ROOT / "report/numbers.tex").read_text())
    assert used and sorted(used) == defined


def prose() -> str:
    """The report's text without macros' arguments, LaTeX's own numbers and comments."""
    text = (ROOT / "report/report.tex").read_text().partition(r"\begin{document}")[2]
    text = re.sub(r"(?m)(?<!\\)%.*$", "", text)
    text = re.sub(r"\\(num|seeds|code|checked|label|ref|eqref|includegraphics|cite\w*)(\[[^]]*\])?\{[^}]*\}", "", text)
    return re.sub(
        r"\\(begin|end)\{(minipage|tabular)\}(\[\w\])?\{?[^}\n]*\}?|\d*\.?\d+(ex|em|pt|\\(textwidth|height))", "", text
    )


# Decimals that are no measurement: settings of an example or of a trial, the question's bar, others' published figures.
SET = {
    "0.5", "0.6", "0.36", "0.9", "0.1", "0.99", "0.999", "0.001", "0.2", "0.05", "0.01", "127.5",
    "0.8", "0.7", "543.4", "1.85", "86.76", "84.45", "82.43", "82.09", "1.06", "1.05", "0.97",
}  # fmt: skip


def test_every_measured_number_comes_from_a_macro():
    """No decimal is typed but those above, and each of those is there; whole numbers are settings and sizes."""
    typed = set(re.findall(r"\d+\.\d+", prose()))
    assert typed == SET, typed ^ SET


def test_every_function_the_report_names_exists():
    text = (ROOT / "report/report.tex").read_text()
    named = re.findall(r"\\code\{(\w+)\.(\w+)\}", text)
    named += [("theory", name) for name in re.findall(r"\\checked\{(q\w+)\}", text)]
    functions = [(module, name) for module, name in named if name not in ("py", "json")]
    assert len(functions) > 15
    for module, name in functions:
        assert hasattr(__import__(module), name), f"{module}.{name}"


def test_every_question_is_backed_by_functions_and_tests_that_exist():
    evidence, report = (ROOT / "docs/evidence.md").read_text(), (ROOT / "report/report.tex").read_text()
    rows = re.findall(r"(?m)^\| (\d\.\d+) \|[^|]*\|(.*)\|(.*)\|$", evidence)
    assert [question for question, *_ in rows] == re.findall(r"\\label\{q:(.*?)\}", report)
    for _, functions, tests in rows:
        found = re.findall(r"`(test_\w+)\.py`: `(test_\w+)`", tests)
        assert found, tests
        sources = ((ROOT / "tests" / f"{module}.py").read_text().split(f"def {name}(")[1] for module, name in found)
        bodies = "".join(re.split(r"\n(?=def |@)", source)[0] for source in sources)
        for module, name in re.findall(r"`(\w+)\.(\w+)`", functions):
            assert hasattr(__import__(module), name), f"{module}.{name}"
            assert name in bodies or uses_it_indirectly(name), f"{name} is in none of {found}"


def uses_it_indirectly(name: str) -> bool:
    """What a listed test runs without naming it: models that a fixture makes, answers by their JSON."""
    return name in {"VAE", "GAN", "Flow", "Prior", "log_prob", "sample"} or name.startswith("q")


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 10_240 and text.count(b"\n") <= 160


def test_nothing_is_left_to_do():
    for path in ("report/report.tex", "README.md", "CONTRIBUTING.md", *(path for path in (ROOT / "docs").glob("*.md"))):
        text = re.sub(r"\bG?OMP_[A-Z_]+", "", (ROOT / path).read_text())  # variables that OpenMP reads
        found = re.search(r"TODO|FIXME|XXX|[A-Z]{4,}_[A-Z]+|\bINFORMATION\b", text)
        assert not found, f"{path}: {found}"


def test_bibliography_and_citations_agree():
    cited = re.findall(r"\\cite\w*(?:\[[^]]*\])*\{([^}]*)\}", (ROOT / "report/report.tex").read_text())
    entries = re.findall(r"(?m)^@\w+\{(\w+),", (ROOT / "report/references.bib").read_text())
    assert {key for keys in cited for key in keys.split(",")} == set(entries) and len(entries) == len(set(entries))


ENVIRONMENT = {"cpu": "C_1 & D", "threads": 2, "torch": "T", "device": "cpu"}


def write_json(checkout, name, content):
    (checkout / "figures" / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def checkout(tmp_path):
    """A small checkout with every run, two seeds of one, the judge, two trials, a bench and an answer."""
    for folder in ("figures/trials", "code", "docs", "report"):
        (tmp_path / folder).mkdir(parents=True)
    marked = {
        "README.md": ("results", "healthy", "game", "flow"),
        "docs/evidence.md": ("theory",),
        "docs/gan.md": ("fresh", "nearest", "chosen"),
        "docs/speed.md": ("ceiling", "races", "growth", "beside", "gpu"),
    }
    for path, markers in marked.items():
        text = "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in markers)
        (tmp_path / path).write_text(f"a\n{text}b\n")
    (tmp_path / "report" / "report.tex").write_text(
        r"\newcommand{\num}[1]{} \begin{document} \num{vae_z20.history.last.val_elbo} \num{vae_z20.history.1.val_elbo}"
        r"\num{judge.result.test_accuracy} \num{theory.q1_4.draws} \num{gan.environment.cpu}"
        r"\num{gan.result.train_seconds} \seeds{vae_z20.seeds.test_nll}"
        r"\num{-vae_z20.history.1.val_elbo} \seeds{-vae_z20.seeds.val_elbo}"
        r"\num{trials.gan_assignment_10.result.validation.fid}"
        r"\seeds{judge.floor.fid} \seeds{gan.over_seeds_and_noise.fid}"
    )
    for script, commands in collect.COMMANDS.items():
        lines = "".join(f"    python {command}    # old\n" for command in commands.values())
        (tmp_path / script).write_text(f'"""\n{lines}    (seed old)\n"""\n')
    bounds = (-543.21, -105.0, -100.126, *[-99.0] * 38)
    history = [{"epoch": e, "val_elbo": bound, "seconds": 3.0} for e, bound in enumerate(bounds)]
    verdict = {"fid": 20.06, "precision": 0.75, "recall": 0.625, "class_counts": [8, 12]}
    costs = {"train_seconds": 2000.4, "seconds_per_1000_samples": 0.0204}
    result = {"test_elbo": -1, "test_nll": 2.0, "test_nll_se": 0.5, "importance_samples": 500, **verdict, **costs}
    run = {"config": {"z_dim": 20, "seed": 0}, "environment": ENVIRONMENT, "history": history, "result": result}
    write_json(tmp_path, "vae_z20", run)
    other = [{**row, "val_elbo": row["val_elbo"] - 1} for row in history]
    write_json(tmp_path, "vae_z20_seed1", {**run, "history": other, "result": {**result, "test_nll": 2.25}})
    write_json(tmp_path, "vae_z20_seed2", {**run, "history": other, "result": {**result, "test_nll": 2.5}})
    best = {**result, "test_nll": 1.75, "importance_samples": 5000, "test_nll_se": 0.21}
    for name in ("vae_best", "vae_best_seed1", "vae_best_seed2"):
        write_json(tmp_path, name, {**run, "config": {"z_dim": 32, "seed": 0}, "result": best})
    flat = {**run, "config": {"z_dim": 2, "seed": 0}, "result": {**result, "test_nll_quadrature": 1.5}}
    write_json(tmp_path, "vae_z2", {**flat, "history": [{**row, "val_elbo": -140.0} for row in history]})
    game = [{"epoch": e, "loss_d": 1.4 - e / 1000, "loss_g": 0.7, "d_real": 0.6, "d_fake": 0.4} for e in range(201)]
    settings = {"epochs": 10, "seed": 0, "betas": [0.0, 0.999], "lr": 5e-4}
    gan = {"config": {**settings, "growth": 4}, "environment": ENVIRONMENT, "history": game}
    gan["result"] = {**verdict, **costs, "unaveraged": verdict, "validation": verdict}
    gan["result"]["over_noise"] = [{**verdict, "fid": fid} for fid in (20.06, 19.0, 20.94)]
    gan["result"]["fresh_discriminator"] = {
        "loss": [1.386, 1.38, 1.3432], "own": 1.3821, "jsd_at_least": 0.0216, "jsd_se": 0.00051
    }  # fmt: skip
    of = {"samples": {"mean": 1088.4, "median": 1103.2}, "test_images": {"mean": 1072.0, "median": 1103.0}}
    gan["result"]["nearest"] = of
    write_json(tmp_path, "gan", {**gan, "config": {**gan["config"], "epochs": 200, "fresh_epochs": 2}})
    write_json(tmp_path, "trials/gan_assignment_200", {**gan, "config": {**settings, "epochs": 200}})
    older = {key: value for key, value in gan["result"].items() if key != "over_noise"}  # than this measurement
    write_json(tmp_path, "trials/gan_assignment_10", {**gan, "config": settings, "result": older})
    write_json(tmp_path, "trials/gan_betas", {**gan, "config": {**settings, "betas": [0.5, 0.9], "lr": 1e-3}})
    write_json(tmp_path, "trials/gan_grown", {**gan, "config": {**settings, "epochs": 20, "growth": 2}})
    bits = [{"epoch": e, "train_bpd": 2 - e / 10, "val_bpd": 2.1 - e / 10, "seconds": 7.0} for e in range(5)]
    for row in bits[1:]:
        row["gradient_norm"] = 100.0 / row["epoch"]
    bits[1] |= {"early_val_bpd": 1.84, "early_seconds": 9.0}
    flow = {"test_bpd": 1.0456, "test_bpd_iw": 1.0321, "importance_samples": 8, **verdict, **costs}
    for name in ("nf", "nf_best", "nf_uniform", "nf_affine"):
        write_json(tmp_path, name, {"config": {"seed": 0}, "environment": ENVIRONMENT, "history": bits, "result": flow})
    floor = {"fid": 1.5, "precision": 0.9, "recall": 0.8, "class_counts": [10.5, 9.5]}
    floor["draws"] = [{**floor, "fid": 1.0, "recall": 0.7}, {**floor, "fid": 2.0, "recall": 0.9}]
    write_json(tmp_path, "judge", {"result": {"test_accuracy": 0.99384, "floor": floor, "floor_validation": floor}})
    theory = {"q1_4": {"draws": 4000}, "environment": ENVIRONMENT, "seconds": {"q1_1": 40.4, "q1_4": 2.0}}
    write_json(tmp_path, "theory", theory)
    row = {"images_per_second": 20_000, "gflops": 100, "ceiling_gflops": 150, "percent_of_ceiling": 66.6}
    row |= {"products_gflops": 120, "products_percent_of_step": 80, "textbook_images_per_second": 9000}
    row |= {"times_textbook": 2.22}
    late = {
        "textbook": {"seconds": 600.4, "reached": -1.9, "passed": {"-1.82": None}},
        "script": {"passed": {"-1.82": 40.0}},
    }
    marks = {"-105.0": 80.0, "-101.7": 200.0}
    races = {"vae": {"textbook": {"passed": marks}, "script": {"passed": {"-105.0": 16.0, "-101.7": 20.0}}}, "nf": late}
    points = {"8": {"seconds": 3.0, "seconds_per_1000_images": 2.0, "memory_mib": 1234.5}}
    points["16"] = {**points["8"], "memory_mib": None}
    grows = {"width": {"vae": points}, "images": {"nf": points}}
    models = {"vae": row, "vae_best": {**row, "times_normal_prior": 1.234}}
    bench = {"models": models, "environment": ENVIRONMENT, "rounds": 7, "races": races, "growth": grows}
    speeds = (("nothing", 900, 890), ("a busy process", 300, 500), ("another training", 200, 400))
    bench["beside"] = {other: {"as OpenMP's default": a, "as the scripts": b} for other, a, b in speeds}
    write_json(tmp_path, "bench", bench)
    write_json(tmp_path, "gan_cuda", {**gan, "environment": {**ENVIRONMENT, "device": "G"}})
    return tmp_path


def test_numbers_follow_the_json(checkout):
    files = {str(path.relative_to(checkout)): text for path, text in collect.collect(checkout).items()}
    expected = {
        "code/vae.py": (
            "    python code/vae.py    # z of 20: test ELBO -1.00 nats, -log p(x) 2.25; 2000 s",
            "    python code/vae.py --z-dim 2    # z of 2: test ELBO -1.00 nats, -log p(x) 1.50; 2000 s",
            "    python code/vae.py --best    # z of 32: test ELBO -1.00 nats, -log p(x) 1.75; 2000 s",
            "    (seeds 0 to 2, means; times of seed 0; C_1 & D, 2 threads, torch T)",
        ),
        "code/gan.py": ("    python code/gan.py    # Frechet distance 20.1, precision 0.750, recall 0.625; 2000 s",),
        "code/nf.py": ("test 1.046 bits per dimension, 1.032 with 8 draws of the noise; 2000 s",),
        "report/numbers.tex": (
            r"num:vae_z20.history.last.val_elbo\endcsname{\ensuremath{-}99.00}",
            r"num:vae_z20.history.1.val_elbo\endcsname{\ensuremath{-}105.00}",
            r"num:judge.result.test_accuracy\endcsname{0.9938}",
            r"num:theory.q1_4.draws\endcsname{4{,}000}",
            r"num:gan.environment.cpu\endcsname{C\_1 \& D}",
            r"num:gan.result.train_seconds\endcsname{2{,}000}",
            r"num:vae_z20.seeds.test_nll\endcsname{2.25 (2.00 to 2.50)}",
            r"num:-vae_z20.history.1.val_elbo\endcsname{105.00}",
            r"num:-vae_z20.seeds.val_elbo\endcsname{99.67 (99.00 to 100.00)}",
            r"num:trials.gan_assignment_10.result.validation.fid\endcsname{20.1}",
            r"num:judge.floor.fid\endcsname{1.5 (1.0 to 2.0)}",
            r"num:gan.over_seeds_and_noise.fid\endcsname{20.0 (19.0 to 20.9)}",
        ),
        "README.md": (
            "| VAE, z of 20 | `code/vae.py` | 33.3 | 2.25 (2.00 to 2.50) nats | 20.1 (20.1 to 20.1) | 0.750 (0.750 to",
            "| VAE, flow prior | `code/vae.py --best` | 33.3 | 1.75 (1.75 to 1.75) nats | 20.1",
            "| VAE, z of 2 | `code/vae.py --z-dim 2` | 33.3 | 1.50 nats | 20.1 |",
            "| GAN | `code/gan.py` | 33.3 | has none | 20.1 |",
            "| flow | `code/nf.py` | 33.3 | 1.032 bits/dim | 20.1 |",
            "| flow, larger | `code/nf.py --best` | partly on a GPU | 1.032 bits/dim | 20.1 | 0.750 | 0.625 |  |",
            "| real images |  |  |  | 1.5 (1.0 to 2.0) | 0.900 (0.900 to 0.900) | 0.800 (0.700 to 0.900) |  |",
            "Real images: mean and range of 2 random draws of 10,000 training images.",
            "of one draw of noise per seed. Over 3 draws per seed it is 20.0 (19.0 to 20.9); smaller differences",
            "- In brackets the range over 3 seeds, after their mean; all else, with all times, is of seed 0.",
            "z of 20 by 500 importance samples, z of 2 by quadrature, the flow prior (z of 32) by 5,000 (standard "
            "errors over images, of z of 20 and the flow prior: 0.50, 0.21). "
            "Test ELBO -1.00 (-1.00 to -1.00), -1.00, -1.00 (-1.00 to -1.00).",
            "| flow, uniform noise | `code/nf.py --noise uniform --epochs 43` | about as many "
            "| 1.032 bits/dim | 20.1 |",
            "| flow, affine maps alone | `code/nf.py --components 0 --epochs 46` | about as many "
            "| 1.032 bits/dim | 20.1 |",
            "grey values, 8 draws of the noise; with one 1.046, the larger flow's 1.046.",
            "first solution, and when ours passed them: z of 20 -101.7 after 9 s, z of 2 -151.2 after 3 s, the flow "
            "1.82 after 28 s. Its",
            "| 10 | -99.0 | -140.0 |",
            "| 8 | 1.392 | 0.700 | 0.600 | 0.400 |",
            "| the last 50 | 1.200 to 1.249 | 0.700 to 0.700 | 0.600 to 0.600 | 0.400 to 0.400 |",
            "| 1/4 | - | 1.840 | - |\n| 1 | 1.900 | 2.000 | 100.0 |",
        ),
        "docs/evidence.md": (
            "2 computations took 42 s of processor time, the longest 40. Measured on C_1 & D, 2 threads, torch T.",
        ),
        "docs/gan.md": (
            "|  | real images | 1.5 (1.0 to 2.0) | 0.90 | 0.80 | 1.5 (1.0 to 2.0) |  |  |\n"
            "| 200 | none | 20.1 | 0.75 | 0.62 | 20.0 (19.0 to 20.9) | 0.60 | 0.40 |\n"
            "| 200 | `--growth 4` | 20.1 | 0.75 | 0.62 | 20.0 (19.0 to 20.9) | 0.60 | 0.40 |\n"
            "| 20 | `--growth 2` | 20.1 | 0.75 | 0.62 | 20.0 (19.0 to 20.9) | 0.60 | 0.40 |\n"
            "| 10 | none | 20.1 | 0.75 | 0.62 |  | 0.60 | 0.40 |\n"
            "| 10 | `--betas 0.5 0.9 --lr 0.001` | 20.1 |",
            "| its loss after epochs | 0 | 1 | 2 |\n| --- | --- | --- | --- |\n| this run | 1.386 | 1.380 | 1.343 |\n"
            "| the assignment's settings | 1.386 | 1.380 | 1.343 |\n\nSo the "
            "divergences are at least 0.022 (standard error 0.0005) and 0.022 (standard error 0.0005) nats, of log 2 = "
            "0.693 at most. On the same images the games' own discriminators have losses of 1.382 and 1.382.",
            "| samples | 1088 | 1103 |\n| test images | 1072 | 1103 |",
            "Measured on C_1 & D, 2 threads, torch T.",
        ),
        "docs/speed.md": (
            "| `vae` | 20,000 | 100 | 150 | 67 | 120 | 80 | 9,000 | 2.22 |",
            "make a step of `vae_best` 1.23 times as long.",
            "| `vae` | -105.0 nats | 80 s | 16 s | 5.0 |\n| `vae` | -101.7 nats | 200 s | 20 s | 10.0 |",
            "| `nf` | 1.82 bits | not in 600 s (then 1.90) | 40 s | - |",
            "| width | `vae` | 8, 16 | 2.000, 2.000 | 1,234, not measured |",
            "| a busy process | 300 | 500 | 600 |\n| another training | 200 | 400 | 450 |",
            "| `vae_z20` | 2000 s | not measured | - |",
            "| `gan` | 2000 s | 2000 s | Frechet distance 20.1, precision 0.750, recall 0.625 |",
            "| all | 10002 s | not measured | - |",
            "Measured on G, torch T.",
        ),
    }
    assert files.keys() == expected.keys()
    for path, texts in expected.items():
        for text in texts:
            assert text in files[path], text
        assert "old" not in files[path]
        assert not path.endswith(".md") or (files[path].startswith("a\n<!--") and files[path].endswith("-->\nb\n"))


def test_a_number_that_no_json_has_is_named(checkout):
    with open(checkout / "report" / "report.tex", "a") as report:
        report.write(r"\num{gan.result.bits}")
    with pytest.raises(UserError, match=r"gan\.result\.bits"):
        collect.collect(checkout)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("x.val_elbo", -90.126, "-90.13"),
        ("x.test_nll_se", 0.231, "0.23"),
        ("x.seconds", 161.4, "161"),
        ("x.parameters", 1234567, "1,234,567"),
        ("x.config.lr", 0.003, "0.003"),
        ("x.config.decay", 0.999, "0.999"),
        ("x.recall", 0.12345, "0.123"),
        ("x.milliseconds", 23.456, "23.5"),
        ("x.greatest_difference", 1.69e-12, "2e-12"),
        ("x.value", -0.00018707, "-1.87e-04"),
        ("x.fid", 2017.3, "2,017"),
    ],
)
def test_rounding(key, value, text):
    assert collect.rounded(key, value) == text


@pytest.mark.parametrize(("run", "key"), [("vae_z20", "test_nll"), ("gan", "over_noise"), ("vae_z20_seed1", "fid")])
def test_a_missing_key_is_named(checkout, run, key):
    path = checkout / "figures" / f"{run}.json"
    content = json.loads(path.read_text())
    del content["result"][key]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=key):
        collect.collect(checkout)


@pytest.mark.parametrize("run", ["judge", "gan", "nf", "bench"])
def test_a_missing_run_is_named(checkout, run):
    (checkout / "figures" / f"{run}.json").unlink()
    with pytest.raises(UserError, match=run):
        collect.collect(checkout)


def test_collecting_takes_no_arguments(capsys):
    assert collect.main(["--hlep"]) == 2
    assert "--help" in capsys.readouterr().err
