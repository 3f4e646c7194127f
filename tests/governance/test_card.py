"""Public cards: one encoding, one signature, readable refusals."""

from __future__ import annotations

import itertools

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from zmq.utils import z85

from p2pfl.errors import ConfigError
from p2pfl.governance.card import Card
from p2pfl.governance.encoding import canonical, grouped, plain_digest, z85_decode, z85_encode
from p2pfl.governance.identity import Identity
from p2pfl.governance.names import is_loopback, split_address

ADDRESS = "tcp://node.hungary.example:7700"
IDENTITY = Identity.new()
OTHER = Identity.new()


def hungary(**content):
    return {**IDENTITY.card("hungary", ADDRESS, 199).as_dict(), **content}


@settings(deadline=None)  # the machine may be busy
@given(st.binary(min_size=32, max_size=32))
def test_z85_is_that_of_zeromq(raw):
    assert z85_encode(raw) == z85.encode(raw).decode()
    assert z85_decode(z85_encode(raw)) == raw


def test_the_example_of_zeromq_rfc_32():
    assert z85_encode(bytes.fromhex("864fd26fb559f75b")) == "HelloWorld"


@pytest.mark.parametrize("text", ["HelloWorl", 'Hello"orld', "#####", "Hellö"])
def test_what_is_not_z85_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011  # any
        z85_decode(text)


def test_canonical_encoding_is_fixed():
    value = {"b": [1e-05, 1.0, 1, True, None], "a": "é"}

    assert canonical(value) == b'{"a":"\\u00e9","b":[1e-05,1.0,1,true,null]}'


def test_a_card_survives_its_file(tmp_path):
    card = Card.from_mapping(hungary(), "card")
    card.save(tmp_path / "card.yaml")

    assert Card.load(tmp_path / "card.yaml") == card


def test_a_name_that_looks_like_a_number_survives_its_file(tmp_path):
    card = IDENTITY.card("12e4")
    card.save(tmp_path / "card.yaml")

    assert Card.load(tmp_path / "card.yaml").name == "12e4"


def test_a_card_is_not_overwritten(tmp_path):
    (tmp_path / "card.yaml").write_text("mine")
    with pytest.raises(FileExistsError):
        Card.from_mapping(hungary(), "card").save(tmp_path / "card.yaml")

    assert (tmp_path / "card.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "budapest"),
        ("address", "tcp://node.hungary.example:7701"),
        ("address", None),
        ("identity", OTHER.card("x").identity),
        ("curve", OTHER.card("x").curve),
        ("samples", 200),
        ("samples", None),
        ("signature", OTHER.card("hungary", ADDRESS, 199).signature),
        ("signature", "00" * 64),
        ("identity", "00" * 32),
    ],
    ids=itertools.count(),  # keys are new in every process, and the workers that share the tests have to agree on names
)
def test_a_changed_field_is_refused_by_the_signature(tmp_path, field, value):
    path = tmp_path / "hungary.yaml"
    path.write_text(yaml.safe_dump(hungary(**{field: value})))

    with pytest.raises(ConfigError, match=r"signature = .* somebody has changed the card") as caught:
        Card.load(path)
    assert caught.value.place == str(path)


def test_a_signature_of_something_else_by_the_same_keys_is_refused():
    content = {key: value for key, value in hungary().items() if key != "signature"}
    signature = IDENTITY.signing.sign(canonical(content)).hex()  # without the domain

    with pytest.raises(ConfigError, match="signature"):
        Card.from_mapping({**content, "signature": signature}, "card")


def test_all_faults_of_a_card_at_once():
    content = hungary(schema=2, name=".hidden", address="node:7700", identity="AB", curve="short", samples=0, colour="red")
    with pytest.raises(ConfigError) as caught:
        Card.from_mapping(content, "card.yaml")

    assert sorted(finding.split(" ")[0] for finding in caught.value.findings) == [
        "address", "colour", "curve", "identity", "name", "samples", "schema"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../a", ".a", "a" * 65, "é", "a\n"])
def test_names_that_cannot_be(name):
    with pytest.raises(ConfigError, match="1 to 64 of A-Z a-z 0-9"):
        IDENTITY.card(name)


@pytest.mark.parametrize("name", ["a", "va-long.beach_2", "a" * 64, "-", "0"])
def test_names_that_can_be(name):
    assert IDENTITY.card(name).name == name


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("tcp://node.hospital.example:7700", ("node.hospital.example", 7700)),
        ("tcp://192.0.2.7:1", ("192.0.2.7", 1)),
        ("tcp://[2001:db8::7]:65535", ("[2001:db8::7]", 65535)),
    ],
)
def test_addresses_that_can_be(address, parts):
    assert split_address(address) == parts


