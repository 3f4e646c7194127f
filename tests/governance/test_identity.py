"""Private keys: made once, readable by their owner alone, never shown."""

from __future__ import annotations

import base64
import copy
import errno
import io
import logging
import os
import pickle
import stat
import sys
import traceback
from functools import cache

import pytest
import zmq
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from p2pfl.cli.keys import app
from p2pfl.errors import ConfigError
from p2pfl.governance import identity as identity_module
from p2pfl.governance import key_file
from p2pfl.governance.card import Card
from p2pfl.governance.encoding import grouped, z85_encode
from p2pfl.governance.identity import Identity, find_passphrase

PASSPHRASE = b"correct horse battery staple"
SCRYPT_N = key_file._N


@pytest.fixture(autouse=True)
def cheap_guesses(monkeypatch):
    """A passphrase takes a millisecond instead of a third of a second."""
    monkeypatch.setattr(key_file, "_N", 2**9)


@pytest.fixture
def dear_guesses(cheap_guesses, monkeypatch):
    monkeypatch.setattr(key_file, "_N", SCRYPT_N)


@pytest.fixture(autouse=True)
def no_passphrase_around(monkeypatch):
    monkeypatch.delenv("P2PFL_PASSPHRASE", raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "site" / "keys"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def secrets_of(identity):
    """Every form in which a private key could show."""
    raw = [identity.signing.private_bytes_raw(), identity.curve.private_bytes_raw()]
    pem = [key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) for key in (identity.signing, identity.curve)]
    lines = [line for text in pem for line in text.splitlines() if not line.startswith(b"-----")]
    return [
        *(key.hex() for key in raw),
        *(z85_encode(key) for key in raw),
        *(repr(key)[2:-1] for key in raw),
        *(line.decode() for line in lines),
    ]


def assert_no_secret(text, identity):
    assert [secret for secret in secrets_of(identity) if secret in text] == []


def keys_of(identity):
    return identity.signing.private_bytes_raw(), identity.curve.private_bytes_raw()


def test_the_curve_key_is_the_one_that_zeromq_derives():
    for _ in range(20):
        identity = Identity.new()

        assert zmq.curve_public(identity.curve_secret) == identity.curve_public


def test_keys_come_back_from_their_file(folder):
    identity = Identity.new()
    identity.save(folder)

    assert keys_of(Identity.load(folder)) == keys_of(identity)


def test_file_and_folder_are_their_owners_alone_whatever_the_umask(folder):
    before = os.umask(0)
    try:
        path = Identity.new().save(folder)
    finally:
        os.umask(before)

    assert (mode(path), mode(folder)) == (0o600, 0o700)


def test_the_file_is_private_from_the_moment_it_is_made(folder, monkeypatch):
    modes = []

    def watched(descriptor, *arguments):
        modes.append((stat.S_IMODE(os.fstat(descriptor).st_mode), os.fstat(descriptor).st_size))
        return fdopen(descriptor, *arguments)

    fdopen = os.fdopen
    monkeypatch.setattr(identity_module.os, "fdopen", watched)
    before = os.umask(0)
    try:
        Identity.new().save(folder)
    finally:
        os.umask(before)

    assert modes == [(0o600, 0)]


def test_keys_are_never_overwritten(folder):
    first = Identity.new()
    first.save(folder)
    with pytest.raises(ConfigError, match="never overwritten"):
        Identity.new().save(folder)

    assert keys_of(Identity.load(folder)) == keys_of(first)


def test_a_link_in_the_place_of_the_file_is_not_followed(folder, tmp_path):
    folder.mkdir(parents=True, mode=0o700)
    (folder / "private.pem").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError):
        Identity.new().save(folder)

    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("permissions", [0o750, 0o701, 0o777])
