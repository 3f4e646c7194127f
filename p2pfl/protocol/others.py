"""The members beside this one, as far as their own signed records and words say where they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from p2pfl.protocol.neighbour import Neighbour
from p2pfl.protocol.view import NetworkView

_NO_NEIGHBOUR = 2
"""Links between this node and a member that is no neighbour, at least."""


class Others:
    """Members whose word counts, each once: one of them may lie about itself, and no more than one does.

    Args:
        num_others: members beside this one; 0: its neighbours are all.
        places: in the roster, by name; without them a neighbour's word and its records count as those of two members.
        steps_to: links between this node and each member, by place in the roster; a member that is not in it is no neighbour.
        view: what this node hears of the whole network; None: nothing signed can be heard.
        prove: this node's own signed record of its last round; None: there is none.
    """

    def __init__(
        self,
        neighbours: Mapping[str, Neighbour],
        *,
        num_others: int = 0,
        places: Mapping[str, int] | None = None,
        steps_to: Mapping[int, int] | None = None,
        view: NetworkView | None = None,
        prove: Callable[[], bytes | None] = lambda: None,
    ) -> None:
        self._neighbours, self._places, self._steps_to, self._prove = neighbours, places or {}, steps_to or {}, prove
        self.view = view
        self.count = max(num_others, len(neighbours))
        self.is_one = len(neighbours) <= 1 and num_others <= 1
        """Whether there is one member beside this one."""
        self.are_neighbours = self.count == len(neighbours)
        """Whether this node exchanges with everybody."""

    def have_stopped(self, converged: Collection[str]) -> bool:
        """Whether two members, or the only other one, have stopped because all agree; the *converged* neighbours have said so."""
        signed = 0
        if self.view is not None:
            signed = self.view.num_closed([self.view.me, *(self._places[name] for name in converged if name in self._places)])
        return len(converged) + signed >= min(2, self.count)

    def second_furthest(self, exchange: int, *, phases: int, ahead: int) -> int:
        """The exchange that two members have reached, seen from one.

        Each link lets the members at its ends be apart by as many exchanges as are kept. A member that is no further ahead than the links
        to it explain has not gone on without this node: what it has reached confirms nobody.
        """
        reached: dict[int | str, tuple[int, int]] = {}
        if self.view is not None:
            for place, rounds in self.view.furthest().items():
                reached[place] = rounds * phases, self._steps_to.get(place, _NO_NEIGHBOUR)
        for name, neighbour in self._neighbours.items():
            member = self._places.get(name, name)
            reached[member] = max(reached.get(member, (-1, 1))[0], neighbour.heard_exchange), 1
        gone_on = (there for there, steps in reached.values() if there > exchange + steps * ahead)
        return sorted([-1, -1, *gone_on])[-2]

    def proof_for(self, name: str) -> list[bytes]:
        """Signed records that show a neighbour where the furthest members are."""
        return [] if self.view is None else self.view.proof(self._prove(), without=self._places.get(name))
