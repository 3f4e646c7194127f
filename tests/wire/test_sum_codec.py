"""Messages of secure sums as bytes: what is sent comes back, and whatever else comes is a BadMessage and costs no memory."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import fields

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.errors import BadMessage
from p2pfl.protocol.sum_check import array_digest
from p2pfl.wire import codec
from p2pfl.wire.codec import CHUNK_BYTES, MAX_HEADER_BYTES
from p2pfl.wire.messages import MESSAGES
from p2pfl.wire.secure_messages import MOST_PARTICIPANTS, MOST_SUMS, HeldTotals, MaskedSubtotal, Opening, Total
from p2pfl.wire.sum_codec import SUM_CODES, SumAssembly, encode_sum
from sum_samples import EVERY_SUM_MESSAGE, OF_SUM, OPENING, SIGNATURE, SUBTOTAL, TRANSCRIPT

MOST_BYTES = 3 * CHUNK_BYTES
LARGE = np.arange(2 * CHUNK_BYTES // 8 + 10, dtype=np.uint64).reshape(-1, 2)


def sent(message):
    return [[bytes(frame) for frame in frames] for frames in encode_sum(message)]


def header_of(**changes):
    """The header of an opening with other fields; None leaves one out."""
    found = msgpack.unpackb(sent(OPENING)[0][0]) | changes
    return [msgpack.packb({key: value for key, value in found.items() if value is not None})]


def reason_of(assembly, frames):
    with pytest.raises(BadMessage) as error:
        assembly.receive(frames)
    return error.value.reason


def is_same(a, b):
    if isinstance(a, MaskedSubtotal | Total):
        names = [each.name for each in fields(a) if each.name != "limbs"]
        return type(a) is type(b) and all(getattr(a, name) == getattr(b, name) for name in names) and np.array_equal(a.limbs, b.limbs)
    return a == b


@pytest.mark.parametrize("message", EVERY_SUM_MESSAGE, ids=lambda message: type(message).__name__)
def test_every_message_comes_back_as_it_was(message):
    (frames,) = sent(message)

    assert is_same(message, SumAssembly(MOST_BYTES).receive(frames))


def test_codes_are_no_others_messages():
    assert not {*SUM_CODES.values()} & {*MESSAGES}
    with pytest.raises(BadMessage, match="wrong_schema"):
        codec.decode(sent(OPENING)[0])


def test_the_largest_lists_fit_into_a_header():
    held = HeldTotals(
        member=255, transcript=TRANSCRIPT, macs=tuple((f"{each:064x}", bytes(32)) for each in range(MOST_SUMS)), signature=SIGNATURE
    )
    opening = Opening(
        study="5a" * 32,
        plan="0f" * 32,
        participants=tuple(range(65_536 - MOST_PARTICIPANTS, 65_536)),
        session=2**53 - 1,
        public=bytes(32),
        nonce=bytes(32),
        member=65_535,
        signature=SIGNATURE,
    )
    for message in (held, opening):
        (frames,) = sent(message)

        assert len(frames[0]) <= MAX_HEADER_BYTES
        assert SumAssembly(0).receive(frames) == message


def test_an_array_of_several_chunks_comes_back_whole():
    message, assembly = Total(**OF_SUM, limbs=LARGE), SumAssembly(MOST_BYTES)
    pieces = sent(message)
    received = [assembly.receive(frames) for frames in pieces]

    assert [len(frames[1]) for frames in pieces] == [CHUNK_BYTES, CHUNK_BYTES, 80]
    assert received[:2] == [None, None]
    assert is_same(message, received[2])
    assert array_digest(received[2].limbs) == array_digest(LARGE)


def test_a_part_of_another_array_is_noticed():
    assembly = SumAssembly(MOST_BYTES)
    first, other = sent(Total(**OF_SUM, limbs=LARGE)), sent(Total(**OF_SUM, limbs=LARGE + np.uint64(1)))
    assembly.receive(first[0])
    assembly.receive(other[1])

    assert reason_of(assembly, other[2]) == "wrong_digest"


@pytest.mark.parametrize("lost", [0, 1])
def test_a_part_without_what_is_before_it_is_refused(lost):
    assembly, pieces = SumAssembly(MOST_BYTES), sent(SUBTOTAL.__class__(**OF_SUM, limbs=LARGE))
    if lost:
        assembly.receive(pieces[0])

    assert reason_of(assembly, pieces[1 + lost]) == "stray_part"
    assert [assembly.receive(frames) is not None for frames in pieces] == [False, False, True]


def test_an_array_that_is_larger_than_all_planned_ones_takes_no_room():
    assembly = SumAssembly(MOST_BYTES)
    head = msgpack.unpackb(sent(SUBTOTAL)[0][0]) | {"shape": [2**39, 2**39, 2]}
    tracemalloc.start()
    try:
        assert reason_of(assembly, [msgpack.packb(head), bytes(CHUNK_BYTES)]) == "wrong_shape"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 4 * CHUNK_BYTES


REFUSED = {
    "no frame": ([], "bad_message"),
    "three frames": ([b"", b"", b""], "bad_message"),
    "a payload too many": ([*header_of(), b"x"], "bad_message"),
    "no payload": ([sent(SUBTOTAL)[0][0]], "bad_message"),
    "a payload too short": ([sent(SUBTOTAL)[0][0], bytes(31)], "bad_message"),
    "another schema": (header_of(v=4), "wrong_schema"),
    "no schema": (header_of(v=None), "bad_message"),
    "another code": (header_of(t=27), "bad_message"),
    "true as a code": (header_of(t=True), "bad_message"),
    "a list as a code": (header_of(t=[1]), "bad_message"),
    "an unknown key": (header_of(more=1), "bad_message"),
    "no signature": (header_of(signature=None), "bad_message"),
    "a short signature": (header_of(signature=bytes(63)), "bad_message"),
    "a digest in capitals": (header_of(study="5A" * 32), "bad_message"),
    "a digest as bytes": (header_of(study=bytes(32)), "bad_message"),
    "too many participants": (header_of(participants=list(range(257))), "bad_message"),
    "a participant that cannot be": (header_of(participants=[0, 65_536]), "bad_message"),
    "a negative session": (header_of(session=-1), "bad_message"),
    "a session as a float": (header_of(session=3.0), "bad_message"),
    "a member as true": (header_of(member=True), "bad_message"),
    "a key of another length": (header_of(public=bytes(31)), "bad_message"),
    "no map": ([msgpack.packb([1, 2])], "bad_message"),
    "a long header": ([bytes(MAX_HEADER_BYTES + 1)], "bad_message"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_message_is_refused_by_its_reason(name):
    frames, reason = REFUSED[name]

    assert reason_of(SumAssembly(MOST_BYTES), frames) == reason


@pytest.mark.parametrize("reason", ["", "x" * 501, "two\nlines", "\x1b[2J", "\u202egnp"])
def test_a_sentence_that_would_steer_a_terminal_is_refused(reason):
    end = next(message for message in EVERY_SUM_MESSAGE if type(message).__name__ == "SessionEnd")
    header = msgpack.unpackb(sent(end)[0][0]) | {"reason": reason}

    assert reason_of(SumAssembly(0), [msgpack.packb(header)]) == "bad_message"


VALID = [frames for message in (*EVERY_SUM_MESSAGE, Total(**OF_SUM, limbs=LARGE)) for frames in sent(message)]


def test_thousands_of_damaged_messages_raise_nothing_else():
    draw, assembly, num_refused = random.Random(1), SumAssembly(MOST_BYTES), 0
    for _ in range(3_000):
        frames = [bytearray(frame) for frame in draw.choice(VALID[:10])]
        for _ in range(draw.randint(1, 4)):
            frame = draw.choice(frames)
            if frame and draw.random() < 0.8:
                frame[draw.randrange(len(frame))] = draw.randrange(256)
            else:
                del frame[draw.randrange(len(frame) + 1) :]
        try:
            assembly.receive(frames)
        except BadMessage:
            num_refused += 1

    assert num_refused > 1_500
    assert [is_same(each, assembly.receive(sent(each)[0])) for each in EVERY_SUM_MESSAGE] == [True] * len(EVERY_SUM_MESSAGE)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=3))
def test_bytes_of_any_kind_raise_nothing_else(frames):
    with pytest.raises(BadMessage):
        SumAssembly(MOST_BYTES).receive(frames)
