"""Key files: private keys under a passphrase, as text. scrypt makes the encrypting key, so that each guess costs time and memory.

    -----BEGIN P2PFL ENCRYPTED PRIVATE KEYS-----
    Kdf: scrypt n=131072 r=8 p=1 salt=HEX
    Cipher: ChaCha20-Poly1305 nonce=HEX
    Checksum: sha256 HEX                    of the lines above and of what is encrypted: tells damage from a wrong passphrase

    BASE64
    -----END P2PFL ENCRYPTED PRIVATE KEYS-----

The lines of the head are authenticated together with what is encrypted.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

BEGIN = b"-----BEGIN P2PFL ENCRYPTED PRIVATE KEYS-----"
_END = b"-----END P2PFL ENCRYPTED PRIVATE KEYS-----"
_FILE = re.compile(
    BEGIN + rb"\n"
    rb"(?P<head>Kdf: scrypt n=(?P<n>[1-9][0-9]{0,9}) r=(?P<r>[1-9][0-9]{0,3}) p=(?P<p>[1-9][0-9]{0,3}) salt=(?P<salt>[0-9a-f]{32,128})\n"
    rb"Cipher: ChaCha20-Poly1305 nonce=(?P<nonce>[0-9a-f]{24})\n)"
    rb"Checksum: sha256 (?P<checksum>[0-9a-f]{64})\n\n"
    rb"(?P<body>[A-Za-z0-9+/=\n]{1,65536})" + _END + rb"\n?"
)

_N, _R, _P = 2**17, 8, 1
"""OWASP's first choice for scrypt: 128 MiB and a third of a second for each guess."""
_MOST_BYTES, _MOST_WORK = 2**30, 2**27
"""Bounds on the memory and work that a file asks for: 128 n r bytes, n r p blocks; eight and 128 times what is written here."""
_SALT_BYTES, _NONCE_BYTES, _KEY_BYTES, _LINE = 16, 12, 32, 64


def seal(content: bytes, passphrase: bytes) -> bytes:
    """Encrypt private keys into a key file's text."""
    salt, nonce = secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_NONCE_BYTES)
    head = f"Kdf: scrypt n={_N} r={_R} p={_P} salt={salt.hex()}\nCipher: ChaCha20-Poly1305 nonce={nonce.hex()}\n".encode()
    sealed = ChaCha20Poly1305(_key(passphrase, salt, _N, _R, _P)).encrypt(nonce, content, head)
    text = base64.b64encode(sealed)
    lines = b"".join(text[i : i + _LINE] + b"\n" for i in range(0, len(text), _LINE))
    return BEGIN + b"\n" + head + b"Checksum: sha256 " + _checksum(head, sealed) + b"\n\n" + lines + _END + b"\n"


def unseal(text: bytes, passphrase: bytes) -> bytes:
    """Decrypt a key file into the private keys that `seal` was given.

    Raises:
        ValueError: the file is damaged, or asks for more memory or work than a key file ever needs.
        InvalidTag: it is not, and has another passphrase.
    """
    found = _FILE.fullmatch(text)
    if found is None:
        raise ValueError("not a key file")
    n, r, p = (int(found[name]) for name in ("n", "r", "p"))
    if n < 2 or n & (n - 1) or 128 * n * r > _MOST_BYTES or n * r * p > _MOST_WORK:  # noqa: PLR2004  # as RFC 7914 has them
        raise ValueError(f"scrypt with n={n} r={r} p={p}, which is refused")
    sealed = base64.b64decode(found["body"].replace(b"\n", b""), validate=True)
    if not hmac.compare_digest(_checksum(found["head"], sealed), found["checksum"]):
        raise ValueError("its checksum is another one")
    key = _key(passphrase, bytes.fromhex(found["salt"].decode()), n, r, p)
    return ChaCha20Poly1305(key).decrypt(bytes.fromhex(found["nonce"].decode()), sealed, found["head"])


def _key(passphrase: bytes, salt: bytes, n: int, r: int, p: int) -> bytes:
    return Scrypt(salt=salt, length=_KEY_BYTES, n=n, r=r, p=p).derive(passphrase)


def _checksum(head: bytes, sealed: bytes) -> bytes:
    return hashlib.sha256(head + sealed).hexdigest().encode()
