"""Records, models and results of all nodes, gathered into the run folder of the whole network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from p2pfl.errors import StoreError
from p2pfl.evaluation.conclusion import conclude
from p2pfl.evaluation.results import read_buffers, read_models
from p2pfl.evaluation.summary import FinalModels, Outcome
from p2pfl.experiment.plan import Plan
from p2pfl.launcher.watched import WatchedNode
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run
from p2pfl.runs.rows import NetworkRow, NodeRow, kind_of_round, row_of_nodes
from p2pfl.runs.stopwatch import Stopwatch, with_rest
from p2pfl.runs.text import Row
from p2pfl.training import Population


def network_row_of(plan: Plan, sites: Sequence[WatchedNode], number: int) -> NetworkRow:
    """Make the network's row of a round from what the nodes have recorded of it."""
    rows = [NodeRow.of(site.rows[number]) for site in sites if number in site.rows]
    named = ("train", "wait", "mix", "evaluate", "checkpoint")
    seconds = {name: max((row.seconds.get(name, 0.0) for row in rows), default=0.0) for name in named}
    kind = kind_of_round(number, plan.experiment.rounds)
    return row_of_nodes(plan.bound_rule, rows, number, kind, seconds=seconds)


def gather(plan: Plan, place: Path, folder: RunFolder, sites: Sequence[WatchedNode], deaths: Sequence[Row], stopwatch: Stopwatch) -> None:
    """Put the nodes' records, models and results together and conclude the run.

    Seconds are those of the slowest node, part by part, and the rest as `other`. The folder's events are complete already; *deaths* has a
    row for each death of a daemon, and *sites* has those too that died for good.

    Raises:
        StoreError: a node's result is gone.
    """
    experiment = plan.experiment.as_dict()
    lost, finished = [site for site in sites if site.is_lost], [site for site in sites if not site.is_lost]
    names = [site.name for site in finished]
    runs = {site.name: read_run(site.run_folder, experiment=experiment) for site in finished}
    summaries = {}
    for name, records in runs.items():
        if records.summary is None:
            raise StoreError(f"{name}: its summary.json is gone")
        summaries[name] = records.summary
    folder.truncate(0)
    for site in finished:
        site.rows = {row["round"]: row for row in runs[site.name].nodes}
    rounds = max(summary["rounds"] for summary in summaries.values())
    for number in range(rounds):
        folder.append_node(*(site.rows[number] for site in sites if number in site.rows))
        folder.append_round(network_row_of(plan, sites, number))
    x_NP = torch.stack([read_models(site.run_folder)[site.name] for site in finished])
    _copy_models(sites, place)
    local = {
        name: {metric: values["per_node"][name] for metric, values in summary["baselines"]["local"].items()}
        for name, summary in summaries.items()
        if summary["baselines"].get("local")
    }
    population = plan.population(names)
    buffers = _buffers_of(finished, population)
    population.take_buffers(buffers)
    reasons = {summary["stop_reason"] for summary in summaries.values()}
    reason = "diverged" if reasons == {"diverged"} else "converged" if reasons <= {"converged", "diverged"} else "rounds"
    seconds = {name: value for name, value in stopwatch.spent.items() if name == "start"}
    for summary in summaries.values():
        parts = {key: value for key, value in summary["seconds"].items() if key not in {"other", "total"}}
        seconds |= {key: max(seconds.get(key, 0.0), value) for key, value in parts.items()}
    differs = [row for summary in summaries.values() for row in summary.get("accepted_differences", ())]
    outcome = Outcome(
        scope="gathered",
        engine="daemons",
        rounds=rounds,
        stop_reason=reason,
        bytes_sent=sum(summary["bytes_sent"] for summary in summaries.values()),
        metrics={
            name: {m: math.nan if (value := v["per_node"][name]) is None else value for m, v in s["metrics"].items()}
            for name, s in summaries.items()
        },
        models=FinalModels(names=names, x_NP=x_NP, buffers=buffers, population=population),
        book=lambda _: with_rest(seconds, stopwatch.so_far_s()),
        row_by_row=next((s["row_by_row"] for s in summaries.values() if s["row_by_row"]), None),
        peak_rss_bytes=max(summary["peak_rss_bytes"] for summary in summaries.values()),
        has_agreed=reason == "converged",
        lost=[site.name for site in lost],
        departures=[site.departure(rounds) for site in lost],
        started_without=sorted({name for summary in summaries.values() for name in summary.get("started_without", ())}),
        local=local or None,
        gains=[row for name in names for row in runs[name].gains],
        more=({"deaths": [*deaths]} if deaths else {}) | ({"accepted_differences": differs} if differs else {}),
    )
    conclude(plan, folder, outcome)


def _buffers_of(sites: list[WatchedNode], population: Population) -> dict[str, Tensor]:
    """Stack every node's own buffers, (N, ...), from the models that the nodes have saved."""
    if not population.buffers:
        return {}
    saved = [read_buffers(site.run_folder, site.name) for site in sites]
    return {name: torch.stack([buffers[name] for buffers in saved]) for name in population.buffers}


def _copy_models(sites: Sequence[WatchedNode], place: Path) -> None:
    """Copy every node's models into the run's own folder, as the simulator leaves them."""
    for site in sites:
        source = site.run_folder / "models"
        for path in source.rglob("*.safetensors"):
            target = place / "models" / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