def test_a_folder_that_others_may_use_is_refused(folder, permissions):
    folder.mkdir(parents=True)
    folder.chmod(permissions)

    with pytest.raises(ConfigError, match=f"chmod 700 {folder}"):
        Identity.new().save(folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("permissions", [0o640, 0o604, 0o620, 0o644])
def test_a_file_that_others_may_use_is_refused_with_the_remedy(folder, permissions):
    path = Identity.new().save(folder)
    path.chmod(permissions)

    with pytest.raises(ConfigError, match=f"mode {permissions:04o}.*chmod 600 {path}"):
        Identity.load(folder)


def test_missing_keys_are_named(folder):
    with pytest.raises(ConfigError, match="no such file") as caught:
        Identity.load(folder)
    assert caught.value.place == str(folder / "private.pem")


def test_encrypted_keys_need_their_passphrase(folder, tmp_path, monkeypatch, dear_guesses):
    identity = Identity.new()
    path = identity.save(folder, PASSPHRASE)
    assert_no_secret(path.read_text(), identity)
    assert path.read_text().startswith("-----BEGIN P2PFL ENCRYPTED PRIVATE KEYS-----\nKdf: scrypt n=131072 r=8 p=1 salt=")

    file = tmp_path / "passphrase"
    file.write_bytes(PASSPHRASE + b"\n")
    file.chmod(0o600)
    assert keys_of(Identity.load(folder, file)) == keys_of(identity)

    monkeypatch.setenv("P2PFL_PASSPHRASE", PASSPHRASE.decode())
    assert keys_of(Identity.load(folder)) == keys_of(identity)

    monkeypatch.setenv("P2PFL_PASSPHRASE", "wrong")
    with pytest.raises(ConfigError, match="wrong passphrase") as caught:
        Identity.load(folder)
    assert "wrong passphrase" in str(caught.value)
    assert_no_secret("".join(traceback.format_exception(caught.value)), identity)


def test_without_a_passphrase_and_a_terminal_the_ways_are_named(folder):
    Identity.new().save(folder, PASSPHRASE)
    with pytest.raises(ConfigError, match="name a file that holds it, or set P2PFL_PASSPHRASE"):
        Identity.load(folder)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("typed", "new", "expected"), [(["a"], False, b"a"), (["a", "a"], True, b"a"), (["a", "b"], True, None), ([""], False, None)]
)
def test_a_passphrase_is_asked_for_on_a_terminal(monkeypatch, typed, new, expected):
    monkeypatch.setattr(sys, "stdin", Terminal())
    answers = iter(typed)
    monkeypatch.setattr(identity_module, "getpass", lambda _: next(answers))

    if expected is None:
        with pytest.raises(ConfigError, match="nothing has been done"):
            find_passphrase(new=new)
    else:
        assert find_passphrase(new=new) == expected


def test_a_passphrase_file_that_others_may_read_or_that_is_empty_is_refused(tmp_path):
    file = tmp_path / "passphrase"
    file.write_bytes(PASSPHRASE)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600") as caught:
        find_passphrase(file)
    assert PASSPHRASE.decode() not in str(caught.value)

    file.chmod(0o600)
    file.write_bytes(b"\n")
    with pytest.raises(ConfigError, match="is empty"):
        find_passphrase(file)


