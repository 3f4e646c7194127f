"""A site's private keys: Ed25519 to sign with and CURVE (X25519) to encrypt links with, in one file that only its owner can read.

Nothing private is ever put into a message, a log or a repr.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from getpass import getpass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InternalError, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from p2pfl.errors import ConfigError
from p2pfl.governance import key_file
from p2pfl.governance.card import Card, card_message
from p2pfl.governance.cohort_commitment import CohortCommitment
from p2pfl.governance.encoding import z85_encode
from p2pfl.statistics.moments import Moments

log = logging.getLogger(__name__)

PRIVATE_FILE = "private.pem"
CARD_FILE = "card.yaml"
PASSPHRASE_VARIABLE = "P2PFL_PASSPHRASE"  # noqa: S105  # the variable's name

_MOST_BYTES = 2**17
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_BLOCK = re.compile(rb"-----BEGIN (?:ENCRYPTED )?PRIVATE KEY-----.*?-----END (?:ENCRYPTED )?PRIVATE KEY-----\n?", re.DOTALL)
_ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Identity:
    """Both private keys of a site."""

    signing: Ed25519PrivateKey
    """Signs its card, which binds the CURVE key to it."""
    curve: X25519PrivateKey
    """Encrypts and authenticates its links."""

    @classmethod
    def new(cls) -> Identity:
        """Make fresh keys from the system's randomness."""
        return cls(Ed25519PrivateKey.generate(), X25519PrivateKey.generate())

    @classmethod
    def load(cls, folder: Path, passphrase_file: Path | None = None) -> Identity:
        """Load the keys in folder/private.pem; a passphrase is looked for (see `find_passphrase`) only where they are encrypted.

        Keys that an earlier version encrypted, with a KDF that is too fast, are written anew in the place of that file.

        Raises:
            ConfigError: there are none, others can read them, the passphrase is wrong or missing, or the file is not what `save` writes.
        """
        path = folder / PRIVATE_FILE
        text = read_private(path)
        if key_file.BEGIN in text:
            return cls._from_blocks(_unsealed(text, find_passphrase(passphrase_file), path), None, path)
        password = find_passphrase(passphrase_file) if _ENCRYPTED in text else None
        found = cls._from_blocks(text, password, path)
        if password is not None:
            _rewrite(path, text, found.pem_blocks(), password)
        return found

    @classmethod
    def _from_blocks(cls, text: bytes, password: bytes | None, path: Path) -> Identity:
        """Make an identity of two PEM blocks."""
        try:
            keys = [load_pem_private_key(block, password) for block in _BLOCK.findall(text)]
        except (ValueError, TypeError, UnsupportedAlgorithm, InternalError) as error:  # the last: a key of a length that is not its kind's
            expected = "wrong passphrase, or the file is damaged" if password is not None else "not two PEM private keys; restore the file"
            raise ConfigError(expected, str(path)) from error
        match keys:
            case [Ed25519PrivateKey() as signing, X25519PrivateKey() as curve]:
                return cls(signing, curve)
        raise ConfigError("expected an Ed25519 and an X25519 private key in PEM; restore the file", str(path))

    def pem_blocks(self) -> bytes:
        """Both private keys in PEM, not encrypted."""
        return b"".join(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) for key in (self.signing, self.curve))

    def save(self, folder: Path, passphrase: bytes | None = None) -> Path:
        """Write folder/private.pem, 0600 from its creation, in a folder of mode 0700; ConfigError where there is one."""
        path = folder / PRIVATE_FILE
        content = key_file.seal(self.pem_blocks(), passphrase) if passphrase else self.pem_blocks()
        try:
            write_private(path, content)
        except FileExistsError as error:
            raise ConfigError("is there already and is never overwritten; choose another folder", str(path)) from error
        except OSError as error:
            raise ConfigError(f"cannot be written: {error.strerror}", str(path)) from error
        return path

    def card(
        self,
        name: str,
        address: str | Sequence[str] | None = None,
        samples: int | None = None,
        moments: Moments | None = None,
        relay: str | Sequence[str] | None = None,
        cohort: CohortCommitment | None = None,
    ) -> Card:
        """Make a signed card with these keys' public halves; ConfigError for a name or an address that cannot be."""
        content: dict[str, Any] = {
            "schema": 1,
            "name": name,
            "address": list(address) if address is not None and not isinstance(address, str) else address,
            "identity": self._identity,
            "curve": self.curve_public.decode("ascii"),
            "samples": samples,
        }
        if relay is not None:
            content["relay"] = relay if isinstance(relay, str) else list(relay)
        if moments is not None:
            content["moments"] = moments.as_dict()
        if cohort is not None:
            content["cohort"] = cohort.as_dict()
        return Card.from_mapping({**content, "signature": self.signing.sign(card_message(content)).hex()}, "card")

    def owns(self, card: Card) -> bool:
        """Whether a card has these keys' public halves."""
        return (self._identity, self.curve_public.decode("ascii")) == (card.identity, card.curve)

    @property
    def curve_public(self) -> bytes:
        """Public CURVE key as ZeroMQ takes it: Z85, 40 bytes."""
        return z85_encode(self.curve.public_key().public_bytes_raw()).encode("ascii")

    @property
    def curve_secret(self) -> bytes:
        """Private CURVE key as ZeroMQ takes it, for the socket only: Z85, 40 bytes."""
        return z85_encode(self.curve.private_bytes_raw()).encode("ascii")

    def __repr__(self) -> str:
        return f"Identity({self._identity[:16]}…)"

    @property
    def _identity(self) -> str:
        return self.signing.public_key().public_bytes_raw().hex()


