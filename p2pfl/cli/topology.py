"""``p2pfl topology``: which graph mixes how fast."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pfl.errors import ConfigError

if TYPE_CHECKING:
    from p2pfl.topology import Schedule, Topology
    from p2pfl.topology.advice import NewLink, Option

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

_DEFAULT_NODES = 16
_SLOW = 0.01
_ALMOST = 1.1

Nodes = Annotated[int | None, typer.Option("--nodes", "-n", help=f"How many nodes a generated graph gets.  [default: {_DEFAULT_NODES}]")]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        "-w",
        help="metropolis, max-degree, lazy, best-constant, fdla, stationary, push-sum or given.  [default: metropolis; if directed given,"
        " or push-sum where the file has none]",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of random graphs.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Also draw a picture (.png, .svg, .pdf).")]

_SOURCE_HELP = (
    "A name that `list` shows, with options after a colon (random-regular:degree=6), or a file (YAML, GraphML, GML, edge list, JSON)."
)


@app.command("list")
def list_(*, as_json: Json = False) -> None:
    """Graphs and weights by name, and the files in ./topologies.

    Example: p2pfl topology list
    """
    from p2pfl.topology import SCHEDULES, SMALL_GRAPHS, TOPOLOGIES, WEIGHTS, options_of

    generated = {}
    for name in (name for name in TOPOLOGIES if name not in SMALL_GRAPHS):
        described, options = _first_line(TOPOLOGIES[name].__doc__), options_of(name)
        generated[name] = f"{described} Options: {', '.join(options)}." if options else described
    changing = {name: SCHEDULES[name] for name in SCHEDULES}
    rules = {name: _first_line(rule.__doc__) for name, rule in WEIGHTS.items()}
    files = {
        str(path): path.read_text(encoding="utf-8", errors="replace").partition("\n")[0].lstrip("# ")
        for path in sorted(Path("topologies").glob("*.yaml"))
        if path.is_file()
    }
    if as_json:
        typer.echo(
            json.dumps(
                {"generated": generated, "changing": changing, "small": list(SMALL_GRAPHS), "weights": rules, "files": files}, indent=2
            )
        )
        return
    _print_pairs("Generated, for any number of nodes that fits", generated)
    _print_pairs("Change from round to round", changing)
    _print_pairs("Small graphs with their own number of nodes", {"networkx": ", ".join(SMALL_GRAPHS)})
    _print_pairs("Weights", rules)
    if files:
        _print_pairs("Files here", files)


@app.command()
def show(
    source: Annotated[str, typer.Argument(metavar="NAME|FILE", help=_SOURCE_HELP)],
    *,
    nodes: Nodes = None,
    weights: Weights = None,
    seed: Seed = 0,
    as_json: Json = False,
    plot: Plot = None,
) -> None:
    """One graph: its size, its spectrum, and how many rounds of gossip it takes to agree.

    Example: p2pfl topology show torus --nodes 64 --plot torus.png
    """
    from p2pfl.topology import Schedule, describe, describe_rounds

    made = _graph(source, nodes, seed, strict=True)
    if isinstance(made, Schedule):
        figures = describe_rounds(made)
        if plot is not None:
            from p2pfl.topology.drawing import draw_rounds

            draw_rounds(made, plot)
        _show_rounds(source, made, figures, as_json=as_json)
        return
    graph, rule = _weighted(made, weights)
    figures = describe(graph)
    if plot is not None:
        from p2pfl.topology.drawing import draw_graph

        draw_graph(graph, plot)
    if as_json:
        typer.echo(json.dumps({"name": graph.name, "weights": rule, **figures}, indent=2))
        return
    _print_pairs(
        f"{source}, {rule} weights",
        {
            "nodes": f"{figures['nodes']:,}",
            "edges": f"{figures['edges']:,}{' (directed)' if graph.directed else ''}",
            "degree": _degree(figures),
            "diameter": _diameter(figures, graph),
            "lambda_2": f"{figures['lambda_2']:.6f}",
            "lambda_min": f"{figures['lambda_min']:.6f}",
            "spectral gap": _gap(figures),
            "rounds to 1e-6": _rounds(figures),
        },
    )
    if figures["spectral_gap"] < _SLOW:
        typer.echo(f"Slow: a gap below {_SLOW}. A few links across the graph help most; `p2pfl topology compare` shows by how much.")


@app.command()
def compare(
    sources: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help=_SOURCE_HELP)],
    *,
    nodes: Nodes = None,
    weights: Weights = None,
    seed: Seed = 0,
    parameters: Annotated[int, typer.Option("--parameters", help="Of the model, four bytes each, for the last column.")] = 1_000_000,
    as_json: Json = False,
    plot: Plot = None,
) -> None:
    """Several graphs side by side, the one that agrees in the fewest rounds first; files and small graphs keep their own number of nodes.

    Example: p2pfl topology compare ring torus hypercube base-3 --nodes 64
    """
    from p2pfl.topology import Schedule, describe, describe_rounds

    findings: list[str] = []
    graphs: dict[str, tuple[Topology | Schedule, str]] = {}
    figures: dict[str, dict[str, Any]] = {}
    for source in sources:
        try:
            made = _graph(source, nodes, seed, strict=False)
            if isinstance(made, Schedule):
                graphs[source], figures[source] = (made, "its own"), describe_rounds(made)
            else:
                graph, rule = _weighted(made, weights)
                graphs[source], figures[source] = (graph, rule), describe(graph)
        except ConfigError as error:
            findings += [f"{source}: {finding}" for finding in error.findings]
    if findings:
        raise ConfigError(findings)
    for row in figures.values():
        row.setdefault("exact_after", 1 if row["rounds_to_1e-6"] == 1 else None)
        rounds = row["rounds_to_1e-6"]
        row["megabytes_to_1e-6"] = None if rounds is None else rounds * row["degree"]["mean"] * parameters * 4 / 1e6
    best_first = sorted(figures, key=lambda source: (_rank(figures[source]), source))
    if plot is not None:
        from p2pfl.topology.drawing import draw_comparison

        draw_comparison({_short(source): graphs[source][0] for source in best_first}, plot)
    if as_json:
        rows = [
            {"name": graphs[source][0].name, "source": source, "weights": graphs[source][1], **figures[source]} for source in best_first
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    _print_comparison(best_first, figures)


@app.command()
def advise(
    source: Annotated[str, typer.Argument(metavar="FILE|NAME", help="Whose links have latency_ms and bandwidth_mbps.")],
    *,
    parameters: Annotated[int, typer.Option("--parameters", min=1, help="Of the model, four bytes each.")] = 1_000_000,
    latency_ms: Annotated[float | None, typer.Option("--latency-ms", min=0, help="Of every link, where the file says nothing.")] = None,
    bandwidth_mbps: Annotated[
        float | None, typer.Option("--bandwidth-mbps", min=1e-6, help="Of every link, where the file says nothing.")
    ] = None,
    new_latency_ms: Annotated[float | None, typer.Option("--new-latency-ms", min=0, help="Of a new link.  [default: the median]")] = None,
    new_bandwidth_mbps: Annotated[
        float | None, typer.Option("--new-bandwidth-mbps", min=1e-6, help="Of a new link.  [default: the median]")
    ] = None,
    nodes: Nodes = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Which of the links that institutions can have to use, with what weights, and which new one would help most: in seconds.

    A round lasts until the slowest link in use has delivered a model: latency + size / bandwidth, each link by itself.

    Example: p2pfl topology advise topologies/swiss-hospitals.yaml --parameters 1000000
    """
    import numpy as np

    from p2pfl.topology import Schedule
    from p2pfl.topology.advice import best_new_link, is_exhaustive, link_costs, message_seconds, options, recommended

    made = _graph(source, nodes, seed, strict=True)
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
    new, tried = best_new_link(links, float(message_seconds(np.array(new_ms), np.array(new_mbps), links.size_bytes)))
    saves = new is not None and new.best.seconds < best.seconds * (1 - 1e-9)
    said = [*_advice(source, graph, best, found), _new_link(graph, new if saves else None, new_ms, new_mbps, tried)]
    if as_json:
        row = None
        if new is not None and saves:
            between = [graph.label(node) for node in new.between]
            row = {"between": between, "latency_ms": new_ms, "bandwidth_mbps": new_mbps, **_as_row(_joined(graph, new.between), new.best)}
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


