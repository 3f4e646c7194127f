from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.errors import BadMessage
from p2pfl.wire.codec import CHUNK_BYTES, decode, encode, padded
from p2pfl.wire.messages import Chunk, Report, StopNews, Update
from p2pfl.wire.update import DTYPES, Assembly, FullUpdate, UpdateFormat, next_state_digest
from wire_samples import CONTINUED, ENCODED, MARKS, NEWS, PAYLOAD, SMALL, UPDATE, WHOLE

LARGE = UpdateFormat(channels=(("x", "float64", (300_000,)),))  # 2.4 MB: three chunks
MIXED = UpdateFormat(channels=(("half", "float16", (3,)), ("x", "float64", (2, 2))))


def large_array(seed=0):
    return np.random.default_rng(seed).standard_normal(300_000)


def sent(update_format, arrays, exchange=7):
    return [decode(frames) for frames in update_format.pack(exchange, arrays).messages(**NEWS)]


def received(assembly, messages):
    unpacked = None
    for message, payload in messages:
        unpacked = assembly.begin(message, payload) if isinstance(message, Update) else assembly.extend(message, payload)
    return None if unpacked is None else unpacked[0]


def refused(assembly, messages):
    with pytest.raises(BadMessage) as caught:
        received(assembly, messages)
    return caught.value.reason


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_travels_bit_for_bit(dtype):
    update_format = UpdateFormat(channels=(("x", dtype, (5,)),))
    if DTYPES[dtype].kind == "f":
        array = np.array([0.0, -0.0, 1.5, np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal], dtype=DTYPES[dtype])
    else:
        array = np.array([0, 1, 7, np.iinfo(dtype).max, np.iinfo(dtype).min], dtype=DTYPES[dtype])
    arrays = received(Assembly(update_format), sent(update_format, {"x": array}))

    assert array.tobytes() == arrays["x"].tobytes()
    assert array.dtype == arrays["x"].dtype


def test_a_large_update_goes_in_chunks_of_one_mebibyte_and_comes_together():
    array = large_array()
    messages = sent(LARGE, {"x": array})
    arrays = received(Assembly(LARGE), messages)

    assert [payload.nbytes for _, payload in messages] == [CHUNK_BYTES, CHUNK_BYTES, 2_400_000 - 2 * CHUNK_BYTES]
    assert [message.offset for message, _ in messages[1:]] == [CHUNK_BYTES, 2 * CHUNK_BYTES]
    assert np.array_equal(array, arrays["x"])


def test_several_channels_lie_behind_each_other_without_gaps():
    half, x = np.arange(3, dtype=np.float16), np.arange(4.0).reshape(2, 2)
    messages = sent(MIXED, {"x": x, "half": half})
    arrays = received(Assembly(MIXED), messages)

    assert half.tobytes() + x.tobytes() == messages[0][1]
    assert messages[0][0].channels == (("half", "float16", 3), ("x", "float64", 4))
    assert np.array_equal(half, arrays["half"])
    assert np.array_equal(x, arrays["x"])
    assert arrays["x"].flags.aligned


def test_a_single_channel_is_packed_without_a_copy():
    array = large_array()

    assert LARGE.pack(7, {"x": array}).payload.readonly
    assert np.shares_memory(array, np.frombuffer(LARGE.pack(7, {"x": array}).payload, dtype=np.uint8))


def test_what_arrives_cannot_be_written_to():
    arrays = received(Assembly(MIXED), sent(MIXED, {"half": np.zeros(3, np.float16), "x": np.ones((2, 2))}))

    for array in arrays.values():
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_what_has_arrived_is_not_written_over_by_the_next_update():
    assembly = Assembly(LARGE)
    first = received(assembly, sent(LARGE, {"x": large_array(1)}))
    second = received(assembly, sent(LARGE, {"x": large_array(2)}))

    assert np.array_equal(large_array(1), first["x"])
    assert np.array_equal(large_array(2), second["x"])


