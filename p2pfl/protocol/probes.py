"""Answers to the questions of neighbours' doctors, and the answers to this node's own questions; they change nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from p2pfl.protocol.neighbour import Neighbour
from p2pfl.wire.messages import Message, Probe, ProbeAnswer


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
    take: Callable[[str, ProbeAnswer], None] = lambda _, __: None
    """Gets a neighbour's name and its answer."""

    def answer(self, probe: Probe) -> ProbeAnswer:
        """Answer a question, in a message as large."""
        forward = self.forward()
        return ProbeAnswer(
            number=probe.number,
            clock=self.clock_ms(),
            version=self.version,
            torch=self.torch,
            arithmetic=self.arithmetic,
            study=self.study,
            layout=self.layout,
            start=self.start,
            forward=None if forward is None else forward.digest,
            outputs=() if forward is None else forward.outputs,
            pad=probe.pad,
        )


def hear_probe(probes: Probes | None, neighbour: Neighbour, message: Message) -> bool:
    """Take a message that is part of probing, and answer it; whether it was one."""
    if isinstance(message, Probe):
        if probes is not None:
            neighbour.queue(probes.answer(message))
        return True
    if isinstance(message, ProbeAnswer):
        if probes is not None:
            probes.take(neighbour.name, message)
        return True
    return False
