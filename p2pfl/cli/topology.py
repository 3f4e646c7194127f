"""``p2pfl topology``: which graph mixes how fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pfl.cli.advise import advise
from p2pfl.cli.graph_arguments import SOURCE_HELP, Nodes, Seed, graph_of, megabytes, short_source, weighted_graph
from p2pfl.cli.options import Json
from p2pfl.errors import ConfigError

if TYPE_CHECKING:
    from p2pfl.topology import Schedule, Topology

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

_SLOW = 0.01

Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        "-w",
        help="Rule for the weights: metropolis, max-degree, lazy, best-constant, fdla, stationary, push-sum or given."
        "  [default: metropolis; for directed graphs given, or push-sum where the file has no weights]",
    ),
]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Also draw a picture (.png, .svg, .pdf).")]


@app.command("list")
def list_(*, as_json: Json = False) -> None:
    """List graphs and weights by name, and the files in ./topologies.

    Example: p2pfl topology list
    """
    from p2pfl.topology import SCHEDULES, SMALL_GRAPHS, TOPOLOGIES, WEIGHTS, options_of

    generated = {name: _first_line(make.__doc__) for name, make in TOPOLOGIES.items() if name not in SMALL_GRAPHS}
    generated |= {name: f"{generated[name]} Options: {', '.join(options)}." for name in generated if (options := options_of(name))}
    changing = dict(SCHEDULES)
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
    source: Annotated[str, typer.Argument(metavar="NAME|FILE", help=SOURCE_HELP)],
    *,
    nodes: Nodes = None,
    weights: Weights = None,
    seed: Seed = 0,
    as_json: Json = False,
    plot: Plot = None,
) -> None:
    """Show a graph's size, spectrum and rounds until its nodes agree. Nodes agree when a millionth of their disagreement is left.

    Example: p2pfl topology show torus --nodes 64 --plot torus.png
    """
    from p2pfl.topology import Schedule, describe, describe_rounds

    made = graph_of(source, nodes, seed, strict=True)
    if isinstance(made, Schedule):
        facts = describe_rounds(made)
        if plot is not None:
            from p2pfl.topology.drawing import draw_rounds

            draw_rounds(made, plot)
        _show_rounds(source, made, facts, as_json=as_json)
        return
    graph, rule = weighted_graph(made, weights)
    facts = describe(graph)
    if plot is not None:
        from p2pfl.topology.drawing import draw_graph

        draw_graph(graph, plot)
    if as_json:
        typer.echo(json.dumps({"name": graph.name, "weights": rule, **facts}, indent=2))
        return
    _print_pairs(
        f"{source}, {rule} weights",
        {
            "nodes": f"{facts['nodes']:,}",
            "edges": f"{facts['edges']:,}{' (directed)' if graph.directed else ''}",
            "degree": _degree(facts),
            "diameter": _diameter(facts, graph),
            "lambda_2": f"{facts['lambda_2']:.6f}",
            "lambda_min": f"{facts['lambda_min']:.6f}",
            "spectral gap": _gap(facts),
            "rounds to 1e-6": _rounds(facts),
        },
    )
    if facts["spectral_gap"] < _SLOW:
        typer.echo(f"Slow: a gap below {_SLOW}. A few links across the graph help most; `p2pfl topology compare` shows by how much.")


@app.command()
def compare(
    sources: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help=SOURCE_HELP)],
    *,
    nodes: Nodes = None,
    weights: Weights = None,
    seed: Seed = 0,
    parameters: Annotated[int, typer.Option(help="Number of the model's parameters, four bytes each, for the column MB.")] = 1_000_000,
    as_json: Json = False,
    plot: Plot = None,
) -> None:
    """Compare graphs, those that agree in the fewest rounds first. Files and small graphs keep their own number of nodes.

    Example: p2pfl topology compare ring torus hypercube base-3 --nodes 64
    """
    from p2pfl.topology import Schedule, describe, describe_rounds

    findings: list[str] = []
    graphs: dict[str, tuple[Topology | Schedule, str]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for source in sources:
        try:
            made = graph_of(source, nodes, seed, strict=False)
            if isinstance(made, Schedule):
                graphs[source], facts[source] = (made, "its own"), describe_rounds(made)
            else:
                graph, rule = weighted_graph(made, weights)
                graphs[source], facts[source] = (graph, rule), describe(graph)
        except ConfigError as error:
            findings += [f"{source}: {finding}" for finding in error.findings]
    if findings:
        raise ConfigError(findings)
    for row in facts.values():
        row.setdefault("exact_after", 1 if row["rounds_to_1e-6"] == 1 else None)
        rounds = row["rounds_to_1e-6"]
        row["megabytes_to_1e-6"] = None if rounds is None else rounds * row["degree"]["mean"] * parameters * 4 / 1e6
    best_first = sorted(facts, key=lambda source: (_rank(facts[source]), source))
    if plot is not None:
        from p2pfl.topology.drawing import draw_comparison

        draw_comparison({short_source(source): graphs[source][0] for source in best_first}, plot)
    if as_json:
        rows = [{"name": graphs[source][0].name, "source": source, "weights": graphs[source][1], **facts[source]} for source in best_first]
        typer.echo(json.dumps(rows, indent=2))
        return
    _print_comparison(best_first, facts)


app.command()(advise)


def _rank(facts: dict[str, Any]) -> tuple[float, ...]:
    """Key to sort graphs by: the fewest rounds first, then the least cost."""
    rounds = facts["rounds_to_1e-6"]
    return (float("inf") if rounds is None else rounds, -facts["spectral_gap"], sum(facts["degree"].values()))


def _show_rounds(source: str, schedule: Schedule, facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"name": schedule.name, "weights": "its own", **facts}, indent=2))
        return
    rounds, exact = facts["rounds_to_1e-6"], facts["exact_after"]
    rows = {
        "nodes": f"{facts['nodes']:,}",
        "links": f"{facts['edges']:,}{' (directed)' if schedule.directed else ''}",
        "messages a round": f"{_degree(facts)} from each node",
        "repeats after": "never: random" if schedule.period is None else f"{schedule.period} rounds",
        "exact mean after": "never" if exact is None else f"{exact} rounds",
        "gap a round": _gap(facts),
        "rounds to 1e-6": ("more than 5,000" if rounds is None else f"{rounds}") + (" with this seed" if facts["random"] else ""),
    }
    if "matchings" in facts:
        rows["matchings"] = f"{facts['matchings']} of {facts['base']}"
    if "probabilities" in facts:
        rows["each used in"] = ", ".join(f"{p:.3g}" for p in facts["probabilities"]) + " of the rounds"
        rows["a link weighs"] = f"{facts['step']:g}"
        rows["squares left"] = f"{facts['squared_left']:.6f} a round, on average"
    _print_pairs(f"{source}, which changes from round to round", rows)


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


def _print_comparison(sources: list[str], facts: dict[str, dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from p2pfl.cli.terminal import open_console

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("graph", style="cyan", overflow="fold")
    for heading in ("nodes", "links", "degree", "gap", "rounds", "exact", "MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for source in sources:
        row = facts[source]
        table.add_row(
            escape(short_source(source)),
            f"{row['nodes']:,}",
            f"{row['edges']:,}",
            _degree(row),
            _gap(row, places=4),
            _rounds(row),
            "-" if row["exact_after"] is None else str(row["exact_after"]),
            "-" if row["megabytes_to_1e-6"] is None else megabytes(row["megabytes_to_1e-6"]),
        )
    console = open_console()
    console.print(table)
    console.print("rounds: until a millionth of the disagreement is left; exact: until none is", style="dim", highlight=False)
    console.print("degree: messages of a node in a round; MB: what a node sends in all rounds", style="dim", highlight=False)
    if any(row.get("random") for row in facts.values()):
        console.print("of random graphs: gap and rounds of this seed's; another --seed has others", style="dim", highlight=False)


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]


def _degree(facts: dict[str, Any]) -> str:
    low, high = facts["degree"]["min"], facts["degree"]["max"]
    return str(low) if low == high else f"{low}-{high}"


def _diameter(facts: dict[str, Any], graph: Topology) -> str:
    from p2pfl.topology import diameter_bounds

    if facts["diameter"] is not None:
        return f"{facts['diameter']:,}"
    low, high = diameter_bounds(graph)
    return f"{low}-{high}"


def _gap(facts: dict[str, Any], places: int = 6) -> str:
    gap = facts["spectral_gap"]
    return f"{gap:.{places}f}" if abs(gap) >= 1e-4 else f"{gap:.3e}"  # noqa: PLR2004  # where six places would show less than three digits


def _rounds(facts: dict[str, Any]) -> str:
    rounds = facts["rounds_to_1e-6"]
    if rounds is None:
        return ">5,000" if "random" in facts else "never"
    return f"{rounds:,}"
