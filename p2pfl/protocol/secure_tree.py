"""The tree along which masked arrays are added and totals come back: all members derive the same one.

It is the breadth-first tree from the first participant in the roster's order, with neighbours in the roster's order. Members that do not
take part in the sum are in it only where the participants are not connected without them: they pass arrays on and add nothing of their own.
What passes through them is masked, as it is for every other inner node.

Shapes: N members of the study.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from p2pfl.errors import TopologyError, some


@dataclass(frozen=True, kw_only=True, slots=True)
class SumTree:
    """A rooted spanning tree of the participants of a sum, members by their places in the roster."""

    root: int
    """The first participant; here the total is known first."""
    parents: Mapping[int, int]
    """The parent of each member of the tree but the root, in breadth-first order."""
    participants: frozenset[int]
    """Members that add a value; every other member of the tree passes on what others have added."""

    @property
    def members(self) -> tuple[int, ...]:
        """Everybody in the tree, the root first, in breadth-first order."""
        return (self.root, *self.parents)

    def children(self, member: int) -> tuple[int, ...]:
        """Members that send their subtotals to this one, in the roster's order."""
        return tuple(sorted(child for child, parent in self.parents.items() if parent == member))

    def neighbours(self, member: int) -> tuple[int, ...]:
        """Members that share an edge of the tree with this one: its parent, then its children."""
        parent = (self.parents[member],) if member in self.parents else ()
        return (*parent, *self.children(member))


def sum_tree(neighbours: Sequence[Collection[int]], participants: Collection[int], names: Sequence[str] | None = None) -> SumTree:
    """Derive the tree of a sum from the study's graph and the set of participants.

    Args:
        neighbours: (N,) the neighbours of each member by their places in the roster; an edge has two entries.
        participants: at least one place.
        names: of the members, for the error.

    Raises:
        TopologyError: no path connects some participant with the first one; it is named.
    """
    if any(member not in neighbours[other] for member, others in enumerate(neighbours) for other in others):
        raise ValueError("a tree needs edges that go both ways")
    taking_part = frozenset(participants)
    root = min(taking_part)
    parents = _breadth_first(neighbours, root, taking_part)
    if not taking_part <= {root, *parents}:
        parents = _breadth_first(neighbours, root, frozenset(range(len(neighbours))))
        missing = sorted(taking_part - {root, *parents})
        if missing:
            named = [names[each] if names is not None else str(each) for each in (root, *missing)]
            raise TopologyError(f"no path of the study's graph leads from {named[0]} to {some(named[1:])}: they cannot add anything up")
        needed = {root}
        for member in taking_part:
            at = member
            while at not in needed:
                needed.add(at)
                at = parents[at]
        parents = {child: parent for child, parent in parents.items() if child in needed}
    return SumTree(root=root, parents=parents, participants=taking_part)


def _breadth_first(neighbours: Sequence[Collection[int]], root: int, allowed: frozenset[int]) -> dict[int, int]:
    """Parents of all members that are reached from the root through the allowed ones."""
    parents: dict[int, int] = {}
    waiting = deque([root])
    while waiting:
        member = waiting.popleft()
        for other in sorted(neighbours[member]):
            if other in allowed and other != root and other not in parents:
                parents[other] = member
                waiting.append(other)
    return parents
