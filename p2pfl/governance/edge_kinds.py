"""The kind of transport that carries each edge of a study, and the member that relays it: a pure function of the study.

Every member computes it for itself, and all must find the same: it depends on the cards and the graph alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from p2pfl.errors import ConfigError
from p2pfl.governance.card import Card

DIRECT, RELAY, BROKER = "zeromq", "relay", "mqtt"
EDGE_KINDS: Mapping[str, str] = {
    DIRECT: "one end dials the other",
    RELAY: "through a member that relays",
    BROKER: "over an MQTT broker that both reach",
}
"""Kinds of transport that a study can name for an edge, as the registry of transports has them."""


def checked_kind(text: str) -> str:
    """Return the name of an edge's kind of transport; ValueError for any other text."""
    if text not in EDGE_KINDS:
        raise ValueError(f"expected one of {', '.join(sorted(EDGE_KINDS))}")
    return text


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeKind:
    """How one edge is carried."""

    kind: str
    """One of EDGE_KINDS."""
    relay: str | None = None
    """The member that relays it."""


def edge_kinds(
    cards: Iterable[Card], edges: Iterable[tuple[str, str]], wanted: Mapping[tuple[str, str], str], default: str | None = None
) -> dict[tuple[str, str], EdgeKind]:
    """Choose how each edge is carried.

    An edge goes as it is wanted, else as the study's default says, else directly where one end has an address, else through a relay. It is
    relayed by the member, of those whose cards offer it, that is a neighbour of both ends, then of those the one with the fewest edges to
    relay, then the first by name. Edges are decided in the order of their names.

    Args:
        cards: of all members.
        edges: two members each, in any order.
        wanted: kinds of single edges, by their ends in the order of the names.
        default: kind of all others; None: as their addresses allow.

    Raises:
        ConfigError: an edge has no way; the message names its ends and what helps, for every such edge.
    """
    members = {card.name: card for card in cards}
    pairs = sorted({(min(a, b), max(a, b)) for a, b in edges})
    neighbours: dict[str, set[str]] = {name: set() for name in members}
    for a, b in pairs:
        neighbours[a].add(b)
        neighbours[b].add(a)
    load: Counter[str] = Counter()
    found: dict[tuple[str, str], EdgeKind] = {}
    faults: list[str] = []
    for a, b in pairs:
        said = wanted.get((a, b), default)
        is_direct = bool(members[a].addresses or members[b].addresses)
        kind = said if said is not None else DIRECT if is_direct else RELAY
        if kind != RELAY:
            found[a, b] = EdgeKind(kind=kind)
            if kind == DIRECT and not is_direct:
                faults.append(f"{a} - {b}: neither has an address, so that neither can dial the other; one of them needs one")
            continue
        offers = [name for name, card in members.items() if card.relay is not None and name not in (a, b)]
        if not offers:
            faults.append(_no_relay(a, b, is_wanted=said is not None))
            continue
        common = neighbours[a] & neighbours[b]
        relay = min(offers, key=lambda name: (name not in common, load[name], name))
        load[relay] += 1
        found[a, b] = EdgeKind(kind=RELAY, relay=relay)
    if faults:
        raise ConfigError([f"graph.edges: {fault}" for fault in faults])
    return found


def _no_relay(a: str, b: str, *, is_wanted: bool) -> str:
    remedy = "a third member must offer to relay on its card (p2pfl keys new --relay tcp://host:port)"
    if is_wanted:
        return f"{a} - {b}: is to go through a relay, and nobody else offers one: {remedy}"
    return f"{a} - {b}: neither has an address, so that neither can dial the other; one of them needs one, or {remedy}"
