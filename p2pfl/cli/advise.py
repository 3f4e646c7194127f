"""``p2pfl topology advise``: which links to use, and which new one would help most."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pfl.cli.graph_arguments import Nodes, Seed, graph_of, megabytes, short_source
from p2pfl.cli.options import Json
from p2pfl.errors import ConfigError

if TYPE_CHECKING:
    from p2pfl.topology import Topology
    from p2pfl.topology.advice import Option

_ALMOST = 1.1


def advise(
    source: Annotated[str, typer.Argument(metavar="FILE|NAME", help="A graph whose links have latency_ms and bandwidth_mbps.")],
    *,
    parameters: Annotated[int, typer.Option(min=1, help="Number of the model's parameters, four bytes each.")] = 1_000_000,
    latency_ms: Annotated[float | None, typer.Option(min=0, help="Latency of links in ms, if the graph has none.")] = None,
    bandwidth_mbps: Annotated[float | None, typer.Option(min=1e-6, help="Bandwidth of links in Mbit/s, if the graph has none.")] = None,
    new_latency_ms: Annotated[float | None, typer.Option(min=0, help="A new link's latency in ms.  [default: median]")] = None,
    new_bandwidth_mbps: Annotated[float | None, typer.Option(min=1e-6, help="A new link's bandwidth in Mbit/s.  [default: median]")] = None,
    nodes: Nodes = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Advise which links to use, with what weights, and which to add. It compares the seconds until the nodes agree.

    A round lasts until the slowest link in use has delivered a model, after latency + size / bandwidth. Links do not slow each other.

    Example: p2pfl topology advise topologies/swiss-hospitals.yaml --parameters 1000000
    """
    import numpy as np

    from p2pfl.topology import Schedule
    from p2pfl.topology.advice import best_new_link, is_exhaustive, link_costs, message_seconds, options, recommended

    made = graph_of(source, nodes, seed, strict=True)
    if isinstance(made, Schedule):
        raise ConfigError(f"{source}: changes from round to round; advice is for the links that there are: give its base, or a file")
    graph = _with_speeds(made, latency_ms, bandwidth_mbps)
    links = link_costs(graph, 4 * parameters)
    found = options(links)
    best = recommended(found)
    assert graph.latency_ms is not None
    assert graph.bandwidth_mbps is not None
    new_ms = float(np.median(graph.latency_ms)) if new_latency_ms is None else new_latency_ms
    new_mbps = float(np.median(graph.bandwidth_mbps)) if new_bandwidth_mbps is None else new_bandwidth_mbps
    pair, then, tried = best_new_link(links, float(message_seconds(np.array(new_ms), np.array(new_mbps), links.size_bytes)))
    if then is not None and then.seconds >= best.seconds * (1 - 1e-9):
        pair = then = None
    said = [*_advice(source, graph, best, found), _new_link(graph, pair, then, new_ms, new_mbps, tried)]
    if as_json:
        row = None
        if pair is not None and then is not None:
            between = [graph.label(node) for node in pair]
            row = {"between": between, "latency_ms": new_ms, "bandwidth_mbps": new_mbps, **_as_row(_joined(graph, pair), then)}
        content = {
            "source": source,
            "parameters": parameters,
            "nodes": graph.num_nodes,
            "links": graph.num_edges,
            "every_choice": is_exhaustive(links),
            "recommended": _as_row(graph, best),
            "options": [_as_row(graph, option) for option in found],
            "new_link": row,
            "new_links_tried": tried,
            "advice": said,
        }
        typer.echo(json.dumps(content, indent=2))
        return
    _print_options(source, graph, found, parameters)
    for sentence in said:
        typer.echo(sentence)
    if not any(option.weights == "fdla" for option in found):
        typer.echo("The fastest weights were not tried: they need pip install 'p2pfl-mesh[optimal]' and at most 32 nodes.")


def _with_speeds(graph: Topology, latency_ms: float | None, bandwidth_mbps: float | None) -> Topology:
    """With what options say where the file says nothing."""
    import numpy as np

    for key, value in (("latency_ms", latency_ms), ("bandwidth_mbps", bandwidth_mbps)):
        if value is None:
            continue
        if getattr(graph, key) is not None:
            raise ConfigError(f"--{key.replace('_', '-')} = {value:g}: the links of {graph.name} have their own; leave the option out")
        everywhere: dict[str, Any] = {key: np.full(len(graph.senders), value)}
        graph = replace(graph, **everywhere)
    return graph


def _joined(graph: Topology, pair: tuple[int, int]) -> Topology:
    """With one link more."""
    import numpy as np

    from p2pfl.topology import Topology

    ends = np.append(graph.senders, pair[0]), np.append(graph.receivers, pair[1])
    return Topology.from_edges(graph.name, graph.num_nodes, *ends, names=graph.names)


