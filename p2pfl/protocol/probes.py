"""Answers to the questions of neighbours' doctors, and the answers to this node's own questions; they change nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from p2pfl.protocol.neighbour import Neighbour
from p2pfl.wire.messages import DoctorAnswer, DoctorQuestion

ANSWERS_WAITING = 16
"""Answers that lie in a neighbour's outbox at most: a doctor waits for so many at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forward:
    """Outputs of the first model on the agreed numbers."""

    digest: bytes
    """SHA-256 of all of them."""
    outputs: tuple[float, ...]
    """The first few."""


@dataclass(frozen=True, kw_only=True)
class Probes:
    """One end's part in probing its edges: the facts that it tells, and who takes the answers of others."""

    version: str
    torch: str
    arithmetic: int
    study: bytes
    layout: bytes
    start: bytes
    """Digests of 32 bytes."""
    clock_ms: Callable[[], int]
    """Milliseconds since 1970 by this machine's clock."""
    forward: Callable[[], Forward | None]
    """Outputs of the first model; None where they were not computed."""
    take: Callable[[str, DoctorAnswer], None] = lambda _, __: None
    """Gets a neighbour's name and its answer."""

    def answer(self, question: DoctorQuestion) -> DoctorAnswer:
        """Answer a question, in a message as large."""
        forward = self.forward()
        return DoctorAnswer(
            number=question.number,
            clock=self.clock_ms(),
            version=self.version,
            torch=self.torch,
            arithmetic=self.arithmetic,
            study=self.study,
            layout=self.layout,
            start=self.start,
            forward=None if forward is None else forward.digest,
            outputs=() if forward is None else forward.outputs,
            pad=question.pad,
        )


def hear_question(probes: Probes | None, neighbour: Neighbour, message: DoctorQuestion | DoctorAnswer, now_s: float) -> bool:
    """Answer a neighbour's question, or take its answer; False: it asks more than a doctor does. None: this node does neither."""
    if probes is None:
        return True
    if not isinstance(message, DoctorQuestion):
        probes.take(neighbour.name, message)
        return True
    waiting = sum(isinstance(item, DoctorAnswer) for item in neighbour.outbox)
    if waiting >= ANSWERS_WAITING or not neighbour.allowance.answers(len(message.pad), now_s):
        return False
    neighbour.queue(probes.answer(message))
    return True
