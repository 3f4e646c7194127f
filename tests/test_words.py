"""One language: names and first lines of docstrings are the field's, and make sense when read alone."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "p2pfl"
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
FEWEST_WORDS = 4
RIDDLES = re.compile(r"(What|Of|The same|Nothing|Who|Whose)\b")

REPLACED = {
    "Whole": "p2pfl.wire.update:FullUpdate",
    "Parcel": "p2pfl.wire.update:EncodedUpdate",
    "Arrived": "p2pfl.wire.update:ReceivedUpdate",
    "Share": "p2pfl.wire.messages:PushSum",
    "SharedSum": "p2pfl.protocol.push_sum:PushSumConversation",
    "Want": "p2pfl.wire.messages:ResendRequest",
    "Alive": "p2pfl.wire.messages:Heartbeat",
    "Decline": "p2pfl.wire.messages:Busy",
    "Posted": "p2pfl.protocol.transfers:SentUpdates",
    "Heard": "p2pfl.protocol.view:LatestRecord",
    "Event": "p2pfl.runs.events:EventKind",
    "Outlook": "p2pfl.protocol.network_view:NetworkViewAdapter",
    "Seen": "p2pfl.node.mixing:RoundStatistics",
    "Limits": "p2pfl.node.clock:Timeouts",
    "Surroundings": "p2pfl.paces.base:Pace",
    "Links": "p2pfl.topology.schedule:Neighbourhood",
    "Meetings": "p2pfl.algorithms.stopping:TimeVaryingBound",
    "Crossing": "p2pfl.simulator.sharding.halo:HaloPlan",
    "Mail": "p2pfl.simulator.sharding.halo:HaloExchange",
    "Columns": "p2pfl.simulator.sharding.halo:BlockedExchange",
    "Descent": "p2pfl.training.backends",
    "Sink": "p2pfl.training.backends",
    "Contradiction": "p2pfl.errors:ConflictError",
    "everybodys": "p2pfl.simulator.sharding.ranks:Ranks",
    "to_first": "p2pfl.simulator.sharding.ranks:Ranks",
    "from_first": "p2pfl.simulator.sharding.ranks:Ranks",
    "told_by_all": "p2pfl.simulator.sharding.ranks:Ranks",
    "links_of": "p2pfl.topology.schedule",
    "shared_sum": "p2pfl.protocol.push_sum",
    "shares": "p2pfl.tasks.partition",
    "share": "p2pfl.tasks.partition",
    "story": "p2pfl.runs.checkpoint",
    "mark": "p2pfl.wire.update",
    "marks": "p2pfl.wire.update",
    "parcel": "p2pfl.wire.update:EncodedUpdate",
    "parcels": "p2pfl.wire.update:EncodedUpdate",
    "taken_back": "p2pfl.protocol.edges",
    "owed": "p2pfl.protocol.edges",
    "meetings": "p2pfl.paces.pairwise",
    "outlook": "p2pfl.protocol.network_view",
    "greet": "p2pfl.wire.link",
    "greeting": "p2pfl.wire.link",
    "stranger": "p2pfl.wire.link",
    "agreed_for": "p2pfl.algorithms.stopping",
    "settle_rounds": "p2pfl.algorithms.stopping",
    "descend": "p2pfl.training",
    "caught_up": "p2pfl.algorithms:Algorithm",
    "try_out": "p2pfl.training:dry_run",
    "trial": "p2pfl.training.dry_run",
    "worth": "p2pfl.evaluation.gain_over_local",
    "unmet": "p2pfl.experiment.requirements",
}
"""Names that only this project used, and the module or the class that has the field's word for each."""


@cache
def tree_of(module: Path) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text(encoding="utf-8"))


def names_in(module: Path) -> set[str]:
    """Names of a module, its classes, functions and parameters, without a leading underscore."""
    found = {module.stem, *module.parts[:-1]}
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found |= {each.arg for each in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]}
    return {name.strip("_") for name in found}


def first_lines(module: Path) -> list[tuple[str, str, bool]]:
    """Name, first line and whether it must have `FEWEST_WORDS`, of every docstring and of every text under an attribute or a constant."""
    tree = tree_of(module)
    found = [(str(module), ast.get_docstring(tree), True)]
    found += [
        (f"{module}:{node.lineno} {node.name}", ast.get_docstring(node), not node.name.startswith("_"))
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    for before, after in (pair for node in ast.walk(tree) for pair in pairwise(ast.iter_child_nodes(node))):
        match before, after:
            case ast.Assign() | ast.AnnAssign(), ast.Expr(value=ast.Constant(value=str(text))):
                found.append((f"{module}:{after.lineno}", text.strip(), False))
    return [(name, said.splitlines()[0], public) for name, said, public in found if said]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_the_first_line_of_a_docstring_makes_sense_alone(module):
    lines = first_lines(module)

    assert [name for name, line, _ in lines if RIDDLES.match(line)] == []
    assert [(name, line) for name, line, public in lines if public and len(line.split()) < FEWEST_WORDS] == []


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_words_that_nobody_else_uses_are_gone(module):
    assert names_in(module) & set(REPLACED) == set()


@pytest.mark.parametrize("place", sorted(set(REPLACED.values())))
def test_the_words_in_their_place_are_there(place):
    module, _, name = place.partition(":")

    there = import_module(module)

    assert not name or hasattr(there, name)
