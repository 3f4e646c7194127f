"""10,000 frames that are not as they should be: whatever comes in, only a PeerError goes out, and the link still works afterwards."""

from __future__ import annotations

import hashlib
import random
import tracemalloc
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pfl.errors import BadMessage, PeerError
from p2pfl.wire.codec import decode, encode
from p2pfl.wire.link import ReceivedMessage
from p2pfl.wire.update import UpdateFormat
from thorough import first_fast
from wire_samples import CONTINUED, ENCODED, EVERY_MESSAGE, HELLO, PAYLOAD, UPDATE, WHOLE, frames_of, open_session, session

pytestmark = pytest.mark.no_cover  # what other tests cover, many times over: being traced would take a third longer

SEEDS = (*EVERY_MESSAGE, CONTINUED, WHOLE)
TWO_CHUNKS = UpdateFormat(channels=(("x", "float32", (2**18 + 4,)),))
BURST = 50
QUIET = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


def strange():
    return session()


def greeted():
    link = session()
    link.receive(encode(replace(HELLO, echo=0, is_open=False)), exchange=7)
    return link


def half_way():
    link = open_session(TWO_CHUNKS)
    array = np.zeros(2**18 + 4, dtype=np.float32)
    link.receive(next(TWO_CHUNKS.pack(7, {"x": array}).messages(UPDATE.report, UPDATE.stop)), exchange=7)
    return link


def of_two_kinds():
    return open_session(ENCODED)


STATES = {"strange": strange, "greeted": greeted, "open": open_session, "half way": half_way, "two kinds": of_two_kinds}


def take(link, frames):
    """Only what is whole and as announced may come out."""
    num_counted = link.counters.total()
    try:
        heard = link.receive(frames, exchange=7)
    except PeerError:
        heard = ReceivedMessage(message=UPDATE, dropped="refused")
    assert link.counters.total() - num_counted == (heard.dropped is not None)
    if heard.received is not None:
        (array,) = heard.received.arrays.values()
        assert hashlib.sha256(array.tobytes()).digest() == heard.message.digest
        assert np.isfinite(array).all()


def assert_still_works(state):
    link = STATES[state]()
    link.receive(encode(HELLO), exchange=7)
    assert link.is_open


def mutated(rng):
    """A valid message with a few bytes changed, put in, cut out, doubled or cut off."""
    frames = [bytearray(frame) for frame in frames_of(rng.choice(SEEDS))]
    for _ in range(rng.randint(1, 4)):
        frame = rng.choice(frames)
        place = rng.randrange(len(frame) + 1)
        match rng.randrange(6):
            case 0 if place < len(frame):
                frame[place] = rng.randrange(256)
            case 1 if place < len(frame):
                frame[place] ^= 1 << rng.randrange(8)
            case 2:
                frame[place:place] = rng.randbytes(rng.randint(1, 8))
            case 3:
                del frame[place : place + rng.randint(1, 8)]
            case 4:
                frame[place:place] = frame[max(0, place - 16) : place]
            case 5:
                del frame[place:]
    if rng.random() < 0.1:
        frames.append(bytearray(rng.randbytes(rng.randint(0, 20))))
    return [memoryview(bytes(frame)) for frame in frames]


def decoded(frames):
    try:
        message, payload = decode(frames)
    except BadMessage:
        return
    assert message == decode(encode(message, payload if payload.nbytes else None))[0]


@pytest.mark.parametrize("state", first_fast(STATES))
@QUIET
@given(seed=st.integers(0, 2**64 - 1))
def test_mutated_frames_only_ever_raise_peer_errors(state, seed):  # 7,400
    rng, link = random.Random(seed), STATES[state]()
    for _ in range(BURST * 3 // 4):
        frames = mutated(rng)
        decoded(frames)
        take(link, frames)
    assert_still_works(state)


@pytest.mark.parametrize("state", first_fast(STATES))
@QUIET
@given(bursts=st.lists(st.lists(st.binary(max_size=200), max_size=4), min_size=10, max_size=20))
def test_random_frames_only_ever_raise_peer_errors(state, bursts):  # 2,000 and more
    link = STATES[state]()
    for frames in bursts:
        decoded(frames)
        take(link, frames)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=20,
)


@pytest.mark.parametrize("state", first_fast(STATES))
@settings(QUIET, max_examples=200)
@given(message=st.sampled_from(SEEDS), key=st.integers(0, 20), deep=st.booleans(), value=ANYTHING)
def test_any_value_in_any_field_only_ever_raises_peer_errors(state, message, key, deep, value):  # 800
    header, *payload = frames_of(message)
    fields = msgpack.unpackb(header)
    place = sorted(fields)[key % len(fields)]
    inner = fields[place]
    if deep and isinstance(inner, dict):
        inner[sorted(inner)[key % len(inner)]] = value
    elif deep and isinstance(inner, list):
        inner[0] = value
    else:
        fields[place] = value
    frames = [msgpack.packb(fields), *payload]
    decoded(frames)
    take(STATES[state](), frames)


def test_a_thousand_nasty_headers_leave_no_memory_behind():
    nasty = [b"\xdd\xff\xff\xff\xff" * 10, b"\x91" * 60_000, b"\xc6\xff\xff\xff\xf0", b"\x81\xa1v" * 20_000, bytes(65_536)]
    link = open_session()
    link.receive(frames_of(UPDATE), exchange=7)
    tracemalloc.start()
    for turn in range(200):
        for header in nasty:
            take(link, [header, PAYLOAD] if turn % 2 else [header])
    held_bytes, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert held_bytes < 200_000
    assert peak_bytes < 5_000_000
    assert link.counters == {"bad_message": 1000}
