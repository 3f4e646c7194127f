"""Graphs that gossip runs on: made by name or read from files, weighted, and what their spectrum predicts."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from p2pfl.errors import TopologyError
from p2pfl.topology.files import load
from p2pfl.topology.generators import SMALL_GRAPHS, TOPOLOGIES
from p2pfl.topology.graph import Topology, check_connected
from p2pfl.topology.spectrum import describe, diameter, diameter_bounds, lambda_2, lambda_min, laplacian_extremes, rounds_to, spectral_gap
from p2pfl.topology.weights import WEIGHTS, weighted

__all__ = [
    "SMALL_GRAPHS",
    "TOPOLOGIES",
    "WEIGHTS",
    "Topology",
    "check_connected",
    "describe",
    "diameter",
    "diameter_bounds",
    "known_names",
    "lambda_2",
    "lambda_min",
    "laplacian_extremes",
    "load",
    "make",
    "options_of",
    "rounds_to",
    "spectral_gap",
    "weighted",
]


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
        near = difflib.get_close_matches(name, TOPOLOGIES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise TopologyError(f"topology = {name!r}: {hint}one of {', '.join(TOPOLOGIES)}")
    if num_nodes is None and name not in SMALL_GRAPHS:
        raise TopologyError(f"topology {name}: needs a number of nodes")
    if num_nodes is not None and num_nodes < 2:  # noqa: PLR2004
        raise TopologyError(f"topology {name} of {num_nodes} nodes: a network needs at least 2")
    allowed = options_of(name)
    faults = [_wrong(name, key, value, allowed) for key, value in options.items()]
    if any(faults):
        raise TopologyError([fault for fault in faults if fault])
    return TOPOLOGIES[name](num_nodes, seed, **options)


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """The options that a generator takes besides number of nodes and seed."""
    parameters = inspect.signature(TOPOLOGIES[name]).parameters
    return {key: parameter for key, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}


def _wrong(name: str, key: str, value: object, allowed: dict[str, inspect.Parameter]) -> str | None:
    """What is wrong with an option, if anything."""
    if key not in allowed:
        return f"topology {name} has no option {key} = {value!r}: expected {', '.join(allowed) or 'none'}"
    annotation = str(allowed[key].annotation)  # a text: annotations are postponed
    if annotation.startswith("bool"):
        fits, expected = isinstance(value, bool), "true or false"
    elif annotation.startswith("int"):
        fits, expected = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    else:
        fits, expected = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    may_be_none = value is None and annotation.endswith("None")
    return None if fits or may_be_none else f"topology {name} with {key} = {value!r}: expected {expected}"
