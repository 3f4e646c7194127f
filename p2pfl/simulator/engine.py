"""The whole network as rows of one population, mixed in place of messages: all of them in one process, or some at each of several ranks.

Shapes: N nodes, M rows of this rank (all N in one process), K neighbour slots, P parameters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.algorithms import Notice
from p2pfl.algorithms.stopping import NEVER
from p2pfl.errors import ConfigError
from p2pfl.evaluation.baselines import trained_alone
from p2pfl.evaluation.conclusion import conclude
from p2pfl.evaluation.gain_over_local import worth
from p2pfl.evaluation.progress import Progress
from p2pfl.evaluation.results import STACKED_ABOVE, write_models
from p2pfl.evaluation.summary import asks_for, peak_rss_bytes, squared_distances_from_mean
from p2pfl.experiment.plan import Plan
from p2pfl.faults.script import FaultScript
from p2pfl.runs.checkpoint import read_checkpoint, write_checkpoint
from p2pfl.runs.events import EventKind, event_row
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.rows import NetworkRow, NodeRow, Row, kind_of_round, network_row
from p2pfl.runs.stopwatch import Stopwatch
from p2pfl.simulator.compiling import mixing_is_worth_it, training_is_worth_it
from p2pfl.simulator.events.clock import RoundClock, RoundTimes
from p2pfl.simulator.exchange import Exchange
from p2pfl.simulator.mixing import is_plain, load_compiled
from p2pfl.simulator.sharding.ranks import Ranks
from p2pfl.simulator.sharding.shard import Shard

_CHECKPOINT = "checkpoint.safetensors"
_CHECKPOINT_S = 2.0  # between two of them: what is lost is computed again, exactly

_MEASURED = 10_000
"""Of more nodes than this the final models of so many, evenly spread, are measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Exchanged:
    """What a round's exchange says of the models that were sent, and what they took; zeros where no models are sent."""

    squared_M: Tensor
    """float64, sum_j ||x_i - x_j||**2."""
    norms_M: Tensor
    """float64, ||x_i||**2."""
    apart_M: Tensor | None
    """float64, ||x_i - mean||**2."""
    moved_M: Tensor
    """float64, ||x_i - x_i of the round before||, where the stop rule asks."""
    bytes_N: NDArray[np.int64]
    phase: int | None
    """The phase in which models were sent; None: in no phase."""


_LEFT, _WITHOUT_LOSS = 1, 2  # how a row's training ended, where it did not end well


