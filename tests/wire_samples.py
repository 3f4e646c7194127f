"""One valid message of each kind, for the tests of the wire."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pfl.wire.codec import decode, encode
from p2pfl.wire.link import LinkSession, Terms
from p2pfl.wire.messages import (
    Busy,
    Chunk,
    Closing,
    DoctorAnswer,
    DoctorQuestion,
    Goodbye,
    Heartbeat,
    Hello,
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
from p2pfl.wire.ready_record import ReadyRecord, packed
from p2pfl.wire.ready_record import seal as seal_ready
from p2pfl.wire.round_record import RoundRecord, seal
from p2pfl.wire.update import UpdateFormat

TERMS = Terms(study="aa" * 32, layout="bb" * 32, start="cc" * 32)
NEWS = {
    "report": Report(closed_through=6, merged=(4, 6), confirmed=3, settled=5),
    "stop": StopNews(agreed_for=2, stop_round=None),
}
SMALL = UpdateFormat(channels=(("x", "float32", (4,)),))
ENCODED = UpdateFormat(channels=(("q", "int8", (4,)),), full=SMALL)
"""Of updates that continue each other; one that stands by itself is SMALL."""
MARKS = (b"before 7", b"after  7")
PAYLOAD = np.arange(4, dtype="<f4").tobytes()

HELLO = Hello(
    member="hospital-1",
    study=b"\xaa" * 32,
    layout=b"\xbb" * 32,
    start=b"\xcc" * 32,
    incarnation=22,
    echo=11,
    is_open=True,
    anew=0,
    remembered=Remembered(anew=0, report=Report(closed_through=5, merged=(5,), confirmed=3, settled=4)),
    exchange=7,
    **NEWS,
)
UPDATE = decode(next(SMALL.pack(7, {"x": np.frombuffer(PAYLOAD, "<f4")}).messages(**NEWS)))[0]
CONTINUED = decode(next(ENCODED.pack(7, {"q": np.arange(4, dtype=np.int8)}, MARKS).messages(**NEWS)))[0]
WHOLE = decode(next(SMALL.pack(7, {"x": np.frombuffer(PAYLOAD, "<f4")}, (None, MARKS[1])).messages(**NEWS)))[0]
CHUNK = Chunk(exchange=7, offset=2**20)
KEY = Ed25519PrivateKey.from_private_bytes(b"\x11" * 32)
"""Of hospital-1, for what it signs."""
RECORD = RoundRecord(
    member=1,
    began=1_790_000_000_000,
    round=6,
    level=1,
    settles=False,
    closing=False,
    disagreement=0.25,
    norm=1.5,
    loss=0.5,
    skipped=1,
    without=(0,),
    agreed_for=2,
    sent=3180,
    milliseconds=(120, 30, 2, 0),
    measured=4,
    metrics=(0.75, None),
    rows=(91, 23),
)
READY_RECORD = ReadyRecord(member=1, began=1_790_000_000_000, number=3, links=packed((0, 1)), started=None)
EVERY_MESSAGE = (
    HELLO,
    UPDATE,
    CHUNK,
    ResendRequest(exchange=7, whole=False, lost=False, offset=0, digest=None),
    Heartbeat(exchange=7, **NEWS),
    Closing(exchange=7, reason="converged", **NEWS),
    Goodbye(reason="pausing"),
    Busy(exchange=7),
    Records(sealed=(seal(RECORD, KEY.sign, b"\xaa" * 32),)),
    PushSum(round=0, step=7, sum=0.75, weight=1.5, low=None, high=None, outage=0, hops=0, void=False),
    Sent(exchange=7, whole=False),
    Ready(sealed=(seal_ready(READY_RECORD, KEY.sign, b"\xaa" * 32),), receipts=(b"receipt.",)),
    ProofRequest(relayed=False),
    DoctorQuestion(number=1, pad=b"\0\0"),
    DoctorAnswer(
        number=1,
        clock=1_790_000_000_000,
        version="0.1.0",
        torch="2.13",
        arithmetic=1,
        study=b"\xaa" * 32,
        layout=b"\xbb" * 32,
        start=b"\xcc" * 32,
        forward=b"\xdd" * 32,
        outputs=(0.5, -1.25),
        pad=b"\0\0",
    ),
)


def frames_of(message):
    payload = bytes(range(4)) if message is CONTINUED else PAYLOAD
    return encode(message, memoryview(payload) if isinstance(message, Update | Chunk) else None)


def session(update_format=SMALL, **changes):
    """hospital-0's side of its link to hospital-1, with incarnation 11."""
    return LinkSession(
        **{"peer": "hospital-1", "member": "hospital-0", "terms": TERMS, "incarnation": 11, "formats": (update_format,)} | changes
    )


def open_session(update_format=SMALL):
    opened = session(update_format)
    opened.receive(encode(HELLO), exchange=7)
    return opened
