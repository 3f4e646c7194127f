"""Messages with which a probe tries a running node: one of each kind that changes nothing there, and faulty ones for a rehearsal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from p2pfl.protocol.ledger import EdgeLedger
from p2pfl.wire.codec import CHUNK_BYTES, Frame, encode
from p2pfl.wire.messages import (
    SCHEMA,
    Busy,
    Chunk,
    Closing,
    DoctorQuestion,
    Heartbeat,
    Hello,
    ProofRequest,
    PushSum,
    Ready,
    Records,
    ResendRequest,
    Sent,
    StopNews,
    Update,
)
from p2pfl.wire.ready_record import receipt
from p2pfl.wire.update import DTYPES, EncodedUpdate, UpdateFormat

FARTHEST = 2**53 - 1
"""The largest exchange: nobody holds an update of it."""

_TRIFLES = frozenset({"stale_round", "far_round", "duplicate", "contradiction", "stray_chunk", "out_of_order"})
"""Reasons for which a message is left alone that could have been of use a moment earlier or later."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One message that is sent, and how a node that keeps to the protocol takes it."""

    name: str
    frames: Sequence[Frame] = ()
    """Frames of the message; empty: it cannot be sent, see *why_not*."""
    why_not: str = ""
    refused_as: frozenset[str] = frozenset()
    """Reasons of which one must be given; empty: it must be taken, or left alone for a reason in *may_be*."""
    may_be: frozenset[str] = frozenset()
    answered_by: frozenset[str] = frozenset()
    """Kinds of messages of which a node may answer one; an answer is not required."""
    ends_link: bool = False
    """Whether a node then waits for a new Hello."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """State of the member in whose name a probe speaks, and what it has heard of the node."""

    ledger: EdgeLedger
    """Ledger of the edge, as the member's checkpoint has it."""
    exchange: int
    """Where the member is."""
    stop: StopNews
    their_exchange: int
    formats: Sequence[UpdateFormat]
    sent: EncodedUpdate | None
    """The member's last update, as its checkpoint has it; None: there is none."""
    records: Sequence[bytes] = ()
    """Sealed round records that the node has said."""
    ready: Sequence[bytes] = ()
    """Sealed ready records that the node has said."""

    @property
    def format(self) -> UpdateFormat:
        """Format of updates of the exchange that the node is in; the full one where updates continue others."""
        found = self.formats[self.their_exchange % len(self.formats)]
        return found.full or found


def harmless_attempts(now: Callable[[], Standing]) -> Iterator[Attempt]:
    """One message of each kind but Hello and Goodbye, as the member could send them after a restart; *now*: what is known by then."""
    of = now()
    report, stop = of.ledger.report(), of.stop
    yield Attempt(name="Heartbeat", frames=encode(Heartbeat(exchange=of.exchange, report=report, stop=stop)))
    request = ResendRequest(exchange=of.their_exchange, whole=False, lost=False, offset=0, digest=None)
    yield Attempt(name="ResendRequest", frames=encode(request), answered_by=frozenset({"Update", "Sent", "Heartbeat", "Closing"}))
    chunk = encode(Chunk(exchange=of.their_exchange, offset=CHUNK_BYTES), memoryview(b"\0"))
    yield Attempt(name="Chunk", frames=chunk, may_be=_TRIFLES, answered_by=frozenset({"ResendRequest"}))
    sent = Sent(exchange=of.their_exchange, whole=False)
    yield Attempt(name="Sent", frames=encode(sent), answered_by=frozenset({"ResendRequest"}))
    yield _own_update(of)
    yield Attempt(name="Busy", frames=encode(Busy(exchange=FARTHEST)))
    yield Attempt(name="ProofRequest", frames=encode(ProofRequest(relayed=True)), answered_by=frozenset({"Records"}))
    of = now()
    if of.records:
        yield Attempt(name="Records", frames=encode(Records(sealed=tuple(of.records[:8]))))
    else:
        yield Attempt(name="Records", why_not="the node has said no record that could be said back, and a new one would be a statement")
    ready = Ready(sealed=tuple(of.ready[:8]), receipts=tuple(map(receipt, of.ready[:8])))
    question = encode(DoctorQuestion(number=1, pad=b""))
    yield Attempt(name="DoctorQuestion", frames=question, may_be=frozenset({"wrong_schema"}), answered_by=frozenset({"DoctorAnswer"}))
    yield Attempt(name="Ready", frames=encode(ready), answered_by=frozenset({"Ready"}))
    nothing = PushSum(round=FARTHEST, step=0, sum=0.0, weight=0.0, low=None, high=None, outage=0, hops=0, void=False)
    yield Attempt(name="PushSum", frames=encode(nothing))
    closing = Closing(exchange=of.exchange, report=report, stop=stop, reason="rounds")
    yield Attempt(name="Closing", frames=encode(closing), answered_by=frozenset({"Heartbeat", "Closing"}))


