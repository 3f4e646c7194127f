"""What may go wrong in a simulated network: nodes that stand still and messages that are lost, by script."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Which nodes and messages are missing in which rounds."""

    paused: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """Rounds in which a node neither trains nor hears nor sends."""

    cut: Mapping[tuple[str, str], frozenset[int]] = field(default_factory=dict)
    """Rounds in which nothing crosses an edge, in either direction."""

    lost: Mapping[tuple[str, str], frozenset[int]] = field(default_factory=dict)
    """Rounds in which what the first sends does not reach the second; the other way still works."""

    def is_paused(self, node: str, round: int) -> bool:
        """Whether a node stands still."""
        return round in self.paused.get(node, frozenset())

    def delivers(self, sender: str, receiver: str, round: int) -> bool:
        """Whether a message of this round reaches its receiver."""
        if self.is_paused(sender, round) or self.is_paused(receiver, round):
            return False
        none: frozenset[int] = frozenset()
        is_cut = round in self.cut.get((sender, receiver), none) or round in self.cut.get((receiver, sender), none)
        return not is_cut and round not in self.lost.get((sender, receiver), none)
