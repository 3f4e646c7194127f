"""The link to one neighbour: the handshake, and messages taken in the right order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from p2pfl.errors import BadMessage, PeerError, Unauthorized
from p2pfl.wire.codec import Frame, decode
from p2pfl.wire.messages import (
    NEWEST_SCHEMA,
    NOTHING_REMEMBERED,
    SCHEMA_OF,
    Chunk,
    DoctorAnswer,
    DoctorQuestion,
    Goodbye,
    Hello,
    Message,
    Remembered,
    Report,
    ResendRequest,
    StopNews,
    Update,
)
from p2pfl.wire.negotiation import announced_schema
from p2pfl.wire.update import Assembly, MakeRoom, ReceivedUpdate, Unpacked, UpdateFormat, in_memory


class LinkState(Enum):
    """How far two neighbours know each other."""

    UNKNOWN = auto()
    """No valid Hello yet, or the neighbour has left."""
    HALF_OPEN = auto()
    """A valid Hello, but not yet one that shows it has heard ours."""
    OPEN = auto()
    """It has heard our Hello and we have heard its own."""


class HandshakeEvent(Enum):
    """Kinds of messages that the state of a link depends on."""

    ECHO = auto()
    """A Hello that bears our incarnation."""
    HELLO = auto()
    """A Hello that does not, from an incarnation that we do not know."""
    HELLO_AGAIN = auto()
    """A Hello that does not, from the incarnation that we know: sent before ours got there."""
    REFUSED = auto()
    """A Hello of another study, layout, start or name."""
    GOODBYE = auto()
    MESSAGE = auto()
    """Anything else."""


TRANSITIONS: Final[dict[tuple[LinkState, HandshakeEvent], LinkState]] = {
    (LinkState.UNKNOWN, HandshakeEvent.HELLO): LinkState.HALF_OPEN,
    (LinkState.UNKNOWN, HandshakeEvent.ECHO): LinkState.OPEN,
    (LinkState.UNKNOWN, HandshakeEvent.REFUSED): LinkState.UNKNOWN,
    (LinkState.UNKNOWN, HandshakeEvent.GOODBYE): LinkState.UNKNOWN,
    (LinkState.HALF_OPEN, HandshakeEvent.HELLO): LinkState.HALF_OPEN,
    (LinkState.HALF_OPEN, HandshakeEvent.HELLO_AGAIN): LinkState.HALF_OPEN,
    (LinkState.HALF_OPEN, HandshakeEvent.ECHO): LinkState.OPEN,
    (LinkState.HALF_OPEN, HandshakeEvent.REFUSED): LinkState.UNKNOWN,
    (LinkState.HALF_OPEN, HandshakeEvent.GOODBYE): LinkState.UNKNOWN,
    (LinkState.OPEN, HandshakeEvent.HELLO): LinkState.HALF_OPEN,
    (LinkState.OPEN, HandshakeEvent.HELLO_AGAIN): LinkState.OPEN,
    (LinkState.OPEN, HandshakeEvent.ECHO): LinkState.OPEN,
    (LinkState.OPEN, HandshakeEvent.REFUSED): LinkState.UNKNOWN,
    (LinkState.OPEN, HandshakeEvent.GOODBYE): LinkState.UNKNOWN,
    (LinkState.OPEN, HandshakeEvent.MESSAGE): LinkState.OPEN,
}
"""Every legal step; what is not here is refused as "not_greeted"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """Terms that two neighbours must have in common, each 64 hexadecimal digits of a SHA-256."""

    study: str
    layout: str
    start: str

    def __post_init__(self) -> None:
        for name in ("study", "layout", "start"):
            if len(bytes.fromhex(getattr(self, name))) != 32:  # noqa: PLR2004
                raise ValueError(f"{name} digest {getattr(self, name)!r}: expected 64 hexadecimal digits")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceivedMessage:
    """Meaning of one message from a neighbour."""

    message: Message
    """Its exchange, report and stop news count even where the update that they came with was dropped."""
    received: ReceivedUpdate | None = None
    """The update that this message made complete."""
    dropped: str | None = None
    """Why an update or chunk was not taken: "stale_round", "far_round", "duplicate", "contradiction", "stray_chunk",
    "out_of_order"."""
    needs_answer: bool = False
    """Answer with `LinkSession.hello`."""


