"""The rounds of a node that exchanges with its neighbours one at a time, while everybody trains at their own pace.

The pace says whom to answer, to turn away and to let wait. All that happens to the model happens in one task, one thing after the other,
each on the disk before the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from torch import Tensor

from p2pfl.errors import BadMessage
from p2pfl.node.checkpoint import keep
from p2pfl.node.node import Node
from p2pfl.node.pairwise_mixing import PairwiseMixing
from p2pfl.node.round_steps import end_round, train
from p2pfl.protocol.edges import Flow
from p2pfl.protocol.neighbour import Neighbour
from p2pfl.runs.events import EventKind
from p2pfl.wire.update import ReceivedUpdate


class PairwiseRounds:
    """The loop of one node's rounds."""

    def __init__(self, node: Node, mixing: PairwiseMixing) -> None:
        self._node, self._mixing, self._protocol, self._clock = node, mixing, node.protocol, node.clock
        self._exchanges = node.protocol.pairwise_exchanges()
        self._pace, self._row = self._exchanges.pace, node.plan.names.index(node.me)

    @property
    def _round(self) -> int:
        return self._node.place.round

    async def run(self) -> str:
        """Run round after round; returns why they ended: "rounds" or "paused"."""
        node = self._node
        while self._round < node.plan.experiment.rounds:
            if self._clock.is_stopping:
                return "paused"
            if all(neighbour.left or neighbour.closing for neighbour in self._protocol.neighbours.values()):
                detail = f"every neighbour has finished: this node stops after {self._round} rounds"
                self._protocol.edges.on_event(EventKind.ALONE, detail)
                break
            if not await self._train():
                return "paused"
            seen, merged = self._mixing.end_round(await self._ask_somebody())
            node.move(round=self._round + 1)
            node.begin_exchange()
            await end_round(node, seen, merged)
        return "rounds"

    async def _train(self) -> bool:
        """Take this round's local steps, and answer neighbours in the meantime; False: the node is to stop."""
        self._mixing.begin_training()
        async with asyncio.TaskGroup() as group:
            local_steps = self._node.plan.experiment.local_steps_at(self._round)
            training = group.create_task(train(self._node, local_steps), name="train")
            training.add_done_callback(lambda _: self._wake())
            while not training.done():
                await self._answer_all()
                if not training.done():
                    await self._clock.wait(self._clock.now_s() + 1.0)
        self._mixing.end_training()
        return not self._clock.is_stopping

    def _wake(self) -> None:
        self._node.sending.wake()
        self._clock.wake()

    async def _answer_all(self) -> None:
        """Answer who has asked, and roll back what was not matched."""
        self._compensate()
        while (request := self._exchanges.next_request()) is not None:
            await self._answer(*request)

    def _compensate(self) -> None:
        if self._pace.asked is None:  # a neighbour does not hold an offer of the model as it is
            self._mixing.compensate()

    async def _ask_somebody(self) -> list[str]:
        """Ask a neighbour and wait for the answer; returns who did not come to it."""
        exchanges, pace, clock = self._exchanges, self._pace, self._clock
        await self._answer_all()
        neighbour = exchanges.partner(seed=self._node.plan.experiment.seed, row=self._row, round=self._round)
        if neighbour is None:
            return []
        own, number = self._mixing.outgoing(self._round), pace.ask(neighbour.name)
        deadline_s = exchanges.ask(self._mixing.pack(number, own), clock.now_s())
        self._wake()
        while not (pace.is_over(clock.now_s()) or clock.is_stopping or clock.now_s() >= deadline_s):
            if (request := exchanges.next_request()) is not None:
                peer, received = request
                self._decline(peer, received.exchange)
            elif not pace.is_over(clock.now_s()):
                await clock.wait(deadline_s)
        answer, is_merged = exchanges.answer(), False
        if answer is not None and neighbour.ledger.admits(number):
            is_merged = await self._merge(neighbour, answer, own)
        else:
            exchanges.give_up(neighbour.name, number, missed=clock.now_s() >= deadline_s)
        if not is_merged:
            self._mixing.note(neighbour.name, number, "offered")
        for peer, received in exchanges.conclude():
            await self._answer(peer, received)
        return [] if is_merged else [neighbour.name]

    def _decline(self, name: str, number: int) -> None:
        self._exchanges.decline(name, number)
        self._wake()

    async def _answer(self, name: str, received: ReceivedUpdate) -> None:
        """Answer a neighbour's request."""
        number = received.exchange
        if number <= self._protocol.edges.closed_through(name):
            return  # it has asked once more in the meantime
        if self._protocol.edges.closed_through(name) < number - 1:  # it has given up some that never came
            self._exchanges.give_up(name, number - 1)
            await keep(self._node)
        neighbour = self._protocol.neighbours[name]
        if not neighbour.ledger.admits(number):
            self._decline(name, number)
            return
        await self._merge(neighbour, received, self._mixing.outgoing(self._round), answers=True)

    async def _merge(self, neighbour: Neighbour, received: ReceivedUpdate, own: Mapping[str, Tensor], *, answers: bool = False) -> bool:
        """Merge a neighbour's update, on the disk before anything else is done with either; False: it was not taken in."""
        name, number = neighbour.name, received.exchange
        merged = self._mixing.merge(neighbour, received, own, self._round)
        if not isinstance(merged, Flow):
            if isinstance(merged, BadMessage):
                self._protocol.hold(name, received, merged)
            else:
                detail = f"round {self._round}: the middle to {name} is not finite; it was not taken in"
                self._protocol.edges.on_event(EventKind.OVERFLOW, detail)
            if answers and merged is not None:
                self._decline(name, number)
            else:
                self._exchanges.give_up(name, number)
            return False
        self._exchanges.merged(name, merged, self._clock.now_s(), answer=self._mixing.pack(number, own) if answers else None)
        self._compensate()
        await keep(self._node)
        self._wake()
        return True
