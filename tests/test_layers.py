"""The house's order: imports point down, sockets are in few rooms, nothing heavy comes with what is light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "p2pfl"
DEADLINE_S = 60

LAYERS = [
    {"errors", "printable"},
    {
        "departures",
        "draws",
        "moments",
        "names",
        "open_files",
        "params",
        "progress",
        "records",
        "status_client",
        "stopwatch",
        "text_files",
        "writing_process",
        "yaml_files",
    }
    | {"checkpoints", "topology"},
    {"algorithms", "tasks", "stopping"},
    {"training"},
    {"cross_site", "experiment", "plan", "subgroups", "summary", "results", "prediction", "worth"},
    {"card", "result_contract", "study", "wire", "transports"},
    {"node", "simulator", "inspector"},
    {"sweeps"},
    {"cli"},
    {"__main__", "__init__"},
]
"""Each may import what stands above it in this list, and its own layer."""

STRANGERS = {
    "wire": {"transports"},
    "transports": {"wire"},
    "node": {"simulator", "inspector"},
    "simulator": {"node", "inspector"},
    "inspector": {"node", "simulator"},
}
"""Of one layer, and yet they do not know each other."""

INPUT_AND_OUTPUT = {"asyncio", "socket", "zmq", "selectors"}
MAY_TALK = {"transports", "node", "cli", "inspector/dashboard"}
"""Rooms, or a part of one."""
BINARY_OBJECTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NOBODYS_NAMES = {"utils", "util", "common", "core", "helpers", "helper", "manager", "managers", "misc"}

MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def room_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def level_of(room: str) -> int:
    return next(level for level, rooms in enumerate(LAYERS) if room in rooms)


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
    assert {room_of(module) for module in MODULES} - set().union(*LAYERS) == set()
    assert len(MODULES) > 50


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_down(module):
    room = room_of(module)
    above = {other for other in rooms_imported(module) if level_of(other) > level_of(room)}

    assert above == set()
    assert rooms_imported(module) & STRANGERS.get(room, set()) == set()


def test_sockets_are_where_messages_are_moved_and_nowhere_else():
    talking = {str(module) for module in MODULES if {name.split(".")[0] for name in imports_of(module)} & INPUT_AND_OUTPUT}

    assert {module for module in talking if not {module.split("/")[0], str(Path(module).parent)} & MAY_TALK} == set()
    assert {"transports/zeromq.py", "inspector/dashboard/server.py"} <= talking


def test_what_decides_about_messages_knows_no_clock():
    clocks = {str(module) for module in MODULES if room_of(module) in {"wire", "algorithms"} and imports_of(module) & {"time", "datetime"}}

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
LIGHT = ["p2pfl", "p2pfl.topology", "p2pfl.records", *INSPECTOR]
WITHOUT_TORCH = [module for module in MODULES if room_of(module) in {"records", "topology", "inspector", "wire", "errors"}]


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
