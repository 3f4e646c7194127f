"""Masks that hide what each site adds to a sum, and cancel in the total.

Any two participants of a session share a key that nobody else has, and draw the same stream of random numbers from it; the earlier one in
the roster adds them to what it sends, the later one subtracts them. What one site sends is then uniform for whoever does not know all its
keys, and the masks of all sites sum to zero.

Keys live in memory only, for one session: a node that restarts cannot continue it, so that no stream is ever used twice, whatever is
restored from whatever backup. How the context of a key is written as bytes is the caller's; it must be one to one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from p2pfl.errors import BadMessage
from p2pfl.privacy.fixed_point import Limbs, added, subtracted

KEY_BYTES = 32
_NONCE_AND_COUNTER = bytes(16)
"""All zero: a key makes one array."""

_WORD_BYTES = 8
_BLOCK_BYTES = 64 * 1024
_ZEROS = memoryview(bytes(_BLOCK_BYTES))


class SessionSecret:
    """A node's own part of the keys of one session, made anew for each and kept in memory only."""

    def __init__(self) -> None:
        self._private: X25519PrivateKey | None = X25519PrivateKey.generate()  # from the operating system
        self.public = self._private.public_key().public_bytes_raw()
        """Public key for the other participants, 32 bytes."""

    def pair_key(self, public: bytes, *, transcript: bytes, context: bytes) -> bytes:
        """The key that this node shares with one other participant, 32 bytes.

        Args:
            public: what the other one has told, 32 bytes.
            transcript: SHA-256 of what all participants have told, in the roster's order.
            context: names the pair, the same at both ends.

        Raises:
            BadMessage: the other one's bytes make no secret, whatever this node's are ("bad_key").
            ValueError: the session is over.
        """
        if self._private is None:
            raise ValueError("the session is over: its secret is erased")
        try:
            secret = self._private.exchange(X25519PublicKey.from_public_bytes(public))  # refuses a secret that is all zero
        except (ValueError, InvalidKey) as error:
            raise BadMessage("a participant's key makes no secret", reason="bad_key") from error
        return HKDF(SHA256(), KEY_BYTES, salt=transcript, info=context).derive(secret)

    def erase(self) -> None:
        """Forget the secret: the session is over."""
        self._private = None


class SessionMasks:
    """Masks of one node in one session, each made once.

    Args:
        me: this node's place in the roster.
        pair_keys: by the place of each other participant, the key that this node shares with it.
    """

    def __init__(self, me: int, pair_keys: Mapping[int, bytes]) -> None:
        if me in pair_keys:
            raise ValueError(f"participant {me} shares no key with itself")
        self._me, self._pair_keys = me, dict(pair_keys)
        self._position = -1
        self._used: set[bytes] = set()

    def mask(self, position: int, shape: tuple[int, ...], context: bytes) -> Limbs:
        """The mask of one sum of the session, uniform for whoever does not have all pair keys.

        Args:
            position: of the sum in the session; it only grows.
            shape: of the sum's array with its limbs, (..., L).
            context: names the sum, its position and its shape, the same at all participants.

        Raises:
            ValueError: the mask of this or of a later position has been made, or the session is over. A stream that is used twice tells the
                difference of what it hides.
        """
        if not self._pair_keys:
            raise ValueError("the session is over, or has no other participant: nothing would be hidden")
        if position <= self._position or context in self._used:
            raise ValueError(f"the mask of position {position} comes after that of position {self._position}, and each is made once")
        self._position = position
        self._used.add(context)
        total: Limbs = np.zeros(shape, dtype=np.uint64)
        streams = [(self._me < other, _stream(pair_key, context)) for other, pair_key in sorted(self._pair_keys.items())]
        words, buffer = total.reshape(-1, shape[-1]), bytearray(_BLOCK_BYTES)
        num_rows = _BLOCK_BYTES // (_WORD_BYTES * shape[-1])
        for start in range(0, len(words), num_rows):  # block by block, so that all streams of one are added in the processor's cache
            block = words[start : start + num_rows]
            for is_added, encryptor in streams:
                encryptor.update_into(_ZEROS[: block.nbytes], buffer)
                drawn = np.frombuffer(buffer, dtype="<u8", count=block.size).reshape(block.shape)
                block[...] = added(block, drawn) if is_added else subtracted(block, drawn)
        return total

    def erase(self) -> None:
        """Forget all keys: the session is over."""
        self._pair_keys.clear()


def _stream(pair_key: bytes, context: bytes) -> CipherContext:
    """The stream of one sum that both ends of a pair draw."""
    return Cipher(ChaCha20(HKDFExpand(SHA256(), KEY_BYTES, info=context).derive(pair_key), _NONCE_AND_COUNTER), mode=None).encryptor()


def uniform_words(key: bytes, shape: tuple[int, ...]) -> Limbs:
    """Draw uniform words of 64 bits from a key of 32 bytes that is used once."""
    encryptor = Cipher(ChaCha20(key, _NONCE_AND_COUNTER), mode=None).encryptor()
    zeros = bytes(8 * int(np.prod(shape)))
    return np.frombuffer(encryptor.update(zeros), dtype="<u8").astype(np.uint64).reshape(shape)
