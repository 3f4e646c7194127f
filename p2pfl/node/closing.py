"""The end of a node's run: settle what is open with the neighbours, write the result, and hear the end of the others."""

from __future__ import annotations

import asyncio

from p2pfl.node.clock import LoopClock
from p2pfl.node.conclusion import NodeConclusion
from p2pfl.node.mixing import Mixing
from p2pfl.node.round_log import RoundLog
from p2pfl.node.round_steps import RoundSteps
from p2pfl.node.sending import Sending
from p2pfl.protocol.protocol import Protocol

LAST_RECORDS_S = 5.0


class Closing:
    """Last steps of one node; it stays *linger_s* for neighbours that have not acknowledged everything."""

    def __init__(
        self,
        protocol: Protocol,
        mixing: Mixing,
        steps: RoundSteps,
        rounds: RoundLog,
        conclusion: NodeConclusion,
        sending: Sending,
        clock: LoopClock,
        linger_s: float,
    ) -> None:
        self._protocol, self._mixing, self._steps, self._rounds, self._conclusion = protocol, mixing, steps, rounds, conclusion
        self._sending, self._clock, self._linger_s = sending, clock, linger_s

    async def close(self, reason: str) -> None:
        """Settle with the neighbours, then write how it went; nothing is written where this node's state went back."""
        protocol, steps, rounds = self._protocol, self._steps, self._steps.place.round
        protocol.stop(reason, steps.exchange)
        await steps.keep()
        self._rounds.tell_last()
        await self._settle()
        if protocol.states.own:
            return  # somebody has to decide first
        self._mixing.compensate(rounds)
        await steps.keep()
        await self._conclusion.note_end(self._linger_s)
        await asyncio.to_thread(self._conclusion.write, reason, rounds)
        steps.move(finished=True)
        await steps.keep()
        await self._hear_the_end()
        self._conclusion.note_others(rounds)

    async def _settle(self) -> None:
        """Wait until every neighbour has acknowledged what went over its edge, or the time is up."""
        protocol, clock = self._protocol, self._clock
        deadline_s = clock.now_s() + self._linger_s
        while protocol.unacknowledged() and clock.now_s() < deadline_s and not clock.is_stopping:
            unsaid = {name: neighbour.ledger.report() for name, neighbour in protocol.neighbours.items()}
            await self._steps.keep()
            for name, neighbour in protocol.neighbours.items():
                if neighbour.ledger.report() != unsaid[name]:
                    neighbour.queue(protocol.announcer.closing(neighbour))
            self._sending.wake()
            await clock.wait(deadline_s)

    async def _hear_the_end(self) -> None:
        """Stay until everybody's last record is here and passed on, for a moment: a member that has gone for good will not send one."""
        deadline_s = self._clock.now_s() + min(self._linger_s, LAST_RECORDS_S)
        while self._protocol.is_spreading() and self._clock.now_s() < deadline_s and not self._clock.is_stopping:
            await self._clock.wait(deadline_s)
