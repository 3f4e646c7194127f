"""Chaos: an experiment run by real daemons on this machine while a script of faults is carried out, and a report of what that cost."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from p2pfl.errors import ConfigError
from p2pfl.evaluation.results import Run
from p2pfl.experiment.plan import Plan, load_sites, make_plan
from p2pfl.experiment.spec import Experiment
from p2pfl.faults.drawing import Pace, draw_faults
from p2pfl.faults.plan_file import FaultPlan
from p2pfl.faults.script import OF_EDGES, Fault, FaultKind, FaultScript
from p2pfl.launcher.gathering import gather
from p2pfl.launcher.processes import ForkServer
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.open_files import replace_file
from p2pfl.runs.stopwatch import Stopwatch
from p2pfl.runs.text import document_of
from p2pfl.simulator import simulate
from p2pfl.testing.mean_drift import Drift, measure_drift, needs_models, why_unknown
from p2pfl.testing.rehearsal import Rehearsed, rehearse_plan
from p2pfl.testing.staging import FaultTimes, Progress

REPORT = "chaos.json"
PLAN = "faults.yaml"
MOST_DRIFT = 1e-6

FIRST_ROUND, LAST_PART = 2, 0.7
"""Faults are drawn from the second round on, and begin in the first 70 % of the rounds, so that the network can recover."""
MIXING_ROUNDS = 30
"""Where nothing trains: so many rounds at most have faults."""
ROUNDS_APART, ROUNDS_LONG = (1.0, 3.0), (1.0, 4.0)
DEADLINE_S, DEADLINE_A_ROUND_S = 300.0, 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeOutcome:
    """How one node came through."""

    name: str
    rounds: int | None
    """The round after which it ended; None: it has no result."""
    lost: int
    """Rounds that it jumped over, or of which it trained nothing although the others did."""
    alone: int
    """Rounds in which none of its neighbours came."""
    starts: int
    exit_code: int | None
    stop_reason: str | None
    is_disturbed: bool
    """Whether any fault names it, or an edge of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultOutcome:
    """How one fault went. Seconds and rounds are counted from the start of the run; null: it did not come to that."""

    what: str
    began_round: int | None
    began_s: float | None
    ended_s: float | None
    recovered_s: float | None
    """From its end until every edge that it concerned had carried a round in both directions again."""
    planned: str = ""
    """When it was to happen, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChaosReport:
    """Report of what a script of faults cost a run."""

    nodes: Sequence[NodeOutcome]
    faults: Sequence[FaultOutcome]
    drift: Drift
    metrics: Mapping[str, tuple[float | None, float | None]]
    """The mean over the nodes at the end, without and with faults, by metric."""
    seconds: float

    @property
    def agreed_round(self) -> int | None:
        """The round after which all nodes ended; None: they do not agree."""
        rounds = {node.rounds for node in self.nodes}
        return next(iter(rounds)) if len(rounds) == 1 else None

    @property
    def not_begun(self) -> list[str]:
        """Faults that were not carried out, as the run had ended, their nodes did not run, or rounds passed faster than anybody looks."""
        return [f"{fault.what} ({fault.planned})" if fault.planned else fault.what for fault in self.faults if fault.began_s is None]

    @property
    def departures(self) -> list[str]:
        """Sentences on all that was not as agreed: the findings, and the faults that were planned and never began."""
        without = self.not_begun
        if not without or len(without) == len(self.faults):  # then it is a finding
            return self.findings
        return [*self.findings, f"{len(without)} of {len(self.faults)} faults never began: {', '.join(without)}"]

    @property
    def findings(self) -> list[str]:
        """Sentences on what did not hold; none: faults began, all ended at one agreed round, and the mean is where it should be."""
        found = []
        if self.faults and len(self.not_begun) == len(self.faults):
            found.append(f"{len(self.faults)} of {len(self.faults)} faults never began: the run was not disturbed")
        if without := [node.name for node in self.nodes if node.rounds is None]:
            found.append(f"no result of {', '.join(without)}")
        ended = sorted({node.rounds for node in self.nodes if node.rounds is not None})
        if len(ended) > 1:
            found.append(f"the nodes ended after different rounds: {', '.join(map(str, ended))}")
        if self.drift.value is None:
            found.append(f"the drift of the mean is unknown: {self.drift.why}")
        elif not self.drift.value < MOST_DRIFT:
            found.append(f"the mean has drifted by {self.drift.value:.2g}, expected less than {MOST_DRIFT:g}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Content of the file chaos.json."""
        return {
            "schema": 1,
            "agreed_round": self.agreed_round,
            "drift": self.drift.value,
            "drift_unknown": self.drift.why or None,
            "seconds": round(self.seconds, 2),
            "never_began": len(self.not_begun),
            "not_begun": self.not_begun,
            "findings": self.findings,
            "nodes": [asdict(node) for node in self.nodes],
            "faults": [asdict(fault) for fault in self.faults],
            "metrics": {name: {"undisturbed": before, "disturbed": after} for name, (before, after) in self.metrics.items()},
        }