class Simulation:
    """A network that runs in this process.

    Args:
        plan: what to run; all sites' data are here.
        folder: where it writes; only the first rank does.
        device: where it computes.
        faults: what goes wrong by script.
        threads: train so many parts of the rows at the same time, each with one of torch's own threads.
        shard: which rows are computed here; None: all.
        stopwatch: goes on from what the run has taken so far; None: begins here.
    """

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        *,
        device: torch.device | str = "cpu",
        faults: FaultScript | None = None,
        threads: int = 1,
        shard: Shard | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self._stopwatch = stopwatch if stopwatch is not None else Stopwatch()
        self.plan, self.folder = plan, folder
        self._shard = shard if shard is not None else Shard.of(Ranks(device=torch.device(device)), plan.topology)
        self._ranks = self._shard.ranks
        names = plan.names if self._shard.is_all else [plan.names[node] for node in self._shard.mine]
        self.population = plan.population(names, device, all_slots=True)
        self.population.threads = threads
        self.diverged: tuple[str, ...] = ()
        """Nodes whose last training left the finite numbers."""
        self._without_loss: tuple[str, ...] = ()
        """Nodes whose last training gave no finite loss, with finite weights."""
        self._clock = RoundClock.of(plan) if plan.experiment.clock is not None else None
        self._exchange = Exchange(
            plan.schedule,
            plan.recipe,
            dtype=plan.layout.dtype,
            device=self.population.device,
            faults=faults,
            is_lossy=self._clock is not None and self._clock.gives_up,
            shard=self._shard,
        )
        num_nodes = len(plan.names)
        self.round = 0
        self.agreed_for_N = np.zeros(num_nodes, dtype=np.int64)
        self.stop_round_N = np.full(num_nodes, NEVER, dtype=np.int64)
        self.bytes_sent = 0
        self._faults = faults
        self._meetings = plan.meetings(plan.names)
        self._sent_MP: Tensor | None = None  # models of the last round, where the graph changes
        self._recorded = spread(num_nodes, most=100, all_up_to=STACKED_ABOVE)
        if plan.recipe.compiled or training_is_worth_it(plan):
            self.population.compile()
        self._compiled = self._is_plain and mixing_is_worth_it(plan) and load_compiled(plan.layout.dtype)
        self._stopwatch.lap("setup")

    @property
    def is_over(self) -> bool:
        """Whether every node has stopped."""
        return self.round >= self.plan.experiment.last_possible_round or bool((self.stop_round_N < self.round).all())

    def run(self, progress: Progress | None = None) -> None:
        """Round after round until every node has stopped, then what is to be said of it."""
        experiment, saved_s = self.plan.experiment, time.monotonic()
        while not self.is_over:
            row = self.step()
            if progress is not None and self._ranks.is_first:
                progress(self.round, experiment.last_possible_round, row.as_row())
            due = self.round % experiment.checkpoint_every == 0
            if due and self._ranks.broadcast_object(time.monotonic() - saved_s >= _CHECKPOINT_S):
                self.save()
                saved_s = time.monotonic()
            self._stopwatch.lap("write")
        self.finish()

    def step(self) -> NetworkRow:
        """One round of every node; returns the network's record of it."""
        experiment, number = self.plan.experiment, self.round
        local_steps = experiment.local_steps_at(number)
        running_N = self.stop_round_N >= number
        running = torch.from_numpy(running_N).to(self.population.device)
        times = self._clock.round(number, local_steps=local_steps, running_N=running_N) if self._clock is not None else None
        there_N, trains_N = self._exchange.active(number), None
        if times is not None and not times.is_whole:
            there_N, trains_N = (torch.from_numpy(mask_N).to(self.population.device) for mask_N in (times.active_N, times.trains_N))
            there_N = there_N | ~running
        active_N = there_N
        if not running_N.all():
            active_N = running if active_N is None else active_N & running
        came = times.came if times is not None and not times.is_whole else (None,) * self.plan.recipe.algorithm.phases
        delivered = [self._exchange.delivered(number, came_E) for came_E in came]
        tables = self._exchange.tables(number)
        both_NK = running[:, None] & running[tables.index_NK]
        present_NK = torch.stack(delivered).all(dim=0) & both_NK
        if times is not None and not self._shard.is_all:
            self._refuse_losses(number, int((tables.linked_NK & both_NK & ~present_NK).sum()))
        active_M = self._shard.local(active_N) if active_N is not None else None
        trains_M = self._shard.local(trains_N) if trains_N is not None else active_M
        losses_M = self.population.train(number, trains_M, in_place=True) if local_steps else None
        train_s = self._stopwatch.lap("train")
        is_plain = self._is_plain and (times is None or times.is_whole) and not self._exchange.is_open
        exchange = self._mix_plainly if is_plain else self._exchange_all
        exchanged = exchange(number, local_steps, delivered, running, active_M, there_N)
        losses_N, squared_N, norms_N, exact, mixed, moved_N = self._of_all(losses_M, exchanged)
        for name in self.diverged if local_steps and self._ranks.is_first else ():
            detail = f"round {number}: training left the finite numbers and was taken back; lower optimizer.lr or set clip_norm"
            self.folder.append_event(event_row(EventKind.DIVERGED, number, name, detail))
        for name in self._without_loss if local_steps and self._ranks.is_first else ():
            self.folder.append_event(event_row(EventKind.NO_LOSS, number, name, f"round {number}"))
        bytes_N = exchanged.bytes_N
        self.bytes_sent += int(bytes_N.sum())
        index_NK, skipped_NK = tables.index_NK.cpu().numpy(), (tables.linked_NK & ~present_NK).cpu().numpy()
        met_N = self._meetings.bound(squared_N, moved_N) if self._meetings is not None and self._model_channel is not None else squared_N
        self._agree(number, met_N, norms_N, index_NK, delivered[-1].cpu().numpy(), np.asarray(skipped_NK.any(axis=1)))
        mix_s = self._stopwatch.lap("mix")
        self.round = number + 1
        last = self.is_over
        metrics = None
        if experiment.evaluate_every and (self.round % experiment.evaluate_every == 0 or last):
            metrics = self._evaluated(self._recorded)
        if experiment.save_models_every and self.round % experiment.save_models_every == 0:
            x_NP, buffers = self._models()
            if x_NP is not None:
                write_models(self.folder.path, self.plan.names, x_NP, self.plan.layout, buffers, number)
        heard_NK = tables.linked_NK & both_NK & delivered[exchanged.phase] if exchanged.phase is not None else None
        compared_N = heard_NK.any(dim=1).cpu().numpy() if heard_NK is not None else None
        seconds = {"train": train_s, "mix": mix_s, "evaluate": self._stopwatch.lap("evaluate")}
        losses = losses_N.tolist() if losses_N is not None else [None] * len(self.plan.names)
        return self._record(
            number, losses, squared_N, norms_N, compared_N, (exact, mixed), index_NK, skipped_NK, metrics, bytes_N.tolist(), seconds, times
        )

    @property
    def _is_plain(self) -> bool:
        """Whether rows are just averaged: then they can be so in place."""
        return self._faults is None and self.population.device.type == "cpu" and is_plain(self.plan)

    @property
    def _model_channel(self) -> str | None:
        """The channel that carries models."""
        return self.plan.recipe.algorithm.model_channel

    def _refuse_losses(self, number: int, num_late: int) -> None:
        """Nothing, if every message of a round comes in time; ranks keep no account of what was not taken in at the other side.

        Raises:
            ConfigError: some do not.
        """
        if num_late:
            raise ConfigError(
                f"clock: in round {number} the deadline is over for {num_late} messages, which {self._ranks.count} ranks cannot take back; "
                "go on with --resume in one process, without torchrun, or start again with a higher clock.deadline_floor_s"
            )

    def _mix_plainly(
        self,
        number: int,
        local_steps: int,
        delivered: list[Tensor],
        running: Tensor,
        active_M: Tensor | None,
        there_N: Tensor | None,
    ) -> _Exchanged:
        """Average in place."""
        (delivered_NK,) = delivered
        sent = self.population.outgoing(number, 0, local_steps=local_steps)
        bytes_N, threads = self._exchange.bytes_sent(number, sent, there_N), self.population.threads
        mixed = self._exchange.mix_in_place(
            number, sent["x"], delivered_NK, running, threads=threads, active_M=active_M, compiled=self._compiled
        )
        apart_M = mixed.apart_N
        if not self._shard.is_all:  # measured from the mean of this rank's rows
            off_P = mixed.mean_P.double()
            off_P = off_P - self._ranks.all_reduce(off_P * len(apart_M)) / len(self.plan.names)
            apart_M = apart_M + off_P.square().sum()
        moved_M = torch.zeros_like(apart_M)
        return _Exchanged(
            squared_M=mixed.squared_N, norms_M=mixed.squared_norms_N, apart_M=apart_M, moved_M=moved_M, bytes_N=bytes_N, phase=0
        )

    def _exchange_all(
        self,
        number: int,
        local_steps: int,
        delivered: list[Tensor],
        running: Tensor,
        active_M: Tensor | None,
        there_N: Tensor | None,
    ) -> _Exchanged:
        """What the algorithm's phases make of the rows."""
        phases, channel = self.plan.recipe.algorithm.phases, self._model_channel
        bytes_N = np.zeros(len(self.plan.names), dtype=np.int64)
        squared_M = norms_M = moved_M = torch.zeros(len(self._shard.mine), dtype=torch.float64)
        apart_M = measured = None
        for phase in range(phases):
            sent = self.population.outgoing(number, phase, local_steps=local_steps)
            inboxes = self._exchange.inboxes(number * phases + phase, delivered[phase], running, sent, active_M)
            self._tell(number, self.population.merge_in_parts(number, phase, inboxes, local_steps=local_steps, active_N=active_M))
            bytes_N += self._exchange.bytes_sent(number * phases + phase, sent, there_N)
            for receiver, sender in self._exchange.resynchronised if self._ranks.is_first else ():
                detail = f"{self.plan.names[sender]} at exchange {number * phases + phase}"
                self.folder.append_event(event_row(EventKind.RESYNCHRONISED, number, self.plan.names[receiver], detail))
            if channel in sent and apart_M is None:
                measured = phase
                squared_M = torch.cat([inbox.squared_distances(channel) for _, inbox in inboxes]).cpu()
                norms_M = torch.linalg.vector_norm(sent[channel], dim=-1).double().square().cpu()
                apart_M = self._apart(sent[channel])
                moved_M = self._moved(sent[channel])
        self._exchange.done()
        return _Exchanged(squared_M=squared_M, norms_M=norms_M, apart_M=apart_M, moved_M=moved_M, bytes_N=bytes_N, phase=measured)

    def _tell(self, number: int, notices: Sequence[Notice]) -> None:
        """Put on record what the rule has changed of its own accord, at all ranks."""
        if not self.plan.recipe.algorithm.has_notices:
            return
        here = [(int(self._shard.mine[notice.row]), notice.event, notice.detail) for notice in notices]
        for node, kind, detail in sorted(told for part in self._ranks.all_gather_object(here) for told in part):
            if self._ranks.is_first:
                self.folder.append_event(event_row(kind, number, self.plan.names[node], f"round {number}: {detail}"))

    def _apart(self, x_MP: Tensor) -> Tensor:
        """||x_i - mean||**2 of rows, (M,) float64 on the CPU."""
        if self._shard.is_all:
            return squared_distances_from_mean(x_MP)
        mean_P = (self._ranks.all_reduce(x_MP.sum(dim=0, dtype=torch.float64)) / len(self.plan.names)).to(x_MP.dtype)
        return squared_distances_from_mean(x_MP, mean_P)

    def _moved(self, sent_MP: Tensor) -> Tensor:
        """How far the models exchanged have moved since the last round, (M,) float64 on the CPU; 0 where nobody asks."""
        moved_M = torch.zeros(len(sent_MP), dtype=torch.float64)
        if self._meetings is not None:
            if self._sent_MP is not None:
                moved_M = torch.linalg.vector_norm(sent_MP - self._sent_MP, dim=-1).double().cpu()
            self._sent_MP = sent_MP.clone()
        return moved_M

    def _of_all(
        self, losses_M: Tensor | None, exchanged: _Exchanged
    ) -> tuple[Tensor | None, NDArray[np.float64], NDArray[np.float64], float | None, float, NDArray[np.float64]]:
        """Losses, squared distances, squared norms, root mean square distances before and after mixing, and ways of all nodes."""
        nothing_M = torch.zeros_like(exchanged.squared_M)
        left_M = nothing_M.clone()
        left, lossless = self.population.diverged, self.population.without_loss
        row_of = {self.plan.names[node]: row for node, row in self._shard.row_of.items()} if left or lossless else {}
        left_M[[row_of[name] for name in left]] = _LEFT
        left_M[[row_of[name] for name in lossless]] = _WITHOUT_LOSS
        columns = [
            losses_M.double() if losses_M is not None else nothing_M,
            exchanged.squared_M,
            exchanged.norms_M,
            exchanged.apart_M if exchanged.apart_M is not None else nothing_M,
            exchanged.moved_M,
            left_M,
            self._apart(self.plan.layout.shared_of(self.population.estimate())),
        ]
        losses_N, squared_N, norms_N, apart_N, moved_N, left_N, mixed_N = self._shard.all_gather(torch.stack(columns, dim=1)).unbind(dim=1)
        self.diverged = tuple(self.plan.names[node] for node in (left_N == _LEFT).nonzero().flatten().tolist())
        self._without_loss = tuple(self.plan.names[node] for node in (left_N == _WITHOUT_LOSS).nonzero().flatten().tolist())
        exact = float(apart_N.mean().sqrt()) if exchanged.apart_M is not None else None
        mixed = float(mixed_N.mean().sqrt())
        return losses_N if losses_M is not None else None, squared_N.numpy(), norms_N.numpy(), exact, mixed, moved_N.numpy()

    def _evaluated(self, nodes: Sequence[int]) -> dict[int, dict[str, float]]:
        """Some nodes' models on their own test rows."""
        here = [node for node in nodes if node in self._shard.row_of]
        figures = self.population.evaluate([self._shard.row_of[node] for node in here])
        told = self._ranks.all_gather_object(list(zip(here, figures, strict=True)))
        return dict(sorted((node, found) for part in told for node, found in part))

    def _models(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Everybody's parameters and buffers at the first rank; None at the others."""
        x_NP = self._shard.gather(self.population.estimate())
        buffers = {name: self._shard.gather(rows) for name, rows in self.population.buffers.items()}
        return x_NP, {name: rows for name, rows in buffers.items() if rows is not None}

    def save(self) -> None:
        """A checkpoint from which `restore` continues exactly."""
        agrees = self.plan.stop_rule is not None  # else nobody ever stops before the others
        story = {
            "round": self.round,
            "agreed_for": self.agreed_for_N.tolist() if agrees else None,
            "stop_round": self.stop_round_N.tolist() if agrees else None,
            "bytes_sent": self.bytes_sent,
            "seconds": self._stopwatch.spent,
            "diverged": list(self.diverged),
            "meetings": self._meetings.story() if self._meetings else None,
        }
        tensors = self.population.tensors()
        if self._sent_MP is not None:
            tensors["last_sent"] = self._sent_MP
        if self._faults is not None:  # a scripted fault's open flows are not kept: such runs are for study and short
            return
        if self._clock is not None:
            story["exchange"] = self._exchange.story()
        whole = {name: self._shard.gather(tensor) for name, tensor in tensors.items()}
        if self._ranks.is_first:
            kept = {name: tensor for name, tensor in whole.items() if tensor is not None}
            if self._clock is not None:  # the same at all ranks
                kept |= {f"clock/{name}": torch.from_numpy(array) for name, array in self._clock.arrays().items()}
                kept |= {f"exchange/{name}": tensor for name, tensor in self._exchange.tensors().items()}
            write_checkpoint(self.folder.path / _CHECKPOINT, kept, story)

    def restore(self) -> None:
        """Go on from the folder's checkpoint, which any number of ranks may have written; from the start where it has none."""
        found = read_checkpoint(self.folder.path / _CHECKPOINT) if self._ranks.is_first else None
        story = self._ranks.broadcast_object(found[1] if found is not None else None)
        if story is not None:
            rows, common = _split(found[0]) if found is not None else (None, None)
            tensors, whole = self._shard.scatter(rows), self._shard.broadcast(common)
            self.population.restore(tensors)
            self.round, self.bytes_sent = story["round"], story["bytes_sent"]
            if story["agreed_for"] is not None:
                self.agreed_for_N, self.stop_round_N = np.array(story["agreed_for"]), np.array(story["stop_round"])
            self._stopwatch.resume(story["seconds"])
            self.diverged = tuple(story["diverged"])
            here = {self.plan.names[node] for node in self._shard.mine} if self.diverged else set()
            self.population.diverged = tuple(name for name in self.diverged if name in here)
            if self._clock is not None:
                self._clock.restore({name: tensor.numpy() for name, tensor in _under("clock/", whole).items()})
                self._exchange.restore(_under("exchange/", whole), story["exchange"])
                if self._exchange.is_open and not self._shard.is_all:
                    raise ConfigError(
                        f"{self.folder.path / _CHECKPOINT}: messages were lost, and {self._ranks.count} ranks cannot take them back; "
                        "go on in one process, without torchrun"
                    )
            if self._meetings:
                self._meetings.restore(story["meetings"])
                last_sent = tensors.get("last_sent")
                self._sent_MP = last_sent.to(self.population.device) if last_sent is not None else None
        if self._ranks.is_first:
            self.folder.truncate(self.round)

    def finish(self) -> None:
        """Settle, evaluate, compare with the baselines, write models and summary."""
        plan, population = self.plan, self.population
        compensation = dict(self._exchange.settle())
        for phase in range(plan.recipe.algorithm.phases if compensation else 0):
            num_slots = self._exchange.tables(self.round).linked_NK.shape[1]
            sent = population.outgoing(self.round, phase, local_steps=0)
            due = {name: compensation.pop(name) for name in compensation.keys() & sent.keys()}  # once, though phases share a channel
            closing = plan.recipe.inboxes.without_messages(sent, num_slots, plan.layout.dtype, due)
            population.merge(self.round, phase, closing, local_steps=0)
        measured = spread(len(plan.names), most=_MEASURED, all_up_to=_MEASURED)
        per_node = {plan.names[node]: figures for node, figures in self._evaluated(measured).items()}
        agreed = bool((self.stop_round_N < self.round).all()) and plan.stop_rule is not None
        reason = "converged" if agreed else "rounds"
        # a rank without anything to train has not learnt nothing
        told = self._ranks.all_gather_object([population.trains, population.all_diverged, peak_rss_bytes()])
        all_diverged = any(trains for trains, _, _ in told) and all(lost or not trains for trains, lost, _ in told)
        local, gains = self._local_baseline()
        x_NP, buffers = self._models()
        if x_NP is None:
            return
        conclude(
            plan,
            self.folder,
            self._stopwatch,
            population=population,
            x_NP=x_NP,
            buffers=buffers,
            metrics=per_node,
            rounds=self.round,
            stop_reason="diverged" if all_diverged else reason,
            bytes_sent=self.bytes_sent,
            engine="simulator" if self._shard.is_all else "sharded",
            local=local,
            gains=gains,
            peak_rss_bytes=max(peak for _, _, peak in told),
            simulated_s=self._clock.now_s if self._clock is not None else None,
        )

    def _local_baseline(self) -> tuple[dict[str, dict[str, float]] | None, list[Row]]:
        """Each node trained alone and what the network is worth to it, where several ranks share the work; else `conclude` does it."""
        plan = self.plan
        if self._shard.is_all or not asks_for(plan, "local"):
            return None, []
        mine = self._shard.mine.tolist()
        names = [plan.names[node] for node in mine]
        alone = trained_alone(plan.task, [plan.sites[name] for name in names], mine, plan.model, plan.recipe)
        gains = worth(plan, self.population, self.population.estimate(), names, alone)
        told = self._ranks.all_gather_object([list(zip(mine, alone.evaluate(), strict=True)), gains])
        figures = sorted((pair for part, _ in told for pair in part), key=lambda pair: pair[0])
        rows = sorted((row for _, part in told for row in part), key=lambda row: plan.names.index(row["site"]))
        return {plan.names[node]: found for node, found in figures}, rows

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
        losses: Sequence[float | None],
        squared_N: NDArray[np.float64],
        norms_N: NDArray[np.float64],
        compared_N: NDArray[np.bool_] | None,
        distances: tuple[float | None, float],
        index_NK: NDArray[np.int64],
        skipped_NK: NDArray[np.bool_],
        metrics: dict[int, dict[str, float]] | None,
        bytes_sent_N: list[int],
        seconds: dict[str, float],
        times: RoundTimes | None,
    ) -> NetworkRow:
        plan = self.plan
        kind = kind_of_round(number, plan.experiment.rounds)
        rows = [
            NodeRow(
                round=number,
                node=plan.names[i],
                kind=kind,
                loss=losses[i],
                disagreement=float(squared_N[i] / 2) if compared_N is not None and compared_N[i] else None,
                norm=math.sqrt(norms_N[i]) if compared_N is not None else None,
                skipped=[plan.names[index_NK[i, k]] for k in skipped_NK[i].nonzero()[0]],
                agreed_for=int(self.agreed_for_N[i]),
                stop_round=None if self.stop_round_N[i] == NEVER else int(self.stop_round_N[i]),
                bytes_sent=bytes_sent_N[i],
                seconds=seconds,
                metrics=metrics[i] if metrics is not None else None,
                simulated_s=times.ended_N[i] if times is not None else None,
            )
            for i in self._recorded
        ]
        rms_disagreement, consensus_distance = distances
        row = network_row(
            plan.bound_rule,
            number,
            kind,
            losses=losses,
            disagreement=float(squared_N.sum() / 2) if compared_N is not None and compared_N.any() else None,
            mean_squared_norm=float(norms_N.mean()) if compared_N is not None else None,
            nodes=len(plan.names),
            skipped=int(skipped_NK.sum()),
            rms_disagreement=rms_disagreement,
            consensus_distance=consensus_distance,
            bytes_sent=sum(bytes_sent_N),
            seconds=seconds,
            simulated_s=times.now_s if times is not None else None,
        )
        if self._ranks.is_first:
            self.folder.append_node(*rows)
            self.folder.append_round(row)
        return row


def spread(num_nodes: int, *, most: int, all_up_to: int) -> list[int]:
    """All rows, or `most` of them evenly spread where there are more than `all_up_to`."""
    if num_nodes <= all_up_to:
        return list(range(num_nodes))
    return [int(i) for i in np.linspace(0, num_nodes - 1, most)]


def _split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint's rows, and what is of no single one."""
    common = {name: tensor for name, tensor in tensors.items() if name.startswith(("clock/", "exchange/"))}
    return {name: tensor for name, tensor in tensors.items() if name not in common}, common


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
