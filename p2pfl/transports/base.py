"""The interface of a transport, which moves frames between members and knows nothing of the messages in them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

from p2pfl.errors import ConfigError

MAX_FRAMES = 2
"""In one message: a header and, where there is one, its payload."""

UNREADABLE = ("frame_count", "routing_id")
"""Counters of a link for messages that were not delivered, because no honest neighbour sends them."""

MAX_FRAME_BYTES = 2**20 + 2**16
"""A chunk of 1 MiB and room for whatever is put around it."""

MAX_QUEUED = 32
"""Messages that wait in one direction of one link before its sender has to wait as well."""

MAX_RECEIVED = 8
"""The most messages of a link that wait to be read: each may be a chunk of 1 MiB."""

MAX_SENDING = 4
"""The most messages of a link that wait at the sender, so that a short message is never long behind a large one."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a member of the study is reached and how it proves who it is."""

    name: str
    address: str | Sequence[str] | None
    """Such as tcp://node.hospital.example:7700 or tcp://[2001:db8::7]:7700, or several, of which the first that works is used.

    None, or none of them: nobody can dial it, it dials its neighbours.
    """
    public_key: bytes
    """CURVE, z85: 40 bytes."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Every address, in the order in which they are tried."""
        if self.address is None:
            return ()
        return (self.address,) if isinstance(self.address, str) else tuple(self.address)


@dataclass(frozen=True, slots=True)
class Received:
    """One message as it came."""

    peer: str
    """The neighbour whose link it came over, which is not what the message says of itself."""
    frames: tuple[memoryview, ...]
    """One or two, read-only."""


class LinkCondition(StrEnum):
    """How a link is, as far as this end can know."""

    CLOSED = "closed"
    """This end is not open."""
    AWAITED = "awaited"
    """The neighbour dials this node, and has not done so yet."""
    RESOLVING = "resolving"
    """The neighbour's host name is being looked up for the first time."""
    CONNECTING = "connecting"
    """It is being dialled for the first time."""
    UNKNOWN_NAME = "unknown name"
    """Its host name has no address, or the resolver does not answer."""
    NO_ROUTE = "no route"
    """This machine has no way to its address."""
    NO_ANSWER = "no answer"
    """Its address is silent: a firewall, or the machine is off."""
    REFUSED = "refused"
    """Its machine answers, and nobody listens at the port."""
    PROXY = "proxy failed"
    """This site's proxy is not reached, or does not make the connection."""
    RELAY = "relay failed"
    """The member that relays the link is not reached, or does not relay it."""
    BROKER = "broker failed"
    """The MQTT broker of the link is not reached, or does not let this site in."""
    HANDSHAKE_FAILED = "handshake failed"
    """Somebody listens, and the connection ended before it was encrypted: another key than on the card, or another program."""
    WRONG_KEY = "wrong key"
    """The other end does not know this node's key."""
    UP = "up"
    """Connected, encrypted and authenticated."""
    SILENT = "silent"
    """Connected, and yet not even signs of life come: the neighbour's process is stopped, or the network between is cut."""
    DOWN = "down"
    """It was up, and the connection has ended."""