def damaged_files(path):
    text = path.read_bytes()
    blocks = text.split(b"-----END PRIVATE KEY-----\n")
    first, second = (block + b"-----END PRIVATE KEY-----\n" for block in blocks[:2])
    another = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    yield from (b"", first, second, second + first, first + another, text[: len(text) // 2], text + another)
    yield text.replace(b"MC4CAQ", b"MC4CAX")
    yield text.replace(b"-----BEGIN PRIVATE KEY-----", b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    yield bytes(range(256))


def test_a_damaged_file_is_refused_without_showing_what_is_in_it(folder, monkeypatch):
    monkeypatch.setenv("P2PFL_PASSPHRASE", PASSPHRASE.decode())
    identity = Identity.new()
    path = identity.save(folder)
    for content in list(damaged_files(path)):
        path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            Identity.load(folder)
        assert_no_secret("".join(traceback.format_exception(caught.value)), identity)


@cache
def sealed_text():
    """Encrypted keys, and their file's text; scrypt takes its time once."""
    identity = Identity.new()
    return identity, key_file.seal(identity.pem_blocks(), PASSPHRASE)


@pytest.fixture
def sealed(folder, monkeypatch, dear_guesses):
    """Encrypted keys, and their file."""
    monkeypatch.setenv("P2PFL_PASSPHRASE", PASSPHRASE.decode())
    identity, text = sealed_text()
    folder.mkdir(parents=True, mode=0o700)
    (folder / "private.pem").write_bytes(text)
    (folder / "private.pem").chmod(0o600)
    return identity, folder / "private.pem"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("n=131072", "n=65536"),
        ("n=131072", "n=131071"),
        ("n=131072", "n=1"),
        ("n=131072 r=8", "n=1073741824 r=1024"),  # 140 TB
        ("p=1", "p=9999"),
        ("n=131072", "n=99999999999999999999"),
        ("salt=", "salt=0"),
        ("ChaCha20-Poly1305", "none"),
        ("-----END P2PFL", "-----END"),
        ("\n\n", "\n\nA"),
        ("\n\n", "\n"),
    ],
)
def test_a_damaged_or_greedy_key_file_is_refused_at_once_and_not_taken_for_a_wrong_passphrase(sealed, folder, old, new):
    identity, path = sealed
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=r"the file is damaged .*; restore it") as caught:
        Identity.load(folder)

    assert_no_secret("".join(traceback.format_exception(caught.value)), identity)


def test_a_checksum_that_was_put_right_does_not_hide_a_change(sealed, folder):
    _, path = sealed
    found = key_file._FILE.fullmatch(path.read_bytes())
    head = found["head"]
    body = base64.b64decode(found["body"].replace(b"\n", b""))
    changed = bytes([body[0] ^ 1]) + body[1:]
    text = path.read_bytes().replace(found["body"], base64.b64encode(changed) + b"\n")
    path.write_bytes(text.replace(found["checksum"], key_file._checksum(head, changed)))

    with pytest.raises(ConfigError, match="wrong passphrase"):
        Identity.load(folder)


def as_earlier_versions_wrote(identity, folder):
    """Both keys under PBKDF2 with 2,048 iterations."""
    folder.mkdir(parents=True, mode=0o700)
    encryption = BestAvailableEncryption(PASSPHRASE)
    blocks = [key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption) for key in (identity.signing, identity.curve)]
    (folder / "private.pem").write_bytes(b"".join(blocks))
    (folder / "private.pem").chmod(0o600)
    return folder / "private.pem"


