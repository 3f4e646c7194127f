"""Graphs that gossip runs on: made by name or read from files, weighted, and what their spectrum predicts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from p2pfl.errors import TopologyError
from p2pfl.topology.files import load
from p2pfl.topology.generators import SMALL_GRAPHS, TOPOLOGIES
from p2pfl.topology.graph import Topology, check_connected
from p2pfl.topology.schedule import SCHEDULES, Schedule, describe_rounds, is_schedule, make_schedule, schedule_faults
from p2pfl.topology.spectrum import describe, diameter, diameter_bounds, lambda_2, lambda_min, laplacian_extremes, rounds_to, spectral_gap
from p2pfl.topology.weights import WEIGHTS, weighted
from p2pfl.yaml_files import shown, unknown_name

__all__ = [
    "SCHEDULES",
    "SMALL_GRAPHS",
    "TOPOLOGIES",
    "WEIGHTS",
    "Schedule",
    "Topology",
    "check_connected",
    "describe",
    "describe_rounds",
    "diameter",
    "diameter_bounds",
    "is_schedule",
    "known_names",
    "lambda_2",
    "lambda_min",
    "laplacian_extremes",
    "load",
    "make",
    "make_schedule",
    "option_faults",
    "options_of",
    "rounds_to",
    "schedule_faults",
    "spectral_gap",
    "weighted",
]

_MAX_NODES = 10**7


def known_names() -> list[str]:
    """Every name that `make` takes."""
    return list(TOPOLOGIES)


def make(name: str, num_nodes: int | None = None, seed: int = 0, **options: Any) -> Topology:
    """The graph of a name.

    Args:
        name: a key of TOPOLOGIES.
        num_nodes: at least 2; None only for a small graph that has its own number.
        seed: of a random graph; the others do not look at it.
        options: the generator's own, such as degree.

    Raises:
        TopologyError: there is no such graph, or none of that size or with those options.
    """
    if name not in TOPOLOGIES:
        raise TopologyError(unknown_name("topology", name, list(TOPOLOGIES)))
    if num_nodes is None and name not in SMALL_GRAPHS:
        raise TopologyError(f"topology {name}: needs a number of nodes")
    if num_nodes is not None and num_nodes < 2:  # noqa: PLR2004
        raise TopologyError(f"topology {name} of {num_nodes} nodes: a network needs at least 2")
    if num_nodes is not None and num_nodes > _MAX_NODES:
        raise TopologyError(f"topology {name} of {num_nodes} nodes: expected at most {_MAX_NODES}")
    if faults := option_faults(name, options):
        raise TopologyError(faults)
    return TOPOLOGIES[name](num_nodes, seed, **options)


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """The options that a generator takes besides number of nodes and seed."""
    parameters = inspect.signature(TOPOLOGIES[name]).parameters
    return {key: parameter for key, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}


def option_faults(name: str, options: Mapping[str, Any]) -> list[str]:
    """What is wrong with a known graph's options, the seed among them."""
    allowed = options_of(name)
    seed = inspect.signature(TOPOLOGIES[name]).parameters["seed"]
    faults = [_wrong(name, key, value, {"seed": seed} if key == "seed" else allowed) for key, value in options.items()]
    return [fault for fault in faults if fault]


def _wrong(name: str, key: str, value: object, allowed: dict[str, inspect.Parameter]) -> str | None:
    """What is wrong with an option, if anything."""
    if key not in allowed:
        return f"topology {name} has no option {key} = {shown(value)}: expected {', '.join(allowed) or 'none'}"
    annotation = str(allowed[key].annotation)  # a text: annotations are postponed
    if annotation.startswith("bool"):
        fits, expected = isinstance(value, bool), "true or false"
    elif annotation.startswith("int"):
        fits, expected = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    else:
        fits, expected = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    may_be_none = value is None and annotation.endswith("None")
    return None if fits or may_be_none else f"topology {name} with {key} = {shown(value)}: expected {expected}"
