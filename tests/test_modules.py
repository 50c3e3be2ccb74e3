"""The rules that hold for the code as a whole: what imports what, and that nothing reaches into another module."""

import ast
import importlib
import re

import pytest

from conftest import ROOT, RUNS

FLOORS = (  # from the bottom to the top; a module imports from lower floors only
    {"cli"}, {"training"}, {"experiment"}, {"mnist", "pictures"}, {"judge"}, set(RUNS),
    {"bench", "explorer", "theory", "collect"},
)  # fmt: skip
FLOOR = {module: number for number, floor in enumerate(FLOORS) for module in floor}
SOURCES = {path.stem: path.read_text() for folder in ("code", "report") for path in (ROOT / folder).glob("*.py")}


def imports(tree: ast.AST) -> dict[str, str]:
    """Names that are bound, anywhere, to a module of ours or to something in one, with that module."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {each.asname or each.name: each.name for each in node.names}
        if isinstance(node, ast.ImportFrom):
            bound |= {each.asname or each.name: node.module for each in node.names}
    return {name: module for name, module in bound.items() if module in SOURCES}


def intrusions(source: str) -> list[str]:
    """What changes an attribute or an item of something imported from a module of ours, and what could patch one."""
    tree = ast.parse(source)
    ours, found = imports(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            root = node
            while isinstance(root, ast.Attribute | ast.Subscript):
                root = root.value
            if isinstance(root, ast.Name) and root.id in ours:
                found.append(ast.unparse(node))
    patching = re.compile(r"\b(setattr|delattr|globals|mock|pytest|__dict__|__setattr__|__defaults__)\b")
    return found + patching.findall(ast.unparse(tree))


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_imports_from_lower_floors_only(name):
    upward = {each for each in imports(ast.parse(SOURCES[name])).values() if FLOOR[each] >= FLOOR[name]}
    assert not upward, f"{name} imports {upward}"


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_changes_another_module(name):
    assert not intrusions(SOURCES[name])


@pytest.mark.parametrize(
    "change",
    [
        "gan.BETAS = 1", "gan.GAN.x += 1", "a, gan.x = 1, 2", "del gan.x", "gan.TABLE['x'] = 1", "setattr(gan, 'x', 1)",
        "GAN.slope = 2", "def f():\n    for gan.x in y: ...", "from unittest import mock", "gan.__dict__.update(x=1)",
    ],
)  # fmt: skip
def test_such_changes_are_found(change):
    assert not intrusions("import gan\nfrom gan import GAN\nmodel = GAN()\nmodel.x = gan.y")
    assert intrusions(f"import gan\nfrom gan import GAN\n{change}")


def test_no_script_is_missing():
    """Every script that trains a model, which is one that asks for the common flags, is run by the tests."""
    assert {name for name, source in SOURCES.items() if "cli.add_flags(" in source} == set(RUNS)


@pytest.mark.parametrize("script", RUNS)
def test_every_flag_is_read(script):
    """A flag that the parser knows is used somewhere as args.<flag>, or by `build`."""
    tree = ast.parse(SOURCES[script] + SOURCES["experiment"])
    (build,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "build")
    read = {node.value for node in ast.walk(build) if isinstance(node, ast.Constant)} | {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args", "run.args")
    }
    assert set(vars(importlib.import_module(script).flags().parse_args([]))) <= read
