"""Members that need nothing more of secure sums: a word about a member counts from neighbours through which its news come.

What members say of each other is not signed. A node takes it of a member only from neighbours that are nearer to it in the study's graph:
news of that member comes through them, and so they could keep it back as well. All of them that are there have to agree.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence


class DoneMembers(Collection[int]):
    """The members that need nothing more, by their places in the roster; those that add nothing never need anything.

    Args:
        neighbours: of each member in the study's graph.
        participants: members that add numbers.
        me: place of this node; it is added by `add_me`.
        is_up: tells whether the link to a neighbour is up.
    """

    def __init__(self, neighbours: Sequence[Collection[int]], participants: Collection[int], me: int, is_up: Callable[[int], bool]) -> None:
        self._num, self._me, self._is_up = len(neighbours), me, is_up
        self._am_i = False
        self._nearer = {each: _nearer(neighbours, each, me) for each in participants if each != me}
        self._said: dict[int, set[int]] = {each: set() for each in self._nearer}
        """Neighbours that count, and have said it, by the member of which they have."""

    def add_me(self) -> None:
        """Note that this node needs nothing more itself."""
        self._am_i = True

    def hear(self, neighbour: int, members: Collection[int]) -> None:
        """Take a neighbour's word that members need nothing more, of those to which it is nearer than this node."""
        for each in members:
            if neighbour in self._nearer.get(each, ()):
                self._said[each].add(neighbour)

    def __contains__(self, member: object) -> bool:
        if member == self._me:
            return self._am_i
        if member not in self._nearer:
            return True
        said = self._said[member]
        return bool(said) and all(each in said or not self._is_up(each) for each in self._nearer[member])

    def __iter__(self) -> Iterator[int]:
        return (each for each in range(self._num) if each in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _nearer(neighbours: Sequence[Collection[int]], member: int, me: int) -> frozenset[int]:
    """Neighbours of this node that are one step nearer to a member."""
    distances, waiting = {member: 0}, deque([member])
    while waiting:
        at = waiting.popleft()
        for each in neighbours[at]:
            if each not in distances:
                distances[each] = distances[at] + 1
                waiting.append(each)
    return frozenset(each for each in neighbours[me] if me in distances and distances[each] < distances[me])