def test_a_large_channel_behind_an_odd_one_is_read_where_it_came():
    rooms = []
    odd = UpdateFormat(channels=(("count", "uint8", (3,)), ("x", "float64", (300_000,)), ("y", "float32", (5,))))

    def make_room(size_bytes):
        rooms.append(np.empty(size_bytes, dtype=np.uint8))
        return rooms[-1]

    arrays = {"count": np.arange(3, dtype=np.uint8), "x": large_array(), "y": np.ones(5, np.float32)}
    found = received(Assembly(odd, make_room=make_room), sent(odd, arrays))

    assert all(np.array_equal(arrays[name], found[name]) for name in arrays)
    assert len(rooms) == 1
    assert np.shares_memory(found["x"], rooms[0])
    assert LARGE.lead_bytes == 0


def test_an_update_that_comes_early_lies_in_room_of_its_own_also_where_one_was_given_up_before_it():
    made = []

    def make_in(place):
        def make(size_bytes):
            made.append(place)
            return np.empty(size_bytes, dtype=np.uint8)

        return make

    assembly = Assembly(LARGE, make_room=make_in("usual"), make_early_room=make_in("early"))
    first, second, *rest = sent(LARGE, {"x": large_array()})
    assembly.begin(*first)
    assembly.extend(*second)
    assembly.begin(*first, is_early=True)  # after a part of one that is not early
    assembly.extend(*second)
    assembly.begin(*first)  # and its room will do for any
    whole = received(assembly, [second, *rest])
    assembly.begin(*first)
    assembly.extend(*second)

    assert np.array_equal(large_array(), whole["x"])
    assert made == ["usual", "early", "usual"]


def test_there_is_room_when_the_second_chunk_comes_and_not_before():
    made = []

    def make_room(size_bytes):
        made.append(size_bytes)
        return np.empty(size_bytes, np.uint8)

    assembly, (first, *others) = Assembly(LARGE, make_room=make_room), sent(LARGE, {"x": large_array()})
    assembly.begin(*first)
    assert (made, assembly.received_bytes) == ([], CHUNK_BYTES)

    assembly.drop()
    assert np.array_equal(large_array(1), received(assembly, sent(LARGE, {"x": large_array(1)}))["x"])
    assert refused(assembly, [first, (others[0][0], others[0][1][1:])]) == "bad_message"
    assert np.array_equal(large_array(), received(assembly, [first, *others])["x"])
    assert made == [LARGE.size_bytes] * 2


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({}, "channels"),
        ({"y": np.zeros(4, np.float32)}, "channels"),
        ({"x": np.zeros(4)}, "float64"),
        ({"x": np.zeros(4, ">f4")}, ">f4"),
        ({"x": np.zeros((2, 2), np.float32)}, r"\(2, 2\)"),
    ],
)
def test_what_is_not_of_the_format_is_not_packed(arrays, fault):
    with pytest.raises(ValueError, match=fault):
        SMALL.pack(0, arrays)


def test_a_strided_array_is_packed_in_its_order():
    packed = SMALL.pack(0, {"x": np.arange(8, dtype=np.float32)[::2]})

    assert np.array([0, 2, 4, 6], "<f4").tobytes() == packed.payload


@pytest.mark.parametrize(
    "channels",
    [
        (),
        (("x", "float32", (1,)),) * 2,
        tuple((f"x{i}", "float32", (1,)) for i in range(17)),
    ],
)
def test_a_format_has_one_to_sixteen_different_channels(channels):
    with pytest.raises(ValueError, match="1 to 16 different names"):
        UpdateFormat(channels=channels)


@pytest.mark.parametrize(
    ("dtype", "shape", "fault"), [("int64", (1,), "int64"), ("object", (1,), "object"), ("float32", (0,), "at least one")]
)
def test_a_channel_has_a_dtype_of_the_list_and_at_least_one_number(dtype, shape, fault):
    with pytest.raises(ValueError, match=fault):
        UpdateFormat(channels=(("x", dtype, shape),))


@pytest.mark.parametrize("size_bytes", [1, 15, 17, 2**41])
def test_another_size_is_refused(size_bytes):
    assert refused(Assembly(SMALL), [(replace(UPDATE, size_bytes=size_bytes), memoryview(PAYLOAD))]) == "wrong_size"


@pytest.mark.parametrize(
    "channels", [(("y", "float32", 4),), (("x", "float16", 4),), (("x", "float32", 3),), (("x", "object", 4),), (("x", "float32", 4),) * 2]
)
def test_other_channels_are_refused(channels):
    assert refused(Assembly(SMALL), [(replace(UPDATE, channels=channels), memoryview(PAYLOAD))]) == "wrong_format"


