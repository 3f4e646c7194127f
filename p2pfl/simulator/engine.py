"""The rounds of a simulated network: rows of one population, all in one process, or some at each of several ranks.

Shapes: N nodes, M rows of this rank (all N in one process), K neighbour slots, P parameters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.errors import ConfigError
from p2pfl.evaluation.baselines import asks_for, trained_alone
from p2pfl.evaluation.conclusion import conclude
from p2pfl.evaluation.gain_over_local import gains_over_local
from p2pfl.evaluation.progress import Progress
from p2pfl.evaluation.results import STACKED_ABOVE, write_models
from p2pfl.evaluation.summary import FinalModels, Outcome
from p2pfl.experiment.plan import Plan
from p2pfl.faults.script import FaultScript
from p2pfl.runs.checkpoint import read_checkpoint, write_checkpoint
from p2pfl.runs.events import event_row, training_rows
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.rows import NetworkRow, NodeRow, kind_of_round, network_row
from p2pfl.runs.stopwatch import Stopwatch, peak_rss_bytes
from p2pfl.runs.text import Row
from p2pfl.simulator.agreement import Agreement
from p2pfl.simulator.events.clock import RoundClock
from p2pfl.simulator.exchange import Participation
from p2pfl.simulator.forecast import training_is_worth_it
from p2pfl.simulator.mixer import Measures, Mixer
from p2pfl.simulator.sharding.ranks import Ranks
from p2pfl.simulator.sharding.shard import Shard

_CHECKPOINT = "checkpoint.safetensors"
_CHECKPOINT_S = 2.0  # between two of them: what is lost is computed again, exactly

_MEASURED = 10_000
"""Largest number of nodes whose final models are measured, evenly spread where there are more."""


class Simulation:
    """A network whose nodes go round by round.

    Args:
        plan: what to run; all sites' data are here.
        folder: where it writes; only the first rank does.
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
        self.population = plan.rows(names, all_slots=True)(device=device)
        self.population.use_threads(threads)
        self.diverged: tuple[str, ...] = ()
        """Nodes whose last training became non-finite."""
        self._clock = RoundClock.of(plan, faults) if plan.experiment.clock is not None else None
        is_lossy = self._clock is not None and self._clock.gives_up
        script, bound = faults if self._clock is None else None, plan.time_varying_bound(plan.names)
        self._mixer = Mixer(plan, self.population, self._shard, script, is_lossy=is_lossy, moves=bound is not None)
        self.round = 0
        self._agreement = Agreement(len(plan.names), plan.stop_rule, bound, first_round=plan.experiment.rounds)
        self.bytes_sent = 0
        self._faults = faults
        self._recorded = spread(len(plan.names), most=100, all_up_to=STACKED_ABOVE)
        if plan.recipe.compiled or training_is_worth_it(plan):
            self.population.compile()
        self._stopwatch.lap("setup")

    @property
    def is_over(self) -> bool:
        """Whether every node has stopped."""
        return self.round >= self.plan.experiment.last_possible_round or self._agreement.is_reached(self.round)

    def run(self, progress: Progress | None = None) -> None:
        """Run rounds until every node has stopped, then conclude the run."""
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
        """Do one round of every node; returns the network's record of it."""
        experiment, number = self.plan.experiment, self.round
        local_steps = experiment.local_steps_at(number)
        running_N = self._agreement.stop_round_N >= number
        times = self._clock.round(number, local_steps=local_steps, running_N=running_N) if self._clock is not None else None
        who = self._mixer.participation(number, running_N, times)
        losses_M = self.population.train(number, who.trains_M, in_place=True) if local_steps else None
        train_s = self._stopwatch.lap("train")
        measures = self._mixer.measures(self._mixer.mix(number, local_steps, who), losses_M, self.population.estimate())
        self.diverged, self.bytes_sent = measures.diverged, self.bytes_sent + int(measures.bytes_N.sum())
        if self._ranks.is_first:
            for kind, node, detail in measures.notices:
                self.folder.append_event(event_row(kind, number, self.plan.names[node], detail))
            for event in training_rows(number, measures.diverged, measures.without_loss) if local_steps > 0 else ():
                self.folder.append_event(event)
        heard_NK, skipped_N = who.delivered[-1].cpu().numpy(), np.asarray(who.skipped_NK.any(axis=1))
        index_NK = who.tables.index_NK.cpu().numpy()
        self._agreement.end_round(number, measures.squared_N, measures.moved_N, measures.norms_N, index_NK, heard_NK, skipped_N)
        mix_s = self._stopwatch.lap("mix")
        self.round = number + 1
        metrics = None
        if experiment.evaluate_every and (self.round % experiment.evaluate_every == 0 or self.is_over):
            metrics = self._evaluated(self._recorded)
        if experiment.save_models_every and self.round % experiment.save_models_every == 0:
            x_NP, buffers = self._models()
            if x_NP is not None:
                write_models(self.folder.path, self.plan.names, x_NP, self.plan.layout, buffers, number)
        seconds = {"train": train_s, "mix": mix_s, "evaluate": self._stopwatch.lap("evaluate")}
        return self._record(number, who, measures, index_NK, metrics, seconds)

    def _evaluated(self, nodes: Sequence[int]) -> dict[int, dict[str, float]]:
        """Evaluate models of some nodes on their own test rows."""
        here = [node for node in nodes if node in self._shard.row_of]
        figures = self.population.evaluate([self._shard.row_of[node] for node in here])
        told = self._ranks.all_gather_object(list(zip(here, figures, strict=True)))
        return dict(sorted((node, found) for part in told for node, found in part))

    def _models(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Gather parameters and buffers of all nodes at the first rank; None at the others."""
        x_NP = self._shard.gather(self.population.estimate())
        buffers = {name: self._shard.gather(rows) for name, rows in self.population.buffers.items()}
        return x_NP, {name: rows for name, rows in buffers.items() if rows is not None}

    def save(self) -> None:
        """Write a checkpoint from which `restore` continues exactly."""
        metadata = {
            "round": self.round,
            **self._agreement.metadata(),
            "bytes_sent": self.bytes_sent,
            "seconds": self._stopwatch.spent,
            "diverged": list(self.diverged),
        }
        tensors = self.population.tensors()
        if self._mixer.sent_MP is not None:
            tensors["last_sent"] = self._mixer.sent_MP
        if self._faults is not None:  # a scripted fault's open flows are not kept: such runs are for study and short
            return
        if self._clock is not None:
            metadata["exchange"] = self._mixer.ledger.metadata()
        whole = {name: self._shard.gather(tensor) for name, tensor in tensors.items()}
        if self._ranks.is_first:
            kept = {name: tensor for name, tensor in whole.items() if tensor is not None}
            if self._clock is not None:  # the same at all ranks
                kept |= {f"clock/{name}": torch.from_numpy(array) for name, array in self._clock.arrays().items()}
                kept |= {f"exchange/{name}": tensor for name, tensor in self._mixer.ledger.tensors().items()}
            write_checkpoint(self.folder.path / _CHECKPOINT, kept, metadata)

    def restore(self) -> None:
        """Go on from the folder's checkpoint, which any number of ranks may have written; from the start where it has none."""
        found = read_checkpoint(self.folder.path / _CHECKPOINT) if self._ranks.is_first else None
        metadata = self._ranks.broadcast_object(found[1] if found is not None else None)
        if metadata is not None:
            tensors = self._shard.scatter(found[0] if found is not None else None, whole=("clock/", "exchange/"))
            self.population.restore(tensors)
            self.round, self.bytes_sent = metadata["round"], metadata["bytes_sent"]
            self._agreement.restore(metadata)
            self._mixer.restore(tensors.get("last_sent"))
            self._stopwatch.resume(metadata["seconds"])
            self.diverged = tuple(metadata["diverged"])
            here = {self.plan.names[node] for node in self._shard.mine} if self.diverged else set()
            self.population.mark_diverged(name for name in self.diverged if name in here)
            if self._clock is not None:
                self._clock.restore({name: tensor.numpy() for name, tensor in _under("clock/", tensors).items()})
                self._mixer.ledger.restore(_under("exchange/", tensors), metadata["exchange"])
                if self._mixer.ledger.is_open and not self._shard.is_all:
                    raise ConfigError(
                        f"{self.folder.path / _CHECKPOINT}: messages were lost, and {self._ranks.count} ranks cannot take them back; "
                        "go on in one process, without torchrun"
                    )
        if self._ranks.is_first:
            self.folder.truncate(self.round)

    def finish(self) -> None:
        """Roll back open flows, evaluate, and conclude the run."""
        plan, population = self.plan, self.population
        self._mixer.roll_back(self.round)
        measured = spread(len(plan.names), most=_MEASURED, all_up_to=_MEASURED)
        per_node = {plan.names[node]: figures for node, figures in self._evaluated(measured).items()}
        agreed = self._agreement.is_reached(self.round) and plan.stop_rule is not None
        reason = "converged" if agreed else "rounds"
        # a rank without anything to train has not learnt nothing
        told = self._ranks.all_gather_object([population.trains, population.all_diverged, peak_rss_bytes()])
        all_diverged = any(trains for trains, _, _ in told) and all(lost or not trains for trains, lost, _ in told)
        local, gains = self._local_baseline()
        x_NP, buffers = self._models()
        if x_NP is None:
            return
        outcome = Outcome(
            scope="network",
            engine="simulator" if self._shard.is_all else "sharded",
            rounds=self.round,
            stop_reason="diverged" if all_diverged else reason,
            bytes_sent=self.bytes_sent,
            metrics=per_node,
            models=FinalModels(names=plan.names, x_NP=x_NP, buffers=buffers, population=population),
            book=self._stopwatch.book,
            row_by_row=population.row_by_row,
            peak_rss_bytes=max(peak for _, _, peak in told),
            local=local,
            gains=gains,
            simulated_s=self._clock.now_s if self._clock is not None else None,
        )
        conclude(plan, self.folder, outcome)

    def _local_baseline(self) -> tuple[dict[str, dict[str, float]] | None, list[Row] | None]:
        """Each node trained alone and what the network is worth to it, where several ranks share the work; else `conclude` does it."""
        plan = self.plan
        if self._shard.is_all or not asks_for(plan, "local"):
            return None, None
        mine = self._shard.mine.tolist()
        names = [plan.names[node] for node in mine]
        alone = trained_alone(plan.task, [plan.sites[name] for name in names], mine, plan.model, plan.recipe)
        gains = gains_over_local(plan, self.population, self.population.estimate(), names, alone)
        told = self._ranks.all_gather_object([list(zip(mine, alone.evaluate(), strict=True)), gains])
        figures = sorted((pair for part, _ in told for pair in part), key=lambda pair: pair[0])
        rows = sorted((row for _, part in told for row in part), key=lambda row: plan.names.index(row["site"]))
        return {plan.names[node]: found for node, found in figures}, rows

    def _record(
        self,
        number: int,
        who: Participation,
        measures: Measures,
        index_NK: NDArray[np.int64],
        metrics: dict[int, dict[str, float]] | None,
        seconds: dict[str, float],
    ) -> NetworkRow:
        """Record a round of some nodes, and of the network."""
        compared_N = who.compared(measures.phase) if measures.phase is not None else None
        skipped_NK, times = who.skipped_NK, who.times
        plan = self.plan
        kind = kind_of_round(number, plan.experiment.rounds)
        rows = [
            NodeRow(
                round=number,
                node=plan.names[i],
                kind=kind,
                loss=measures.losses[i],
                disagreement=float(measures.squared_N[i] / 2) if compared_N is not None and compared_N[i] else None,
                norm=math.sqrt(measures.norms_N[i]) if compared_N is not None else None,
                skipped=[plan.names[index_NK[i, k]] for k in skipped_NK[i].nonzero()[0]],
                agreed_for=int(self._agreement.consensus_counter_N[i]),
                stop_round=self._agreement.stop_round(i),
                bytes_sent=int(measures.bytes_N[i]),
                seconds=seconds,
                metrics=metrics[i] if metrics is not None else None,
                simulated_s=times.ended_N[i] if times is not None else None,
            )
            for i in self._recorded
        ]
        row = network_row(
            plan.bound_rule,
            number,
            kind,
            losses=measures.losses,
            disagreement=float(measures.squared_N.sum() / 2) if compared_N is not None and compared_N.any() else None,
            mean_squared_norm=float(measures.norms_N.mean()) if compared_N is not None else None,
            nodes=len(plan.names),
            skipped=int(skipped_NK.sum()),
            rms_disagreement=measures.rms_disagreement,
            consensus_distance=measures.consensus_distance,
            bytes_sent=int(measures.bytes_N.sum()),
            seconds=seconds,
            simulated_s=times.now_s if times is not None else None,
        )
        if self._ranks.is_first:
            self.folder.append_node(*rows)
            self.folder.append_round(row)
        return row


def spread(num_nodes: int, *, most: int, all_up_to: int) -> list[int]:
    """Select all rows, or `most` of them evenly spread where there are more than `all_up_to`."""
    if num_nodes <= all_up_to:
        return list(range(num_nodes))
    return [int(i) for i in np.linspace(0, num_nodes - 1, most)]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
