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


async def close(
    reason: str,
    protocol: Protocol,
    mixing: Mixing,
    steps: RoundSteps,
    rounds_log: RoundLog,
    conclusion: NodeConclusion,
    sending: Sending,
    clock: LoopClock,
    linger_s: float,
) -> None:
    """Settle with the neighbours, for *linger_s* at most, then write how it went; nothing is written where this node's state went back."""
    rounds = steps.place.round
    protocol.stop(reason, steps.exchange)
    await steps.keep()
    rounds_log.tell_last()
    deadline_s = clock.now_s() + linger_s
    while protocol.unacknowledged() and clock.now_s() < deadline_s and not clock.is_stopping:
        unsaid = {name: neighbour.ledger.report() for name, neighbour in protocol.neighbours.items()}
        await steps.keep()
        for name, neighbour in protocol.neighbours.items():
            if neighbour.ledger.report() != unsaid[name]:
                neighbour.queue(protocol.announcer.closing(neighbour))
        sending.wake()
        await clock.wait(deadline_s)
    if protocol.states.own:
        return  # somebody has to decide first
    mixing.compensate(rounds)
    await steps.keep()
    await conclusion.note_end(linger_s)
    await asyncio.to_thread(conclusion.write, reason, rounds)
    steps.move(finished=True)
    await steps.keep()
    # until everybody's last record is here and passed on, for a moment: a member that has gone for good will not send one
    deadline_s = clock.now_s() + min(linger_s, LAST_RECORDS_S)
    while protocol.is_spreading() and clock.now_s() < deadline_s and not clock.is_stopping:
        await clock.wait(deadline_s)
    conclusion.note_others(rounds)
