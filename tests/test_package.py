"""What importing and installing the package costs."""

import json
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import p2pfl

DISTRIBUTION = "p2pfl-mesh"
HEAVY = ["torch", "numpy", "scipy", "sklearn", "pydantic", "networkx", "zmq", "cryptography", "yaml", "rich"]
MOST_PACKAGES = 26
DEADLINE_S = 60
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def loaded_after(code):
    """Those of HEAVY that a fresh interpreter has imported when the code has run."""
    report = f"\nimport json, sys; sys.stderr.write(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True, timeout=DEADLINE_S)
    return json.loads(done.stderr)


def required_by(name, extras=frozenset()):
    """All that pip brings along with a distribution, itself left out."""
    seen, todo = set(), [(canonicalize_name(name), frozenset(extras))]
    while todo:
        found = todo.pop()
        if found in seen:
            continue
        seen.add(found)
        for text in requires(found[0]) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in found[1] or {""}):
                todo.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    return {each for each, _ in seen} - {canonicalize_name(name)}


def test_importing_the_package_imports_nothing_heavy():
    assert loaded_after("import p2pfl") == []


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], []),
        # typer itself looks at pydantic before it reads a command's options
        (["up", "--help"], ["pydantic"]),
        (["node", "start", "--help"], ["pydantic"]),
        (["topology", "show", "--help"], ["pydantic"]),
    ],
)
def test_help_imports_nothing_heavy(arguments, allowed):
    # what this buys in milliseconds: benchmarks/startup.py
    code = f"""
import sys
from p2pfl.cli import main
sys.argv = ["p2pfl", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code
"""

    assert set(loaded_after(code)) <= set(allowed)


@pytest.mark.parametrize(
    "code", ["import p2pfl.topology", "import p2pfl.runs.records", "import p2pfl.inspector.terminal, p2pfl.inspector.convergence"]
)
def test_graphs_and_records_do_without_torch(code):
    assert "torch" not in loaded_after(code)


def test_every_public_name_is_there_on_first_use():
    for name in p2pfl.__all__:
        assert getattr(p2pfl, name) is not None
    assert dir(p2pfl) == sorted(p2pfl.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'simulat'"):
        _ = p2pfl.simulat


def test_the_version_is_that_of_the_distribution():
    assert p2pfl.__version__ == version(DISTRIBUTION)


def test_few_packages_are_needed_beside_what_torch_brings():
    beside_torch = required_by(DISTRIBUTION) - required_by("torch") - {"torch"}

    assert len(beside_torch) <= MOST_PACKAGES, sorted(beside_torch)
    assert {"numpy", "pyzmq", "pydantic"} <= beside_torch


def test_constraints_pin_all_that_is_installed_for_the_tests():
    pinned = {canonicalize_name(line.partition("==")[0]) for line in CONSTRAINTS.read_text().splitlines() if "==" in line}

    assert required_by(DISTRIBUTION, {"dev"}) - required_by("torch") <= pinned
    assert "torch" in pinned
