"""The encoding of what people compare: one value has one canonical form, one digest and one way to be read out."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_Z85 = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_B85 = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
_DIGEST_DIGITS = 64


def z85_encode(raw: bytes) -> str:
    """Encode a key in ZeroMQ's text form (RFC 32): base 85 as in the standard library but with other letters."""
    return base64.b85encode(raw).translate(bytes.maketrans(_B85, _Z85)).decode("ascii")


def z85_decode(text: str) -> bytes:
    """Decode a key from ZeroMQ's text form; ValueError for a text that is none."""
    letters = text.encode("ascii")  # raises UnicodeEncodeError, which is a ValueError
    if set(letters) - set(_Z85) or len(letters) % 5:
        raise ValueError("not Z85")
    return base64.b85decode(letters.translate(bytes.maketrans(_Z85, _B85)))


def canonical(value: Any) -> bytes:
    """Encode a value as JSON with sorted keys and no spaces, floats as repr: one value, one encoding."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def grouped(digest: str) -> str:
    """Write 64 hex digits as 16 groups of 4, for reading out."""
    return " ".join(digest[start : start + 4] for start in range(0, len(digest), 4))


def plain_digest(text: str) -> str:
    """Turn a digest as people write it (groups, dashes, capitals) into 64 hex digits; ValueError if it is none."""
    digits = re.sub(r"[\s\-]", "", text).lower()
    if not re.fullmatch(rf"[0-9a-f]{{{_DIGEST_DIGITS}}}", digits):
        raise ValueError(f"expected {_DIGEST_DIGITS} hex digits, in groups or not")
    return digits


def unencodable(value: object, key: str) -> Iterator[str]:
    """Find values without one encoding: neither null, true, false, finite number, text, list nor mapping with text keys."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if isinstance(name, str):
                yield from unencodable(inner, f"{key}.{name}")
            else:
                yield f"{key}: the key {name!r} is not a text"
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from unencodable(inner, f"{key}.{index}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield f"{key} = {value!r}: expected a finite number"
    elif value is not None and not isinstance(value, (bool, int, str)):
        yield f"{key} = {value!r}: expected a number, a text, true, false, null, a list or a mapping"