def _rank(figures: dict[str, Any]) -> tuple[float, ...]:
    """The smaller the better: rounds, then what they cost."""
    rounds = figures["rounds_to_1e-6"]
    return (float("inf") if rounds is None else rounds, -figures["spectral_gap"], sum(figures["degree"].values()))


def _show_rounds(source: str, schedule: Schedule, figures: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"name": schedule.name, "weights": "its own", **figures}, indent=2))
        return
    rounds, exact = figures["rounds_to_1e-6"], figures["exact_after"]
    _print_pairs(
        f"{source}, which changes from round to round",
        {
            "nodes": f"{figures['nodes']:,}",
            "links": f"{figures['edges']:,}{' (directed)' if schedule.directed else ''}",
            "messages a round": f"{_degree(figures)} from each node",
            "repeats after": "never: random" if schedule.period is None else f"{schedule.period} rounds",
            "exact mean after": "never" if exact is None else f"{exact} rounds",
            "gap a round": _gap(figures),
            "rounds to 1e-6": ("more than 5,000" if rounds is None else f"{rounds}") + (" with this seed" if figures["random"] else ""),
            **_facts(figures),
        },
    )


def _facts(figures: dict[str, Any]) -> dict[str, str]:
    """What is to be said of a schedule over a base graph."""
    rows = {}
    if "matchings" in figures:
        rows["matchings"] = f"{figures['matchings']} of {figures['base']}"
    if "probabilities" in figures:
        rows["each used in"] = ", ".join(f"{p:.3g}" for p in figures["probabilities"]) + " of the rounds"
        rows["a link weighs"] = f"{figures['step']:g}"
        rows["squares left"] = f"{figures['squared_left']:.6f} a round, on average"
    return rows


