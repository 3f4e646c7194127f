"""The house's order: imports point down, sockets are in few rooms, nothing heavy comes with what is light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "p2pfl"
DEADLINE_S = 60

ROWS = [
    {"errors"},
    {"params", "draws", "yaml_files"},
    {"topology", "statistics"},
    {"runs", "governance", "algorithms", "paces", "privacy", "compiled"},
    {"data"},
    {"tasks", "analyses"},
    {"training"},
    {"experiment"},
    {"evaluation", "wire", "transports", "faults"},
    {"protocol"},
    {"node", "simulator", "inspector"},
    {"launcher"},
    {"testing", "sweeps"},
    {"cli"},
    {"__main__", "__init__"},
]
"""Rooms of p2pfl, from the lowest: a room may import those of the rows above its own in this list, and none of its own row."""

INPUT_AND_OUTPUT = {"asyncio", "socket", "zmq", "selectors"}
MAY_TALK = {"transports", "node", "launcher", "testing", "cli", "inspector/dashboard"}
"""Rooms, or a part of one."""
BINARY_OBJECTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NOBODYS_NAMES = {"utils", "util", "common", "core", "helpers", "helper", "manager", "managers", "misc"}

MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def room_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def row_of(room: str) -> int:
    return next(row for row, rooms in enumerate(ROWS) if room in rooms)


@cache
def imports_of(module: Path, source: str | None = None) -> set[str]:
    """Every module that is imported anywhere in a file, by its full name; also inside functions, and for types only."""
    package = ["p2pfl", *module.parent.parts]
    found = set()
    for node in ast.walk(ast.parse(source if source is not None else (PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # `from p2pfl import topology` imports a room, not a name
            found |= {f"{name}.{alias.name}" for alias in node.names} if name == "p2pfl" else {name}
    return found


def rooms_imported(module: Path) -> set[str]:
    return {name.split(".")[1] for name in imports_of(module) if name.startswith("p2pfl.")}


def test_an_import_is_seen_wherever_it_stands():
    source = """
import zmq.asyncio
from p2pfl import topology
def f():
    from .base import X
    from .. import errors
    import p2pfl.cli
"""
    found = imports_of(Path("tasks/tables.py"), source)

    assert found == {"zmq.asyncio", "p2pfl.topology", "p2pfl.tasks.base", "p2pfl.errors", "p2pfl.cli"}


def test_every_room_has_its_place():
    assert {room_of(module) for module in MODULES} - set().union(*ROWS) == set()
    assert len(MODULES) > 50


def test_only_what_everything_stands_on_lies_outside_rooms():
    loose = {path.stem for path in PACKAGE.glob("*.py")}

    assert loose == {"errors", "params", "draws", "yaml_files", "__init__", "__main__"}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_down_and_never_sideways(module):
    room = room_of(module)

    assert {other for other in rooms_imported(module) if other != room and row_of(other) >= row_of(room)} == set()


def test_sockets_are_where_messages_are_moved_and_nowhere_else():
    talking = {str(module) for module in MODULES if {name.split(".")[0] for name in imports_of(module)} & INPUT_AND_OUTPUT}

    assert {module for module in talking if not {module.split("/")[0], str(Path(module).parent)} & MAY_TALK} == set()
    assert {"transports/zeromq.py", "inspector/dashboard/server.py"} <= talking


def test_what_decides_about_messages_knows_no_clock():
    clocks = {
        str(module)
        for module in MODULES
        if room_of(module) in {"wire", "protocol", "paces", "algorithms"} and imports_of(module) & {"time", "datetime"}
    }

    assert clocks == set()


def test_nothing_is_ever_unpickled():
    """Neither by its own name nor through torch.load, numpy's allow_pickle or a spawned process's queue."""
    importing = {str(module) for module in MODULES if {name.split(".")[0] for name in imports_of(module)} & BINARY_OBJECTS}
    hidden = re.compile(r"torch\.load|torch\.save\b|allow_pickle|read_pickle|to_pickle|multiprocessing")
    calling = {str(module) for module in MODULES if hidden.search((PACKAGE / module).read_text(encoding="utf-8"))}

    assert importing | calling == set()


def test_no_room_is_called_nothing():
    names = {part.removesuffix(".py") for module in MODULES for part in module.parts}

    assert names & NOBODYS_NAMES == set()
    assert not (PACKAGE / "inspect").exists()  # a folder of that name would shadow the standard library's


INSPECTOR = [f"p2pfl.inspector.{path.stem}" for path in sorted((PACKAGE / "inspector").glob("[a-z]*.py"))]
LIGHT = ["p2pfl", "p2pfl.topology", "p2pfl.runs.records", *INSPECTOR]
WITHOUT_TORCH = [
    module
    for module in MODULES
    if room_of(module) in {"errors", "topology", "statistics", "governance", "inspector", "wire"}
    or (room_of(module) == "runs" and module.stem != "checkpoint")
]


def test_what_reads_records_and_graphs_does_without_torch():
    code = f"""
import importlib, sys
for name in {LIGHT!r}:
    importlib.import_module(name)
    assert 'torch' not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=DEADLINE_S)

    assert len(LIGHT) >= 6
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", WITHOUT_TORCH, ids=str)
def test_rooms_that_do_without_torch_never_name_it(module):
    assert "torch" not in {name.split(".")[0] for name in imports_of(module)}
