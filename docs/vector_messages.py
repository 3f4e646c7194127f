"""Examples of single messages: every kind, what is refused and why, padding, and the handshake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any

import msgpack
import numpy as np

from p2pfl.errors import PeerError
from p2pfl.wire.codec import CHUNK_BYTES, Frame, decode, encode
from p2pfl.wire.link import LinkSession, Terms
from p2pfl.wire.messages import (
    NO_STOP,
    NOTHING_CLOSED,
    NOTHING_REMEMBERED,
    Busy,
    Chunk,
    Closing,
    DoctorAnswer,
    DoctorQuestion,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    ProofRequest,
    PushSum,
    Ready,
    Records,
    Remembered,
    Report,
    ResendRequest,
    Sent,
    StopNews,
    Update,
)
from p2pfl.wire.update import UpdateFormat

TERMS = Terms(study="aa" * 32, layout="bb" * 32, start="cc" * 32)
SMALL = UpdateFormat(channels=(("x", "float32", (4,)),))
ENCODED = UpdateFormat(channels=(("q", "int8", (4,)),), full=SMALL)
LARGE = UpdateFormat(channels=(("x", "uint8", (2 * CHUNK_BYTES + 1,)),))
NEWS: dict[str, Any] = {
    "report": Report(closed_through=6, merged=(4, 6), confirmed=3, settled=5),
    "stop": StopNews(agreed_for=2, stop_round=None),
}
MOST = 2**53 - 1
FULL_NEWS: dict[str, Any] = {
    "report": Report(closed_through=MOST, merged=tuple(range(MOST - 15, MOST + 1)), confirmed=MOST - 16, settled=MOST),
    "stop": StopNews(agreed_for=MOST, stop_round=MOST),
}
FIRST_NEWS: dict[str, Any] = {"report": NOTHING_CLOSED, "stop": NO_STOP}
HELLO = Hello(
    member="hospital-1",
    study=b"\xaa" * 32,
    layout=b"\xbb" * 32,
    start=b"\xcc" * 32,
    incarnation=22,
    echo=11,
    is_open=True,
    anew=0,
    remembered=NOTHING_REMEMBERED,
    exchange=7,
    **NEWS,
)
EXCHANGE = 7
"""Where the receiver of the refused messages is."""
_EXACT = 2**53
_LONGEST_SHOWN = 65_536


def plain(value: Any) -> Any:
    """A message's field as JSON: bytes in hexadecimal, whole numbers beyond 2**53 as text."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT:
        return {"int": str(value)}
    return value


def _payload(size_bytes: int) -> bytes:
    """Byte i is (7 i + 3) mod 251."""
    return ((7 * np.arange(size_bytes, dtype=np.int64) + 3) % 251).astype(np.uint8).tobytes()


