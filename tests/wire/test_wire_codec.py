from __future__ import annotations

import tracemalloc
from dataclasses import fields, replace
from pathlib import Path

import msgpack
import pytest

from p2pfl.errors import BadMessage
from p2pfl.wire import codec
from p2pfl.wire.codec import CHUNK_BYTES, MAX_HEADER_BYTES, decode, encode
from p2pfl.wire.messages import MESSAGES, SCHEMA, DoctorAnswer, DoctorQuestion, Goodbye, Ready, Report, ResendRequest, Sent
from wire_samples import CHUNK, EVERY_MESSAGE, HELLO, PAYLOAD, UPDATE, frames_of

CORPUS = sorted((Path(__file__).parents[1] / "corpus").glob("*.hex"))


def changed(message, **changes):
    """The frames of a message with something else in its header."""
    header, *payload = frames_of(message)
    return [msgpack.packb(msgpack.unpackb(header, use_list=False) | changes), *payload]


def refused(frames):
    with pytest.raises(BadMessage) as caught:
        decode(frames)
    return caught.value.reason


@pytest.mark.parametrize("message", EVERY_MESSAGE, ids=lambda message: type(message).__name__)
def test_what_is_encoded_is_decoded(message):
    decoded, payload = decode(frames_of(message))

    assert message == decoded
    assert (PAYLOAD if len(frames_of(message)) == 2 else b"") == payload


def test_the_samples_are_of_every_kind():
    assert list(MESSAGES.values()) == [type(message) for message in EVERY_MESSAGE]


def test_the_bytes_of_a_want_are_those_of_the_documentation():
    assert encode(Sent(exchange=7, whole=False)) == [b"\x84\xa1v\x04\xa1t\x0b\xa8exchange\x07\xa5whole\xc2"]


def test_a_payload_is_copied_neither_way():
    payload = memoryview(bytearray(PAYLOAD))
    frames = encode(UPDATE, payload)

    assert frames[1] is payload
    assert payload.obj is decode(frames)[1].obj


@pytest.mark.parametrize("message", EVERY_MESSAGE, ids=lambda message: type(message).__name__)
def test_each_key_is_needed_and_no_other_allowed(message):
    header, *payload = frames_of(message)
    keys = msgpack.unpackb(header, use_list=False)

    assert {"v", "t"} | {field.name for field in fields(message)} == keys.keys()
    for missing in keys:
        assert refused([msgpack.packb({key: value for key, value in keys.items() if key != missing}), *payload]) == "bad_message"
    assert refused([msgpack.packb(keys | {"further": 1}), *payload]) == "bad_message"


ALLOWED = {
    ("is_open", "True"),
    ("whole", "True"),
    ("lost", "True"),
    ("marks", "None"),
    ("pad", "b''"),
    ("void", "True"),
    ("relayed", "True"),
    ("forward", "None"),
    ("outputs", "[]"),
}
ALLOWED |= {(name, str(value)) for name in ("sum", "weight", "low", "high") for value in (1.0, 2**64 - 1)} | {
    ("low", "None"),
    ("high", "None"),
}