@pytest.mark.parametrize("place", [0, 15])
def test_a_payload_with_one_bit_changed_is_refused(place):
    payload = bytearray(PAYLOAD)
    payload[place] ^= 1

    assert refused(Assembly(SMALL), [(UPDATE, memoryview(payload))]) == "wrong_digest"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 2**18 - 1, 2**18, 299_999])
def test_one_number_that_is_not_finite_is_refused_wherever_it_is(value, place):
    array = large_array()
    array[place] = value

    assert refused(Assembly(LARGE), sent(LARGE, {"x": array})) == "not_finite"


@pytest.mark.parametrize("payload", [b"", PAYLOAD[:-1], PAYLOAD + b"\0"])
def test_a_first_chunk_of_another_length_is_refused(payload):
    assert refused(Assembly(SMALL), [(UPDATE, memoryview(payload))]) == "bad_message"


def test_chunks_are_whole_but_for_the_last():
    first, second, third = sent(LARGE, {"x": large_array()})
    short = (Chunk(exchange=7, offset=CHUNK_BYTES), second[1][:-1])

    assert refused(Assembly(LARGE), [first, short]) == "bad_message"
    assert refused(Assembly(LARGE), [first, second, (third[0], second[1])]) == "bad_message"


@pytest.mark.parametrize("order", [(0, 2), (0, 1, 1), (1,), (0, 1, 2, 2)])
def test_chunks_come_in_order_or_not_at_all(order):
    messages = sent(LARGE, {"x": large_array()})

    assert refused(Assembly(LARGE), [messages[place] for place in order]) == "out_of_order"


def test_after_a_gap_what_was_there_is_continued():
    messages = sent(LARGE, {"x": large_array()})
    assembly = Assembly(LARGE)
    refused(assembly, [messages[0], messages[2]])

    assert assembly.received_bytes == CHUNK_BYTES
    assert np.array_equal(large_array(), received(assembly, messages[1:])["x"])


def test_an_update_that_begins_again_is_taken_from_its_start():
    messages = sent(LARGE, {"x": large_array()})

    assert np.array_equal(large_array(), received(Assembly(LARGE), [*messages[:2], *messages])["x"])


# ---- updates that continue each other


def test_an_update_that_continues_another_has_one_format_and_one_that_stands_by_itself_the_other():
    small = bytes(range(4))

    assert received(Assembly(ENCODED), [(CONTINUED, memoryview(small))])["q"].tolist() == [0, 1, 2, 3]
    assert received(Assembly(ENCODED), [(WHOLE, memoryview(PAYLOAD))])["x"].tolist() == [0, 1, 2, 3]
    assert refused(Assembly(ENCODED), [(replace(CONTINUED, marks=WHOLE.marks), memoryview(small))]) == "wrong_size"
    assert refused(Assembly(ENCODED), [(replace(WHOLE, marks=MARKS), memoryview(PAYLOAD))]) == "wrong_size"
    assert refused(Assembly(ENCODED), [(UPDATE, memoryview(PAYLOAD))]) == "wrong_format"
    assert refused(Assembly(SMALL), [(WHOLE, memoryview(PAYLOAD))]) == "wrong_format"


def test_a_whole_one_is_packed_when_somebody_asks():
    whole = FullUpdate(SMALL, 7, {"x": np.arange(4, dtype=np.float32)}, MARKS[1])
    (frames,) = whole.encoded.messages(**NEWS)

    assert decode(frames)[0] == WHOLE
    assert whole.encoded is whole.encoded


def test_a_mark_is_another_after_anything_else():
    updates = [SMALL.pack(7, {"x": np.full(4, value, dtype=np.float32)}) for value in (0, 0, 1)]
    marks = [next_state_digest(bytes(8), [encoded]) for encoded in updates]
    later = [next_state_digest(marks[0], [encoded]) for encoded in updates]

    assert marks[0] == marks[1]
    assert len({*marks, *later}) == 4
    assert {len(mark) for mark in (*marks, *later)} == {8}


def test_the_format_of_a_message_is_that_of_its_arrays():
    encoded, whole = {"q": np.zeros(4, dtype=np.int8)}, {"x": np.zeros(4, dtype=np.float32)}

    assert UpdateFormat.of(encoded, whole) == ENCODED
    assert UpdateFormat.of(whole, whole) == UpdateFormat.of(whole) == SMALL