def draw_plan(experiment: Experiment, neighbours: Mapping[str, Sequence[str]], kinds: Sequence[FaultKind], seed: int) -> FaultPlan:
    """Draw the faults of an experiment from a seed.

    Raises:
        ConfigError: it has too few rounds for any.
    """
    rounds = experiment.rounds or min(experiment.last_possible_round, MIXING_ROUNDS)
    last = int(LAST_PART * rounds)
    if last < FIRST_ROUND:
        raise ConfigError(f"rounds = {experiment.rounds}: faults need 3 rounds at least; try --rounds 20")
    pace = Pace(begins=(FIRST_ROUND, last), every=ROUNDS_APART, lasts=ROUNDS_LONG)
    return FaultPlan.of(draw_faults(kinds, seed=seed, neighbours=neighbours, pace=pace), neighbours)


def neighbours_of(plan: Plan) -> dict[str, list[str]]:
    """Give the neighbours of every node."""
    return {name: plan.neighbours(name) for name in plan.names}


def plan_of(experiment: Experiment, allow_tasks: Collection[str]) -> Plan:
    """Make the plan of a run whose drift can be measured, where it can be at all: each node then keeps its model of every round."""
    plan = make_plan(experiment, load_sites(experiment, allow_tasks=allow_tasks))
    if needs_models(plan) and experiment.save_models_every != 1:
        changed = replace(plan.experiment, save_models_every=1)
        return make_plan(changed, load_sites(changed, allow_tasks=allow_tasks))
    return plan


def run_chaos(
    plan: Plan,
    faults: FaultPlan,
    *,
    place: Path,
    allow_tasks: Collection[str] = (),
    fork: ForkServer | None = None,
    site: Mapping[str, Any] | None = None,
    deadline_s: float | None = None,
    progress: Progress | None = None,
) -> ChaosReport:
    """Run a plan undisturbed in the simulator and disturbed by real daemons, and write the report into the run's folder.

    The folder holds what `p2pfl up` leaves behind, the run of the simulator in `undisturbed`, faults.yaml and chaos.json.

    Args:
        plan: see `plan_of`.
        faults: what is to happen.
        place: the run's folder, which must not exist.
        allow_tasks: tasks that may run beside the built-in ones.
        fork: a fork server at work, from which the daemons are forked; None: each is a Python of its own.
        site: settings for every site.yaml.
        deadline_s: how long the disturbed run may take; None: 5 minutes, and 10 s a round.
        progress: called with the furthest round and the number of faults that have begun.

    Raises:
        ConfigError: the folder is there already, or the faults are not of this run.
        TimeoutError: nodes still ran at the deadline; the message names them. None of them is left behind.
    """
    script = faults.script(neighbours_of(plan))
    stopwatch = Stopwatch()
    folder = RunFolder.create(place, plan.experiment.as_dict(), topology=plan.graph_record(), engine="daemons")
    replace_file(place / PLAN, faults.text)
    undisturbed = simulate(replace(plan.experiment, save_models_every=None), out=place / "undisturbed", allow_tasks=allow_tasks)
    rehearsed = rehearse_plan(
        plan,
        place=place,
        script=script,
        site=site,
        allow_tasks=allow_tasks,
        deadline_s=deadline_s or DEADLINE_S + DEADLINE_A_ROUND_S * plan.experiment.rounds,
        fork=fork,
        progress=progress,
    )
    report = _report(plan, script, rehearsed, undisturbed.summary["metrics"])
    if all(node.rounds is not None for node in report.nodes):
        gather(plan, place, folder, list(rehearsed.watched.values()), [], stopwatch)
        means = Run(place).summary["metrics"]
        metrics = {name: (before, means[name]["mean"] if name in means else None) for name, (before, _) in report.metrics.items()}
        report = replace(report, metrics=metrics)
    replace_file(place / REPORT, document_of(report.as_dict()))
    return report


