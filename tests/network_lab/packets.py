"""What a router does with a packet, without input, output or clock: which one it drops, when the others come out, and what was in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from random import Random

TCP = 6
SYN, ACK = 0x02, 0x10
Flow = tuple[str, int, str, int]
"""Sender, its port, receiver, its port: one direction of a connection."""


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet of IPv4; ports, flags and content are those of TCP."""

    source: str
    target: str
    size_bytes: int
    protocol: int
    ports: tuple[int, int] = (0, 0)
    flags: int = 0
    sequence: int = 0
    content: bytes = b""

    @classmethod
    def read(cls, raw: bytes) -> Packet | None:
        """Take a packet apart; None if it is not IPv4."""
        if len(raw) < 20 or raw[0] >> 4 != 4:
            return None
        source, target = (".".join(map(str, raw[at : at + 4])) for at in (12, 16))
        tcp = raw[4 * (raw[0] & 0xF) : int.from_bytes(raw[2:4], "big")]
        if raw[9] != TCP or len(tcp) < 20:
            return cls(source, target, len(raw), raw[9])
        ports = int.from_bytes(tcp[:2], "big"), int.from_bytes(tcp[2:4], "big")
        content = tcp[4 * (tcp[12] >> 4) :]
        return cls(source, target, len(raw), TCP, ports, tcp[13], int.from_bytes(tcp[4:8], "big"), content)

    @property
    def flow(self) -> Flow:
        return self.source, self.ports[0], self.target, self.ports[1]

    @property
    def opens(self) -> bool:
        """Whether it asks for a new connection."""
        return self.protocol == TCP and self.flags & SYN != 0 and self.flags & ACK == 0


@dataclass(kw_only=True)
class Firewall:
    """What may pass between hosts, by their addresses.

    Args:
        closed: hosts that nobody may connect to; what they have asked for comes in.
        only_to: by host, the only hosts that it may exchange packets with.
        apart: pairs of hosts between which nothing passes.
    """

    closed: frozenset[str] = frozenset()
    only_to: Mapping[str, frozenset[str]] = field(default_factory=dict)
    apart: frozenset[frozenset[str]] = frozenset()
    _asked_for: set[Flow] = field(default_factory=set)

    def lets_pass(self, packet: Packet) -> bool:
        ends = (packet.source, packet.target)
        if frozenset(ends) in self.apart:
            return False
        if any(a in self.only_to and b not in self.only_to[a] for a, b in (ends, ends[::-1])):
            return False
        if packet.source in self.closed:
            self._asked_for.add(packet.flow)
        if packet.target not in self.closed:
            return True
        return packet.protocol == TCP and (*packet.flow[2:], *packet.flow[:2]) in self._asked_for


@dataclass(kw_only=True)
class Wires:
    """A line of each host to a network that delays and loses packets. Times are in seconds, on the caller's clock.

    Args:
        delay_s: from line to line.
        jitter_s: so much more or less, evenly; packets between two hosts keep their order.
        loss: probability that a packet is lost.
        bytes_per_s: rate of each line, each way.
        buffer_s: what would wait longer for a line is dropped.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    bytes_per_s: float = float("inf")
    buffer_s: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        self._draw = Random(self.seed)
        self._free_s: dict[tuple[str, str], float] = {}
        self._last_s: dict[tuple[str, str], float] = {}

    def enter(self, packet: Packet, now_s: float) -> float | None:
        """When a packet that a host sends now is at the other host's line; None if it is lost."""
        sent_s = self._through(("up", packet.source), packet.size_bytes, now_s)
        if sent_s is None or self._draw.random() < self.loss:
            return None
        ends = packet.source, packet.target
        arrived_s = sent_s + self.delay_s + self._draw.uniform(-self.jitter_s, self.jitter_s)
        arrived_s = self._last_s[ends] = max(arrived_s, self._last_s.get(ends, 0.0))
        return arrived_s

    def leave(self, packet: Packet, now_s: float) -> float | None:
        """When a packet that is at its host's line now comes out of it; None if the line is too busy."""
        return self._through(("down", packet.target), packet.size_bytes, now_s)

    def _through(self, line: tuple[str, str], size_bytes: int, now_s: float) -> float | None:
        begins_s = max(now_s, self._free_s.get(line, 0.0))
        if begins_s - now_s > self.buffer_s:
            return None
        self._free_s[line] = begins_s + size_bytes / self.bytes_per_s
        return self._free_s[line]


def streams(packets: Iterable[Packet]) -> dict[Flow, list[bytes]]:
    """What was said over each direction of each connection, in order; a new piece begins where something was not seen."""
    flows: dict[Flow, list[dict[int, bytes]]] = {}
    for packet in packets:
        if packet.protocol != TCP:
            continue
        if packet.flags & SYN:  # a port may be used again
            flows.setdefault(packet.flow, []).append({})
        if packet.content:
            found = flows.setdefault(packet.flow, [{}])[-1]
            if len(packet.content) > len(found.get(packet.sequence, b"")):
                found[packet.sequence] = packet.content
    return {flow: [piece for each in found for piece in _pieces(each)] for flow, found in flows.items()}


def _pieces(found: dict[int, bytes]) -> list[bytes]:
    if not found:
        return []
    first = next(iter(found))  # the numbers go round, and all are within half a turn of this one
    at = {(number - first + 2**31) % 2**32 - 2**31: content for number, content in found.items()}
    pieces: list[bytearray] = []
    end = min(at) - 1
    for begin in sorted(at):
        if begin > end:
            pieces.append(bytearray())
            end = begin
        pieces[-1] += at[begin][end - begin :]
        end = max(end, begin + len(at[begin]))
    return [bytes(piece) for piece in pieces]
