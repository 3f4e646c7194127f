"""Rules for names and addresses of members, and for names of tasks: a name becomes part of a file's name, is printed, or leads to code."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator

RULE = "1 to 64 of A-Z a-z 0-9 . _ -, not starting with '.'"
"""The rule for members, for messages."""

TASK_RULE = "distribution:entry or module:function"
"""The rule for tasks that are not built in, for messages."""

DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")  # as package indexes allow
_ENTRY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
NEW_RULE = "1 to 64 of A-Z a-z 0-9 . _ -, not starting with '.' or '-'"
"""The rule for new members, for messages. A command takes what starts with '-' for an option."""

_MAX_PORT = 65535
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")  # all of a member's name


def is_task_name(text: str) -> bool:
    """Whether a text has the form distribution:entry or module:function; dotted attributes and relative modules have not."""
    home, colon, entry = text.partition(":")
    if not colon or not (_ENTRY.fullmatch(entry) or entry.isidentifier()):
        return False
    return DISTRIBUTION.fullmatch(home) is not None or all(part.isidentifier() for part in home.split("."))


def checked_task_name(text: str) -> str:
    """Return a name that may stand in a list of allowed tasks; ValueError for any other text."""
    if not is_task_name(text):
        raise ValueError(f"expected {TASK_RULE}")
    return text


def is_new_name(text: str) -> bool:
    """Whether a text may be the name of a new member; older studies may hold other names."""
    return NAME.fullmatch(text) is not None and not text.startswith("-")


def checked_name(text: str) -> str:
    """Return a member's name that holds to `RULE`; ValueError for any other text."""
    if not NAME.fullmatch(text):
        raise ValueError(f"expected {RULE}")
    return text


Name = Annotated[str, AfterValidator(checked_name)]
"""A member's name in a file that people write."""


def split_address(address: str) -> tuple[str, int]:
    """Split tcp://host:port into host and port; ValueError for anything else. An IPv6 host stands in brackets and keeps them."""
    match = re.fullmatch(r"tcp://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9._\-]*):([0-9]{1,5})", address)
    if not match or not 1 <= int(match[2]) <= _MAX_PORT:
        raise ValueError("expected tcp://host:port, the host as the others reach it, the port from 1 to 65535")
    host = match[1]
    try:
        unspecified = ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        unspecified = False  # a DNS name
    if unspecified:
        raise ValueError("nobody can dial this: expected the host as the others reach it")
    return host, int(match[2])


def is_loopback(address: str) -> bool:
    """Whether an address stands for the machine of whoever dials it."""
    host = split_address(address)[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "ip6-localhost") or host.endswith(".localhost")  # RFC 6761
