"""Totals that members hold when a session opens: they are final, and whoever lacks one is sent it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from p2pfl.protocol.secure_sum import SessionVoid
from p2pfl.protocol.sum_terms import SumTerms
from p2pfl.wire.secure_messages import HeldTotals


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalTotal:
    """A total that somebody holds, and who gives it to those that lack it."""

    mac: bytes
    holder: int
    is_lacking: bool
    """Whether some participant does not hold it."""


def final_totals(terms: SumTerms, held: Mapping[int, HeldTotals]) -> dict[str, FinalTotal]:
    """Find the totals that are final, by sum id, from what all participants have said to hold.

    Raises:
        SessionVoid: two members hold different totals of one sum; both are named.
    """
    holders: dict[str, tuple[int, bytes]] = {}
    for member in terms.participants:
        for sum_id, mac in held[member].macs:
            first, agreed = holders.setdefault(sum_id, (member, mac))
            if agreed != mac:
                raise SessionVoid(f"{terms.names[first]} and {terms.names[member]} hold different totals of one sum", (first, member))
    has = [dict(each.macs) for each in held.values()]
    return {
        sum_id: FinalTotal(mac=mac, holder=holder, is_lacking=any(sum_id not in macs for macs in has))
        for sum_id, (holder, mac) in holders.items()
    }