@pytest.mark.parametrize(
    "address",
    ["node:7700", "tcp://node", "tcp://node:0", "tcp://node:65536", "tcp://*:7700", "tcp://0.0.0.0:7700", "tcp://[::]:7700", "ipc:///tmp/x",
     "tcp://a:1;b:2", "tcp://:7700", "tcp://user@node:1", "tcp://node:7700\n"],
)  # fmt: skip
def test_addresses_that_cannot_be(address):
    with pytest.raises(ConfigError, match="address = "):
        IDENTITY.card("a", address)


SEVERAL = [ADDRESS, "tcp://[2001:db8::7]:7700"]


def test_a_card_may_hold_several_addresses(tmp_path):
    card = IDENTITY.card("hungary", SEVERAL)
    card.save(tmp_path / "card.yaml")
    found = Card.load(tmp_path / "card.yaml")

    assert found.addresses == tuple(SEVERAL)
    assert found.as_dict()["address"] == SEVERAL
    assert IDENTITY.card("hungary", ADDRESS).addresses == (ADDRESS,)
    assert IDENTITY.card("hungary").addresses == ()


def test_the_order_of_addresses_is_signed():
    content = IDENTITY.card("hungary", SEVERAL).as_dict()
    with pytest.raises(ConfigError, match="signature"):
        Card.from_mapping({**content, "address": SEVERAL[::-1]}, "card")


def test_a_card_with_one_address_is_encoded_and_signed_as_ever():
    content = IDENTITY.card("hungary", ADDRESS, 199).as_dict()
    message = b'p2pfl card v1\0{"address":"%s","curve":"%s","identity":"%s","name":"hungary","samples":199,"schema":1}' % (
        ADDRESS.encode(),
        content["curve"].encode(),
        content["identity"].encode(),
    )

    IDENTITY.signing.public_key().verify(bytes.fromhex(content["signature"]), message)


@pytest.mark.parametrize(
    ("addresses", "said"),
    [
        ([], "0 addresses: expected 1 to 8"),
        ([ADDRESS] * 2, "an address stands in it twice"),
        ([f"tcp://node:{port}" for port in range(1, 10)], "9 addresses: expected 1 to 8"),
        ([ADDRESS, "tcp://*:7700"], r"'tcp://\*:7700': expected tcp://host:port"),
    ],
)
def test_lists_of_addresses_that_cannot_be(addresses, said):
    with pytest.raises(ConfigError, match=said):
        IDENTITY.card("hungary", addresses)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("tcp://ip6-localhost:1", True),
        ("tcp://127.0.0.1:1", True),
        ("tcp://127.8.8.8:1", True),
        ("tcp://localhost:1", True),
        ("tcp://node.localhost:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://10.0.0.1:1", False),
        ("tcp://localhost.example:1", False),
    ],
)
def test_loopback(address, expected):
    assert is_loopback(address) is expected


def test_a_fingerprint_covers_both_keys():
    fingerprints = {
        IDENTITY.card("a").fingerprint,
        OTHER.card("a").fingerprint,
        Identity(IDENTITY.signing, OTHER.curve).card("a").fingerprint,
        Identity(OTHER.signing, IDENTITY.curve).card("a").fingerprint,
    }

    assert len(fingerprints) == 4
    assert IDENTITY.card("b", ADDRESS).fingerprint == IDENTITY.card("a").fingerprint


def test_a_digest_is_read_in_sixteen_groups_and_comes_back():
    digest = "0123456789abcdef" * 4
    groups = grouped(digest)

    assert groups == " ".join(["0123", "4567", "89ab", "cdef"] * 4)
    assert plain_digest(groups.upper().replace(" ", "-\n")) == digest


@pytest.mark.parametrize("text", ["", "0123", "0123456789abcdef" * 4 + "0", "g" * 64])
def test_what_is_no_digest_is_refused(text):
    with pytest.raises(ValueError, match="64 hex digits"):
        plain_digest(text)


def test_a_card_that_is_too_large_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("p2pfl.yaml_files.parse_yaml", lambda *_: pytest.fail("it was parsed"))
    (tmp_path / "card.yaml").write_text("".join(f"unknown_key_{i}: 1\n" for i in range(100_000)))

    with pytest.raises(ConfigError, match="cannot be read: more than 1048576 bytes"):
        Card.load(tmp_path / "card.yaml")