def _report(plan: Plan, script: FaultScript, rehearsed: Rehearsed, undisturbed: Mapping[str, Any]) -> ChaosReport:
    summaries = {name: rehearsed.records(name).summary for name in plan.names}
    rows = {name: {int(row["round"]): row for row in rehearsed.records(name).nodes} for name in plan.names}
    has_ended = all(summary is not None for summary in summaries.values())
    drift = measure_drift(plan, rehearsed.watched) if has_ended else Drift(value=None, why=why_unknown(plan) or "not all nodes have ended")
    nodes = [_node(plan, script, rehearsed, name, summaries[name], rows) for name in plan.names]
    faults = [_fault(plan, times, rehearsed, rows) for times in rehearsed.times]
    metrics = {name: (values["mean"], None) for name, values in undisturbed.items()}
    return ChaosReport(nodes=nodes, faults=faults, drift=drift, metrics=metrics, seconds=rehearsed.took_s)


def _node(
    plan: Plan,
    script: FaultScript,
    rehearsed: Rehearsed,
    name: str,
    summary: Mapping[str, Any] | None,
    rows: Mapping[str, Mapping[int, Mapping[str, Any]]],
) -> NodeOutcome:
    own, near = rows[name], set(plan.neighbours(name))
    last = max((number for each in rows.values() for number in each), default=-1)
    trained = {number for each in rows.values() for number, row in each.items() if row["loss"] is not None}
    trains = any(row["loss"] is not None for row in own.values())
    lost = [n for n in range(last + 1) if n not in own or (trains and n in trained and own[n]["loss"] is None)]
    return NodeOutcome(
        name=name,
        rounds=None if summary is None else int(summary["rounds"]),
        lost=len(lost),
        alone=sum(bool(near) and near <= set(row["skipped"]) for row in own.values()),
        starts=rehearsed.watched[name].starts,
        exit_code=rehearsed.exit_codes.get(name),
        stop_reason=None if summary is None else str(summary["stop_reason"]),
        is_disturbed=any(_concerns(fault, name, near) for fault in script.faults),
    )


def _concerns(fault: Fault, name: str, near: Collection[str]) -> bool:
    if fault.kind is FaultKind.PARTITION:
        return any(fault.is_on(name, other) for other in near)
    return name in fault.nodes


def _fault(plan: Plan, times: FaultTimes, rehearsed: Rehearsed, rows: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> FaultOutcome:
    def known(seconds: float) -> float | None:
        return None if math.isnan(seconds) else round(seconds, 2)

    recovered_s = None
    if not math.isnan(times.ended_s):
        edges = [(a, b) for a in plan.names for b in plan.neighbours(a) if _is_of(times.fault, a, b)]
        moments = [_carried_after(times.ended_s, edge, rehearsed, rows) for edge in edges]
        if moments and None not in moments:
            recovered_s = max(moment for moment in moments if moment is not None) - times.ended_s
    return FaultOutcome(
        what=times.fault.text,
        began_round=times.began_round if times.began_round >= 0 else None,
        began_s=known(times.began_s),
        ended_s=known(times.ended_s),
        recovered_s=None if recovered_s is None else round(recovered_s, 2),
        planned=times.fault.when,
    )


def _is_of(fault: Fault, node: str, other: str) -> bool:
    """Whether a fault concerns what a node hears of another one."""
    if fault.kind in OF_EDGES or fault.kind is FaultKind.PARTITION:
        return fault.is_on(node, other) or fault.is_on(other, node)
    return fault.nodes[0] in (node, other)


def _carried_after(
    ended_s: float, edge: tuple[str, str], rehearsed: Rehearsed, rows: Mapping[str, Mapping[int, Mapping[str, Any]]]
) -> float | None:
    """When a node first ended a round that the other one came to, after a moment; None: never."""
    node, other = edge
    seen = sorted((rehearsed.seen_s[node, n], n) for n in rows[node] if (node, n) in rehearsed.seen_s)
    return next((moment for moment, n in seen if moment > ended_s and other not in rows[node][n]["skipped"]), None)
