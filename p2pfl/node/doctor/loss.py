"""Loss on this process's own connections, as the kernel has noticed it."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

_TCP_INFO_BYTES = 160
_RETRANSMITTED_AT, _DATA_SEGMENTS_AT = 100, 156
"""Places of tcpi_total_retrans and tcpi_data_segs_out in Linux's struct tcp_info."""
_NUMBER = struct.Struct("=I")


Place = tuple[str, int]
"""A numeric host and a port."""


def repeated_fraction(places: Collection[Place]) -> float | None:
    """Fraction of the segments to one neighbour, which is at some of these places, that had to be sent again; None: it is not known.

    A connection is told from others by both: neighbours often have the same port.
    """
    wanted = {(ipaddress.ip_address(host), port) for host, port in places}
    seen: dict[int, tuple[int, int]] = {}
    try:
        descriptors = [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]
    except OSError:
        return None
    for descriptor in descriptors:
        with suppress(OSError, ValueError), socket.socket(fileno=os.dup(descriptor)) as twin:
            if twin.type != socket.SOCK_STREAM or twin.family not in (socket.AF_INET, socket.AF_INET6) or _remote(twin) not in wanted:
                continue
            told = twin.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            if len(told) == _TCP_INFO_BYTES:
                inode = os.fstat(descriptor).st_ino
                seen[inode] = (_NUMBER.unpack_from(told, _RETRANSMITTED_AT)[0], _NUMBER.unpack_from(told, _DATA_SEGMENTS_AT)[0])
    sent = sum(segments for _, segments in seen.values())
    return sum(again for again, _ in seen.values()) / sent if sent else None


def _remote(connection: socket.socket) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    host, port = connection.getpeername()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])  # without the interface of a local one
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address, port
