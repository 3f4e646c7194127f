"""The schema is negotiated: a member of before there was a choice is understood and understands, and the lower of two is used."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from p2pfl.errors import BadMessage
from p2pfl.wire.codec import decode, encode
from p2pfl.wire.link import LinkState
from p2pfl.wire.messages import NEWEST_SCHEMA, SCHEMA, SCHEMA_OF, DoctorAnswer, DoctorQuestion, Hello
from p2pfl.wire.negotiation import announced_schema, announcing
from wire_samples import EVERY_MESSAGE, HELLO, frames_of, session

RECORDED = json.loads((Path(__file__).parent / "schema_4_messages.json").read_text())
"""One message of each kind as the last version wrote it that knew schema 4 alone."""
KINDS = {type(message).__name__: message for message in EVERY_MESSAGE}


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_message_is_read_as_what_it_was(name):
    message, _ = decode([bytes.fromhex(frame) for frame in RECORDED[name]])

    assert KINDS[name] == message


@pytest.mark.parametrize("name", RECORDED)
def test_a_message_of_schema_4_is_written_with_the_same_bytes(name):
    assert [bytes.fromhex(frame) for frame in RECORDED[name]] == [bytes(frame) for frame in frames_of(KINDS[name])]


def test_all_that_was_there_before_is_still_of_schema_4():
    assert {kind for kind, message in KINDS.items() if SCHEMA_OF[message.code] == SCHEMA} == set(RECORDED)


def test_an_announcement_is_a_legal_incarnation_and_is_read_back():
    draw = random.Random(1)
    for _ in range(1000):
        schema = draw.randrange(SCHEMA, 256)
        incarnation = announcing(draw.getrandbits(64), schema)

        assert 1 <= incarnation < 2**63
        assert announced_schema(incarnation) == schema


def test_two_starts_announce_different_incarnations():
    draw = random.Random(2)

    assert len({announcing(draw.getrandbits(64)) for _ in range(1000)}) == 1000


def test_numbers_that_were_drawn_as_a_whole_announce_nothing():
    draw = random.Random(3)

    assert {announced_schema(1 + draw.randrange(2**63 - 1)) for _ in range(10_000)} == {SCHEMA}


@pytest.mark.parametrize(("theirs", "used"), [(None, SCHEMA), (SCHEMA, SCHEMA), (NEWEST_SCHEMA, NEWEST_SCHEMA), (200, NEWEST_SCHEMA)])
def test_the_lower_of_the_two_is_used(theirs, used):
    incarnation = 22 if theirs is None else announcing(5, theirs)
    link = session()
    before = link.schema
    link.receive(encode(replace(HELLO, incarnation=incarnation)), exchange=7)

    assert (SCHEMA, used) == (before, link.schema)
    assert link.understands(DoctorQuestion) == (used >= SCHEMA_OF[DoctorQuestion.code])
    assert link.understands(Hello)
    assert link.state is LinkState.OPEN


def test_a_neighbour_that_was_set_back_to_an_older_version_gets_the_older_schema():
    link = session()
    link.receive(encode(replace(HELLO, incarnation=announcing(5))), exchange=7)
    link.receive(encode(replace(HELLO, incarnation=23)), exchange=7)

    assert link.schema == SCHEMA


def test_an_older_member_takes_a_hello_that_announces_for_any_other():
    """It knows the form of Hello as it was recorded, and nothing of what lies in the number."""
    recorded, _ = decode([bytes.fromhex(frame) for frame in RECORDED["Hello"]])
    assert isinstance(recorded, Hello)
    header = encode(replace(recorded, incarnation=announcing(5)))[0]

    assert header[:3] == bytes.fromhex(RECORDED["Hello"][0])[:3]  # a map of as many keys
    assert header[3:5] == b"\x04\xa1"  # of schema 4


@pytest.mark.parametrize("message", [KINDS["DoctorQuestion"], KINDS["DoctorAnswer"]], ids=lambda message: type(message).__name__)
def test_a_probe_changes_no_state_of_the_link(message):
    link = session()
    heard = link.receive(encode(message), exchange=7)

    assert message == heard.message
    assert link.state is LinkState.UNKNOWN
    assert not link.counters


def test_a_probe_is_of_no_older_schema():
    for kind in (DoctorQuestion, DoctorAnswer):
        header = encode(KINDS[kind.__name__])[0]
        assert header[3] == NEWEST_SCHEMA
        with pytest.raises(BadMessage, match="wrong_schema"):
            decode([header[:3] + bytes([SCHEMA]) + header[4:]])
