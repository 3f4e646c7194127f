"""The start of a simulation: an experiment is checked, and one of the engines runs it.

One process, or each of several ranks, does so.
"""

from __future__ import annotations

import hashlib
import logging
import shlex
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from p2pfl.errors import ConfigError, Paused
from p2pfl.evaluation.progress import Progress
from p2pfl.evaluation.results import Run
from p2pfl.experiment.loading import recorded_experiment, resolve
from p2pfl.experiment.plan import Plan, load_sites, make_plan
from p2pfl.experiment.spec import Experiment
from p2pfl.faults.plan_file import FaultPlan
from p2pfl.faults.script import FaultKind, FaultScript
from p2pfl.runs.checkpoint import changes_told
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.open_files import replace_file
from p2pfl.runs.stopwatch import Stopwatch
from p2pfl.runs.writing_process import mark_pause
from p2pfl.simulator.engine import Simulation
from p2pfl.simulator.events.asynchronous import AsynchronousEvents
from p2pfl.simulator.events.pairwise import PairwiseEvents
from p2pfl.simulator.events.replay import AsynchronousReplay, PairwiseReplay, Replay, recorded_rows, run_recorded
from p2pfl.simulator.events.simulation import CHECKPOINT, Events, run_events
from p2pfl.simulator.exchange import SIMULATED
from p2pfl.simulator.forecast import refuse_what_does_not_fit
from p2pfl.simulator.sharding.ranks import Ranks, joined, ranks_here
from p2pfl.simulator.sharding.shard import Shard, check_enough
from p2pfl.tasks.permission import options_of
from p2pfl.yaml_files import dump_yaml, load_yaml

log = logging.getLogger(__name__)

_Recorded = Mapping[str, deque[Mapping[str, Any]]]

_EVENTS: Mapping[bool, tuple[Callable[[Plan, FaultScript | None], Events], Callable[[Plan, _Recorded], Replay]]] = {
    False: (AsynchronousEvents, AsynchronousReplay),
    True: (PairwiseEvents, PairwiseReplay),
}
"""Events of paces without common rounds, by whether these count each edge alone: those that are drawn, and those of a recorded run."""


def simulate(
    experiment: Experiment | Mapping[str, Any] | Path | str,
    *,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    replay: Path | str | None = None,
    device: torch.device | str = "cpu",
    faults: FaultScript | FaultPlan | None = None,
    progress: Progress | None = None,
    waited_s: float = 0.0,
    allow_tasks: Collection[str] = (),
    **overrides: Any,
) -> Run:
    """Run an experiment in this process.

    Args:
        experiment: its file, a mapping as the file would hold, or an Experiment.
        out: the run's folder, which must not exist; None: runs/NAME.
        resume: the folder of an interrupted run to continue exactly; the experiment is then read from there.
        replay: the folder of a run whose nodes went at their own pace, to compute again in the order that its records tell; `experiment` is
            not looked at.
        device: where to compute.
        faults: what goes wrong, by script: slow nodes where there is a clock, as without common rounds; else pauses, kills, cuts, losses
            and partitions. Of a file's plan, what cannot be simulated is left out, and a warning says so.
        progress: called after each round.
        waited_s: for how long somebody waits for this run already; the summary's `seconds` have it as `start`.
        allow_tasks: tasks that may run beside the built-in ones, as distribution:entry or module:function.
        overrides: top-level keys to replace, such as rounds=10.

    Raises:
        TaskNotAllowed: the experiment asks for another task; nothing of it has been imported.
        ConfigError: what is asked is wrong, with all findings.
        StoreError: the disk failed.
        Paused: it was interrupted, and `resume` goes on from its last checkpoint; as KeyboardInterrupt where it cannot.
    """
    stopwatch = Stopwatch(waited_s=waited_s)
    if resume is not None:
        place = Path(resume)
        resolved = recorded_experiment(load_yaml(place / "experiment.yaml"), str(place / "experiment.yaml"))
        if (place / "summary.json").exists():
            return Run(place)
    elif replay is not None:
        if faults is not None:
            raise ConfigError("faults: a recorded run has had its own; leave them out")
        resolved = recorded_experiment(load_yaml(Path(replay) / "experiment.yaml"), str(Path(replay) / "experiment.yaml"), overrides)
        place = Path(out) if out is not None else Path("runs") / f"{resolved.name}-replayed"
    else:
        resolved = resolve(experiment, overrides)
        place = Path(out) if out is not None else Path("runs") / resolved.name
    check_device(device)
    existed = (place / "experiment.yaml").exists()
    try:
        with joined(device) as ranks:
            return _run(
                resolved,
                place,
                ranks,
                faults,
                progress,
                resume=resume is not None,
                replay=Path(replay) if replay is not None else None,
                stopwatch=stopwatch,
                allow_tasks=allow_tasks,
            )
    except KeyboardInterrupt:
        is_kept = (place / "experiment.yaml").exists() and existed == (resume is not None)
        if is_kept:
            mark_pause(place)
        if not is_kept or faults is not None or replay is not None:
            raise
        raise Paused(f"go on with: {shlex.join(['p2pfl', 'simulate', '--resume', str(place), *options_of(allow_tasks)])}") from None


