"""Text from other people's files and machines, safe to print: what steers a terminal is shown as an escape and does nothing."""

from __future__ import annotations

import re
from typing import Final

_STEERS = "\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f"
"""Control characters of both sets, marks and overrides of direction, separators of lines, and what has no width."""

_UNSAFE: Final = re.compile(f"[{_STEERS}]")
_UNSAFE_OR_BREAK: Final = re.compile(f"[\t\n{_STEERS}]")


def visible(text: str) -> str:
    r"""The text with everything that steers a terminal as an escape, such as \u001b; line ends and tabs stay.

    The escapes are those of JSON.
    """
    return _UNSAFE.sub(_escape, text)


def on_one_line(text: str) -> str:
    r"""The text as `visible` gives it, on one line: a line end becomes \u000a."""
    return _UNSAFE_OR_BREAK.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"  # noqa: PLR2004
