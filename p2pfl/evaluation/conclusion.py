"""What a simulation leaves behind at its end, whatever its nodes' pace.

Shapes: N nodes, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from p2pfl.evaluation.cross_site import cross_site
from p2pfl.evaluation.gain_over_local import worth
from p2pfl.evaluation.results import write_models
from p2pfl.evaluation.subgroups import subgroups
from p2pfl.evaluation.summary import (
    Metrics,
    baselines_summary,
    finish_summary,
    mean_model_metrics,
    mean_model_of,
    non_finite_models,
    seconds_spent,
    test_figures,
)
from p2pfl.evaluation.summary import peak_rss_bytes as own_peak_bytes
from p2pfl.experiment.plan import Plan
from p2pfl.params import frozen_of
from p2pfl.runs.departures import departures_of_events
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.rows import Row
from p2pfl.runs.stopwatch import Stopwatch
from p2pfl.training import Population


def conclude(
    plan: Plan,
    folder: RunFolder,
    stopwatch: Stopwatch,
    *,
    population: Population,
    x_NP: Tensor,
    buffers: Mapping[str, Tensor],
    metrics: Mapping[str, Metrics],
    rounds: int,
    stop_reason: str,
    bytes_sent: int,
    simulated_s: float | None = None,
    engine: str = "simulator",
    local: Mapping[str, Metrics] | None = None,
    gains: Sequence[Row] = (),
    peak_rss_bytes: int = 0,
) -> None:
    """Write the models and the summary.

    Args:
        plan: of the run.
        folder: of the run.
        stopwatch: goes on for what is computed here.
        population: any rows of the run; its model evaluates.
        x_NP: every node's parameters.
        buffers: every node's own, (N, ...).
        metrics: of every node.
        rounds: how many there were.
        stop_reason: why no more.
        bytes_sent: by all nodes.
        simulated_s: on the network's own clock, where it has one.
        engine: as the summary names it.
        local: each node trained alone, where that is known already.
        gains: what the network is worth to each node, where that is known already.
        peak_rss_bytes: of other processes of this run, the most that one held.
    """
    stopwatch.lap("evaluate")
    write_models(folder.path, plan.names, x_NP, plan.layout, buffers, frozen=frozen_of(plan.model))
    stopwatch.lap("write")
    mean = mean_model_of(plan, x_NP, buffers)
    mean_model = mean_model_metrics(plan, mean, population)
    test = test_figures(plan, population, x_NP, buffers, {name: row for row, name in enumerate(plan.names) if name in metrics}, mean)
    folder.write_cross_site(cross_site(plan, population, x_NP))
    if len(population.sites) == len(plan.names) or not population.buffers:
        folder.write_subgroups(subgroups(plan, population, x_NP, plan.names, mean))
    stopwatch.lap("evaluate")
    baselines, alone = baselines_summary(plan, local)
    folder.write_worth(gains or worth(plan, population, x_NP, plan.names, alone))
    stopwatch.lap("baselines")
    departures = [*departures_of_events(folder.events(), simulated=True), *non_finite_models(plan.names, x_NP)]
    summary = finish_summary(
        plan,
        engine=engine,
        rounds=rounds,
        stop_reason=stop_reason,
        x_NP=x_NP,
        metrics=metrics,
        mean_model=mean_model,
        mean_model_reason=mean if isinstance(mean, str) else None,
        test=test,
        baselines=baselines,
        bytes_sent=bytes_sent,
        seconds=stopwatch.spent,
        row_by_row=population.row_by_row,
        peak_rss_bytes=max(peak_rss_bytes, own_peak_bytes()),
        departures=departures,
    )
    stopwatch.lap("write")
    summary["seconds"] = seconds_spent(stopwatch.spent)
    if simulated_s is not None:
        summary["seconds"]["simulated"] = simulated_s
    folder.write_summary(summary)