def _run(
    experiment: Experiment,
    place: Path,
    ranks: Ranks,
    given: FaultScript | FaultPlan | None,
    progress: Progress | None,
    *,
    resume: bool,
    replay: Path | None,
    stopwatch: Stopwatch,
    allow_tasks: Collection[str],
) -> Run:
    """Run a resolved experiment at one rank."""
    pace, device = experiment.pace.kind, ranks.device
    _check_it_can_run(experiment, ranks, given)
    if device.type != "cpu" and experiment.compiled == "auto" and experiment.schema != 1:
        experiment = replace(experiment, compiled="off")
    task = load_sites(experiment, allow_tasks=allow_tasks)
    stopwatch.lap("sites")
    plan = make_plan(experiment, task)
    if ranks.count > 1:
        _check_the_same_everywhere(plan, ranks)
    faults = _simulated_part(given, plan) if isinstance(given, FaultPlan) else given
    refuse_what_does_not_fit(plan, ranks.count, ranks_here())
    recorded = recorded_rows(replay, plan) if replay is not None else None
    shard = Shard.of(ranks, plan.topology)
    if resume:
        folder = RunFolder.open(place) if ranks.is_first else RunFolder(place)
    elif ranks.is_first:
        topology = plan.graph_record() | ({} if shard.is_all else {"parts": shard.record()})
        folder = RunFolder.create(place, plan.experiment.as_dict(), topology=topology, engine="simulator" if shard.is_all else "sharded")
    else:
        folder = RunFolder(place)
    if isinstance(given, FaultPlan):
        replace_file(place / "faults.yaml", given.text)
    stopwatch.lap("plan")
    if not pace.in_step:
        drawn, replayed = _EVENTS[pace.counts_edges]
        if recorded is not None:
            run_recorded(plan, folder, replayed(plan, recorded), progress, stopwatch)
        else:
            run_events(plan, folder, drawn(plan, faults), progress, stopwatch, resume=resume)
        return Run(place)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several parts of the rows at once are faster than one with several threads
    try:
        num_threads = threads if device.type == "cpu" else 1
        simulation = Simulation(plan, folder, device=device, faults=faults, threads=num_threads, shard=shard, stopwatch=stopwatch)
        if resume:
            with changes_told(place / CHECKPOINT) if shard.is_all else nullcontext():  # what other ranks do is no fault of the file
                simulation.restore()
        simulation.run(progress)
    finally:
        torch.set_num_threads(threads)
    return Run(place)


def _simulated_part(given: FaultPlan, plan: Plan) -> FaultScript:
    """Take from a file's plan what means something to rows of a population, and say what does not.

    Raises:
        ConfigError: it names nodes or edges that the run does not have.
    """
    script = given.script({name: plan.neighbours(name) for name in plan.names})
    has_clock = plan.experiment.clock is not None or not plan.experiment.pace.kind.in_step
    kept = script.only((FaultKind.SLOW,), in_seconds=True) if has_clock else script.only(SIMULATED, in_seconds=False)
    left_out = Counter(fault.kind.value for fault in script.faults if fault not in set(kept.faults))
    last = plan.experiment.last_possible_round
    if late := sum(bool(fault.rounds) and min(fault.rounds) >= last for fault in kept.faults):
        log.warning("%d of %d faults never begin: the run has %d rounds at most", late, len(script.faults), last)
    if left_out:
        why = (
            "of faults, a run with a clock simulates slow nodes alone"
            if has_clock
            else "rounds have no seconds, bytes, names or clocks here"
        )
        named = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        log.warning("%d of %d faults are left out of the simulation (%s): %s", left_out.total(), len(script.faults), named, why)
    return kept


def _check_it_can_run(experiment: Experiment, ranks: Ranks, faults: FaultScript | FaultPlan | None) -> None:
    """Refuse what cannot go together here.

    Raises:
        ConfigError: it does not.
    """
    pace, clock, in_step = experiment.pace.name, experiment.clock, experiment.pace.kind.in_step
    if clock is not None and in_step and isinstance(faults, FaultScript) and {fault.kind for fault in faults.faults} != {FaultKind.SLOW}:
        raise ConfigError("clock: has faults of its own (loss, churn, stragglers); run scripted ones but slow without a clock")
    if experiment.compiled == "on" and ranks.device.type != "cpu":
        raise ConfigError(f"compiled = 'on': compiled loops run on the CPU, not on {ranks.device.type}; take off, or auto")
    if not in_step and ranks.device.type != "cpu":
        raise ConfigError(f"pace.name = {pace!r}: runs on the CPU; take synchronous for another device")
    if ranks.count == 1:
        return
    if not in_step or faults is not None:
        what = "faults" if in_step else f"pace.name = {pace!r}"
        raise ConfigError(f"{what}: cannot be shared among {ranks.count} ranks; start one process, without torchrun, or take synchronous")
    if clock is not None and clock.drops:
        raise ConfigError(
            [
                f"clock.{drop}: cannot be shared among {ranks.count} ranks; start one process, without torchrun, or let every message come"
                for drop in clock.drops
            ]
        )


def _check_the_same_everywhere(plan: Plan, ranks: Ranks) -> None:
    """Refuse ranks that have read different files.

    Raises:
        ConfigError: one has another experiment, other nodes or another model.
    """
    texts = {"experiment": dump_yaml(plan.experiment.as_dict()), "nodes": "\n".join(plan.names), "start": plan.start_digest}
    facts = {what: hashlib.sha256(text.encode()).hexdigest() for what, text in texts.items()}
    for rank, told in enumerate(ranks.all_gather_object(facts)):
        for what, own in facts.items():
            if told[what] != own:
                raise ConfigError(f"rank {rank} has another {what} than rank {ranks.rank}: expected the same files at all ranks")
    check_enough(len(plan.names), ranks.count)


def check_device(device: torch.device | str) -> None:
    """Refuse a device that is not there.

    Raises:
        ConfigError: torch does not know it or cannot use it here.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device = {str(device)!r}: cannot be used here ({str(error).splitlines()[0]}); use cpu", "--device") from error