@pytest.mark.parametrize("message", EVERY_MESSAGE, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("value", [None, True, 1.0, -2, 2**64 - 1, "", "x" * 200, b"", b"x" * 300, [], {}, [[1]], {"a": 1}])
def test_no_field_takes_a_value_of_another_type_or_range(message, value):
    for field in fields(message):
        if isinstance(message, Ready) and value == []:
            continue
        if isinstance(message, DoctorQuestion | DoctorAnswer) and (field.name, value) == ("pad", b"x" * 300):
            continue
        if (field.name, repr(value)) not in ALLOWED and not (
            isinstance(message, ResendRequest) and (field.name, value) == ("digest", None)
        ):
            assert refused(changed(message, **{field.name: value})) == "bad_message"


@pytest.mark.parametrize(
    "report",
    [
        {"closed_through": 6, "merged": [5, 4], "confirmed": 3, "settled": 5},
        {"closed_through": 6, "merged": [4, 4], "confirmed": 3, "settled": 5},
        {"closed_through": 6, "merged": [3], "confirmed": 3, "settled": 5},
        {"closed_through": 6, "merged": [7], "confirmed": 3, "settled": 5},
        {"closed_through": 6, "merged": [], "confirmed": 7, "settled": 6},
        {"closed_through": 6, "merged": [], "confirmed": 3, "settled": 7},
        {"closed_through": 6, "merged": [], "confirmed": 3, "settled": 2},
        {"closed_through": 6, "merged": [], "confirmed": -2, "settled": 5},
        {"closed_through": 6, "merged": [True], "confirmed": 0, "settled": 5},
        {"closed_through": 100, "merged": list(range(1, 18)), "confirmed": 0, "settled": 5},
        {"closed_through": 6, "merged": [], "confirmed": 3},
        {"closed_through": 6, "merged": [], "confirmed": 3, "settled": 5, "further": 1},
    ],
)
def test_a_report_that_contradicts_itself_is_refused(report):
    assert refused(changed(HELLO, report=report)) == "bad_message"


def test_a_report_may_list_sixteen_exchanges():
    report = Report(closed_through=16, merged=tuple(range(1, 17)), confirmed=0, settled=0)

    assert report == decode(encode(replace(HELLO, report=report)))[0].report


@pytest.mark.parametrize(
    "channels",
    [[], [["x", "float32", 0]], [["x", "float32"]], [["x", "float32", 4, 4]], [[1, "float32", 4]], [["x", "float32", 4]] * 17],
)
def test_channels_are_one_to_sixteen_triples(channels):
    assert refused(changed(UPDATE, channels=channels)) == "bad_message"


@pytest.mark.parametrize("version", [0, SCHEMA - 1, SCHEMA + 1, -1])
def test_another_schema_is_refused_by_name_whatever_else_is_in_it(version):
    assert refused([msgpack.packb({"v": version, "t": 99, "new": [1]})]) == "wrong_schema"


@pytest.mark.parametrize("version", [True, None, "1", 1.0, [1]])
def test_a_version_is_a_number(version):
    assert refused(changed(HELLO, v=version)) == "bad_message"


@pytest.mark.parametrize("code", [0, 8, True, "1", None, 1.0])
def test_a_type_code_is_one_of_seven_numbers(code):
    assert refused(changed(HELLO, t=code)) == "bad_message"


@pytest.mark.parametrize("reason", ["", "Pausing", "a b", "a\n", "_a", "a" * 33, "päusing", "a1"])
def test_a_reason_is_safe_to_print_and_to_count_by(reason):
    assert refused(changed(Goodbye(reason="pausing"), reason=reason)) == "bad_message"


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [*encode(HELLO), b""],
        [*encode(HELLO), b"x"],
        frames_of(UPDATE)[:1],
        [frames_of(UPDATE)[0], b""],
        [*frames_of(UPDATE), b"x"],
        [encode(HELLO)[0] + b"\x00"],
        [encode(HELLO)[0][:-1]],
        [b"\xdf\xff\xff\xff\xff"],
        [b"\xdd\xff\xff\xff\xff" + b"\x00" * 1000],
        [b"\xc6\xff\xff\xff\xff"],
        [b"\x91" * 60_000],
        [b"\x81\xa1v" * 20_000],
        [b"\xc7\x00\x01"],
        [b"\xd6\xff\x00\x00\x00\x00"],
        [b"\x83\xa1v\x01\xa1v\x01\xa1t\x04"],
        [b"\x82\xa1v\x01\x04\x04"],
        [b"\x82\xa1v\x01\xa1\xff\x04"],
        [msgpack.packb([1, 2])],
        [msgpack.packb({b"v": 1, b"t": 4, b"exchange": 7})],
    ],
)
def test_what_is_no_message_is_refused(frames):
    assert refused(frames) == "bad_message"


def test_a_frame_above_its_limit_is_refused():
    with pytest.raises(BadMessage, match="a header of 65537 bytes: expected at most 65536"):
        decode([bytes(MAX_HEADER_BYTES + 1)])
    assert refused([frames_of(UPDATE)[0], bytes(CHUNK_BYTES + 1)]) == "bad_message"
    assert decode([frames_of(CHUNK)[0], bytes(CHUNK_BYTES)])[1].nbytes == CHUNK_BYTES


@pytest.mark.parametrize("many", [b"\xdd\x00\x00\xff\x00" + b"\xc0" * 0xFF00, b"\xdf\x00\x00\x7f\x00" + b"\xa0\xc0" * 0x7F00])
def test_a_header_of_very_many_items_is_given_up_before_they_are_built(many):
    tracemalloc.start()
    reason = refused([many])
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert reason == "bad_message"
    assert peak_bytes < 50_000


def test_a_refusal_does_not_repeat_what_the_peer_sent():
    with pytest.raises(BadMessage) as caught:
        decode(changed(HELLO, **{"k\x1b[31m" * 100: 1}))

    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert caught.value.__cause__ is None


def test_a_payload_is_encoded_only_where_one_belongs():
    for message, payload in [(HELLO, memoryview(b"x")), (UPDATE, None), (CHUNK, memoryview(b"")), (CHUNK, memoryview(bytes(2**20 + 1)))]:
        with pytest.raises(ValueError, match="payload"):
            encode(message, payload)


def test_the_schema_is_the_third():
    assert SCHEMA == 4


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_every_nasty_of_the_corpus_is_refused_by_the_name_in_its_first_line(path):
    first, *lines = path.read_text().splitlines()

    assert first.removeprefix("# ").split(":")[0] == refused([bytes.fromhex(line) for line in lines if not line.startswith("#")])


def test_the_corpus_is_there():
    assert len(CORPUS) >= 20


def test_a_header_of_many_maps_is_given_up_early(monkeypatch):
    looked_at = []
    unique = codec._unique
    monkeypatch.setattr(codec, "_unique", lambda pairs: looked_at.append(None) or unique(pairs))
    maps = [[[{"": 0} for _ in range(20)] for _ in range(32)] for _ in range(32)]

    with pytest.raises(BadMessage, match="not msgpack"):
        decode([msgpack.packb({"v": SCHEMA, "t": 5, "exchange": maps})])
    assert len(looked_at) <= 8
