"""The rule over sets: of one statistic, totals over different sets of members must not give a sum over few of them.

Totals over several sets, added and subtracted, give at most sums over atoms: the members that are in exactly the same sets. So each atom
must have enough members, or none. Looking at pairs of sets is not enough: {1,2,3}, {3,4,5} and {1,2,4,5} differ by three or four members
and give member 3.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from typing import TypeVar

from p2pfl.errors import ConfigError, some

M = TypeVar("M", bound=Hashable)


def atoms(sets: Collection[frozenset[M]]) -> list[frozenset[M]]:
    """Split the members of all sets into groups that are in exactly the same sets; those in none are left out."""
    found: dict[tuple[bool, ...], set[M]] = {}
    for member in frozenset().union(*sets):
        found.setdefault(tuple(member in each for each in sets), set()).add(member)
    return [frozenset(group) for group in found.values()]


def fewest_in_atom(min_participants: int, curious: int) -> int:
    """How many members an atom needs: the curious ones know their own values and can take them off."""
    return min_participants + curious - 1


def check_sets(
    statistic: str,
    new: frozenset[str],
    released: Collection[frozenset[str]],
    *,
    fewest: int,
    consenting: Collection[str] = (),
    names: Mapping[str, str] | None = None,
) -> None:
    """Refuse a set of members over which a statistic would tell a sum over few of them.

    Args:
        statistic: its name, for the error.
        new: identities of the members over which it is asked.
        released: the sets over which it has been asked before; asked means that a masked value was sent.
        fewest: that an atom may have, unless it is empty.
        consenting: identities of members that have signed that they may be in a smaller atom.
        names: of members by their identities, for the error.

    Raises:
        ConfigError: an atom is too small; its members are named.
    """
    for atom in sorted(atoms([*dict.fromkeys([*released, new])]), key=sorted):
        if len(atom) < fewest and not atom <= frozenset(consenting):
            shown = some(sorted((names or {}).get(each, each[:16]) for each in atom))
            raise ConfigError(
                f"{statistic} has been asked over other members: with this total the sum over {shown} alone would be known;"
                f" at least {fewest} are needed, or the signed consent of those members"
            )
