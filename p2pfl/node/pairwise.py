"""A node that meets its neighbours one at a time, while everybody trains at their own pace.

An exchange over an edge is a request and an answer, both an Update of the edge's next number; both ends then move to the middle. Either
does so or, by the edge ledger, takes it back. A node that waits for an answer meets nobody else in the meantime: it takes a request of the
neighbour that it asked itself for the answer, lets those before it in the order of the names wait, and turns the others away, so that
nobody waits in a circle. What it does with its model happens in one task, one thing after the other, each on the disk before the next.

Shapes: one row, P parameters.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from p2pfl.algorithms import Algorithm, Context, SlotInbox, State
from p2pfl.draws import Purpose, shuffled
from p2pfl.errors import BadMessage
from p2pfl.experiment.plan import Plan
from p2pfl.node.mixing import is_finite
from p2pfl.params import tensor_over
from p2pfl.protocol.distance_watch import DistanceWatch
from p2pfl.protocol.neighbour import Neighbour
from p2pfl.protocol.protocol import HALF, Flow, Protocol
from p2pfl.runs.events import EventKind
from p2pfl.training import Population
from p2pfl.wire.messages import Busy
from p2pfl.wire.update import ReceivedUpdate, UpdateFormat

Entry = list[Any]
"""[neighbour, number of the exchange over that edge, "training" | "waiting", and perhaps what else happened]."""


@dataclass(kw_only=True)
class Surroundings:
    """What the daemon around it does for it."""

    now_s: Callable[[], float]
    is_stopping: Callable[[], bool]
    event: Callable[[EventKind, str], None]
    wait: Callable[[float], Awaitable[None]]
    """Until something was heard, at most until a time."""
    wake: Callable[[], None]
    """Whoever waits, and whoever sends."""
    keep: Callable[[], Awaitable[None]]
    """Write a checkpoint."""
    train: Callable[[], Coroutine[Any, Any, None]]
    """The round's local steps, on the population's state."""
    end_round: Callable[[float | None, float | None, list[str]], Awaitable[None]]
    """Record a round with sum ||x_i - x_j||**2, ||x_i|| and who was skipped; the sum is None where nobody was met.

    It takes `merged` and writes a checkpoint."""


class PairwiseRounds:
    """The rounds of one node.

    Args:
        plan: of the study.
        me: this node.
        population: its row; its state belongs to the training while that runs.
        protocol: its edges.
        update_format: of an Update.
        around: the daemon.
    """

    def __init__(
        self, plan: Plan, me: str, population: Population, protocol: Protocol, update_format: UpdateFormat, around: Surroundings
    ) -> None:
        self._plan, self._me, self._population, self._protocol = plan, me, population, protocol
        self._format, self._around = update_format, around
        self._row = plan.names.index(me)
        self.round = 0
        self.now: State = population.state if protocol.meetings is not None else {}
        """The model as it is, with all that it has met; the population's may be one that trains. Empty where nobody meets in pairs."""
        self._before: dict[str, Tensor] = {}
        """The population's tensors as they were when the training began, for a checkpoint in the meantime."""
        self._partner: str | None = None
        self._deferred: dict[str, ReceivedUpdate] = {}
        """By neighbour, its newest."""
        self._stage = "training"
        self.merged: list[Entry] = []
        self._distances: dict[str, DistanceWatch] = {}
        self._squared: float | None = None
        self._norm: float | None = None

    @property
    def _algorithm(self) -> Algorithm:
        return self._population.recipe.algorithm

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint: as the population's, at a moment that a later start can go on from."""
        held = self._before or self._population.tensors()
        return held | {f"state/{name}": tensor for name, tensor in self.now.items()}

    def restore(self, merged: list[Entry]) -> None:
        """Take up a checkpoint; the round's training begins once more, with the model as it is now."""
        self.now = self._population.state
        self.merged = [*merged, [self._me, self.round, "training", "began"]]

    async def run(self, first_round: int) -> str:
        """Round after round; returns why it ended: "rounds" or "paused"."""
        self.round = first_round
        self.now = self._population.state
        while self.round < self._plan.experiment.rounds:
            if self._around.is_stopping():
                return "paused"
            if all(neighbour.left or neighbour.closing for neighbour in self._protocol.neighbours.values()):
                self._around.event(EventKind.ALONE, f"every neighbour has finished: this node stops after {self.round} rounds")
                break
            await self._train()
            if self._around.is_stopping():
                return "paused"
            skipped = await self._meet_somebody()
            self._population.state = self.now
            self.round += 1
            squared, norm = self._squared, self._norm
            self._squared, self._stage = None, "training"
            await self._around.end_round(squared, norm, skipped)
        return "rounds"

    async def _train(self) -> None:
        """This round's local steps, while neighbours are met."""
        start, population = self.now, self._population
        self._stage, population.state = "training", start
        self._before = {name: tensor.clone() if name.startswith("buffers/") else tensor for name, tensor in population.tensors().items()}
        async with asyncio.TaskGroup() as group:
            training = group.create_task(self._around.train(), name="train")
            training.add_done_callback(lambda _: self._around.wake())
            while not training.done():
                await self._meet_all()
                if not training.done():
                    await self._around.wait(self._around.now_s() + 1.0)
        self.now = self._algorithm.apply_stale_update(self.now, start, population.state)
        self._before = {}
        population.state = self.now
        self._stage = "waiting"

    async def _meet_all(self) -> None:
        """Answer who has asked, and take back what was not matched."""
        self._take_back()
        assert self._protocol.meetings is not None
        while self._protocol.meetings:
            name, _, received = self._protocol.meetings.popleft()
            if received is not None:
                await self._answer(name, received)

    async def _meet_somebody(self) -> list[str]:
        """Ask a neighbour and wait for the answer; returns who did not come to it."""
        protocol, around = self._protocol, self._around
        await self._meet_all()
        neighbour = self._choice()
        if neighbour is None:
            return []
        number = neighbour.ledger.closed_through + 1
        self._partner = neighbour.name
        own = self._outgoing()
        protocol.ask(neighbour.name, self._format.pack(number, _arrays(own)), around.now_s())
        around.wake()
        deadline_s, answer, is_over = around.now_s() + protocol.patience_with(neighbour.name), None, False
        assert protocol.meetings is not None
        while not (is_over or neighbour.ledger.refuses(number) or around.is_stopping() or around.now_s() >= deadline_s):
            if neighbour.left or neighbour.closing or number <= neighbour.ledger.closed_through:
                break
            if not protocol.meetings:
                await around.wait(deadline_s)
            while protocol.meetings and not is_over:
                name, heard, received = protocol.meetings.popleft()
                if name == neighbour.name and heard == number:
                    answer, is_over = received, True
                elif received is not None:
                    self._postpone(name, received)
        skipped = await self._conclude(neighbour, number, answer, own, missed=around.now_s() >= deadline_s)
        self._partner = None
        deferred, self._deferred = self._deferred, {}
        for name, received in deferred.items():
            await self._answer(name, received)
        return skipped

    async def _conclude(
        self, neighbour: Neighbour, number: int, answer: ReceivedUpdate | None, own: Mapping[str, Tensor], *, missed: bool
    ) -> list[str]:
        """Merge an answer, or give the exchange up where none came that can be merged; returns who was skipped."""
        if answer is not None and neighbour.ledger.admits(number):
            if await self._merge(neighbour, answer, own):
                return []
        else:
            self._protocol.give_up(neighbour.name, number, missed=missed)
        self.merged.append([neighbour.name, number, self._stage, "offered"])
        return [neighbour.name]

    def _choice(self) -> Neighbour | None:
        """Whom to ask in this round: one that is there, in an order that is drawn; None: nobody is."""
        neighbours = list(self._protocol.neighbours.values())
        order = shuffled(self._plan.experiment.seed, Purpose.PARTNER, len(neighbours), node=self._row, round=self.round)
        for neighbour in (neighbours[k] for k in order):
            is_there = neighbour.session.is_open and not (neighbour.left or neighbour.closing or neighbour.missed)
            if is_there and self._protocol.patience_with(neighbour.name) > 0:
                return neighbour
        return None

    def _postpone(self, name: str, received: ReceivedUpdate) -> None:
        """A request while this node waits for another neighbour."""
        if name < self._me:
            self._deferred.pop(name, None)
            self._deferred[name] = received
        else:
            self._decline(name, received.exchange)

    def _decline(self, name: str, number: int) -> None:
        """Turn a neighbour away: neither of both merges this exchange."""
        self._protocol.give_up(name, number, missed=False)
        self._protocol.neighbours[name].queue(Busy(exchange=number))
        self._around.wake()

    async def _answer(self, name: str, received: ReceivedUpdate) -> None:
        """Meet a neighbour that has asked."""
        neighbour, number = self._protocol.neighbours[name], received.exchange
        if number <= neighbour.ledger.closed_through:
            return  # it has asked once more in the meantime
        if neighbour.ledger.closed_through < number - 1:  # it has given up some that never came
            self._protocol.give_up(name, number - 1, missed=False)
            await self._around.keep()
        if not neighbour.ledger.admits(number):
            self._decline(name, number)
            return
        own = self._outgoing()
        await self._merge(neighbour, received, own, answers=True)

    async def _merge(self, neighbour: Neighbour, received: ReceivedUpdate, own: Mapping[str, Tensor], *, answers: bool = False) -> bool:
        """Half of the way to a neighbour's model, on the disk before anything else is done with either; False: it was not taken in."""
        theirs = {channel: tensor_over(array) for channel, array in received.arrays.items()}
        inbox = SlotInbox.of_one_row(
            self._algorithm.channels,
            own,
            list(self._protocol.neighbours),
            {neighbour.name: theirs},
            {neighbour.name: HALF},
            self_weight=HALF,
            dtype=self._plan.layout.dtype,
            flows={},
            writes_over=self._algorithm.reads_once,
        )
        ctx = self._population.context(self.round, local_steps=self._plan.experiment.algorithm.local_steps)
        if (refusal := self._refusal(neighbour, theirs, own, ctx)) is not None:
            self._protocol.hold(neighbour.name, received, refusal)
            if answers:
                self._decline(neighbour.name, received.exchange)
            else:
                self._protocol.give_up(neighbour.name, received.exchange, missed=False)
            return False
        merged = self._algorithm.merge(self.now, 0, inbox, ctx)
        if not all(is_finite(tensor) for tensor in merged.values()):
            self._around.event(EventKind.OVERFLOW, f"round {self.round}: the middle to {neighbour.name} is not finite; it was not taken in")
            self._protocol.give_up(neighbour.name, received.exchange, missed=False)
            return False
        self.now = merged
        self._squared = (self._squared or 0.0) + float(inbox.squared_distances("x")[0])
        self._norm = float(torch.linalg.vector_norm(own["x"][0]).double())
        (distance,) = inbox.distances("x").values()
        self._look_at_distance(neighbour, distance, self._norm)
        self.merged.append([neighbour.name, received.exchange, self._stage])
        (amounts,) = (inbox.flows or {}).values()
        taken = Flow(exchange=received.exchange, amounts=amounts)
        if answers:
            self._protocol.answer(neighbour.name, self._format.pack(received.exchange, _arrays(own)))
        self._protocol.met(neighbour.name, taken, self._around.now_s())
        self._take_back()
        await self._around.keep()
        self._around.wake()
        return True

    def _refusal(self, neighbour: Neighbour, theirs: Mapping[str, Tensor], own: Mapping[str, Tensor], ctx: Context) -> BadMessage | None:
        """Why a neighbour's model is not met; None: it is."""
        guard, slot = self._plan.guard, list(self._protocol.neighbours).index(neighbour.name)
        norm = guard.norm(self.now, 0, theirs, ctx, slot=slot)
        return guard.refusal(norm, self.now, 0, own, ctx, diverged=bool(self._population.diverged))

    def _look_at_distance(self, neighbour: Neighbour, distance: float, own_norm: float) -> None:
        """Report a neighbour's model that is suddenly far away."""
        watch = self._distances.setdefault(neighbour.name, DistanceWatch())
        report = watch.look(distance, own_norm, neighbour.greetings)
        if report is not None:
            self._around.event(EventKind.FAR_UPDATE, f"{neighbour.name}: {report}")

    def _take_back(self) -> None:
        """What only this side has merged goes back; never while a neighbour holds an offer of the model as it is."""
        if self._partner is not None:
            return
        for neighbour, unmatched in self._protocol.taken_back:
            self.now = {**self.now, "x": self.now["x"] - unmatched.amounts["x"].unsqueeze(0)}
            self.merged.append([neighbour.name, unmatched.exchange, self._stage, "returned"])
        self._protocol.taken_back = []

    def _outgoing(self) -> dict[str, Tensor]:
        ctx = self._population.context(self.round, local_steps=self._plan.experiment.algorithm.local_steps)
        return self._algorithm.outgoing(self.now, 0, ctx)


def _arrays(sent: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor[0].detach().contiguous().numpy() for name, tensor in sent.items()}
