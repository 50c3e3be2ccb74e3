"""The report and README say what the JSON says, and the code cites equations that exist."""

import json
import re

import pytest

import collect
from conftest import ROOT
from experiment import UserError


def test_generated_files_are_up_to_date():
    for path, text in collect.collect(ROOT).items():
        assert path.read_text() == text, f"run report/collect.py: {path.name} is not what figures/*.json say"


def test_every_cited_equation_has_a_label():
    labels = set(re.findall(r"\\label\{([^}]*)\}", (ROOT / "report/report.tex").read_text()))
    for path in sorted((ROOT / "code").glob("*.py")):
        cited = set(re.findall(r"\beq:[\w-]+", path.read_text()))
        assert cited <= labels, f"{path.name} cites {cited - labels}"


def test_every_number_the_report_uses_is_defined():
    used = set(re.findall(r"\\num\{([^}]*)\}", (ROOT / "report/report.tex").read_text()))
    defined = set(re.findall(r"csname num:(.*?)\\endcsname\{", (ROOT / "report/numbers.tex").read_text()))
    assert used and used <= defined | {"run.key"}, used - defined


def prose() -> str:
    """The report's text without macros' arguments, LaTeX's own numbers and comments."""
    text = (ROOT / "report/report.tex").read_text().partition(r"\begin{document}")[2]
    text = re.sub(r"(?m)(?<!\\)%.*$", "", text)
    text = re.sub(r"\\(num|code|checked|label|ref|eqref|includegraphics|cite\w*)(\[[^]]*\])?\{[^}]*\}", "", text)
    return re.sub(
        r"\\(begin|end)\{(minipage|tabular)\}(\[\w\])?\{?[^}\n]*\}?|\d*\.?\d+(ex|em|pt|\\(textwidth|height))", "", text
    )


