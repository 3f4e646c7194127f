"""The whole network in one process: N rows of one population, mixed in place of messages.

Shapes: N nodes, K neighbour slots, P parameters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.algorithms import SlotInbox
from p2pfl.checkpoints import read_checkpoint, write_checkpoint
from p2pfl.errors import ConfigError, StoreError
from p2pfl.experiment import Experiment, experiment_from, resolve
from p2pfl.plan import Plan, load_sites, make_plan
from p2pfl.records import RunFolder
from p2pfl.results import STACKED_ABOVE, Run, write_models
from p2pfl.simulator.asynchronous import AsynchronousSimulation
from p2pfl.simulator.clock import RoundClock, RoundTimes
from p2pfl.simulator.conclusion import Stopwatch, conclude
from p2pfl.simulator.exchange import Exchange
from p2pfl.simulator.faults import Faults
from p2pfl.simulator.forecast import refuse_what_does_not_fit
from p2pfl.simulator.mixing import is_plain, mix_in_place
from p2pfl.simulator.pairwise import PairwiseSimulation
from p2pfl.simulator.replay import AsynchronousReplay, PairwiseReplay, recorded_rows
from p2pfl.stopping import NEVER
from p2pfl.summary import consensus_distance, disagreement_row
from p2pfl.yaml_files import load_yaml

_CHECKPOINT = "checkpoint.safetensors"
_CHECKPOINT_S = 2.0  # between two of them: what is lost is computed again, exactly

_MEASURED = 10_000
"""Of more nodes than this the final models of so many, evenly spread, are measured."""

_Exchanged = tuple[NDArray[np.float64], NDArray[np.float64], float | None, NDArray[np.float64], Tensor, NDArray[np.int64]]
"""sum_j ||x_i - x_j||**2 and ||x_i||**2 of each node, the consensus distance, what the stop rule is given, who was there, bytes."""

Progress = Callable[[int, int, Mapping[str, Any]], None]
"""Called after each round with the round, the last possible round and the round's record."""