def find_passphrase(file: Path | None = None, *, new: bool = False) -> bytes:
    """Read the passphrase from a file if one is named, else from P2PFL_PASSPHRASE, else from the terminal (twice for new keys)."""
    if file is not None:
        passphrase = read_private(file).rstrip(b"\r\n")
        if not passphrase:
            raise ConfigError("is empty; expected a passphrase", str(file))
        return passphrase
    if from_environment := os.environ.get(PASSPHRASE_VARIABLE):
        return os.fsencode(from_environment)
    if not sys.stdin.isatty():
        raise ConfigError(f"a passphrase is needed and nobody is there to ask: name a file that holds it, or set {PASSPHRASE_VARIABLE}")
    passphrase = getpass("Passphrase of the private keys: ").encode()
    if not passphrase or (new and getpass("The same again: ").encode() != passphrase):
        raise ConfigError("the passphrase is empty, or was not the same twice; nothing has been done")
    return passphrase


def _unsealed(text: bytes, passphrase: bytes, path: Path) -> bytes:
    """Decrypt the PEM blocks of a key file."""
    try:
        return key_file.unseal(text, passphrase)
    except InvalidTag as error:
        raise ConfigError("wrong passphrase", str(path)) from error
    except (ValueError, MemoryError) as error:
        raise ConfigError(f"the file is damaged ({error}); restore it", str(path)) from error


def _rewrite(path: Path, before: bytes, blocks: bytes, passphrase: bytes) -> None:
    """Encrypt keys anew in the place of an old file; where that fails the old one stays, with a warning."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    content = key_file.seal(blocks, passphrase)
    assert key_file.unseal(content, passphrase) == blocks  # the only copy of the keys goes with the old file
    try:
        owner = path.stat()
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            if (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            os.fsync(file.fileno())
        if path.is_symlink() or path.read_bytes() != before:
            raise OSError(None, "it is a link, or has just been changed")
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        log.warning(
            "%s is encrypted as earlier versions did, which is quickly guessed; it cannot be written anew: %s", path, error.strerror
        )
    else:
        log.info("%s has been encrypted anew: a guess at its passphrase takes longer now", path)


def write_private(path: Path, content: bytes) -> None:
    """Write a new file of mode 0600 durably, in a folder of mode 0700; OSError where it is there or the disk refuses.

    Raises:
        ConfigError: others may use the folder.
    """
    folder = path.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=stat.S_IRWXU, exist_ok=True)
    if folder.stat().st_mode & _OTHERS:
        raise ConfigError(f"others may use the folder of the keys; run: chmod 700 {folder}", str(folder))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, stat.S_IRUSR | stat.S_IWUSR)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_private(path: Path) -> bytes:
    """Read a file that only its owner can read; ConfigError where others can."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & _OTHERS:
                raise ConfigError(f"mode {stat.S_IMODE(mode):04o}, others may use it; run: chmod 600 {path}", str(path))
            content = file.read(_MOST_BYTES + 1)
            if len(content) > _MOST_BYTES:
                raise ConfigError(f"more than {_MOST_BYTES} bytes: this is neither a key nor a passphrase", str(path))
            return content
    except FileNotFoundError as error:
        raise ConfigError("no such file (p2pfl keys new makes the keys of a site)", str(path)) from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path)) from error