def _left_out(graph: Topology, option: Option) -> list[list[str]]:
    """The links that an option does without, by name."""
    links = {(i, j) for i, j in zip(graph.receivers.tolist(), graph.senders.tolist(), strict=True) if i < j}
    return [[graph.label(i), graph.label(j)] for i, j in sorted(links - set(option.links))]


def _as_row(graph: Topology, option: Option) -> dict[str, Any]:
    return {
        "use": option.use,
        "weights": option.weights,
        "budget": option.budget,
        "links": len(option.links),
        "left_out": _left_out(graph, option),
        "round_s": option.round_s,
        "rounds": option.rounds,
        "seconds": option.seconds,
        "megabytes": option.bytes_sent / 1e6,
    }


def _advice(source: str, graph: Topology, best: Option, found: list[Option]) -> list[str]:
    """Advise in plain words how to use the links."""
    said = [f"{_way(source, graph, best)}: {_seconds(best.seconds)} until a millionth of the disagreement is left."]
    usual = next((o for o in found if o.use == "links" and o.weights == "metropolis" and len(o.links) == graph.num_edges), None)
    if usual is not None and usual is not best:
        said.append(f"All links in every round with weights: metropolis take {_seconds(usual.seconds)}.")
    frugal = min((o for o in found if o.seconds <= _ALMOST * best.seconds), key=lambda o: o.bytes_sent)
    if frugal.bytes_sent <= best.bytes_sent / 2:
        sent = f"{megabytes(frugal.bytes_sent / 1e6)} MB a node instead of {megabytes(best.bytes_sent / 1e6)}"
        said.append(f"Almost as fast, {_seconds(frugal.seconds)}, with {sent}: {_way(source, graph, frugal, first=False)}.")
    return said


def _way(source: str, graph: Topology, option: Option, *, first: bool = True) -> str:
    """How to use the links, as the experiment would say it."""
    out = _left_out(graph, option)
    which = f"the {len(option.links)} links without {_named(out)}" if out else f"all {len(option.links)} links"
    if option.use == "links":
        how = f"use {which} in every round, with weights: {option.weights}"
    elif option.use == "matchings":
        how = f"use {which} in turns, topology: {{name: matchings, base: {source}}}"
    else:
        how = f"use {which} at random, topology: {{name: matcha, base: {source}, budget: {option.budget:g}}}"
    return how[0].upper() + how[1:] if first else how


def _new_link(
    graph: Topology, pair: tuple[int, int] | None, best: Option | None, latency_ms: float, bandwidth_mbps: float, tried: int
) -> str:
    """Say which new link would help most; None for the pair and its best use: no one would."""
    speed = f"{latency_ms:g} ms, {bandwidth_mbps:g} Mbit/s"
    if pair is None or best is None:
        return f"No single new link of {speed} would shorten that ({tried} tried)." if tried else "There is no link to add."
    one, other = (graph.label(node) for node in pair)
    out = _left_out(_joined(graph, pair), best)
    how = {"links": f"weights: {best.weights}", "matchings": "links in turns"}[best.use]
    without = f", without {_named(out)}" if out else ""
    return f"Of {tried} new links, one between {one} and {other} ({speed}) would help most: {_seconds(best.seconds)} with {how}{without}."


def _named(links: list[list[str]]) -> str:
    most = 4
    listed = [f"{one} - {other}" for one, other in links[:most]]
    return ", ".join(listed) + (f" and {len(links) - most} more" if len(links) > most else "")


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"


def _print_options(source: str, graph: Topology, found: list[Option], parameters: int) -> None:
    from rich.markup import escape
    from rich.table import Table

    from p2pfl.cli.terminal import open_console

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("use", style="cyan", overflow="fold")
    table.add_column("weights")
    for heading in ("a round", "rounds", "until agreed", "MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for option in found:
        some = "all links" if len(option.links) == graph.num_edges else f"{len(option.links)} of {graph.num_edges} links"
        use = {"links": some, "matchings": f"{some} in turns", "matcha": f"{some}, matcha"}[option.use]
        weights = option.weights if option.budget is None else f"budget {option.budget:g}"
        cells = (_seconds(option.round_s), f"{option.rounds:,}", _seconds(option.seconds), megabytes(option.bytes_sent / 1e6))
        table.add_row(use, weights, *cells)
    console = open_console()
    title = f"{short_source(source)}: {graph.num_nodes} nodes, {graph.num_edges} links, a model of {parameters:,} parameters"
    console.print(escape(title), style="bold", highlight=False)
    console.print(table)
    console.print("a round: until the slowest link in use has delivered; MB: what a node sends until agreed", style="dim", highlight=False)
    console.print()
