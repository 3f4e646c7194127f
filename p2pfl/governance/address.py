"""Network addresses of members, as cards name them: tcp://host:port."""

from __future__ import annotations

import ipaddress
import re

_MAX_PORT = 65535


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
        return host in ("localhost", "ip6-localhost")
