"""Numbers and lines of text files that other programs wrote: one rule for both."""

from __future__ import annotations

import re

_MOST_LINE_SHOWN = 60
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]*,[0-9]+")


def number(text: str) -> float:
    """A finite number as tables write it, spaces around it allowed.

    Raises:
        ValueError: it is no finite decimal number. Python's float also takes 1_000, nan and infinity.
    """
    text = text.strip(" \t")
    if _NUMBER.fullmatch(text) and abs(value := float(text)) != float("inf"):
        return value
    if _DECIMAL_COMMA.fullmatch(text):
        raise ValueError("expected a number with a decimal point, not a comma")
    raise ValueError("expected a number")


def quoted(line: str) -> str:
    """A line of a file for a message, cut where it is long."""
    line = line.strip("\r\n")
    return repr(line if len(line) <= _MOST_LINE_SHOWN else line[: _MOST_LINE_SHOWN - 1] + "…")
