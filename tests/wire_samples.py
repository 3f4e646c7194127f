"""One valid message of each kind, for the tests of the wire."""

from __future__ import annotations

import hashlib

import numpy as np

from p2pfl.wire.codec import encode
from p2pfl.wire.link import LinkSession, Terms
from p2pfl.wire.messages import Alive, Chunk, Closing, Decline, Goodbye, Hello, Report, StopNews, Update, Want
from p2pfl.wire.update import ChannelFormat, UpdateFormat

TERMS = Terms(study="aa" * 32, layout="bb" * 32, start="cc" * 32)
NEWS = {
    "report": Report(closed_through=6, merged=(4, 6), confirmed=3, settled=5),
    "stop": StopNews(agreed_for=2, stop_round=None),
}
SMALL = UpdateFormat(channels=(ChannelFormat(name="x", dtype="float32", shape=(4,)),))
PAYLOAD = np.arange(4, dtype="<f4").tobytes()

HELLO = Hello(
    member="hospital-1",
    study=b"\xaa" * 32,
    layout=b"\xbb" * 32,
    start=b"\xcc" * 32,
    incarnation=22,
    echo=11,
    is_open=True,
    exchange=7,
    **NEWS,
)
UPDATE = Update(exchange=7, channels=SMALL.entries, size_bytes=16, digest=hashlib.sha256(PAYLOAD).digest(), **NEWS)
CHUNK = Chunk(exchange=7, offset=2**20)
EVERY_MESSAGE = (
    HELLO,
    UPDATE,
    CHUNK,
    Want(exchange=7),
    Alive(exchange=7, **NEWS),
    Closing(exchange=7, reason="converged", **NEWS),
    Goodbye(reason="pausing"),
    Decline(exchange=7),
)


def frames_of(message):
    return encode(message, memoryview(PAYLOAD) if isinstance(message, Update | Chunk) else None)


def session(update_format=SMALL, **changes):
    """hospital-0's side of its link to hospital-1, with incarnation 11."""
    return LinkSession(
        **{"peer": "hospital-1", "member": "hospital-0", "terms": TERMS, "incarnation": 11, "formats": (update_format,)} | changes
    )


def open_session(update_format=SMALL):
    opened = session(update_format)
    opened.receive(encode(HELLO), exchange=7)
    return opened