def messages() -> dict[str, Any]:
    """Every kind of message with its smallest and largest values, other encodings of the same, and an update of three pieces."""
    first = replace(HELLO, member="a", incarnation=1, echo=0, is_open=False, exchange=0, **FIRST_NEWS)
    widest = replace(HELLO, member="ä" * 128, incarnation=2**63 - 1, echo=2**63 - 1, anew=MOST, exchange=MOST, **FULL_NEWS)
    widest = replace(widest, remembered=Remembered(anew=MOST, report=FULL_NEWS["report"]))
    largest = 3e38
    answer = DoctorAnswer(
        number=MOST,
        clock=1_790_000_000_000,
        version="0.1.0",
        torch="2.13",
        arithmetic=1,
        study=b"\xaa" * 32,
        layout=b"\xbb" * 32,
        start=b"\xcc" * 32,
        forward=b"\xdd" * 32,
        outputs=(0.5, -1.25, *[largest] * 6),
        pad=b"\0\0",
    )
    kinds: Sequence[Message] = (
        first,
        HELLO,
        widest,
        Update(exchange=0, channels=(("x", "uint8", 1),), size_bytes=1, digest=bytes(32), marks=None, pad=b"", **FIRST_NEWS),
        Update(exchange=7, channels=(("q", "int8", 4),), size_bytes=4, digest=bytes(32), marks=(b"before 7", b"after  7"), pad=b"", **NEWS),
        Update(exchange=7, channels=(("x", "float32", 4),), size_bytes=16, digest=bytes(32), marks=(None, b"after  7"), pad=b"\1", **NEWS),
        Update(
            exchange=MOST,
            channels=tuple((f"{i:0128}", "float64", 2**63 - 1) for i in range(16)),
            size_bytes=2**63 - 1,
            digest=b"\xff" * 32,
            marks=None,
            pad=bytes(255),
            **FULL_NEWS,
        ),
        Chunk(exchange=0, offset=1),
        Chunk(exchange=MOST, offset=2**63 - 1),
        ResendRequest(exchange=0, whole=False, lost=False, offset=0, digest=None),
        ResendRequest(exchange=MOST, whole=True, lost=True, offset=2**63 - 1, digest=b"\xff" * 32),
        Heartbeat(exchange=0, **FIRST_NEWS),
        Heartbeat(exchange=MOST, **FULL_NEWS),
        Closing(exchange=7, reason="converged", **NEWS),
        Closing(exchange=MOST, reason="a" * 32, **FULL_NEWS),
        Goodbye(reason="f"),
        Goodbye(reason="state_lost"),
        Busy(exchange=0),
        Busy(exchange=MOST),
        Records(sealed=(b"\1" * 65,)),
        Records(sealed=(b"\1" * 512,) * 32),
        PushSum(round=0, step=0, sum=0.0, weight=0.0, low=None, high=None, outage=0, hops=0, void=False),
        PushSum(round=MOST, step=MOST, sum=largest, weight=0.1, low=0.5, high=largest, outage=MOST, hops=MOST, void=True),
        Sent(exchange=0, whole=False),
        Sent(exchange=MOST, whole=True),
        Ready(sealed=(), receipts=()),
        Ready(sealed=(b"\1" * 65,) * 16, receipts=(b"receipt.",) * 16),
        ProofRequest(relayed=False),
        ProofRequest(relayed=True),
        DoctorQuestion(number=0, pad=b""),
        DoctorQuestion(number=MOST, pad=bytes(300)),
        replace(answer, forward=None, outputs=()),
        answer,
    )
    listed = [_shown(message) for message in kinds]
    return {"each": listed, "other_encodings": _other_encodings(), "large": _large()}


def _shown(message: Message) -> dict[str, Any]:
    payload = memoryview(b"\5") if isinstance(message, Update | Chunk) else None
    frames = encode(message, payload)
    return {
        "message": type(message).__name__,
        "fields": plain(asdict(message)),
        "header": bytes(frames[0]).hex(),
        "payload": b"".join(map(bytes, frames[1:])).hex(),
    }


def _other_encodings() -> list[dict[str, Any]]:
    """Headers that this implementation would not send and takes all the same, as the same message."""
    busy = bytes.fromhex("83a17604a17408a865786368616e676507")
    longer = {
        "exchange in nine bytes": "83a17604a17408a865786368616e6765cf0000000000000007",
        "exchange as a signed number of five bytes": "83a17604a17408a865786368616e6765d200000007",
        "v in two bytes, t in three": "83a176cc04a174cd0008a865786368616e676507",
        "a key with a length of one byte more": "83a17604a174 08d90865786368616e676507".replace(" ", ""),
        "a map with a length of two bytes": "de0003a17604a17408a865786368616e676507",
        "keys in another order": "83a865786368616e676507a17408a17604",
    }
    assert decode([busy])[0] == Busy(exchange=7)
    return [{"what": what, "header": header, "same_as": busy.hex()} for what, header in longer.items()]


def _large() -> dict[str, Any]:
    payload = np.frombuffer(_payload(2 * CHUNK_BYTES + 1), dtype=np.uint8)
    encoded = LARGE.pack(EXCHANGE, {"x": payload})
    frames = [[bytes(frame) for frame in message] for message in encoded.messages(**NEWS)]
    return {
        "rule": "byte i is (7 i + 3) mod 251",
        "size_bytes": payload.size,
        "sha256": sha256(payload.tobytes()).hexdigest(),
        "exchange": EXCHANGE,
        "news": plain({key: asdict(value) for key, value in NEWS.items()}),
        "pieces": [
            {"header": header.hex(), "payload_bytes": len(piece), "payload_sha256": sha256(piece).hexdigest()} for header, piece in frames
        ],
    }


# ---- refused


