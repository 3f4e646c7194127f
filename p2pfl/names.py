"""What a member, a site and a node may be called: the name becomes part of a file's name and is printed."""

from __future__ import annotations

import re

RULE = "1 to 64 of A-Z a-z 0-9 . _ -, not starting with '.'"
"""In words, for messages."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


def is_name(text: str) -> bool:
    """Whether a member may be called so."""
    return _NAME.fullmatch(text) is not None
