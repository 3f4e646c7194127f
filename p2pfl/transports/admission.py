"""Admission of connections: who may hold one, and how many bytes of it, decided without sockets and without a clock.

An unknown peer is a connection over which no neighbour has said a word yet. Unknown peers compete for few places; links of
neighbours hold none, so nobody can push them out.
"""

from __future__ import annotations

import ipaddress
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Account:
    """Bytes of one connection that were delivered; the reader of messages adds to it."""

    delivered_bytes: int = 0

    def deliver(self, size_bytes: int) -> None:
        """Add what was delivered."""
        self.delivered_bytes += size_bytes


@dataclass(slots=True)
class Connection:
    """One connection as admission knows it."""

    source: str
    """Its address, see `source_of`."""
    member: str | None = None
    """The neighbour that has proved to be its other end; None: an unknown peer."""
    is_known: bool = False
    """Whether it holds one of the reserved places."""
    movable_s: float = 0.0
    """When another unknown peer may take its place."""
    account: Account = field(default_factory=Account)
    """Delivered bytes of it."""


def source_of(host: str) -> str:
    """The party that an address stands for: itself, or for IPv6 its network of 64 bits, which one party has as a whole."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))


@dataclass(kw_only=True, eq=False)
class Admission:
    """Places of unknown peers, links of members and what both may have sent, at one listener.

    Every method that takes a decision returns the numbers of the connections that must be shut now, with the reason: "evicted" (an
    unknown peer whose place another one took, or that found none), "replaced" (a member's connection too many), "oversent" (more bytes
    than allowed).
    They count until the caller has told that they `leave`.
    """

    open_places: int = 32
    """Unknown peers from addresses that no neighbour has come from."""
    reserved_places: int = 16
    """Unknown peers from addresses that a neighbour has come from in this study."""
    places_per_source: int = 24
    """Unknown peers from one address, or from one IPv6 network of 64 bits."""
    grace_s: tuple[float, float] = (0.05, 1.0)
    """Least and most time that an unknown peer has before another one may take its place; drawn for each, evenly on a logarithmic scale.

    A short time lets many try, so that a near neighbour soon comes through a crowd. A long one lets a distant one finish its handshake.
    """
    connections_per_member: int = 2
    """Links of one member; the newest stay. A member that came back behind a router still has one that hangs."""
    known_sources: int = 256
    """Addresses that are remembered, the most recently used."""
    unknown_peer_bytes: int = 4096
    """Bytes that a connection may send before its handshake is over; libzmq's own handshake takes fewer than 700."""
    newcomer_bytes: int = 8 * 2**20
    """Bytes that all encrypted connections together may send before a message of theirs was read."""
    member_bytes: int
    """Bytes that one member may have sent and that are not delivered yet, all its connections together."""
    draw: Callable[[], float] = random.SystemRandom().random
    """Draws numbers from 0 to 1; who is evicted must not be foreseen."""
    _connections: dict[int, Connection] = field(init=False, default_factory=dict)  # in the order of arrival
    _known: OrderedDict[str, None] = field(init=False, default_factory=OrderedDict)
    # bytes of encrypted connections that are over and not read yet; by member, None where no message had been read
    _remains: Counter[str | None] = field(init=False, default_factory=Counter)

    @property
    def unknown_peers(self) -> list[int]:
        """Connections of nobody, oldest first."""
        return [number for number, connection in self._connections.items() if connection.member is None]

    @property
    def has_remains(self) -> bool:
        """Whether there may still be messages to read that came over connections which are over."""
        return bool(self._remains)

    def member(self, number: int) -> str | None:
        """The neighbour at the other end of a connection; None: an unknown peer."""
        return self._connections[number].member if number in self._connections else None

    def held_bytes(self, number: int, taken_bytes: int) -> int:
        """Bytes of a connection that were taken and are not delivered."""
        return taken_bytes - self._connections[number].account.delivered_bytes if number in self._connections else 0

    def arrive(self, number: int, source: str, now_s: float) -> dict[int, str]:
        """A connection was accepted."""
        if self._remains[None] > self.newcomer_bytes:  # each would leave more behind that nobody reads
            return {number: "evicted"}
        least_s, most_s = self.grace_s
        newcomer = Connection(source, is_known=source in self._known, movable_s=now_s + least_s * (most_s / least_s) ** self.draw())
        rivals = {
            other: connection
            for other, connection in self._connections.items()
            if connection.member is None and connection.is_known == newcomer.is_known
        }
        counts = Counter(connection.source for connection in rivals.values())
        places = self.reserved_places if newcomer.is_known else self.open_places
        if counts[source] >= min(self.places_per_source, places):
            crowd = {source}
        elif len(rivals) >= places:
            largest = max(counts.values())
            crowd = {other for other, count in counts.items() if count == largest}
        else:
            self._connections[number] = newcomer
            return {}
        movable = [other for other, connection in rivals.items() if connection.source in crowd and connection.movable_s <= now_s]
        if not movable:
            return {number: "evicted"}
        self._connections[number] = newcomer
        return {movable[int(self.draw() * len(movable))]: "evicted"}

    def dial(self, number: int, source: str) -> None:
        """This node made a connection; it takes no place, and its bytes are counted as those of any other."""
        self._connections[number] = Connection(source, is_known=True, movable_s=float("inf"))

    def authenticate(self, number: int, member: str, account: Account) -> dict[int, str]:
        """A neighbour has proved to be the other end of a connection."""
        connection = self._connections.get(number)
        if connection is None:
            return {}
        connection.member, connection.account = member, account
        self._known[connection.source] = None
        self._known.move_to_end(connection.source)
        while len(self._known) > self.known_sources:
            self._known.popitem(last=False)
        own = [other for other, each in self._connections.items() if each.member == member]
        surplus = own[: max(0, len(own) - self.connections_per_member)]
        return dict.fromkeys(surplus, "replaced")

    def leave(self, number: int, taken_bytes: tuple[int, bool] = (0, False)) -> None:
        """Forget a connection that has ended, known or not; *taken_bytes* are as for `weigh`."""
        connection = self._connections.pop(number, None)
        taken, is_encrypted = taken_bytes
        if connection is None or not (is_encrypted or connection.member is not None):
            return
        held = taken - connection.account.delivered_bytes
        if held > 0:
            self._remains[connection.member] += held

    def drained(self, dialled: Collection[str], peer: str | None) -> None:
        """All messages were read that had come from one of the dialled neighbours, or, where it is None, from all others."""
        for member in [member for member in self._remains if (member == peer if peer is not None else member not in dialled)]:
            del self._remains[member]

    def newest_unknown_peer(self) -> int | None:
        """The unknown peer that came last, for one who needs its file descriptor; None: there is none."""
        numbers = [number for number in self.unknown_peers if self._connections[number].movable_s != float("inf")]
        return numbers[-1] if numbers else None

    def weigh(self, taken_bytes: Mapping[int, tuple[int, bool]]) -> dict[int, str]:
        """Weigh the bytes that were taken from the kernel of each connection, and whether its handshake is over, against what it may."""
        shut: list[int] = []
        newcomers: list[tuple[int, int]] = []
        totals = Counter(self._remains)
        excess = totals.pop(None, 0) - self.newcomer_bytes
        for number, (taken, is_encrypted) in taken_bytes.items():
            connection = self._connections.get(number)
            if connection is None:
                continue
            held = taken - connection.account.delivered_bytes
            if connection.member is not None:
                totals[connection.member] += max(0, held)
            elif is_encrypted:
                newcomers.append((held, number))
            elif held > self.unknown_peer_bytes:
                shut.append(number)
        excess += sum(held for held, _ in newcomers)
        for held, number in sorted(newcomers, reverse=True):
            if excess <= 0:
                break
            shut.append(number)
            excess -= held
        excessive = {member for member, total in totals.items() if total > self.member_bytes}
        shut += [number for number, connection in self._connections.items() if connection.member in excessive]
        return dict.fromkeys(shut, "oversent")