def session(update_format: UpdateFormat = SMALL, **changes: Any) -> LinkSession:
    """hospital-0's side of its link to hospital-1, with incarnation 11."""
    given: dict[str, Any] = {"peer": "hospital-1", "member": "hospital-0", "terms": TERMS, "incarnation": 11, "formats": (update_format,)}
    return LinkSession(**given | changes)


FORMATS = {"small": SMALL, "encoded": ENCODED, "large": LARGE}


def outcome(opened: LinkSession, frames: Sequence[Frame]) -> str | None:
    """Why a message is refused or dropped; None where it is taken."""
    try:
        return opened.receive(frames, exchange=EXCHANGE).dropped
    except PeerError as error:
        return error.reason


def refused() -> dict[str, Any]:
    """Messages that are not taken, each with its reason, and what came before each over the link."""
    found: list[dict[str, Any]] = []

    def add(
        what: str, frames: Sequence[Frame], *, before: Sequence[Sequence[Frame]] = (), kind: str = "small", greets: bool = True
    ) -> None:
        opened = session(FORMATS[kind])
        history = [*([encode(HELLO)] if greets else []), *before]
        for each in history:
            assert outcome(opened, each) is None, what
        reason = outcome(opened, frames)
        assert reason is not None, what
        said = [[_frame(frame) for frame in each] for each in history]
        found.append({"reason": reason, "what": what, "format": kind, "before": said, "frames": [_frame(frame) for frame in frames]})

    def header(**fields: Any) -> list[Frame]:
        return [msgpack.packb(fields)]

    busy = {"v": 4, "t": 8, "exchange": 7}
    heartbeat = {"v": 4, "t": 5, "exchange": 7, "report": asdict(NEWS["report"]), "stop": asdict(NEWS["stop"])}
    for name, fields in {
        "another schema version": busy | {"v": 3},
        "another schema version, whatever else is there": {"v": 6, "anything": [1]},
        "no type code, whatever else is there": {"v": 5, "anything": [1]},
        "a later schema for an unknown code": busy | {"v": 5, "t": 99},
        "a later schema for a code of this one": busy | {"v": 5},
        "no schema version": {"t": 8, "exchange": 7},
        "a version that is a bool": busy | {"v": True},
        "an unknown type code": busy | {"t": 14},
    }.items():
        add(name, header(**fields))
    add("a bool for an int", header(**busy | {"exchange": True}))
    add("a float for an int", header(**busy | {"exchange": 7.0}))
    add("bytes for text", header(v=4, t=7, reason=b"pausing"))
    add("text for bytes", header(v=4, t=4, exchange=7, whole=False, lost=False, offset=0, digest="x" * 32))
    add("a missing key", header(v=4, t=8))
    add("an unknown key", header(**busy | {"extra": 1}))
    add("a key twice", [bytes.fromhex("84a17604a17408a865786368616e676507a865786368616e676508")])
    add("33 items in an array", header(v=4, t=9, sealed=[b"\1" * 65] * 33))
    add("nine maps", header(v=4, t=8, exchange=[{}] * 8))
    add("a byte behind the map", [msgpack.packb(busy) + b"\0"])
    add("an array in place of the map", header_of([4, 8, 7]))
    add("text that is not UTF-8", [bytes.fromhex("83a17604a17407a6726561736f6ea2ffff")])
    add("an extension type", [bytes.fromhex("83a17604a17408a865786368616e6765d40100")])
    add("a header that breaks off", [msgpack.packb(busy)[:-1]])
    add("a number below its range", header(**busy | {"exchange": -1}))
    add("a number above its range", header(**busy | {"exchange": 2**53}))
    add("a reason that is no word", header(v=4, t=7, reason="Bye"))
    add("a digest of 31 bytes", header(v=4, t=4, exchange=7, whole=False, lost=False, offset=0, digest=bytes(31)))
    add("a payload where there is none", [msgpack.packb(busy), b"\1"])
    add("three frames", [msgpack.packb(busy), b"\1", b"\1"])
    add("no frame", [])
    add("merged that does not rise", header(**heartbeat | {"report": asdict(NEWS["report"]) | {"merged": [6, 4]}}))
    add("merged beyond closed_through", header(**heartbeat | {"report": asdict(NEWS["report"]) | {"merged": [7]}}))
    add("merged that is confirmed", header(**heartbeat | {"report": asdict(NEWS["report"]) | {"merged": [3]}}))
    add("confirmed above settled", header(**heartbeat | {"report": asdict(NEWS["report"]) | {"settled": 2}}))
    add("settled above closed_through", header(**heartbeat | {"report": asdict(NEWS["report"]) | {"settled": 7}}))
    for name, changes in {
        "another member's name": {"member": "hospital-2"},
        "another study": {"study": bytes(32)},
        "another layout": {"layout": bytes(32)},
        "another start": {"start": bytes(32)},
    }.items():
        add(name, encode(replace(HELLO, **changes)))
    add("before any Hello", header(**busy), greets=False)
    add("after Goodbye", header(**busy), before=[encode(Goodbye(reason="pausing"))])
    _refused_updates(add)
    rule = "a frame of so many bytes of those of which byte i is (7 i + 3) mod 251, from a first one"
    return {"exchange": EXCHANGE, "bytes_by_rule": rule, "formats": {name: _format(each) for name, each in FORMATS.items()}, "each": found}


