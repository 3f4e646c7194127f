"""docs/protocol.md says what the code does: its bytes, its keys, its table of states."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import msgpack
import pytest

from p2pfl.wire.codec import CHUNK_BYTES, MAX_HEADER_BYTES
from p2pfl.wire.link import TRANSITIONS, HandshakeEvent, LinkState
from p2pfl.wire.messages import MAX_CHANNELS, MAX_MERGED, MAX_READY, MAX_READY_BYTES, MAX_RECORD_BYTES, MAX_RECORDS, MESSAGES
from p2pfl.wire.ready_record import ReadyRecord
from p2pfl.wire.round_record import RoundRecord
from p2pfl.wire.sum_codec import SUM_CODES, encode_sum
from p2pfl.wire.update import DTYPES
from sum_samples import EVERY_SUM_MESSAGE, SUBTOTAL
from wire_samples import CONTINUED, EVERY_MESSAGE, PAYLOAD, frames_of

DOCUMENT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
DUMPS = [
    bytes.fromhex("".join(dump.split())) for dump in re.findall(r"(?:^ {4}(?:[0-9a-f]{2} )*[0-9a-f]{2}\n)+", DOCUMENT, flags=re.MULTILINE)
]
COLUMNS = (
    HandshakeEvent.ECHO,
    HandshakeEvent.HELLO,
    HandshakeEvent.HELLO_AGAIN,
    HandshakeEvent.REFUSED,
    HandshakeEvent.GOODBYE,
    HandshakeEvent.MESSAGE,
)


EXAMPLES = (*EVERY_MESSAGE, CONTINUED)
OF_SUMS = [bytes(next(encode_sum(message))[0]) for message in EVERY_SUM_MESSAGE]
PART = msgpack.packb({"v": 6, "t": 25, "offset": 2**20})


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_message_is_there_byte_by_byte(message):
    assert frames_of(message)[0] in DUMPS


def test_no_bytes_are_there_that_the_code_would_not_send():
    payloads = [PAYLOAD, bytes(frames_of(CONTINUED)[1]), bytes(next(encode_sum(SUBTOTAL))[1])]
    assert sorted([*payloads, *(frames_of(message)[0] for message in EXAMPLES), *OF_SUMS, PART]) == sorted(DUMPS)


@pytest.mark.parametrize("kind", SUM_CODES)
def test_every_message_of_secure_sums_is_in_the_table_with_its_keys(kind):
    name = {"MaskedSubtotal": "SubtotalHead", "Total": "TotalHead"}.get(kind.__name__, kind.__name__)
    (line,) = re.findall(rf"^\| {SUM_CODES[kind]} \| {name} .*$", DOCUMENT, flags=re.MULTILINE)

    assert [field.name for field in fields(kind)] == sorted(re.findall(r"`(\w+)`", line), key=[f.name for f in fields(kind)].index)


@pytest.mark.parametrize("kind", MESSAGES.values())
def test_every_message_is_in_the_table_with_its_keys(kind):
    (line,) = re.findall(rf"^\| {kind.code} \| {kind.__name__} .*$", DOCUMENT, flags=re.MULTILINE)

    assert [field.name for field in fields(kind)] == re.findall(r"`(\w+)`", line)


def test_every_field_of_a_round_record_is_in_the_table_in_its_order():
    (table,) = re.findall(r"^\| place \| field .*\n\|.*\n((?:\|.*\n)+)", DOCUMENT, flags=re.MULTILINE)

    assert [field.name for field in fields(RoundRecord)] == re.findall(r"^\| \d+ \| `(\w+)`", table, flags=re.MULTILINE)


def test_every_field_of_a_ready_record_is_in_the_table_in_its_order():
    (table,) = re.findall(r"^\| of a ready record .*\n\|.*\n((?:\|.*\n)+)", DOCUMENT, flags=re.MULTILINE)

    assert [field.name for field in fields(ReadyRecord)] == re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)


@pytest.mark.parametrize("state", LinkState)
def test_the_table_of_states_is_that_of_the_code(state):
    (line,) = re.findall(rf"^\| {state.name.lower()} \| (.*) \|$", DOCUMENT, flags=re.MULTILINE)
    steps = dict(zip(COLUMNS, line.split(" | "), strict=True))
    words = {"unknown", "half_open", "open", "heard"}

    assert {event: word for event, word in steps.items() if word in words} == {
        event: "heard" if event is HandshakeEvent.MESSAGE else TRANSITIONS[state, event].name.lower()
        for event in COLUMNS
        if (state, event) in TRANSITIONS
    }
    assert set(steps.values()) <= words | {"not_greeted", "(cannot be)"}


@pytest.mark.parametrize("number", [MAX_HEADER_BYTES, CHUNK_BYTES])
def test_the_limits_are_those_of_the_code(number):
    assert f"{number:,}" in DOCUMENT


def test_the_numbers_of_items_are_those_of_the_code():
    assert f"array of 1 to {MAX_CHANNELS} arrays" in DOCUMENT
    assert f"at most {MAX_MERGED}, rising" in DOCUMENT
    assert f"array of 1 to {MAX_RECORDS}, each bin of 65 to {MAX_RECORD_BYTES} bytes" in DOCUMENT
    assert f"at most {MAX_READY}, each bin of 65 to {MAX_READY_BYTES:,} bytes" in DOCUMENT
    assert "dtype is one of " + ", ".join(f"`{name}`" for name in DTYPES) in DOCUMENT


def test_every_reason_of_a_refusal_is_explained():
    package = Path(__file__).parents[2] / "p2pfl"
    code = "".join(path.read_text() for room in ("wire", "protocol") for path in sorted((package / room).glob("*.py")))
    reasons = set(re.findall(r'(?:reason=|dropped = |return |counters\[)"([a-z_]+)"', code)) | {"bad_message"}

    assert len(reasons) >= 12
    assert [reason for reason in sorted(reasons) if f'"{reason}"' not in DOCUMENT] == []