class LinkSession:
    """The conversation with one neighbour; bytes in, meanings out, no clock and no socket.

    Args:
        peer: the name that belongs to the key which authenticated the link.
        member: our own.
        terms: what we must have in common.
        incarnation: drawn at random in [1, 2**63) when this process started.
        formats: of the updates of our study, one for each phase of a round.
        ahead: how many exchanges after the current one an update may be of and is kept.
        make_room: where an update lies.
        make_early_room: where one of an exchange after the current one lies; None: likewise.
    """

    def __init__(
        self,
        *,
        peer: str,
        member: str,
        terms: Terms,
        incarnation: int,
        formats: Sequence[UpdateFormat],
        ahead: int = 1,
        make_room: MakeRoom = in_memory,
        make_early_room: MakeRoom | None = None,
    ) -> None:
        self.peer = peer
        self.state = LinkState.UNKNOWN
        self.counters: Counter[str] = Counter()
        """Numbers of messages refused or dropped, by reason."""
        self._member = member
        self._terms = terms
        self._incarnation = incarnation
        self._peer_incarnation = 0
        self._assembly = Assembly(*formats, make_room=make_room, make_early_room=make_early_room)
        self._ahead = ahead
        self._complete: dict[tuple[int, bool], bytes] = {}  # digests of those handed out, of the current exchange and those ahead
        self._kept: dict[int, ReceivedUpdate] = {}

    @property
    def is_open(self) -> bool:
        """Whether anything but a Hello may be said."""
        return self.state is LinkState.OPEN

    @property
    def schema(self) -> int:
        """The lower of both ends' newest schemas, which both speak; the oldest one as long as the neighbour has not said Hello."""
        return min(NEWEST_SCHEMA, announced_schema(self._peer_incarnation))

    def understands(self, kind: type[Message]) -> bool:
        """Whether a message of a kind may be sent: it is of a schema that the neighbour has announced."""
        return SCHEMA_OF[kind.code] <= self.schema

    @property
    def progress(self) -> tuple[int, int] | None:
        """Exchange and bytes so far of the update that is coming in; None between updates. While it grows there is nothing to ask for."""
        update = self._assembly.update
        return None if update is None else (update.exchange, self._assembly.received_bytes)

    @property
    def announced_bytes(self) -> int:
        """Size of the update that is coming in; 0 between updates."""
        update = self._assembly.update
        return 0 if update is None else update.size_bytes

    def has(self, exchange: int, *, full: bool) -> bool:
        """Whether the update of an exchange has come to its end; full: the full one."""
        return (exchange, full) in self._complete

    def resend_request(self, exchange: int, *, full: bool, lost: bool) -> ResendRequest:
        """Request for what is missing of an update."""
        update = self._assembly.update
        if update is None or (update.exchange, _kind(update)[1]) != (exchange, full):
            return ResendRequest(exchange=exchange, whole=full, lost=lost, offset=0, digest=None)
        return ResendRequest(exchange=exchange, whole=full, lost=lost, offset=self._assembly.received_bytes, digest=update.digest)

    def refuse(self) -> None:
        """Refuse the neighbour whose Hello has just come; its next Hello is looked at again."""
        self._step(HandshakeEvent.REFUSED)
        self._forget_peer()

    def forget_updates(self) -> None:
        """Forget what the neighbour has sent, but for what is kept: it has begun again without its state."""
        self._assembly.drop()
        self._complete.clear()

    def keep(self, received: ReceivedUpdate) -> None:
        """Keep an update that was handed out, until it is released."""
        self._kept[received.exchange] = received

    def kept(self, exchange: int) -> ReceivedUpdate:
        """Return the update of an exchange that is kept."""
        return self._kept[exchange]

    def release(self, needed: Collection[int]) -> None:
        """Let go of all updates that are kept, but those of some exchanges."""
        self._kept = {exchange: received for exchange, received in self._kept.items() if exchange in needed}

    def hello(self, *, exchange: int, report: Report, stop: StopNews, anew: int = 0, remembered: Remembered = NOTHING_REMEMBERED) -> Hello:
        """Make the Hello to send now and then until the link is open, and whenever `ReceivedMessage.needs_answer` asks for it."""
        return Hello(
            member=self._member,
            study=bytes.fromhex(self._terms.study),
            layout=bytes.fromhex(self._terms.layout),
            start=bytes.fromhex(self._terms.start),
            incarnation=self._incarnation,
            echo=self._peer_incarnation,
            is_open=self.is_open,
            anew=anew,
            remembered=remembered,
            exchange=exchange,
            report=report,
            stop=stop,
        )

    def receive(self, frames: Sequence[Frame], *, exchange: int) -> ReceivedMessage:
        """Take one message of the neighbour, while this node is at an exchange.

        Raises:
            Unauthorized: "wrong_name", "wrong_study", "wrong_layout" or "wrong_start": answer Goodbye(reason=error.reason), that somebody
                at the other end may read why; "not_greeted": it speaks before its Hello, our next one tells it to.
            BadMessage: anything else that cannot be taken, under its reason. The node and the link go on.
        """
        try:
            heard = self._receive(frames, exchange)
        except PeerError as error:
            self.counters[error.reason] += 1
            raise
        if heard.dropped is not None:
            self.counters[heard.dropped] += 1
        return heard

    def _receive(self, frames: Sequence[Frame], exchange: int) -> ReceivedMessage:
        message, payload = decode(frames)
        if isinstance(message, Hello):
            return self._hear_hello(message)
        if isinstance(message, DoctorQuestion | DoctorAnswer):  # in any state: a doctor never says Hello
            return ReceivedMessage(message=message)
        self._step(HandshakeEvent.GOODBYE if isinstance(message, Goodbye) else HandshakeEvent.MESSAGE)
        match message:
            case Update():
                return self._updated(message, payload, exchange)
            case Chunk():
                return self._continued(message, payload, exchange)
            case Goodbye():
                self._forget_peer()
        return ReceivedMessage(message=message)

    def _step(self, event: HandshakeEvent) -> None:
        following = TRANSITIONS.get((self.state, event))
        if following is None:
            raise Unauthorized(f"{self.peer} says something before its Hello", reason="not_greeted")
        self.state = following

    def _hear_hello(self, hello: Hello) -> ReceivedMessage:
        try:
            self._verify(hello)
        except Unauthorized:
            self.refuse()
            raise
        is_new, echoes = hello.incarnation != self._peer_incarnation, hello.echo == self._incarnation
        self._step(HandshakeEvent.ECHO if echoes else HandshakeEvent.HELLO if is_new else HandshakeEvent.HELLO_AGAIN)
        if is_new:  # the neighbour's process has been restarted: the rest of what it was sending will not come
            self._assembly.drop()
            self._peer_incarnation = hello.incarnation
        return ReceivedMessage(message=hello, needs_answer=not (echoes and hello.is_open))

    def _verify(self, hello: Hello) -> None:
        if hello.member != self.peer:
            raise Unauthorized(f"the key of {self.peer} says Hello as {hello.member!r}", reason="wrong_name")
        for name in ("study", "layout", "start"):
            ours, theirs = getattr(self._terms, name), getattr(hello, name).hex()
            if ours.lower() != theirs:
                raise Unauthorized(f"{self.peer} holds {name} {theirs[:16]}…, this node {ours[:16]}…", reason=f"wrong_{name}")

    def _forget_peer(self) -> None:
        self._assembly.drop()
        self._peer_incarnation = 0

    def _updated(self, update: Update, payload: memoryview, exchange: int) -> ReceivedMessage:
        if update.report.closed_through < update.exchange - 1:
            raise BadMessage(
                f"an update of exchange {update.exchange} from a node that has closed {update.report.closed_through}",
                reason="wrong_report",
            )
        dropped, before = self._unusable(update.exchange, exchange), self._complete.get(_kind(update))
        if dropped is None and before is not None:
            dropped = "duplicate" if before == update.digest else "contradiction"  # the first one stands: it may have been merged
            if self.progress is not None and self.progress[0] == update.exchange:
                self._assembly.drop()  # of the other kind, and given up: its chunks could not be told from those that follow
        if dropped is not None:
            return ReceivedMessage(message=update, dropped=dropped)
        return self._taken(update, update, self._assembly.begin(update, payload, is_early=update.exchange > exchange))

    def _continued(self, chunk: Chunk, payload: memoryview, exchange: int) -> ReceivedMessage:
        dropped = self._unusable(chunk.exchange, exchange)
        if dropped is not None:
            return ReceivedMessage(message=chunk, dropped=dropped)
        update = self._assembly.update
        if update is None or update.exchange != chunk.exchange:  # its beginning was lost with a connection, or dropped
            is_known = any(of == chunk.exchange for of, _ in self._complete)
            return ReceivedMessage(message=chunk, dropped="duplicate" if is_known else "stray_chunk")
        if chunk.offset != self._assembly.received_bytes:  # something before it was lost with a connection: what is here is kept
            return ReceivedMessage(message=chunk, dropped="out_of_order")
        return self._taken(chunk, update, self._assembly.extend(chunk, payload))

    def _unusable(self, came: int, exchange: int) -> str | None:
        """Why an update of that exchange is of no use now; forgets on the way what has become so."""
        self._complete = {kind: digest for kind, digest in self._complete.items() if kind[0] >= exchange}
        if self._assembly.update is not None and self._assembly.update.exchange < exchange:
            self._assembly.drop()
        if came < exchange:
            return "stale_round"
        return "far_round" if came > exchange + self._ahead else None

    def _taken(self, message: Update | Chunk, update: Update, unpacked: Unpacked | None) -> ReceivedMessage:
        if unpacked is None:
            return ReceivedMessage(message=message)
        arrays, norms = unpacked
        self._complete[_kind(update)] = update.digest
        received = ReceivedUpdate(
            exchange=update.exchange,
            arrays=arrays,
            norms=norms,
            state_digests=update.marks,
            report=update.report,
            stop=update.stop,
            digest=update.digest,
        )
        return ReceivedMessage(message=message, received=received)


def _kind(update: Update) -> tuple[int, bool]:
    """Kind of an update: of an exchange there may be one that continues another, and a full one."""
    return update.exchange, update.marks is not None and update.marks[0] is None
