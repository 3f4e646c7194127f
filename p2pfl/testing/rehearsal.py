"""A rehearsal: an experiment run by one real daemon a node on this machine, while a script of faults is carried out."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from p2pfl.errors import ConfigError
from p2pfl.evaluation.results import read_models
from p2pfl.experiment.loading import resolve
from p2pfl.experiment.plan import Plan, load_sites, make_plan
from p2pfl.experiment.spec import Experiment
from p2pfl.faults.script import FaultKind, FaultScript
from p2pfl.launcher.processes import ForkServer
from p2pfl.launcher.watched import WatchedNode
from p2pfl.runs.records import RunRecords, read_run
from p2pfl.tasks.permission import options_of
from p2pfl.testing.staging import FaultTimes, Progress, Stage

SITE: Mapping[str, Any] = {"deadline_floor_s": 2.0, "heartbeat_s": 1, "linger_s": 10.0}
"""Settings of site.yaml for a rehearsal, whose links are fast and whose neighbours answer at once."""

ROUND_AT_LEAST_S = 0.25
"""Where faults happen in rounds, so that no round goes by between two looks; not for slow nodes, which would only wait less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsed:
    """Everything that a rehearsal left behind, by node."""

    place: Path
    """Folder with the study and, under sites/, keys, records and logs of every node."""

    exit_codes: Mapping[str, int]
    """Exit code of the last process of every node; minus the signal that ended it."""

    times: Sequence[FaultTimes] = ()
    """When each fault began and was over."""

    seen_s: Mapping[tuple[str, int], float] = field(default_factory=dict)
    """When a node's row of a round was first seen, by node and round; seconds since the start."""

    watched: Mapping[str, WatchedNode] = field(default_factory=dict)
    """Every node as it was looked after."""

    took_s: float = 0.0

    def records(self, node: str) -> RunRecords:
        """Read the rows, events and summary of one node."""
        return read_run(self._run(node))

    def models(self) -> dict[str, Tensor]:
        """Read the last model of every node as a flat vector, (P,)."""
        return {node: read_models(self._run(node))[node] for node in self.exit_codes}

    def log(self, node: str) -> str:
        """Read what a node printed, over all its starts."""
        return (self.place / "sites" / node / "node.log").read_text(encoding="utf-8", errors="replace")

    def _run(self, node: str) -> Path:
        return self.place / "sites" / node / "state" / "run"


def rehearse(
    experiment: Experiment | Mapping[str, Any] | Path | str,
    *,
    place: Path,
    faults: FaultScript | None = None,
    site: Mapping[str, Any] | None = None,
    bytes_per_s: float | None = None,
    latency_s: float = 0.0,
    allow_tasks: Collection[str] = (),
    deadline_s: float = 240.0,
    fork: ForkServer | None = None,
    **more: Any,
) -> Rehearsed:
    """Run an experiment with one real daemon a node and carry out faults while it runs.

    Args:
        experiment: its file, a mapping as the file would hold, or an Experiment.
        place: a new folder for keys, study, records and logs.
        faults: in rounds of the furthest node (slow: its own) or in seconds since the start. A killed node starts again from its checkpoint
            when its fault is over; one whose fault has no end stays away. A slow node is stopped and continued in turns: what it computes
            takes longer, not what it waits for. What is lost of an edge is sent again, as TCP does.
        site: settings for every site.yaml, over those of `SITE`.
        bytes_per_s: capacity of every link in each direction; None: as much as the machine gives.
        latency_s: delay of every link in each direction.
        allow_tasks: tasks that may run beside the built-in ones.
        deadline_s: how long the whole run may take.
        fork: a fork server at work, from which the daemons are forked; None: each is a Python of its own.
        more: top-level keys of the experiment to replace, such as rounds=10.

    Raises:
        ConfigError: the experiment or the script cannot be; all findings at once.
        TimeoutError: nodes still ran at the deadline; the message names them. None of them is left behind.
    """
    script = faults if faults is not None else FaultScript()
    plan = make_plan(resolved := resolve(experiment, more), load_sites(resolved, allow_tasks=allow_tasks))
    script.check(plan.names)
    if place.exists():
        raise ConfigError("exists already; choose a new folder", str(place))
    place.mkdir(parents=True)
    return rehearse_plan(
        plan,
        place=place,
        script=script,
        site=site,
        bytes_per_s=bytes_per_s,
        latency_s=latency_s,
        allow_tasks=allow_tasks,
        deadline_s=deadline_s,
        fork=fork,
    )


def rehearse_plan(
    plan: Plan,
    *,
    place: Path,
    script: FaultScript,
    site: Mapping[str, Any] | None = None,
    bytes_per_s: float | None = None,
    latency_s: float = 0.0,
    allow_tasks: Collection[str] = (),
    deadline_s: float = 240.0,
    fork: ForkServer | None = None,
    progress: Progress | None = None,
) -> Rehearsed:
    """Run a plan as `rehearse` does, in a folder that is there.

    Args:
        plan: of the run.
        place: folder for keys, study, records and logs.
        script: faults that can be carried out.
        site: settings for every site.yaml, over those of `SITE`.
        bytes_per_s: capacity of every link in each direction; None: as much as the machine gives.
        latency_s: delay of every link in each direction.
        allow_tasks: tasks that may run beside the built-in ones.
        deadline_s: how long the whole run may take.
        fork: a fork server at work, from which the daemons are forked; None: each is a Python of its own.
        progress: called with the furthest round and the faults that have begun.

    Raises:
        TimeoutError: nodes still ran at the deadline; the message names them. None of them is left behind.
    """
    is_by_rounds = any(fault.rounds for fault in script.faults if fault.kind != FaultKind.SLOW)
    in_rounds = {"round_at_least_s": ROUND_AT_LEAST_S} if is_by_rounds else {}
    tasks = {"allow_tasks": [*allow_tasks]} if allow_tasks else {}
    settings = {**SITE, **in_rounds, **tasks, **(site or {})}
    stage = Stage(plan, place, script, settings, options_of(allow_tasks), fork=fork, progress=progress)
    asyncio.run(stage.run(bytes_per_s, latency_s, deadline_s))
    return Rehearsed(
        place=place,
        exit_codes={node.watched.name: node.code for node in stage.nodes if node.code is not None},
        times=stage.times,
        seen_s=stage.seen_s,
        watched={node.watched.name: node.watched for node in stage.nodes},
        took_s=stage.took_s,
    )