def _frame(frame: Frame) -> Any:
    """A frame in hexadecimal; a long one by the rule that made it."""
    data = bytes(frame)
    if len(data) <= _LONGEST_SHOWN:
        return data.hex()
    first = next(offset for offset in (0, CHUNK_BYTES) if data == _payload(offset + len(data))[offset:])
    return {"bytes_by_rule": len(data), "from": first}


def frame_from(shown: Any) -> bytes:
    """Undo `_frame`."""
    if isinstance(shown, str):
        return bytes.fromhex(shown)
    return _payload(shown["from"] + shown["bytes_by_rule"])[shown["from"] :]


def header_of(value: Any) -> list[Frame]:
    """One frame with any value in it."""
    return [msgpack.packb(value)]


def _format(update_format: UpdateFormat) -> dict[str, Any]:
    full = update_format.full
    return {"channels": plain(update_format.entries), "full": None if full is None else {"channels": plain(full.entries)}}


def _refused_updates(add: Any) -> None:
    four = np.arange(4, dtype="<f4")
    good = list(SMALL.pack(EXCHANGE, {"x": four}).messages(**NEWS))
    update = decode(good[0])[0]
    assert isinstance(update, Update)
    payload = memoryview(four.tobytes())

    def changed(data: memoryview = payload, **changes: Any) -> list[Frame]:
        return encode(replace(update, **changes), data)

    later = Report(closed_through=9, merged=(), confirmed=3, settled=5)
    add("an update whose payload is missing", changed()[:1])
    add("an update of the exchange before", changed(exchange=6))
    add("an update two exchanges ahead", changed(exchange=9, report=later))
    add("a report that has not closed the exchange before", changed(exchange=8))
    add("the same update again", changed(), before=good)
    add("another update of the same exchange", changed(digest=bytes(32)), before=good)
    add("another size", changed(size_bytes=20))
    add("another channel's name", changed(channels=(("y", "float32", 4),)))
    add("another dtype", changed(channels=(("x", "int32", 4),)))
    add("marks where nothing is encoded", changed(marks=(None, bytes(8))))
    add("no marks where something is", changed(), kind="encoded")
    add("a payload that is too short for its place", changed(payload[:8]))
    add("another payload than the digest's", changed(memoryview(bytes(16))))
    for name, number in (("NaN", np.nan), ("an infinity", np.inf)):
        add(name, next(iter(SMALL.pack(EXCHANGE, {"x": np.full(4, number, dtype="<f4")}).messages(**NEWS))))
    add("a chunk of no update", encode(Chunk(exchange=7, offset=CHUNK_BYTES), memoryview(b"\1")))
    add("a chunk of an update that is there", encode(Chunk(exchange=7, offset=CHUNK_BYTES), memoryview(b"\1")), before=good)
    add("a chunk of an exchange that is over", encode(Chunk(exchange=6, offset=CHUNK_BYTES), memoryview(b"\1")))
    pieces = [*LARGE.pack(EXCHANGE, {"x": np.frombuffer(_payload(LARGE.size_bytes), dtype=np.uint8)}).messages(**NEWS)]
    add("a first piece of less than 1,048,576 bytes", [pieces[0][0], b"\1"], kind="large")
    add("the third piece behind the first", pieces[2], before=pieces[:1], kind="large")
    add("a last piece that is too long", [pieces[2][0], b"\1\1"], before=pieces[:2], kind="large")


