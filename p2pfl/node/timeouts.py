"""Times that a node allows itself and its neighbours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """Times that a node allows itself and its neighbours."""

    start_within_s: float | None = None
    """How long this node waits for all members before it starts; None: as the experiment's `require.within_s` says."""
    deadline_floor_s: float = 30.0
    """The least time that a neighbour has for a round, counted from when this node has sent its own model."""
    deadline_factor: float = 5.0
    """Or so many times what recent rounds took, where that is more."""
    linger_s: float = 30.0
    """How long a stopped node stays for neighbours that have not acknowledged everything."""
    round_at_least_s: float = 0.0
    """A round's training takes at least so long, for rehearsals with slow nodes."""
