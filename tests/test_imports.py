"""Claims about how the files depend on each other.

python -m pytest -q tests/test_imports.py
"""

import ast
import subprocess
from graphlib import CycleError, TopologicalSorter

import pytest

from helpers import ROOT

FOLDERS = ("apo", "miniature", "tools", "study")
FILES = {  # every module that is no test, by the name that imports it
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [*ROOT.glob("*.py"), *(p for f in FOLDERS for p in ROOT.glob(f"{f}/*.py"))]
    if not path.name.startswith("test_") and path.name != "__init__.py"
}
CORE = [name for name in FILES if "." not in name]


def imported(nodes) -> set[str]:
    """The modules of this repository that import statements name."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & {*FILES}


def tree(name):
    return ast.parse(FILES[name].read_text())


def at_module_level(node):
    """All statements that run when a module is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_module_level(child)


def test_no_import_leads_back_to_where_it_came_from():
    """Imports inside functions count as well."""
    graph = {name: imported(ast.walk(tree(name))) for name in FILES}
    assert graph["train_ganpo"] >= {"losses", "packing", "miniature.world"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_the_core_imports_the_miniature_only_where_it_is_used_and_nothing_that_is_beside_it():
    for name in CORE:
        assert not any("." in other for other in imported(at_module_level(tree(name)))), name
        anywhere = {other for other in imported(ast.walk(tree(name))) if "." in other}
        assert anywhere <= {"miniature.world", "tools.ifeval"}, name


def test_evaluation_knows_no_trainer():
    names = "eval_alpaca reward_model winrate generate checkpoint tools.plots".split()
    for name in names:
        assert "train_ganpo" not in imported(ast.walk(tree(name))), name


def test_every_program_imports_cpu_before_anything_that_may_import_torch():
    programs = [name for name, path in FILES.items() if "if __name__ ==" in path.read_text()]
    assert {"train_ganpo", "eval_alpaca", "apo.train_apo", "tools.bench"} <= {*programs}
    for name in programs:
        if name == "tools.ifeval":  # which runs where there is no torch
            continue
        imports = [n for n in tree(name).body if isinstance(n, ast.Import | ast.ImportFrom)]
        assert isinstance(imports[0], ast.Import), name
        assert [alias.name for alias in imports[0].names] == ["cpu"], name


def test_the_root_is_small():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git repository")
    root = [name for name in listed.stdout.splitlines() if "/" not in name]
    assert len(root) <= 28 and sum(name.endswith(".py") for name in root) <= 21