class Simulation:
    """A network that runs in this process.

    Args:
        plan: what to run; all sites' data are here.
        folder: where it writes.
        device: where it computes.
        faults: what goes wrong by script.
        threads: train so many parts of the rows at the same time, each with one of torch's own threads.
    """

    def __init__(
        self, plan: Plan, folder: RunFolder, *, device: torch.device | str = "cpu", faults: Faults | None = None, threads: int = 1
    ) -> None:
        self._stopwatch = Stopwatch()
        self.plan, self.folder = plan, folder
        self.population = plan.population(plan.names, device)
        self.population.threads = threads
        self._clock = RoundClock.of(plan) if plan.experiment.clock is not None else None
        self._exchange = Exchange(
            plan.schedule,
            plan.recipe.algorithm,
            dtype=plan.layout.dtype,
            device=self.population.device,
            faults=faults,
            is_lossy=self._clock is not None and self._clock.gives_up,
        )
        num_nodes = len(plan.names)
        self.round = 0
        self.agreed_for_N = np.zeros(num_nodes, dtype=np.int64)
        self.stop_round_N = np.full(num_nodes, NEVER, dtype=np.int64)
        self.bytes_sent = 0
        self._faults = faults
        self._meetings = plan.meetings(plan.names)
        self._sent_NP: Tensor | None = None  # models of the last round, where the graph changes
        self._recorded = spread(num_nodes, most=100, all_up_to=STACKED_ABOVE)
        self._setup_s = self._stopwatch.lap("setup")

    @property
    def is_over(self) -> bool:
        """Whether every node has stopped."""
        return self.round >= self.plan.experiment.last_possible_round or bool((self.stop_round_N < self.round).all())

    def run(self, progress: Progress | None = None) -> None:
        """Round after round until every node has stopped, then what is to be said of it."""
        experiment, saved_s = self.plan.experiment, time.monotonic()
        while not self.is_over:
            row = self.step()
            if progress is not None:
                progress(self.round, experiment.last_possible_round, row)
            if self.round % experiment.checkpoint_every == 0 and time.monotonic() - saved_s >= _CHECKPOINT_S:
                self.save()
                saved_s = time.monotonic()
        self.finish()

    def step(self) -> dict[str, Any]:
        """One round of every node; returns the network's record of it."""
        experiment, number = self.plan.experiment, self.round
        local_steps = experiment.local_steps_at(number)
        running_N = self.stop_round_N >= number
        running = torch.from_numpy(running_N).to(self.population.device)
        times = self._clock.round(number, local_steps=local_steps, running_N=running_N) if self._clock is not None else None
        there_N, trains_N = self._exchange.active(number), None
        if times is not None and not times.is_whole:
            there_N, trains_N = (torch.from_numpy(mask_N).to(self.population.device) for mask_N in (times.active_N, times.trains_N))
            there_N |= ~running
        active_N = there_N
        if not running_N.all():
            active_N = running if active_N is None else active_N & running
        losses_N = self.population.train(number, active_N if trains_N is None else trains_N, in_place=True) if local_steps else None
        for name in self.population.diverged if local_steps else ():
            detail = f"round {number}: training left the finite numbers and was taken back; lower optimizer.lr or set clip_norm"
            self.folder.append_event({"round": number, "node": name, "event": "diverged", "detail": detail})
        train_s = self._stopwatch.lap("train")
        came = times.came if times is not None and not times.is_whole else (None,) * self.plan.recipe.algorithm.phases
        delivered = [self._exchange.delivered(number, came_E) for came_E in came]
        tables = self._exchange.tables(number)
        is_plain = self._is_plain and (times is None or times.is_whole) and not self._exchange.is_open
        exchange = self._mix_plainly if is_plain else self._exchange_all
        squared_N, norms_N, exact, met_N, present_NK, bytes_N = exchange(number, local_steps, delivered, running, active_N, there_N)
        self.bytes_sent += int(bytes_N.sum())
        index_NK, skipped_NK = tables.index_NK.cpu().numpy(), (tables.linked_NK & ~present_NK).cpu().numpy()
        self._agree(number, met_N, norms_N, index_NK, delivered[-1].cpu().numpy(), np.asarray(skipped_NK.any(axis=1)))
        mix_s = self._stopwatch.lap("mix")
        self.round = number + 1
        last = self.is_over
        metrics = None
        if experiment.evaluate_every and (self.round % experiment.evaluate_every == 0 or last):
            metrics = dict(zip(self._recorded, self.population.evaluate(self._recorded), strict=True))
        if experiment.save_models_every and self.round % experiment.save_models_every == 0:
            write_models(self.folder.path, self.plan.names, self.population.estimate(), self.plan.layout, self.population.buffers, number)
        seconds = {"train": train_s, "mix": mix_s, "evaluate": self._stopwatch.lap("evaluate")}
        return self._record(number, losses_N, squared_N, norms_N, exact, index_NK, skipped_NK, metrics, bytes_N.tolist(), seconds, times)

    @property
    def _is_plain(self) -> bool:
        """Whether rows are just averaged: then they can be so in place."""
        return self._faults is None and self.population.device.type == "cpu" and is_plain(self.plan)

    def _mix_plainly(
        self,
        number: int,
        local_steps: int,
        delivered: list[Tensor],
        running: Tensor,
        active_N: Tensor | None,
        there_N: Tensor | None,
    ) -> _Exchanged:
        """Average in place."""
        (delivered_NK,) = delivered
        tables, x_NP = self._exchange.tables(number), self.population.state["x"]
        present_NK = delivered_NK & running[:, None] & running[tables.index_NK]
        sent = self.population.outgoing(number, 0, local_steps=local_steps)
        mixed = mix_in_place(x_NP, tables.index_NK, tables.weights_NK, present_NK, threads=self.population.threads, active_N=active_N)
        squared_N, norms_N = mixed.squared_N.numpy(), mixed.squared_norms_N.numpy()
        return squared_N, norms_N, mixed.distance, squared_N, present_NK, self._exchange.bytes_sent(number, sent, there_N)

    def _exchange_all(
        self,
        number: int,
        local_steps: int,
        delivered: list[Tensor],
        running: Tensor,
        active_N: Tensor | None,
        there_N: Tensor | None,
    ) -> _Exchanged:
        """What the algorithm's phases make of the rows."""
        phases = self.plan.recipe.algorithm.phases
        inboxes, bytes_N = [], np.zeros(len(self.plan.names), dtype=np.int64)
        for phase in range(phases):
            sent = self.population.outgoing(number, phase, local_steps=local_steps)
            inbox = self._exchange.inbox(number * phases + phase, delivered[phase], running, sent, active_N)
            self.population.merge(number, phase, inbox, local_steps=local_steps, active_N=active_N)
            inboxes.append(inbox)
            bytes_N += self._exchange.bytes_sent(number * phases + phase, sent, there_N)
            for receiver, sender in self._exchange.resynchronised:
                event = {"round": number, "node": self.plan.names[receiver], "event": "resynchronised"}
                self.folder.append_event({**event, "detail": f"{self.plan.names[sender]} at exchange {number * phases + phase}"})
        squared_N, norms_N, exact = self._disagreement(inboxes)
        present_NK = torch.stack([inbox.present_NK for inbox in inboxes]).all(dim=0)
        return squared_N, norms_N, exact, self._met(squared_N, inboxes), present_NK, bytes_N

    def save(self) -> None:
        """A checkpoint from which `restore` continues exactly."""
        story = {
            "round": self.round,
            "agreed_for": self.agreed_for_N.tolist(),
            "stop_round": self.stop_round_N.tolist(),
            "bytes_sent": self.bytes_sent,
            "seconds": self._stopwatch.spent,
            "diverged": list(self.population.diverged),
            "meetings": self._meetings.story() if self._meetings else None,
        }
        tensors = self.population.tensors()
        if self._sent_NP is not None:
            tensors["last_sent"] = self._sent_NP
        if self._clock is not None:
            tensors |= {f"clock/{name}": torch.from_numpy(array) for name, array in self._clock.arrays().items()}
            tensors |= {f"exchange/{name}": tensor for name, tensor in self._exchange.tensors().items()}
            story["exchange"] = self._exchange.story()
        if self._faults is None:  # a scripted fault's open flows are not kept: such runs are for study and short
            write_checkpoint(self.folder.path / _CHECKPOINT, tensors, story)

    def restore(self) -> None:
        """Go on from the folder's checkpoint; from the start where it has none."""
        found = read_checkpoint(self.folder.path / _CHECKPOINT)
        if found is not None:
            tensors, story = found
            self.population.restore(tensors)
            self.round, self.bytes_sent = story["round"], story["bytes_sent"]
            self.agreed_for_N, self.stop_round_N = np.array(story["agreed_for"]), np.array(story["stop_round"])
            self._stopwatch.spent = dict(story["seconds"])
            self.population.diverged = tuple(story["diverged"])
            if self._clock is not None:
                self._clock.restore({name: tensor.numpy() for name, tensor in _under("clock/", tensors).items()})
                self._exchange.restore(_under("exchange/", tensors), story["exchange"])
            if self._meetings:
                self._meetings.restore(story["meetings"])
                self._sent_NP = tensors.get("last_sent")
        self.folder.truncate(self.round)

    def finish(self) -> None:
        """Settle, evaluate, compare with the baselines, write models and summary."""
        plan, population = self.plan, self.population
        returns = dict(self._exchange.settle())
        for phase in range(plan.recipe.algorithm.phases if returns else 0):
            nobody = torch.zeros_like(self._exchange.tables(self.round).linked_NK)
            sent = population.outgoing(self.round, phase, local_steps=0)
            closing = SlotInbox(
                channels=plan.recipe.algorithm.channels,
                sent=sent,
                weights_NK=torch.zeros(nobody.shape, dtype=plan.layout.dtype, device=population.device),
                present_NK=nobody,
                slot=_no_message,
                returns={name: returns.pop(name) for name in returns.keys() & sent.keys()},  # once, though phases share a channel
            )
            population.merge(self.round, phase, closing, local_steps=0)
        measured = spread(len(plan.names), most=_MEASURED, all_up_to=_MEASURED)
        per_node = dict(zip((plan.names[row] for row in measured), population.evaluate(measured), strict=True))
        agreed = bool((self.stop_round_N < self.round).all()) and plan.stop_rule is not None
        reason = "converged" if agreed else "rounds"
        conclude(
            plan,
            self.folder,
            self._stopwatch,
            population=population,
            x_NP=population.estimate(),
            buffers=population.buffers,
            metrics=per_node,
            rounds=self.round,
            stop_reason="diverged" if population.all_diverged else reason,
            bytes_sent=self.bytes_sent,
            simulated_s=self._clock.now_s if self._clock is not None else None,
        )

    def _disagreement(self, inboxes: list[SlotInbox]) -> tuple[NDArray[np.float64], NDArray[np.float64], float | None]:
        """Of the models exchanged: sum_j ||x_i - x_j||**2 and ||x_i||**2 of each node, and the exact consensus distance."""
        channel = next((name for name, c in self.plan.recipe.algorithm.channels.items() if c.model), None)
        if channel is None:
            nothing = np.zeros(len(self.plan.names))
            return nothing, nothing, None
        inbox = next(inbox for inbox in inboxes if channel in inbox.sent)
        squared_N = inbox.squared_distances(channel).cpu().numpy()
        sent_NP = inbox.own(channel)
        norms_N = torch.linalg.vector_norm(sent_NP, dim=-1).double().square().cpu().numpy()
        return squared_N, norms_N, consensus_distance(sent_NP)

    def _met(self, squared_N: NDArray[np.float64], inboxes: list[SlotInbox]) -> NDArray[np.float64]:
        """What the stop rule is given: the distances themselves, or where the graph changes what the last rounds say of them."""
        channel = next((name for name, c in self.plan.recipe.algorithm.channels.items() if c.model), None)
        if self._meetings is None or channel is None:
            return squared_N
        sent_NP = next(inbox for inbox in inboxes if channel in inbox.sent).own(channel)
        moved_N = np.zeros_like(squared_N)
        if self._sent_NP is not None:
            moved_N = torch.linalg.vector_norm(sent_NP - self._sent_NP, dim=-1).double().cpu().numpy()
        self._sent_NP = sent_NP.clone()
        return self._meetings.bound(squared_N, moved_N)

    def _agree(
        self,
        number: int,
        squared_N: NDArray[np.float64],
        norms_N: NDArray[np.float64],
        index_NK: NDArray[np.int64],
        heard_NK: NDArray[np.bool_],
        skipped_N: NDArray[np.bool_],
    ) -> None:
        rule = self.plan.stop_rule
        if rule is None or number < self.plan.experiment.rounds:
            return
        running_N = self.stop_round_N >= number
        passed_N = np.logical_and(rule.passes(squared_N, norms_N), ~skipped_N)
        agreed_NK = np.where(heard_NK, self.agreed_for_N[index_NK], NEVER)
        stops_NK = np.where(heard_NK, self.stop_round_N[index_NK], NEVER)
        agreed_N = rule.agreed_for(passed_N, self.agreed_for_N, agreed_NK)
        stop_N = rule.stop_round(number, agreed_N, self.stop_round_N, stops_NK)
        self.agreed_for_N = np.where(running_N, agreed_N, self.agreed_for_N)
        self.stop_round_N = np.where(running_N, stop_N, self.stop_round_N)

    def _record(
        self,
        number: int,
        losses_N: Tensor | None,
        squared_N: NDArray[np.float64],
        norms_N: NDArray[np.float64],
        exact: float | None,
        index_NK: NDArray[np.int64],
        skipped_NK: NDArray[np.bool_],
        metrics: dict[int, dict[str, float]] | None,
        bytes_sent_N: list[int],
        seconds: dict[str, float],
        times: RoundTimes | None,
    ) -> dict[str, Any]:
        plan = self.plan
        kind = "train" if number < plan.experiment.rounds else "settle"
        losses = losses_N.tolist() if losses_N is not None else [None] * len(plan.names)
        rows = []
        for i in self._recorded:
            skipped = [plan.names[index_NK[i, k]] for k in skipped_NK[i].nonzero()[0]]
            row = {
                "round": number,
                "node": plan.names[i],
                "kind": kind,
                "loss": losses[i],
                "disagreement": float(squared_N[i] / 2),
                "norm": math.sqrt(norms_N[i]),
                "skipped": skipped,
                "agreed_for": int(self.agreed_for_N[i]),
                "stop_round": None if self.stop_round_N[i] == NEVER else int(self.stop_round_N[i]),
                "bytes_sent": bytes_sent_N[i],
                "seconds": seconds,
            }
            if metrics is not None:
                row["metrics"] = metrics[i]
            if times is not None:
                row["simulated_s"] = times.ended_N[i]
            rows.append(row)
        self.folder.append_node(*rows)
        row = disagreement_row(plan, number, kind, losses, float(squared_N.sum() / 2), float(norms_N.mean()), exact)
        row |= {"nodes": len(plan.names), "bytes_sent": sum(bytes_sent_N), "skipped": int(skipped_NK.sum()), "seconds": seconds}
        if times is not None:
            row["simulated_s"] = times.now_s
        self.folder.append_round(row)
        return row