# Decimals that are no measurement: settings of an example or of a trial, the question's bar, others' published figures.
SET = {
    "0.5", "0.6", "0.36", "0.9", "0.1", "0.99", "0.999", "0.001", "0.00025", "0.02", "0.2", "0.05", "0.01", "127.5",
    "543.4", "1.85", "86.76", "1.06", "1.05", "0.97",
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


def test_readme_backs_every_question_with_functions_and_tests_that_exist():
    readme, report = (ROOT / "README.md").read_text(), (ROOT / "report/report.tex").read_text()
    rows = re.findall(r"(?m)^\| (\d\.\d+) \|[^|]*\|(.*)\|(.*)\|$", readme)
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
    return name in {"VAE", "Flow", "log_prob", "sample"} or name.startswith("q")


def test_nothing_is_left_to_do():
    for path in ("report/report.tex", "README.md", "docs/speed.md"):
        found = re.search(r"TODO|FIXME|XXX|[A-Z]{4,}_[A-Z]+|\bINFORMATION\b", (ROOT / path).read_text())
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
    """A small checkout with two seeds of one run, the judge, a bench and an answer."""
    for folder in ("figures", "code", "docs"):
        (tmp_path / folder).mkdir()
    marked = {
        "README.md": ("results", "bits", "judged", "healthy", "game", "chosen", "flow", "theory", "gpu"),
        "docs/speed.md": ("ceiling", "ladder", "tried", "growth"),
    }
    for path, markers in marked.items():
        text = "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in markers)
        (tmp_path / path).write_text(f"a\n{text}b\n")
    for script in ("vae", "gan", "nf"):
        (tmp_path / "code" / f"{script}.py").write_text(f'"""\n    python code/{script}.py    # old\n"""\n')
    bounds = (-543.21, -105.0, -100.126, *[-99.0] * 38)
    history = [{"epoch": e, "val_elbo": bound, "seconds": 3.0} for e, bound in enumerate(bounds)]
    result = {"test_elbo": -1, "test_nll": 2, "test_nll_se": 0.5, "importance_samples": 500, "train_seconds": 1234.5}
    result |= {"fid": 12.34, "precision": 0.5, "recall": 0.25, "class_counts": [5, 15]}
    run = {"config": {"z_dim": 20}, "environment": ENVIRONMENT, "history": history, "result": result}
    write_json(tmp_path, "vae_z20", run)
    write_json(tmp_path, "vae_z20_seed1", {**run, "result": {**result, "test_nll": 2.25}})
    game = [{"epoch": e, "loss_d": 1.4 - e / 1000, "loss_g": 0.7, "d_real": 0.6, "d_fake": 0.4} for e in range(201)]
    verdict = {"fid": 20.06, "precision": 0.75, "recall": 0.625, "class_counts": [8, 12]}
    costs = {"train_seconds": 2000.4, "seconds_per_1000_samples": 0.0204}
    gan = {"environment": ENVIRONMENT, "history": game, "result": {**verdict, **costs, "unaveraged": verdict}}
    write_json(tmp_path, "gan", gan)
    bits = [{"epoch": e, "train_bpd": 2 - e / 10, "val_bpd": 2.1 - e / 10, "seconds": 7.0} for e in range(5)]
    for row in bits[1:]:
        row["gradient_norm"] = 100.0 / row["epoch"]
    bits[1] |= {"early_val_bpd": 1.84, "early_seconds": 9.0}
    flow = {"test_bpd": 1.0456, "test_bpd_iw": 1.0321, "importance_samples": 8, "parameters": 1234, **verdict, **costs}
    for run in ("nf", "nf_affine"):
        write_json(tmp_path, run, {"environment": ENVIRONMENT, "history": bits, "result": flow})
    trial = {"changed": "nothing", "d_real": 0.55, "d_fake": 0.45, "unaveraged": verdict, **verdict}
    write_json(tmp_path, "trials", {"gan": {"as_it_is": trial}})
    floor = {"fid": 1.5, "precision": 0.9, "recall": 0.8, "class_counts": [10, 10]}
    write_json(tmp_path, "judge", {"result": {"test_accuracy": 0.99384, "floor": floor}})
    gaps = {"gap_median": 0.011, "gap_percentile_90": 4.5, "gap_percentile_99": 43.0}
    answer = {"images": 500, "draws": 4000, "nll_from_q_and_prior": 130.1, "nll_quadrature": 130.2, **gaps}
    seconds = {"q1_1": 40.4, "q1_4": 2.0}
    write_json(tmp_path, "theory", {"q1_4": answer, "environment": ENVIRONMENT, "seconds": seconds})
    rates = {"images_per_second": 20_000, "gflops": 100, "ceiling_gflops": 150, "percent_of_ceiling": 66.6}
    row = {**rates, "products_gflops": 120, "parameters": 7, "calls_per_step": 1234}
    row |= {"evaluation_percent_of_epoch": 9, "compile_seconds": 21}
    row |= {"percent_of_step": {"products": 80, "data_and_noise": 5, "optimizer": 5, "elementwise_and_rest": 10}}
    row |= {"ladder_images_per_second": {"textbook loop": 10_000, "the script's step": 20_000}}
    row |= {"tried_images_per_second": {"the objective compiled": 22_000, "twice the batch size": 21_000}}
    points = {"8": {"seconds": 3.0, "images": 1500, "seconds_per_1000_images": 2.0, "memory_mib": 1234.5}}
    points["16"] = {**points["8"], "memory_mib": None}
    grows = {"width": {"vae": points}, "images": {"nf": points}}
    bench = {"models": {"vae_z20": row}, "environment": ENVIRONMENT, "rounds": 7, "growth": grows}
    write_json(tmp_path, "bench", bench)
    write_json(tmp_path, "gan_cuda", {**gan, "environment": {**ENVIRONMENT, "device": "G"}})
    return tmp_path


def test_numbers_follow_the_json(checkout):
    files = {path.name: text for path, text in collect.collect(checkout).items()}
    assert "    python code/vae.py    # z of 20: test ELBO -1.00 nats" in files["vae.py"]
    assert "    python code/gan.py    # Frechet distance 20.1, precision 0.750, recall 0.625; 2000 s" in files["gan.py"]
    assert "test 1.046 bits per dimension, 1.032 with 8 draws of the noise; 2000 s" in files["nf.py"]
    for expected in (
        r"num:vae_z20.history.last.val_elbo\endcsname{\ensuremath{-}99.00}",
        r"num:vae_z20.history.1.val_elbo\endcsname{\ensuremath{-}105.00}",
        r"num:judge.result.test_accuracy\endcsname{0.9938}",
        r"num:theory.q1_4.nll_from_q_and_prior\endcsname{130.10}",
        r"num:theory.q1_4.draws\endcsname{4{,}000}",
        r"num:gan.environment.cpu\endcsname{C\_1 \& D}",
        r"num:gan.result.train_seconds\endcsname{2{,}000}",
    ):
        assert expected in files["numbers.tex"]
    for expected in (
        "| `vae_z20` | -99.00 | -1.00 | 2.00 ± 0.50 | - | 1234 s | -101.7 |",
        "`vae_z20` with 2 seeds: validation ELBO -99.00, -99.00; test -log p(x) 2.00, 2.25.",
        "passed the original's -101.7 (static) after 9 s",
        "500 test images, with 4,000 samples of q, by 0.01, 4.50, 43.00 nats",
        "the two agree: 130.10 and 130.20",
        "| real training images: the floor | 1.5 | 0.900 | 0.800 | 50.0% and 50.0% | - | - |",
        "| `vae_z20` | 12.3 | 0.500 | 0.250 | 25.0% and 75.0% | 1234 s | - |",
        "| `gan` | 20.1 | 0.750 | 0.625 | 40.0% and 60.0% | 2000 s | 0.020 s |",
        "| `gan`, weights not averaged | 20.1 | 0.750 | 0.625 | 40.0% and 60.0% | - | - |",
        "| 100 | 1.300 | 0.700 | 0.600 | 0.400 |",
        "| the last 50 | 1.200 to 1.249 | 0.700 to 0.700 | 0.600 to 0.600 | 0.400 to 0.400 |",
        "| nothing | 20 | 0.75 | 0.62 | 20 | 0.55 | 0.45 |",
        "| 10 | -99.0 |",
        "| `nf` | 1.700 | 1.046 | 1.032 | 4 | 33 minutes | 1,234 |",
        "bar of 1.85 after 9 s, and below the original's end, 1.82 after 40 epochs, after 28 s.",
        "| `nf` | 20.1 | 0.750 | 0.625 | 40.0% and 60.0% | 2000 s | 0.020 s |",
        "| 1/4 | - | 1.840 | - |\n| 1 | 1.900 | 2.000 | 100.0 |\n| 2 to 4 |  |  | at most 50.0 |",
        "The 2 computations took 42 s, the longest 40 s. Measured on C_1 & D, 2 threads, torch T.",
        "| `vae_z20` | 1234 s | not measured | - |",
        "| `gan` | 2000 s | 2000 s | Frechet distance 20.1, precision 0.750, recall 0.625 |",
        "| all four | not measured | not measured | - |",
        "Measured on G, torch T.",
    ):
        assert expected in files["README.md"]
    for expected in (
        "| `vae_z20` | 20,000 | 100 | 150 | 67 | 120 | 7 | 1,234 |",
        "| `vae_z20` | 80% | 5% | 5% | 10% | 9% |",
        "| `vae_z20` | the script's step | 20,000 | 2.00 |",
        "| `vae_z20` | the objective compiled (after 21 s of compiling) | 1.10 |",
        "| width | `vae` | 8, 16 | 2.000, 2.000 | 1,234, not measured |",
        "torch T. On a GPU: not measured.",
    ):
        assert expected in files["speed.md"]
    for name in ("README.md", "speed.md"):
        assert files[name].startswith("a\n<!--") and files[name].endswith("-->\nb\n")
        assert "\nold\n" not in files[name]


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
    ],
)
def test_rounding(key, value, text):
    assert collect.rounded(key, value) == text


def test_a_missing_key_is_named(checkout):
    path = checkout / "figures" / "vae_z20.json"
    content = json.loads(path.read_text())
    del content["result"]["test_nll"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="test_nll"):
        collect.collect(checkout)
