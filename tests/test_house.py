"""The house: who imports whom, and how large a room may be. `python tests/test_house.py` prints the graph.

Arrows run one way: evaluate -> protocols -> methods -> common -> plumbing -> what is installed; train -> methods.
"""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("ebm_pretrain", "finola", "magma", "mixedae", "mlo_mae")
BELOW = {"plumbing": set(), "common": {"plumbing"}, "method": {"plumbing", "common"}}  # floor: the floors below it
BELOW |= {"train": {"plumbing", "common", "method"}, "protocols": {"plumbing", "common", "method"}}
BELOW |= {"evaluate": {"plumbing", "common", "method", "protocols"}}
BUDGETS = {"common.py": 700, "evaluate.py": 240, "train.py": 80, "README.md": 200}  # lines

PATHS = [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("protocols/*.py")]
TREES = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in sorted(PATHS)}


def floor(room):
    """Which part of the house a room is in."""
    top = room.split(".")[0]
    return "method" if top in METHODS else top


def imported(tree):
    """(module, name) of every import of a file, those within functions too; the name is "" for a whole module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "an import says where a thing lives"
            found |= {(node.module, alias.name) for alias in node.names}
    return {(f"{module}.{name}", "") if f"{module}.{name}" in TREES else (module, name) for module, name in found}


GRAPH = {room: sorted({module for module, _ in imported(tree)} & TREES.keys()) for room, tree in TREES.items()}


def defined(tree):
    """The names that a file defines itself, outside of functions and classes."""
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    others = [node for node in tree.body if getattr(node, "name", None) not in found]
    names = [node for other in others for node in ast.walk(other) if isinstance(node, ast.Name)]
    return found | {name.id for name in names if isinstance(name.ctx, ast.Store)}


def test_the_house_has_the_rooms_that_it_should():
    assert {room for room in TREES if "." not in room} == {"common", "train", "evaluate", *METHODS}


@pytest.mark.parametrize("room", TREES)
def test_arrows_run_one_way(room):
    """A room imports from the floors below; from its own floor where that is a folder: no method imports another."""
    allowed = BELOW[floor(room)] | ({floor(room)} & {"plumbing", "protocols"})
    assert {other for other in GRAPH[room] if floor(other) not in allowed} == set()


def test_there_is_no_circle():
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize("room", TREES)
def test_a_name_is_imported_from_where_it_is_defined(room):
    """But for `from common import load_data`. A name reached through its module, `room.name`, is one of its own too."""
    names = {(module, name) for module, name in imported(TREES[room]) if name and module in TREES}
    modules = {module for module, name in imported(TREES[room]) if not name} & TREES.keys()
    for node in ast.walk(TREES[room]):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            names.add((ast.unparse(node.value), node.attr))
    foreign = {(module, name) for module, name in names if name not in defined(TREES[module]) and name != "__doc__"}
    assert foreign <= {("common", "load_data")}


@pytest.mark.parametrize("file", BUDGETS)
def test_what_everybody_reads_stays_small(file):
    assert len((ROOT / file).read_text().splitlines()) <= BUDGETS[file]


def test_no_test_imports_another():
    for path in (ROOT / "tests").glob("*.py"):
        modules = {module for module, _ in imported(ast.parse(path.read_text()))}
        assert not {module for module in modules if module.startswith("test_")}, path.name


# --- the graph, to be looked at --------------------------------------------------------------------------------------


def outside(room):
    """What a room needs that must be installed."""
    packages = {module.split(".")[0] for module, _ in imported(TREES[room])}
    return sorted(packages - {other.split(".")[0] for other in TREES} - sys.stdlib_module_names)


def main():
    for room in graphlib.TopologicalSorter(GRAPH).static_order():
        lines = len((ROOT / f"{room.replace('.', '/')}.py").read_text().splitlines())
        below = {}
        for other in GRAPH[room]:
            folder, _, name = other.rpartition(".")
            below.setdefault(folder, []).append(name)
        shown = [f"{folder}: {' '.join(names)}" if folder else " ".join(names) for folder, names in below.items()]
        shown += [f"outside: {' '.join(outside(room))}"] if outside(room) else []
        print(f"{room:<26}{lines:>4} lines  <- {'; '.join(shown) or '-'}")


if __name__ == "__main__":
    main()
