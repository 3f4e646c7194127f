"""Steps of a round that every pace shares: training, evaluation, the row and the checkpoint."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from p2pfl.evaluation.results import write_models
from p2pfl.experiment.plan import Plan
from p2pfl.node.checkpoint import Found, NodeCheckpoint, Progress
from p2pfl.node.clock import LoopClock
from p2pfl.node.mixing import RoundStatistics
from p2pfl.node.round_log import RoundLog
from p2pfl.node.run_log import RunLog
from p2pfl.node.seconds import PARTS, RunSeconds
from p2pfl.node.sending import Sending
from p2pfl.protocol.protocol import Protocol
from p2pfl.runs.events import EventKind
from p2pfl.runs.rows import NodeRow, kind_of_round
from p2pfl.training import Population
from p2pfl.training.freed_memory import return_freed_memory

TRIM_FROM_BYTES = 8 * 2**20
"""Size of a model from which on freed memory is given back after training; it takes less than a millisecond."""


class RoundSteps:
    """One node's place in the run, and the steps that move it on; a round's training takes *round_at_least_s* at least."""

    def __init__(
        self,
        plan: Plan,
        population: Population,
        protocol: Protocol,
        checkpoint: NodeCheckpoint,
        rounds: RoundLog,
        run_log: RunLog,
        sending: Sending,
        seconds: RunSeconds,
        clock: LoopClock,
        round_at_least_s: float,
    ) -> None:
        self._plan, self._population, self._protocol = plan, population, protocol
        self._checkpoint, self._rounds, self._log = checkpoint, rounds, run_log
        self._sending, self._run_seconds, self._clock, self._round_at_least_s = sending, seconds, clock, round_at_least_s
        self.place = Progress()
        self._seconds = dict.fromkeys(PARTS, 0.0)

    @property
    def exchange(self) -> int:
        """The exchange that the node is in."""
        return self.place.round * self._protocol.edges.phases + self.place.phase

    def restore(self, found: Found) -> None:
        """Go where a checkpoint was written."""
        self.place = self._checkpoint.restore(found)

    def move(self, **changes: Any) -> None:
        """Change the node's place in the run."""
        self.place = replace(self.place, **changes)

    def begin_exchange(self) -> None:
        """Tell the edges which exchange the node is in."""
        self._protocol.begin(self.exchange, self._clock.now_s())

    def begin_round(self) -> None:
        """Count a round's seconds from nothing."""
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def spend(self, part: str, since_s: float) -> None:
        """Add the time since a moment to a part of the round."""
        self._seconds[part] += self._clock.now_s() - since_s

    async def train(self, local_steps: int) -> None:
        """Take the round's local steps, if there are any."""
        if not local_steps or not self._population.trains:
            self.move(loss=None)
            return
        began_s, number, population = self._clock.now_s(), self.place.round, self._population
        loss = float((await asyncio.to_thread(population.train, number))[0])
        if self._plan.layout.size_bytes >= TRIM_FROM_BYTES:
            return_freed_memory()  # of gradients, before anything else comes in
        while self._clock.now_s() < (until_s := began_s + self._round_at_least_s) and not self._clock.is_stopping:
            await self._clock.wait(until_s)
        self.spend("train", began_s)
        if population.diverged:
            detail = f"round {number}: training became non-finite and was rolled back; lower optimizer.lr or set clip_norm"
            self._log.event(EventKind.DIVERGED, detail)
        if population.without_loss:
            self._log.event(EventKind.NO_LOSS, f"round {number}")
        self.move(loss=loss)

    async def end_round(self, seen: RoundStatistics, merged: list[Any] | None) -> None:
        """Evaluate and record the round before the node's place, and write a checkpoint.

        Args:
            seen: what its exchanges have shown.
            merged: whose updates it merged, where nodes do not go in step.
        """
        number = self.place.round - 1
        metrics = await self._evaluate(number)
        self._rounds.record(
            NodeRow(
                round=number,
                node=self._protocol.edges.me,
                kind=kind_of_round(number, self._plan.experiment.rounds),
                loss=self.place.loss,
                disagreement=None if seen.squared is None else seen.squared / 2,
                norm=seen.norm,
                skipped=sorted(seen.skipped),
                agreed_for=self._protocol.stopping.consensus_counter,
                stop_round=self._protocol.stopping.stop_round,
                bytes_sent=self._sending.take_bytes(),
                seconds=self._run_seconds.end_round(self._seconds),
                merged=merged,
                metrics=metrics,
            )
        )
        self._sending.wake()
        self.begin_round()
        await self.keep()

    async def keep(self) -> None:
        """Write a checkpoint; only then may it be told what it contains.

        It is written after every exchange, whatever `checkpoint_every` says: the next update tells of this one, and what has been told must
        be there after a crash.
        """
        began_s = self._clock.now_s()
        ledgers = self._protocol.edges.ledgers()
        await self._log.write(*self._checkpoint.prepare(self.place))
        self._protocol.edges.checkpointed(ledgers)
        self._run_seconds.note_checkpoint(self._clock.now_s() - began_s)

    async def _evaluate(self, number: int) -> dict[str, float] | None:
        experiment, population, metrics = self._plan.experiment, self._population, None
        began_s = self._clock.now_s()
        is_last = number + 1 >= experiment.last_possible_round or self._protocol.stopping.stop_round == number
        if (number + 1) % experiment.evaluate_every == 0 or is_last:
            metrics = (await asyncio.to_thread(population.evaluate))[0]
        if experiment.save_models_every and (number + 1) % experiment.save_models_every == 0:
            names, x_NP = (self._protocol.edges.me,), population.estimate()
            await self._log.write(write_models, self._log.folder.path, names, x_NP, self._plan.layout, population.buffers, number)
        self.spend("evaluate", began_s)
        return metrics