def pad() -> list[dict[str, Any]]:
    """Bytes of padding by exchange and news, of an update of one channel `x` of four float32."""
    news = [
        Report(closed_through=-1, merged=(), confirmed=-1, settled=-1),
        Report(closed_through=2, merged=(0, 2), confirmed=-1, settled=1),
    ]
    found = []
    for exchange in (0, 115, 116, 243, 244, 65_523, 65_524, 2**32 - 13, 2**32 - 12):
        reports = [news[0]] if not exchange else [Report(closed_through=exchange - 1, merged=(exchange - 2,), confirmed=-1, settled=-1)]
        reports.append(Report(closed_through=exchange + 2, merged=(exchange, exchange + 1), confirmed=exchange - 1, settled=exchange + 1))
        for report in reports:
            for stop in (NO_STOP, StopNews(agreed_for=exchange, stop_round=exchange + 4)):
                frames = next(iter(SMALL.pack(exchange, {"x": np.zeros(4, dtype="<f4")}).messages(report, stop)))
                update = decode(frames)[0]
                assert isinstance(update, Update)
                found.append(
                    {
                        "exchange": exchange,
                        "report": plain(asdict(report)),
                        "stop": plain(asdict(stop)),
                        "pad_bytes": len(update.pad),
                        "header_bytes": len(frames[0]),
                    }
                )
    return found


def greeting() -> list[dict[str, Any]]:
    """Conversations of a link, Hello by Hello: the state after each, and the answer."""
    steps: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "both start, this end first": [("Hello", {"echo": 0, "is_open": False}), ("Hello", {"echo": 11, "is_open": True})],
        "both start, the other end first": [("Hello", {"echo": 11, "is_open": False}), ("Hello", {"echo": 11, "is_open": True})],
        "this end's Hello is lost": [("Hello", {"echo": 0, "is_open": False}), ("Hello", {"echo": 0, "is_open": False})],
        "the other end starts again": [
            ("Hello", {"echo": 11, "is_open": True}),
            ("Hello", {"incarnation": 33, "echo": 0, "is_open": False}),
            ("Busy", {}),
            ("Hello", {"incarnation": 33, "echo": 11, "is_open": False}),
            ("Busy", {}),
        ],
        "this end has started again": [("Hello", {"echo": 10, "is_open": True}), ("Hello", {"echo": 11, "is_open": True})],
        "an old Hello comes late": [("Hello", {"echo": 11, "is_open": True}), ("Hello", {"echo": 0, "is_open": False})],
        "Goodbye, and back": [
            ("Hello", {"echo": 11, "is_open": True}),
            ("Goodbye", {}),
            ("Busy", {}),
            ("Hello", {"echo": 11, "is_open": False}),
        ],
        "refused, and then as it should be": [
            ("Hello", {"echo": 11, "is_open": True}),
            ("Hello", {"echo": 11, "is_open": True, "study": bytes(32)}),
            ("Hello", {"echo": 11, "is_open": True}),
        ],
    }
    found = []
    for what, said in steps.items():
        opened = session()
        rows = []
        for kind, changes in said:
            others: dict[str, Message] = {"Goodbye": Goodbye(reason="pausing"), "Busy": Busy(exchange=7)}
            message = replace(HELLO, **changes) if kind == "Hello" else others[kind]
            before, answer, reason = opened.state.name.lower(), None, None
            try:
                heard = opened.receive(encode(message), exchange=EXCHANGE)
                if heard.needs_answer:
                    mine = opened.hello(exchange=EXCHANGE, **NEWS)
                    answer = {"message": "Hello", "echo": mine.echo, "is_open": mine.is_open}
            except PeerError as error:
                reason = error.reason
                answer = {"message": "Goodbye", "reason": reason} if reason.startswith("wrong_") else None
            fields = {key: plain(getattr(message, key)) for key in ("incarnation", "echo", "is_open", "study")} if kind == "Hello" else {}
            rows.append(
                {"state": before, "message": kind, **fields, "refused": reason, "then": opened.state.name.lower(), "answer": answer}
            )
        found.append({"what": what, "own_incarnation": 11, "steps": rows})
    return found
