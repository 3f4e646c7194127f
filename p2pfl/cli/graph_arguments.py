"""Arguments of the commands on topologies: which graph a name, a file and options mean."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pfl.errors import ConfigError

if TYPE_CHECKING:
    from p2pfl.topology import Schedule, Topology

DEFAULT_NODES = 16
Nodes = Annotated[int | None, typer.Option("--nodes", "-n", help=f"Number of nodes of a generated graph.  [default: {DEFAULT_NODES}]")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of random graphs.")]
SOURCE_HELP = (
    "A name from `topology list`, with options after a colon (random-regular:degree=6), or a file (YAML, GraphML, GML, edge list, JSON)."
)


def graph_of(source: str, nodes: int | None, seed: int, *, strict: bool) -> Topology | Schedule:
    """The graph that a name, perhaps with options, or a file means, without its weights.

    Where it is *strict*, a file with its own number of nodes refuses another one.
    """
    from p2pfl.topology import SCHEDULES, SMALL_GRAPHS, TOPOLOGIES, has_base, load, make, make_schedule, schedule_faults
    from p2pfl.yaml_files import parse_yaml

    name, _, assignments = source.partition(":")
    if name not in TOPOLOGIES and name not in SCHEDULES and (Path(source).suffix or "/" in source):
        graph = load(source)
        if strict and nodes not in (None, graph.num_nodes):
            raise ConfigError(f"--nodes = {nodes}: {source} has its own {graph.num_nodes} nodes; leave the option out")
        return graph
    options = {}
    for assignment in filter(None, re.split(r",(?![^{\[]*[}\]])", assignments)):  # a comma inside brackets is the value's
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{source}: {assignment!r} is not an option; write them as {name}:degree=6,p=0.1")
        options[key.strip()] = parse_yaml(value, source)
    reserved = sorted(options.keys() & {"name", "num_nodes", "seed"})
    if reserved:
        raise ConfigError(f"{source}: {', '.join(reserved)} cannot stand after the colon; use --nodes and --seed")
    if name in SCHEDULES:
        if faults := schedule_faults(name, options):
            raise ConfigError(faults)
        if has_base(name):
            options["base"] = _base(options.get("base", "ring"), nodes, seed, strict=strict)
            return make_schedule(name, options["base"].num_nodes, seed=seed, **options)
        return make_schedule(name, nodes if nodes is not None else DEFAULT_NODES, seed=seed, **options)
    own_number = name in SMALL_GRAPHS and (nodes is None or not strict)
    return make(name, None if own_number else nodes if nodes is not None else DEFAULT_NODES, seed, **options)


def _base(value: Any, nodes: int | None, seed: int, *, strict: bool) -> Topology:
    """The graph whose links a schedule uses, from what stands after `base=`."""
    from p2pfl.topology import Topology, base_spec

    spec = base_spec(value)
    options = ",".join(f"{key}={json.dumps(option)}" for key, option in spec.items() if key not in ("name", "file"))
    source = spec.get("file") or f"{spec['name']}:{options}"
    found = graph_of(source, nodes, seed, strict=strict)
    assert isinstance(found, Topology)  # the options have been checked
    return found


def weighted_graph(graph: Topology, rule: str | None) -> tuple[Topology, str]:
    """Give a graph the weights that were asked for, and return their name too."""
    from p2pfl.topology import weighted

    of_directed = "given" if graph.weights is not None else "push-sum"
    chosen = rule or (of_directed if graph.directed else "metropolis")
    return weighted(graph, chosen), chosen


def short_source(source: str) -> str:
    """Shorten a source that is a file to its name without the folders."""
    return re.sub(r"[^\s:=]*/", "", source)


def megabytes(number: float) -> str:
    """Write a number of megabytes in few digits."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"  # noqa: PLR2004  # where no decimals would show one digit or none
