"""The end of a node's conversations: settle what is open with the neighbours, and hear the end of the others."""

from __future__ import annotations

from p2pfl.node.clock import LoopClock
from p2pfl.node.round_steps import RoundSteps
from p2pfl.node.sending import Sending
from p2pfl.protocol.protocol import Protocol

LAST_RECORDS_S = 5.0


class Closing:
    """Last words of one node.

    Args:
        protocol: its edges.
        steps: its checkpoints.
        sending: its outboxes.
        clock: its loops'.
        linger_s: how long it stays for neighbours that have not acknowledged everything.
    """

    def __init__(self, protocol: Protocol, steps: RoundSteps, sending: Sending, clock: LoopClock, linger_s: float) -> None:
        self._protocol, self._steps, self._sending, self._clock, self.linger_s = protocol, steps, sending, clock, linger_s

    async def settle(self) -> None:
        """Wait until every neighbour has acknowledged what went over its edge, or the time is up."""
        protocol, clock = self._protocol, self._clock
        deadline_s = clock.now_s() + self.linger_s
        while not protocol.is_settled() and clock.now_s() < deadline_s and not clock.is_stopping:
            unsaid = {name: neighbour.ledger.report() for name, neighbour in protocol.neighbours.items()}
            await self._steps.keep()
            for name, neighbour in protocol.neighbours.items():
                if neighbour.ledger.report() != unsaid[name]:
                    neighbour.queue(protocol.closing_message(neighbour))
            self._sending.wake()
            await clock.wait(deadline_s)

    async def hear_the_end(self) -> None:
        """Stay until everybody's last record is here and passed on, for a moment: a member that has gone for good will not send one."""
        deadline_s = self._clock.now_s() + min(self.linger_s, LAST_RECORDS_S)
        while self._protocol.is_spreading() and self._clock.now_s() < deadline_s and not self._clock.is_stopping:
            await self._clock.wait(deadline_s)
