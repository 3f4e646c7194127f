"""What a transport is: it moves frames between members and knows nothing of the messages in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from p2pfl.errors import ConfigError

MAX_FRAMES = 2
"""In one message: a header and, where there is one, its payload."""

MAX_FRAME_BYTES = 2**20 + 2**16
"""A chunk of 1 MiB and room for whatever is put around it."""

MAX_QUEUED = 32
"""Messages that wait in one direction of one link before its sender has to wait as well."""

MAX_SENDING = 4
"""Of these at most so many wait at the sender, so that a short message is never long behind a large one."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a member of the study is reached and how it proves who it is."""

    name: str

    address: str | None
    """Such as tcp://node.hospital.example:7700 or tcp://[2001:db8::7]:7700; None: nobody can dial it, it dials its neighbours."""

    public_key: bytes
    """CURVE, z85: 40 bytes."""


@dataclass(frozen=True, slots=True)
class Received:
    """One message as it came."""

    peer: str
    """The neighbour whose link it came over, which is not what the message says of itself."""

    frames: tuple[memoryview, ...]
    """One or two, read-only."""


class Transport(Protocol):
    """Links to neighbours, open inside `async with`. Messages of one task to one peer arrive in the order sent, or not at all."""

    counters: Counter[str]
    """What happened to links and to frames that were not delivered, by name; over the object's life."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None: ...

    async def send(self, peer: str, frames: Sequence[bytes | memoryview], timeout_s: float) -> None:
        """Hand a message to the link; returning does not say that it arrived.

        Args:
            peer: a neighbour.
            frames: one or two; they must not change afterwards, for they may be sent without a copy.
            timeout_s: how long to wait while the link's queue is full.

        Raises:
            TransportError: there is no link to the peer now (known at once).
            QueueFull: the link is up and its queue stayed full until the timeout; nothing of the message was sent.
            ValueError: the peer is no neighbour, or the frames are not ones that a neighbour would take.
        """
        ...

    async def receive(self) -> Received:
        """Wait for the next message of any neighbour."""
        ...


def dials(name: str, address: str | None, peer_name: str, peer_address: str | None) -> bool:
    """Whether *name* dials the peer; an edge is one connection, so exactly one of two neighbours does.

    The one whose name sorts later, unless the other has no address.

    Raises:
        ConfigError: neither has an address.
    """
    if address is None and peer_address is None:
        raise ConfigError(f"address of {name} and {peer_name}: none given; of two neighbours at least one must have one")
    if address is None or peer_address is None:
        return address is None
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
