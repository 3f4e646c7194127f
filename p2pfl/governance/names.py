"""What members, sites, nodes and tasks may be called: a name becomes part of a file's name, is printed, or leads to code."""

from __future__ import annotations

import re

RULE = "1 to 64 of A-Z a-z 0-9 . _ -, not starting with '.'"
"""In words, for messages."""

TASK_RULE = "distribution:entry or module:function"
"""In words: how a task that is not built in is named."""

DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")  # as package indexes allow
_ENTRY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
NEW_RULE = "1 to 64 of A-Z a-z 0-9 . _ -, not starting with '.' or '-'"
"""In words: the rule for new members. A command takes what starts with '-' for an option."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


def is_name(text: str) -> bool:
    """Whether a member may be called so."""
    return _NAME.fullmatch(text) is not None


def is_task_name(text: str) -> bool:
    """Whether a text has the form distribution:entry or module:function; dotted attributes and relative modules have not."""
    home, colon, entry = text.partition(":")
    if not colon or not (_ENTRY.fullmatch(entry) or entry.isidentifier()):
        return False
    return DISTRIBUTION.fullmatch(home) is not None or all(part.isidentifier() for part in home.split("."))


def checked_task_name(text: str) -> str:
    """A name that may stand in a list of allowed tasks.

    Raises:
        ValueError: it has another form.
    """
    if not is_task_name(text):
        raise ValueError(f"expected {TASK_RULE}")
    return text


def is_new_name(text: str) -> bool:
    """Whether a new member may be called so; older studies may hold other names."""
    return is_name(text) and not text.startswith("-")