def _own_update(of: Standing) -> Attempt:
    """The member's last update once more: the same bytes, so that whatever becomes of them is right."""
    if of.sent is None:
        return Attempt(name="Update", why_not="the member has sent none that could be sent again, and a new one would be merged")
    if of.ledger.report().closed_through < of.sent.exchange - 1:
        return Attempt(name="Update", why_not="the member's checkpoint does not go with its last update")
    frames = next(iter(of.sent.messages(of.ledger.report(), of.stop)))
    return Attempt(name="Update", frames=frames, may_be=_TRIFLES)


def faulty_attempts(of: Standing, hello: Hello) -> Iterator[Attempt]:
    """Messages that no node may take, one for each reason that a single message can show."""
    busy = encode(Busy(exchange=0))[0]
    assert isinstance(busy, bytes)
    older = busy.replace(b"\xa1v" + bytes([SCHEMA]), b"\xa1v" + bytes([SCHEMA - 1]), 1)
    yield Attempt(name="another schema", frames=[older], refused_as=frozenset({"wrong_schema"}))
    yield Attempt(name="a byte behind the header", frames=[busy + b"\0"], refused_as=frozenset({"bad_message"}))
    yield Attempt(name="a payload where none is", frames=[busy, b"\0"], refused_as=frozenset({"bad_message"}))
    early = StopNews(agreed_for=0, stop_round=0)
    at_once = Heartbeat(exchange=of.exchange, report=of.ledger.report(), stop=early)
    yield Attempt(name="a stop at round 0", frames=encode(at_once), refused_as=frozenset({"implausible_stop"}))
    no_record = encode(Ready(sealed=(bytes(65),), receipts=()))
    yield Attempt(name="a record that is none", frames=no_record, refused_as=frozenset({"bad_record"}))
    yield from _faulty_updates(of)
    for name, changes in {
        "wrong_name": {"member": "nobody-of-this-name"},
        "wrong_study": {"study": bytes(32)},
        "wrong_layout": {"layout": bytes(32)},
        "wrong_start": {"start": bytes(32)},
    }.items():
        wrong = encode(replace(hello, **changes))  # type: ignore[arg-type]  # each is a field of its own type
        yield Attempt(name=f"Hello, {name.removeprefix('wrong_')}", frames=wrong, refused_as=frozenset({name}), ends_link=True)


def _faulty_updates(of: Standing) -> Iterator[Attempt]:
    """Updates of the node's own exchange that it must refuse; it then waits for the member no more until a sound one comes."""
    fmt, exchange = of.format, of.their_exchange
    is_encoded = of.formats[exchange % len(of.formats)].full is not None
    closed = replace(of.ledger.report(), closed_through=max(of.ledger.report().closed_through, exchange - 1))
    good = fmt.pack(exchange, {name: np.zeros(shape, DTYPES[dtype]) for name, dtype, shape in fmt.channels})
    marks = (None, bytes(8)) if is_encoded else None
    update = Update(
        exchange=exchange,
        channels=good.channels,
        size_bytes=good.payload.nbytes,
        digest=bytes(32),
        marks=marks,
        report=closed,
        stop=of.stop,
        pad=b"",
    )
    first = good.payload[:CHUNK_BYTES]
    late = _TRIFLES - {"stray_chunk", "out_of_order"}  # the node may have gone on meanwhile, or hold the member's own
    if exchange:
        behind = replace(of.ledger.report(), closed_through=exchange - 2, merged=(), confirmed=-1, settled=-1)
        report = encode(replace(update, report=behind), first)
        yield Attempt(name="Update, report behind", frames=report, refused_as=frozenset({"wrong_report"}))
    size = encode(replace(update, size_bytes=update.size_bytes + 1), first)
    yield Attempt(name="Update, another size", frames=size, refused_as=late | {"wrong_size"})
    (name, dtype, count), *others = update.channels
    renamed = encode(replace(update, channels=((name + "x", dtype, count), *others)), first)
    yield Attempt(name="Update, another channel", frames=renamed, refused_as=late | {"wrong_format"})
    if good.payload.nbytes <= CHUNK_BYTES:
        yield Attempt(name="Update, another digest", frames=encode(update, first), refused_as=late | {"wrong_digest"})
