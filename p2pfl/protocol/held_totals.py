"""Totals that members hold when a session opens: they are final, and whoever lacks one is sent it."""

from __future__ import annotations

from collections.abc import Mapping

from p2pfl.protocol.secure_sum import SessionVoid
from p2pfl.protocol.sum_terms import SumTerms
from p2pfl.wire.secure_messages import HeldTotals


def final_totals(terms: SumTerms, held: Mapping[int, HeldTotals]) -> dict[str, bytes]:
    """Find the totals that are final, with their HMACs by sum id, from what all participants have said to hold.

    Raises:
        SessionVoid: two members hold different totals of one sum; both are named.
    """
    holders: dict[str, tuple[int, bytes]] = {}
    for member in terms.participants:
        for sum_id, mac in held[member].macs:
            first, agreed = holders.setdefault(sum_id, (member, mac))
            if agreed != mac:
                raise SessionVoid(f"{terms.names[first]} and {terms.names[member]} hold different totals of one sum", (first, member))
    return {sum_id: mac for sum_id, (_, mac) in holders.items()}