def simulate(
    experiment: Experiment | Mapping[str, Any] | Path | str,
    *,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    replay: Path | str | None = None,
    device: torch.device | str = "cpu",
    faults: Faults | None = None,
    progress: Progress | None = None,
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
        faults: what goes wrong, by script.
        progress: called after each round.
        overrides: top-level keys to replace, such as rounds=10.

    Raises:
        ConfigError: what is asked is wrong, with all findings.
        StoreError: the disk failed.
    """
    if resume is not None:
        place = Path(resume)
        resolved = experiment_from(load_yaml(place / "experiment.yaml"), str(place / "experiment.yaml"))
        if (place / "summary.json").exists():
            return Run(place)
    elif replay is not None:
        resolved = experiment_from(load_yaml(Path(replay) / "experiment.yaml"), str(Path(replay) / "experiment.yaml"), overrides)
        place = Path(out) if out is not None else Path("runs") / f"{resolved.name}-replayed"
    else:
        resolved = resolve(experiment, overrides)
        place = Path(out) if out is not None else Path("runs") / resolved.name
    check_device(device)
    if resolved.clock is not None and faults is not None:
        raise ConfigError("clock: has faults of its own (loss, churn, stragglers); run scripted ones without a clock")
    if resolved.pace.name != "synchronous" and (faults is not None or str(device) != "cpu"):
        raise ConfigError(f"pace.name = {resolved.pace.name!r}: runs on the CPU and without scripted faults; take synchronous for these")
    plan = make_plan(resolved, load_sites(resolved))
    refuse_what_does_not_fit(plan)
    recorded = recorded_rows(Path(replay), plan) if replay is not None else None
    folder = (
        RunFolder.open(place)
        if resume is not None
        else RunFolder.create(place, plan.experiment.as_dict(), topology=plan.graph_record(), engine="simulator")
    )
    if recorded is not None:
        replay_of = AsynchronousReplay if resolved.pace.name == "asynchronous" else PairwiseReplay
        replay_of(plan, folder, recorded, progress).run()
        return Run(place)
    if resolved.pace.name != "synchronous":
        paced = AsynchronousSimulation if resolved.pace.name == "asynchronous" else PairwiseSimulation
        at_own_pace = paced(plan, folder, progress)
        if resume is not None:
            at_own_pace.restore()
        at_own_pace.run()
        return Run(place)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several parts of the rows at once are faster than one with several threads
    try:
        simulation = Simulation(plan, folder, device=device, faults=faults, threads=threads if str(device) == "cpu" else 1)
        if resume is not None:
            simulation.restore()
        simulation.run(progress)
    finally:
        torch.set_num_threads(threads)
    return Run(place)


def check_device(device: torch.device | str) -> None:
    """Refuse a device that is not there.

    Raises:
        ConfigError: torch does not know it or cannot use it here.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device = {str(device)!r}: cannot be used here ({str(error).splitlines()[0]}); use cpu", "--device") from error


def spread(num_nodes: int, *, most: int, all_up_to: int) -> list[int]:
    """All rows, or `most` of them evenly spread where there are more than `all_up_to`."""
    if num_nodes <= all_up_to:
        return list(range(num_nodes))
    return [int(i) for i in np.linspace(0, num_nodes - 1, most)]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _no_message(channel: str, k: int, rows: Tensor | None) -> Tensor:
    raise StoreError(f"no message of channel {channel} in slot {k} for rows {rows}")
