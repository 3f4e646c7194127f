"""Description of all that a study makes its members do, for the person who is asked to agree to it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from p2pfl.cli.terminal import open_console
from p2pfl.errors import on_one_line
from p2pfl.governance.edge_kinds import DIRECT
from p2pfl.governance.result_contract import KINDS, AgreedTask, Difference, ResultContract
from p2pfl.node.own_contract import contract_here

if TYPE_CHECKING:
    from p2pfl.governance.study import Study

_WIDTH = 80
_KEY_WIDTH = 24
_SHOWN_ABOVE = {"name", "task", "nodes", "partition", "topology", "algorithm", "optimizer", "compressor", "aggregator", "rounds", "stop"}
_SHOWN_ABOVE |= {"pace", "weights", "weighting"}


def say_agreement(study: Study, differences: Sequence[Difference] = ()) -> None:
    """Print what will be done: task and options, algorithm, rounds, graph, tensors, and how this machine differs from the contract."""
    say_table("what will be done", _plan_rows(study))
    say_layout(study)
    say_table("the result contract", _contract_rows(study.result_contract, contract_here(study.task_name), differences))


def say_table(title: str, rows: Iterator[tuple[str, str]]) -> None:
    """Print two columns, keys and values, under a title."""
    from rich.table import Table

    table = Table(title=title, show_header=False)
    table.add_column(overflow="fold", max_width=_KEY_WIDTH)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(on_one_line(key), on_one_line(value))
    _print(table)


def _print(table: Any) -> None:
    console = open_console(markup=False, highlight=False)
    console.print(table, width=min(console.width, _WIDTH))


def _plan_rows(study: Study) -> Iterator[tuple[str, str]]:
    said = study.experiment
    yield "experiment", str(said.get("name"))
    yield from _named("task", said.get("task"))
    if said.get("nodes") is not None:
        yield from _named("rows shared out", said.get("partition"), f"{said['nodes']} nodes: ")
    yield from _named("algorithm", said.get("algorithm"))
    yield from _named("optimizer", said.get("optimizer"))
    for key in ("compressor", "aggregator"):
        yield from _named(key, said.get(key))
    yield "rounds", _rounds(said)
    yield from _named("pace", said.get("pace"))
    graph = study.graph
    one_way = ", one way each" if graph.directed else ""
    yield "graph", f"{graph.name}: {len(study.members)} members, {len(graph.edges)} links{one_way}"
    if isinstance(topology := said.get("topology"), Mapping):
        yield from ((f"  {option}", written(given)) for option, given in topology.items() if option != "name")
    yield from (
        (f"{a} - {b}", f"relayed by {found.relay}" if found.relay is not None else found.kind)
        for (a, b), found in study.edge_kinds().items()
        if found.kind != DIRECT
    )
    yield "weights", f"{said.get('weights')}, weighting {said.get('weighting')}"
    for key, value in said.items():
        if key not in _SHOWN_ABOVE:
            yield key, written(value)


def _named(key: str, value: object, before: str = "") -> Iterator[tuple[str, str]]:
    """A section with a name: the name, then a line for each of its options."""
    if not isinstance(value, Mapping):
        yield key, before + written(value)
        return
    yield key, before + str(value.get("name", ""))
    for option, given in value.items():
        if option != "name":
            yield f"  {option}", written(given)


def _rounds(said: Mapping[str, Any]) -> str:
    stop = said.get("stop")
    if not isinstance(stop, Mapping):
        return f"{said.get('rounds')}, then they stop"
    return f"{said.get('rounds')}, then at most {stop.get('settle')} without training, until all agree to {stop.get('relative_consensus')}"


def written(value: object) -> str:
    """Write a value as JSON, in full: nothing in it may stay unseen."""
    return value if isinstance(value, str) and value.isidentifier() else json.dumps(value, ensure_ascii=False)


def say_layout(study: Study) -> None:
    """Print which tensors the members train, and which of them leave a member."""
    from rich.table import Table

    if study.layout is None:
        open_console(markup=False, highlight=False).print("The study has no table of its model's tensors.")
        return
    table = Table(title="the model")
    table.add_column("tensor", overflow="fold")
    for column in ("shape", "dtype", "trains", "travels"):
        table.add_column(column, overflow="fold")
    for row in study.layout:
        shape = " x ".join(map(str, row.shape)) or "1"
        table.add_row(
            on_one_line(row.name), shape, on_one_line(row.dtype), "yes" if row.trains else "frozen", "yes" if row.travels else "stays"
        )
    _print(table)


def _contract_rows(agreed: ResultContract | None, here: ResultContract, differences: Sequence[Difference]) -> Iterator[tuple[str, str]]:
    if agreed is None:
        yield "not bound", "this study was made before there were result contracts: versions and the task's code are not compared"
        return
    yield "made by", f"p2pfl {agreed.p2pfl}" + (f" (here {here.p2pfl})" if here.p2pfl != agreed.p2pfl else "")
    yield "wire", f"schema {agreed.wire}"
    yield "arithmetic", f"revision {agreed.arithmetic}"
    yield "torch", agreed.torch
    yield "task's code", _code(agreed.task)
    for difference in sorted(differences, key=lambda found: KINDS.index(found.kind)):
        yield "differs here", difference.detail


def _code(task: AgreedTask | None) -> str:
    if task is None:
        return "built in: the arithmetic revision covers it"
    whence = f"distribution {task.distribution}" if task.distribution is not None else "no distribution"
    if task.source is None:
        return f"{task.name}: not bound: it was not there where the study was made"
    return f"{task.name}, {whence}, source {task.source}"
