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


@pytest.fixture
def checkout(tmp_path):
    """A small checkout with one run."""
    (tmp_path / "figures").mkdir()
    (tmp_path / "README.md").write_text(
        "a\n<!-- results -->\nold\n<!-- /results -->\n"
        "<!-- judged -->\n<!-- /judged -->\n<!-- healthy -->\n<!-- /healthy -->\nb\n"
    )
    history = [
        {"epoch": e, "val_elbo": v, "seconds": 3.0} for e, v in enumerate((-543.21, -105, -100.126, *[-99.0] * 38))
    ]
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "vae.py").write_text('"""\n    python code/vae.py    # old\n"""\n')
    result = {"test_elbo": -1, "test_nll": 2, "test_nll_se": 0.5, "importance_samples": 500, "train_seconds": 1234.5}
    result |= {"fid": 12.34, "precision": 0.5, "recall": 0.25, "class_counts": [5, 15]}
    content = {
        "history": history,
        "result": result,
        "config": {"z_dim": 20},
        "environment": {"cpu": "C", "threads": 2, "torch": "T"},
    }
    (tmp_path / "figures" / "vae_z20.json").write_text(json.dumps(content))
    return tmp_path


def test_numbers_follow_the_json(checkout):
    files = {path.name: text for path, text in collect.collect(checkout).items()}
    assert r"num:vae_z20.history.last.val_elbo\endcsname{\ensuremath{-}99.00}" in files["numbers.tex"]
    assert "| `vae_z20` | -99.00 | -1.00 | 2.00 ± 0.50 | - | 1234 s | -101.7 |" in files["README.md"] and files[
        "README.md"
    ].startswith("a\n<!-- results -->\n|")
    assert "    python code/vae.py    # z of 20: test ELBO -1.00 nats" in files["vae.py"]
    assert "| `vae_z20` | 12.3 | 0.500 | 0.250 | 25.0% and 75.0% |" in files["README.md"]
    assert "| 10 | -99.0 |" in files["README.md"]
    assert "passed the original's -101.7 after 9 s" in files["README.md"]
    assert files["README.md"].endswith("<!-- /healthy -->\nb\n") and "old" not in files["README.md"]


def test_a_missing_key_is_named(checkout):
    path = checkout / "figures" / "vae_z20.json"
    content = json.loads(path.read_text())
    del content["result"]["test_nll"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="test_nll"):
        collect.collect(checkout)