def _graph(source: str, nodes: int | None, seed: int, *, strict: bool) -> Topology | Schedule:
    """The graph that an argument means, without its weights.

    Args:
        source: a name, with options perhaps, or a file.
        nodes: as the user said, if they did.
        seed: of random graphs.
        strict: whether a graph with its own number of nodes minds another one.
    """
    from p2pfl.topology import SMALL_GRAPHS, TOPOLOGIES, has_base, is_schedule, load, make, make_schedule, schedule_faults
    from p2pfl.yaml_files import parse_yaml

    name, _, assignments = source.partition(":")
    if name not in TOPOLOGIES and not is_schedule(name) and (Path(source).suffix or "/" in source):
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
    if is_schedule(name):
        if faults := schedule_faults(name, options):
            raise ConfigError(faults)
        if has_base(name):
            options["base"] = _base(options.get("base", "ring"), nodes, seed, strict=strict)
            return make_schedule(name, options["base"].num_nodes, seed=seed, **options)
        return make_schedule(name, nodes if nodes is not None else _DEFAULT_NODES, seed=seed, **options)
    own_number = name in SMALL_GRAPHS and (nodes is None or not strict)
    return make(name, None if own_number else nodes if nodes is not None else _DEFAULT_NODES, seed, **options)


def _base(value: Any, nodes: int | None, seed: int, *, strict: bool) -> Topology:
    """The graph whose links a schedule uses, from what stands after `base=`."""
    from p2pfl.topology import Topology, base_spec

    spec = base_spec(value)
    options = ",".join(f"{key}={json.dumps(option)}" for key, option in spec.items() if key not in ("name", "file"))
    source = spec.get("file") or f"{spec['name']}:{options}"
    found = _graph(source, nodes, seed, strict=strict)
    assert isinstance(found, Topology)  # the options have been checked
    return found


def _weighted(graph: Topology, rule: str | None) -> tuple[Topology, str]:
    """With the weights asked for, and what they are called."""
    from p2pfl.topology import weighted

    of_directed = "given" if graph.weights is not None else "push-sum"
    chosen = rule or (of_directed if graph.directed else "metropolis")
    return weighted(graph, chosen), chosen


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
    """What to do, in plain words."""
    said = [f"{_way(source, graph, best)}: {_seconds(best.seconds)} until a millionth of the disagreement is left."]
    usual = next((o for o in found if o.use == "links" and o.weights == "metropolis" and len(o.links) == graph.num_edges), None)
    if usual is not None and usual is not best:
        said.append(f"All links in every round with weights: metropolis take {_seconds(usual.seconds)}.")
    frugal = min((o for o in found if o.seconds <= _ALMOST * best.seconds), key=lambda o: o.bytes_sent)
    if frugal.bytes_sent <= best.bytes_sent / 2:
        sent = f"{_megabytes(frugal.bytes_sent / 1e6)} MB a node instead of {_megabytes(best.bytes_sent / 1e6)}"
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


