"""Loss on this process's own connections, as the kernel has noticed it."""

from __future__ import annotations

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


def repeated_fraction(addresses: Collection[str]) -> float | None:
    """Fraction of the segments to some addresses, tcp://host:port, that had to be sent again; None where the system does not say."""
    ports = {int(address.rpartition(":")[2]) for address in addresses}
    seen: dict[int, tuple[int, int]] = {}
    try:
        descriptors = [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]
    except OSError:
        return None
    for descriptor in descriptors:
        with suppress(OSError, ValueError), socket.socket(fileno=os.dup(descriptor)) as twin:
            if (
                twin.type != socket.SOCK_STREAM
                or twin.family not in (socket.AF_INET, socket.AF_INET6)
                or twin.getpeername()[1] not in ports
            ):
                continue
            told = twin.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            if len(told) == _TCP_INFO_BYTES:
                inode = os.fstat(descriptor).st_ino
                seen[inode] = (_NUMBER.unpack_from(told, _RETRANSMITTED_AT)[0], _NUMBER.unpack_from(told, _DATA_SEGMENTS_AT)[0])
    sent = sum(segments for _, segments in seen.values())
    return sum(again for again, _ in seen.values()) / sent if sent else None
