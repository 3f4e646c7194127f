"""The paces by name: what an experiment may ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from p2pfl.protocol.asynchronous import Asynchronous
from p2pfl.protocol.deadlines import Deadlines
from p2pfl.protocol.edges import Edges
from p2pfl.protocol.lockstep import Lockstep
from p2pfl.protocol.pace import Pace
from p2pfl.protocol.pairwise import Pairwise
from p2pfl.wire.update import ReceivedUpdate

PACES: Final[dict[str, Callable[[Edges, Deadlines, int], Pace[ReceivedUpdate]]]] = {
    "synchronous": lambda edges, deadlines, _: Lockstep(edges, deadlines),
    "asynchronous": lambda _edges, _deadlines, max_age: Asynchronous(max_age=max_age),
    "pairwise": lambda edges, _deadlines, _: Pairwise(me=edges.me, closed_through=edges.closed_through, may_answer=edges.may_answer),
}
"""Each is made of a node's edges, its deadlines, and the greatest age of an update."""
