"""The rounds of a node that exchanges with its neighbours one at a time, while everybody trains at their own pace.

An exchange over an edge is a request and an answer, both an update of the edge's next number; both ends then move to the middle. Either
does so or, by the edge ledger, rolls it back. A node that waits for an answer exchanges with nobody else in the meantime: it takes a
request of the neighbour that it asked itself for the answer, lets those before it in the order of the names wait, and turns the others
away, so that nobody waits in a circle. All that happens to the model happens in one task, one thing after the other, each on the disk
before the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from torch import Tensor

from p2pfl.draws import Purpose, shuffled
from p2pfl.errors import BadMessage
from p2pfl.experiment.plan import Plan
from p2pfl.node.clock import LoopClock
from p2pfl.node.pairwise_mixing import PairwiseMixing
from p2pfl.node.round_steps import RoundSteps
from p2pfl.node.sending import Sending
from p2pfl.protocol.neighbour import Neighbour
from p2pfl.protocol.protocol import Flow, Protocol
from p2pfl.runs.events import EventKind
from p2pfl.wire.messages import Busy
from p2pfl.wire.update import ReceivedUpdate


class PairwiseRounds:
    """The loop of one node's rounds."""

    def __init__(
        self, plan: Plan, protocol: Protocol, mixing: PairwiseMixing, steps: RoundSteps, sending: Sending, clock: LoopClock
    ) -> None:
        self._plan, self._protocol, self._mixing, self._steps, self._sending, self._clock = plan, protocol, mixing, steps, sending, clock
        self._row = plan.names.index(protocol.me)
        self._partner: str | None = None
        self._deferred: dict[str, ReceivedUpdate] = {}
        """By neighbour, its newest."""

    @property
    def _round(self) -> int:
        return self._steps.place.round

    async def run(self) -> str:
        """Run round after round; returns why they ended: "rounds" or "paused"."""
        experiment, steps = self._plan.experiment, self._steps
        while self._round < experiment.rounds:
            if self._clock.is_stopping:
                return "paused"
            if all(neighbour.left or neighbour.closing for neighbour in self._protocol.neighbours.values()):
                detail = f"every neighbour has finished: this node stops after {self._round} rounds"
                self._protocol.on_event(EventKind.ALONE, detail)
                break
            if not await self._train():
                return "paused"
            seen, merged = self._mixing.end_round(await self._ask_somebody())
            steps.move(round=self._round + 1)
            steps.begin_exchange()
            await steps.end_round(seen, merged)
        return "rounds"

    async def _train(self) -> bool:
        """Take this round's local steps, and answer neighbours in the meantime; False: the node is to stop."""
        self._mixing.begin_training()
        async with asyncio.TaskGroup() as group:
            training = group.create_task(self._steps.train(self._plan.experiment.local_steps_at(self._round)), name="train")
            training.add_done_callback(lambda _: self._wake())
            while not training.done():
                await self._answer_all()
                if not training.done():
                    await self._clock.wait(self._clock.now_s() + 1.0)
        self._mixing.end_training()
        return not self._clock.is_stopping

    def _wake(self) -> None:
        self._sending.wake()
        self._clock.wake()

    async def _answer_all(self) -> None:
        """Answer who has asked, and roll back what was not matched."""
        self._compensate()
        assert self._protocol.meetings is not None
        while self._protocol.meetings:
            name, _, received = self._protocol.meetings.popleft()
            if received is not None:
                await self._answer(name, received)

    def _compensate(self) -> None:
        if self._partner is None:  # a neighbour does not hold an offer of the model as it is
            self._mixing.compensate()

    async def _ask_somebody(self) -> list[str]:
        """Ask a neighbour and wait for the answer; returns who did not come to it."""
        protocol, clock = self._protocol, self._clock
        await self._answer_all()
        neighbour = self._choice()
        if neighbour is None:
            return []
        number = neighbour.ledger.closed_through + 1
        self._partner = neighbour.name
        own = self._mixing.outgoing(self._round)
        protocol.ask(neighbour.name, self._mixing.pack(number, own), clock.now_s())
        self._wake()
        deadline_s, answer, is_over = clock.now_s() + protocol.patience_with(neighbour.name), None, False
        assert protocol.meetings is not None
        while not (is_over or neighbour.ledger.refuses(number) or clock.is_stopping or clock.now_s() >= deadline_s):
            if neighbour.left or neighbour.closing or number <= neighbour.ledger.closed_through:
                break
            if not protocol.meetings:
                await clock.wait(deadline_s)
            while protocol.meetings and not is_over:
                name, heard, received = protocol.meetings.popleft()
                if name == neighbour.name and heard == number:
                    answer, is_over = received, True
                elif received is not None:
                    self._postpone(name, received)
        skipped = await self._conclude(neighbour, number, answer, own, missed=clock.now_s() >= deadline_s)
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
        self._mixing.note(neighbour.name, number, "offered")
        return [neighbour.name]

    def _choice(self) -> Neighbour | None:
        """Choose whom to ask in this round: the first that is there, in an order that is drawn; None: nobody is."""
        neighbours = list(self._protocol.neighbours.values())
        order = shuffled(self._plan.experiment.seed, Purpose.PARTNER, len(neighbours), node=self._row, round=self._round)
        for neighbour in (neighbours[k] for k in order):
            is_there = neighbour.session.is_open and not (neighbour.left or neighbour.closing or neighbour.missed)
            if is_there and self._protocol.patience_with(neighbour.name) > 0:
                return neighbour
        return None

    def _postpone(self, name: str, received: ReceivedUpdate) -> None:
        """Let a request wait while this node waits for another neighbour, or turn it away."""
        if name < self._protocol.me:
            self._deferred.pop(name, None)
            self._deferred[name] = received
        else:
            self._decline(name, received.exchange)

    def _decline(self, name: str, number: int) -> None:
        """Turn a neighbour away: neither of both merges this exchange."""
        self._protocol.give_up(name, number, missed=False)
        self._protocol.neighbours[name].queue(Busy(exchange=number))
        self._wake()

    async def _answer(self, name: str, received: ReceivedUpdate) -> None:
        """Answer a neighbour's request."""
        neighbour, number = self._protocol.neighbours[name], received.exchange
        if number <= neighbour.ledger.closed_through:
            return  # it has asked once more in the meantime
        if neighbour.ledger.closed_through < number - 1:  # it has given up some that never came
            self._protocol.give_up(name, number - 1, missed=False)
            await self._steps.keep()
        if not neighbour.ledger.admits(number):
            self._decline(name, number)
            return
        await self._merge(neighbour, received, self._mixing.outgoing(self._round), answers=True)

    async def _merge(self, neighbour: Neighbour, received: ReceivedUpdate, own: Mapping[str, Tensor], *, answers: bool = False) -> bool:
        """Merge a neighbour's update, on the disk before anything else is done with either; False: it was not taken in."""
        protocol, name, number = self._protocol, neighbour.name, received.exchange
        merged = self._mixing.merge(neighbour, received, own, self._round)
        if not isinstance(merged, Flow):
            if isinstance(merged, BadMessage):
                protocol.hold(name, received, merged)
            else:
                detail = f"round {self._round}: the middle to {name} is not finite; it was not taken in"
                protocol.on_event(EventKind.OVERFLOW, detail)
            if answers and merged is not None:
                self._decline(name, number)
            else:
                protocol.give_up(name, number, missed=False)
            return False
        if answers:
            protocol.answer(name, self._mixing.pack(number, own))
        protocol.met(name, merged, self._clock.now_s())
        self._compensate()
        await self._steps.keep()
        self._wake()
        return True