def test_keys_that_an_earlier_version_encrypted_are_read_and_encrypted_anew(folder, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    identity = Identity.new()
    path = as_earlier_versions_wrote(identity, folder)
    monkeypatch.setenv("P2PFL_PASSPHRASE", "wrong")
    with pytest.raises(ConfigError, match="wrong passphrase, or the file is damaged"):
        Identity.load(folder)
    assert path.read_text().count("BEGIN ENCRYPTED PRIVATE KEY") == 2
    monkeypatch.setenv("P2PFL_PASSPHRASE", PASSPHRASE.decode())
    before = os.umask(0)
    try:
        assert keys_of(Identity.load(folder)) == keys_of(identity)
    finally:
        os.umask(before)

    assert path.read_bytes().startswith(key_file.BEGIN)
    assert [(path.name, mode(path)) for path in folder.iterdir()] == [("private.pem", 0o600)]
    assert "has been encrypted anew" in caplog.text
    assert keys_of(Identity.load(folder)) == keys_of(identity)
    assert_no_secret(caplog.text + path.read_text(), identity)


def test_where_the_file_cannot_be_written_anew_the_old_one_stays_and_is_used(folder, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    identity = Identity.new()
    path = as_earlier_versions_wrote(identity, folder)
    old = path.read_bytes()
    monkeypatch.setenv("P2PFL_PASSPHRASE", PASSPHRASE.decode())
    monkeypatch.setattr(identity_module.os, "fsync", refuse)

    assert keys_of(Identity.load(folder)) == keys_of(identity)
    assert path.read_bytes() == old
    assert [path.name for path in folder.iterdir()] == ["private.pem"]
    assert "cannot be written anew: Read-only file system" in caplog.text


def test_keys_without_a_passphrase_stay_as_they_are(folder):
    path = Identity.new().save(folder)
    before = path.read_bytes(), path.stat().st_ino
    Identity.load(folder)

    assert (path.read_bytes(), path.stat().st_ino) == before


def test_what_is_far_too_long_for_a_key_is_not_read(folder):
    path = Identity.new().save(folder)
    with path.open("ab") as file:
        file.truncate(2**40)

    with pytest.raises(ConfigError, match="neither a key nor a passphrase"):
        Identity.load(folder)


def test_nothing_private_shows_in_repr_or_card_or_log(folder, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    identity = Identity.new()
    identity.save(folder)
    identity.card("a").save(tmp_path / "card.yaml")
    loaded = Identity.load(folder)

    assert_no_secret(f"{identity} {loaded!r} {[identity]} " + (tmp_path / "card.yaml").read_text() + caplog.text, identity)


def test_keys_do_not_travel_as_pickles():
    with pytest.raises(TypeError):
        pickle.dumps(Identity.new())


def test_an_identity_knows_its_own_card():
    one, other = Identity.new(), Identity.new()

    assert one.owns(one.card("a"))
    assert not one.owns(other.card("a"))
    assert not one.owns(Identity(one.signing, other.curve).card("a"))
    assert not one.owns(Identity(other.signing, one.curve).card("a"))
    assert copy.copy(one).owns(one.card("a"))


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_keys_new_writes_both_files_and_says_nothing_private(folder):
    result = invoke("new", "--name", "hungary", "--address", "tcp://node.hungary.example:7700", "--samples", 199, "--out", folder)

    assert result.exit_code == 0, result.output
    card = Card.load(folder / "card.yaml")
    assert (card.name, card.address, card.samples) == ("hungary", "tcp://node.hungary.example:7700", 199)
    identity = Identity.load(folder)
    assert identity.owns(card)
    assert_no_secret(result.output, identity)
    assert grouped(card.fingerprint) in result.output
    assert invoke("show", folder).output == "".join(result.output.splitlines(keepends=True)[2:])
    assert invoke("show", folder / "card.yaml", "--json").output == (
        '{"name": "hungary", "address": "tcp://node.hungary.example:7700", "samples": 199, "moments": null, '
        f'"fingerprint": "{card.fingerprint}"}}\n'
    )


def test_keys_new_with_a_passphrase_encrypts(folder, monkeypatch):
    monkeypatch.setenv("P2PFL_PASSPHRASE", PASSPHRASE.decode())
    result = invoke("new", "--name", "hungary", "--passphrase", "--out", folder)

    assert result.exit_code == 0, result.output
    assert "encrypted" in result.output
    assert PASSPHRASE.decode() not in result.output
    assert (folder / "private.pem").read_text().startswith("-----BEGIN P2PFL ENCRYPTED PRIVATE KEYS-----")
    assert Identity.load(folder).owns(Card.load(folder / "card.yaml"))


@pytest.mark.parametrize(
    "arguments",
    [["--name", "a b"], ["--name=-rf"], ["--name=--help"], ["--name", "a", "--address", "a:1"], ["--name", "a", "--samples", "0"]],
)
def test_keys_new_writes_nothing_if_the_card_cannot_be(folder, arguments):
    result = invoke("new", *arguments, "--out", folder)

    assert isinstance(result.exception, ConfigError)
    assert not folder.exists()


def test_keys_new_keeps_what_is_there(folder):
    invoke("new", "--name", "a", "--out", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = invoke("new", "--name", "a", "--out", folder)

    assert isinstance(result.exception, ConfigError)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@given(st.binary(max_size=40), st.integers(0, 10**4), st.integers(0, 40))
def test_a_changed_key_file_is_called_damaged_whatever_was_changed(noise, start, length):
    _, text = sealed_text()
    start %= len(text) + 1
    changed = text[:start] + noise + text[start + length :]
    if changed.replace(b"\n", b"") != text.replace(b"\n", b""):  # where lines end within BASE64 means nothing
        with pytest.raises(ValueError, match=r"key file|checksum|refused|base64|padding|data"):
            key_file.unseal(changed, PASSPHRASE)