# ---- how long it is

REPORTS = st.builds(
    lambda exchange, behind, merged, ahead: (
        exchange,
        Report(
            closed_through=exchange - 1 + ahead,
            merged=tuple(e for e in range(exchange - 3, exchange) if e > exchange - 4 + behind and merged >> (e % 3) & 1),
            confirmed=exchange - 4 + behind,
            settled=exchange - 1,
        ),
    ),
    exchange=st.integers(4, 70_000) | st.sampled_from([114, 115, 116, 127, 128, 255, 256, 65_535, 65_536]),
    behind=st.integers(0, 3),
    merged=st.integers(0, 7),
    ahead=st.integers(0, 8),
)


@given(
    news=REPORTS,
    agreed_for=st.integers(0, 4),
    stop_round=st.none() | st.integers(0, 10**6),
    kind=st.sampled_from(["plain", "next", "whole"]),
)
@settings(deadline=None)
def test_whatever_the_news_an_update_has_the_length_that_is_counted(news, agreed_for, stop_round, kind):
    exchange, report = news
    stop = StopNews(agreed_for=agreed_for, stop_round=stop_round)
    update_format = SMALL if kind == "plain" else ENCODED
    marks = {"plain": None, "next": MARKS, "whole": (None, MARKS[1])}[kind]
    arrays = {"q": np.zeros(4, dtype=np.int8)} if kind == "next" else {"x": np.zeros(4, dtype=np.float32)}
    (frames,) = (ENCODED if kind == "next" else SMALL).pack(exchange, arrays, marks).messages(report, stop)

    assert sum(memoryview(frame).nbytes for frame in frames) == update_format.encoded_bytes(exchange, full=kind == "whole")
    decode(frames)


def test_the_length_of_a_large_update_is_that_of_its_pieces():
    frames = [frame for message in LARGE.pack(7, {"x": large_array()}).messages(**NEWS) for frame in message]

    assert sum(memoryview(frame).nbytes for frame in frames) == LARGE.encoded_bytes(7)


def test_more_news_than_there_ever_is_goes_all_the_same():
    report = Report(closed_through=40, merged=tuple(range(20, 36)), confirmed=3, settled=5)
    (frames,) = SMALL.pack(41, {"x": np.zeros(4, dtype=np.float32)}).messages(report, NEWS["stop"])

    assert (decode(frames)[0].report, decode(frames)[0].pad) == (report, b"")


@pytest.mark.parametrize("missing_bytes", [0, 1, 31, 255])
def test_a_header_that_is_padded_afterwards_is_that_of_a_padded_message(missing_bytes):
    payload = np.zeros(16, dtype=np.uint8).data
    update = Update(exchange=7, channels=(("x", "float32", 4),), size_bytes=16, digest=bytes(32), marks=None, **NEWS, pad=b"")
    header = encode(update, payload)[0]

    assert padded(bytes(header), missing_bytes) == encode(replace(update, pad=bytes(missing_bytes)), payload)[0]


def test_a_parcel_says_what_is_known_when_it_is_sent():
    encoded = SMALL.pack(7, {"x": np.arange(4, dtype=np.float32)})
    (frames,) = encoded.messages(**NEWS)

    assert decode(frames)[0] == UPDATE
    assert hashlib.sha256(PAYLOAD).digest() == encoded.digest


@pytest.mark.parametrize(
    ("dtype", "largest", "norm"), [("float32", 3.0, 5.0), ("float64", 3.0, 5.0), ("float32", 1e38, None), ("int8", 3, None)]
)
def test_a_norm_is_known_where_no_square_overflows(dtype, largest, norm):
    update_format = UpdateFormat(channels=(("x", dtype, (2,)),))
    payload = np.array([largest, 4], dtype=DTYPES[dtype]).view(np.uint8)
    arrays, norms = update_format.unpack(payload)

    assert arrays["x"].tolist() == np.array([largest, 4], dtype=DTYPES[dtype]).tolist()
    assert norms == ({} if norm is None else {"x": norm})


def test_a_norm_is_of_all_pieces_of_a_large_update():
    _, norms = LARGE.unpack(large_array().view(np.uint8))

    assert norms == {"x": pytest.approx(np.linalg.norm(large_array()), rel=1e-12)}