def _new_link(graph: Topology, new: NewLink | None, latency_ms: float, bandwidth_mbps: float, tried: int) -> str:
    speed = f"{latency_ms:g} ms, {bandwidth_mbps:g} Mbit/s"
    if new is None:
        return f"No single new link of {speed} would shorten that ({tried} tried)." if tried else "There is no link to add."
    one, other = (graph.label(node) for node in new.between)
    out = _left_out(_joined(graph, new.between), new.best)
    how = {"links": f"weights: {new.best.weights}", "matchings": "links in turns"}[new.best.use]
    without = f", without {_named(out)}" if out else ""
    return (
        f"Of {tried} new links, one between {one} and {other} ({speed}) would help most: {_seconds(new.best.seconds)} with {how}{without}."
    )


def _named(links: list[list[str]]) -> str:
    most = 4
    listed = [f"{one} - {other}" for one, other in links[:most]]
    return ", ".join(listed) + (f" and {len(links) - most} more" if len(links) > most else "")


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"


def _megabytes(megabytes: float) -> str:
    return f"{megabytes:,.0f}" if megabytes >= 10 else f"{megabytes:.2g}"  # noqa: PLR2004  # where no decimals would show one digit or none


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
        figures = (_seconds(option.round_s), f"{option.rounds:,}", _seconds(option.seconds), _megabytes(option.bytes_sent / 1e6))
        table.add_row(use, weights, *figures)
    console = open_console()
    title = f"{_short(source)}: {graph.num_nodes} nodes, {graph.num_edges} links, a model of {parameters:,} parameters"
    console.print(escape(title), style="bold", highlight=False)
    console.print(table)
    console.print("a round: until the slowest link in use has delivered; MB: what a node sends until agreed", style="dim", highlight=False)
    console.print()


def _print_pairs(title: str, rows: dict[str, str]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from p2pfl.cli.terminal import open_console

    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", overflow="fold")
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(escape(key), escape(value))
    console = open_console()
    console.print(escape(title), style="bold", highlight=False)
    console.print(table)
    console.print()


def _print_comparison(sources: list[str], figures: dict[str, dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from p2pfl.cli.terminal import open_console

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("graph", style="cyan", overflow="fold")
    for heading in ("nodes", "links", "degree", "gap", "rounds", "exact", "MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for source in sources:
        row = figures[source]
        table.add_row(
            escape(_short(source)),
            f"{row['nodes']:,}",
            f"{row['edges']:,}",
            _degree(row),
            _gap(row, places=4),
            _rounds(row),
            "-" if row["exact_after"] is None else str(row["exact_after"]),
            "-" if row["megabytes_to_1e-6"] is None else _megabytes(row["megabytes_to_1e-6"]),
        )
    console = open_console()
    console.print(table)
    console.print("rounds: until a millionth of the disagreement is left; exact: until none is", style="dim", highlight=False)
    console.print("degree: messages of a node in a round; MB: what a node sends in all rounds", style="dim", highlight=False)
    if any(row.get("random") for row in figures.values()):
        console.print("of random graphs: gap and rounds of this seed's; another --seed has others", style="dim", highlight=False)


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]


def _short(source: str) -> str:
    """Files without their folders."""
    return re.sub(r"[^\s:=]*/", "", source)


def _degree(figures: dict[str, Any]) -> str:
    low, high = figures["degree"]["min"], figures["degree"]["max"]
    return str(low) if low == high else f"{low}-{high}"


def _diameter(figures: dict[str, Any], graph: Topology) -> str:
    from p2pfl.topology import diameter_bounds

    if figures["diameter"] is not None:
        return f"{figures['diameter']:,}"
    low, high = diameter_bounds(graph)
    return f"{low}-{high}"


def _gap(figures: dict[str, Any], places: int = 6) -> str:
    gap = figures["spectral_gap"]
    return f"{gap:.{places}f}" if abs(gap) >= 1e-4 else f"{gap:.3e}"  # noqa: PLR2004  # where six places would show less than three digits


def _rounds(figures: dict[str, Any]) -> str:
    rounds = figures["rounds_to_1e-6"]
    if rounds is None:
        return ">5,000" if "random" in figures else "never"
    return f"{rounds:,}"