CONNECTED = frozenset({LinkCondition.UP, LinkCondition.SILENT})
BEGINNING = frozenset({LinkCondition.CLOSED, LinkCondition.AWAITED, LinkCondition.RESOLVING, LinkCondition.CONNECTING})
"""Conditions before anything is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkState:
    """How the link to one neighbour is, and since when."""

    state: LinkCondition
    detail: str = ""
    """The cause as far as it is known, such as "connection refused at tcp://127.0.0.1:7700"; empty where there is nothing to say."""
    since_s: float
    """When this state began, on the clock of time.monotonic."""
    heard_s: float | None = None
    """When anything last came over the link, a sign of life included, on the same clock; None: never."""

    @property
    def is_up(self) -> bool:
        """Whether there is a connection; a silent one may come to life again."""
        return self.state in CONNECTED


class LinkStates:
    """The states of the links to all neighbours of one transport, by its clock."""

    def __init__(self, peers: Iterable[str], now_s: Callable[[], float] | None = None) -> None:
        self.counters: dict[str, Counter[str]] = {peer: Counter() for peer in peers}
        """Numbers of events of each link, by name, over the object's life."""
        self._now_s = now_s or (lambda: time.monotonic())  # noqa: PLW0108  # looked up when called: time may be virtual
        self._states = {peer: LinkState(state=LinkCondition.CLOSED, since_s=self._now_s()) for peer in self.counters}
        self._heard_s: dict[str, float] = {}
        self._excluded_until_s: dict[str, float] = {}
        self._beating: set[str] = set()  # neighbours that send signs of life over the link that they have

    def note(self, peer: str, state: LinkCondition, detail: str = "", *, since_s: float | None = None) -> None:
        """Put down how a link is now. It is so since it first came to be so, or since the time that is given."""
        before = self._states[peer]
        if before.state == state:
            since_s = before.since_s
        elif state not in CONNECTED:
            self._beating.discard(peer)
        self._states[peer] = LinkState(state=state, detail=detail, since_s=self._now_s() if since_s is None else since_s)

    def begin(self, peer: str, state: LinkCondition, detail: str = "") -> None:
        """Put down a first attempt; where more than that is known already, it stays."""
        if self._states[peer].state in BEGINNING:
            self.note(peer, state, detail)

    def exclude(self, peer: str, for_s: float, why: str) -> None:
        """Put down that this node has ended a link, and wants none for so long."""
        self._excluded_until_s[peer] = self._now_s() + for_s
        self.note(peer, LinkCondition.DOWN, f"this node has ended the connection for {for_s:g} s: {why}")

    def excluded_for_s(self, peer: str) -> float:
        """For how long from now no link is wanted; 0 or less: it is wanted."""
        return self._excluded_until_s.get(peer, 0.0) - self._now_s()

    def is_excluded(self, peer: str) -> bool:
        """Whether no link is wanted now because of `exclude`."""
        return bool(self._excluded_until_s) and self.excluded_for_s(peer) > 0  # asked for each message

    def note_received(self, peer: str) -> None:
        """Something came over a link: it is up, whatever was said of it before."""
        self._heard_s[peer] = self._now_s()
        if self._states[peer].state != LinkCondition.UP:
            self.note(peer, LinkCondition.UP)

    def note_received_if_up(self, peer: str, *, is_sign_of_life: bool) -> None:
        """Something came over a connection that may be over, or about to be known: it is heard, and makes no link."""
        self._heard_s[peer] = self._now_s()
        if self.state(peer).is_up:
            self.note_received(peer)
            if is_sign_of_life:
                self._beating.add(peer)

    def note_silence(self, patience_s: float) -> None:
        """Put down which neighbours that send signs of life have sent nothing for longer than so many seconds."""
        for peer in self._beating:
            link = self.state(peer)
            if link.state == LinkCondition.UP and link.heard_s is not None and self._now_s() - link.heard_s > patience_s:
                self.note(peer, LinkCondition.SILENT, "connected, and yet no sign of life comes", since_s=link.heard_s)

    def state(self, peer: str) -> LinkState:
        """The state of one link; ValueError for somebody who is no neighbour."""
        if peer not in self._states:
            raise ValueError(f"{peer!r} is no neighbour")
        now = self._states[peer]  # asked for many times a second: `replace` takes three times as long
        return LinkState(state=now.state, detail=now.detail, since_s=now.since_s, heard_s=self._heard_s.get(peer))


class Transport(Protocol):
    """Links to neighbours, open inside `async with`. Messages of one task to one peer arrive in the order sent, or not at all."""

    @property
    def counters(self) -> Counter[str]:
        """Numbers of events of links and of frames that were not delivered, by name, over the object's life."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None: ...

    async def send(self, peer: str, frames: Sequence[bytes | memoryview], timeout_s: float) -> None:
        """Hand a message of one or two frames to the link, and wait so long while its queue is full; it may still not arrive.

        The frames must not change afterwards, for they may be sent without a copy.

        Raises:
            TransportError: there is no link to the peer now (known at once).
            QueueFull: the link is up and its queue stayed full until the timeout; nothing of the message was sent.
            ValueError: the peer is no neighbour, or the frames are not ones that a neighbour would take.
        """
        ...

    async def receive(self) -> Received:
        """Wait for the next message of any neighbour."""
        ...

    @property
    def link_counters(self) -> Mapping[str, Counter[str]]:
        """By neighbour, what happened to its link: "connected", "disconnected", and what else is known of attempts."""
        ...

    def disconnect(self, peer: str, for_s: float, why: str) -> None:
        """End the link to a neighbour, and have none with it for so many seconds; the state of the link then says why."""
        ...

    def link(self, peer: str) -> LinkState:
        """How the link to a neighbour is now, also of a transport that is not open; ValueError for somebody who is no neighbour."""
        ...


class Service(Protocol):
    """Something that a member runs for others as long as its links are open."""

    counters: Counter[str]
    """Numbers of its events, by name."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None: ...


TransportFactory = Callable[..., Transport]
"""Makes a member's closed transport from its keys and its neighbours; the arguments are those of `ZeroMQTransport`."""


def dials(name: str, address: str | Sequence[str] | None, peer_name: str, peer_address: str | Sequence[str] | None) -> bool:
    """Whether *name* dials the peer: of two neighbours the one whose name sorts later does, unless the other has no address.

    Raises:
        ConfigError: neither has an address.
    """
    if not address and not peer_address:
        raise ConfigError(f"address of {name} and {peer_name}: none given; of two neighbours at least one must have one")
    if not address or not peer_address:
        return not address
    return name > peer_name


def check_frames(frames: Sequence[bytes | memoryview], max_frame_bytes: int) -> None:
    """Refuse with a ValueError what the receiver would not deliver.

    A single empty frame is no message: it is how a dialler makes itself known.
    """
    sizes = [memoryview(frame).nbytes for frame in frames]
    if not 1 <= len(sizes) <= MAX_FRAMES or sizes == [0]:
        raise ValueError(f"frames of {sizes} bytes: 1 to {MAX_FRAMES}, and not a single empty one")
    if max(sizes) > max_frame_bytes:
        raise ValueError(f"a frame of {max(sizes)} bytes: at most {max_frame_bytes}")
