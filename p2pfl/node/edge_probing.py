"""Measurement of a running node's edges, over its own links, when a doctor at this site asks for it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from p2pfl.node.doctor.interview import EdgeMeasurement, Interview
from p2pfl.node.sending import Sending
from p2pfl.protocol.protocol import Protocol
from p2pfl.wire.messages import DoctorAnswer, DoctorQuestion

WITHIN_S = 4.0
"""Whoever asks the status page waits for five seconds."""
AGAIN_AFTER_S = 10.0
"""A measurement is good for so long: neighbours count the bytes that a node sends them."""


class EdgeProbing:
    """Questions of one node to its neighbours; the node's protocol hands the answers in."""

    def __init__(self) -> None:
        self._interviews: dict[str, Interview] = {}
        self._measured: dict[str, EdgeMeasurement] = {}
        self._measured_s = float("-inf")

    def take(self, peer: str, answer: DoctorAnswer) -> None:
        """Take a neighbour's answer; one that nobody waits for is dropped."""
        if peer in self._interviews:
            self._interviews[peer].take(answer)

    async def measure(self, protocol: Protocol, sending: Sending) -> dict[str, Any]:
        """Measure the edges to the neighbours that are there and know the question; all that was found in time, by neighbour."""
        if time.monotonic() - self._measured_s >= AGAIN_AFTER_S:
            self._measured_s = time.monotonic()

            async def ask(peer: str, question: DoctorQuestion) -> None:
                protocol.neighbours[peer].queue(question)
                sending.wake()

            self._measured = {
                name: EdgeMeasurement(peer=name, is_dialled=False, schema=neighbour.session.schema)
                for name, neighbour in protocol.neighbours.items()
                if neighbour.session.is_open and neighbour.session.understands(DoctorQuestion)
            }
            self._interviews = {name: Interview(ask) for name in self._measured}
            asking = [asyncio.ensure_future(self._interviews[name].examine(edge)) for name, edge in self._measured.items()]
            if asking:
                _, late = await asyncio.wait(asking, timeout=WITHIN_S)
                for each in late:
                    each.cancel()
                await asyncio.gather(*asking, return_exceptions=True)
        return {name: edge.as_dict() for name, edge in self._measured.items()}
