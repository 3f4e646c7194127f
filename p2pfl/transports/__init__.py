"""Moving frames between members: in memory, or over ZeroMQ with CURVE."""

from __future__ import annotations

from p2pfl.transports.base import MAX_FRAME_BYTES, UNREADABLE, Endpoint, LinkCondition, LinkState, Received, Transport, TransportFactory
from p2pfl.transports.memory import MemoryNetwork, join_process
from p2pfl.transports.ports import ReservedPort, reserve_port
from p2pfl.transports.zeromq import ZeroMQTransport

TRANSPORTS: dict[str, TransportFactory] = {"zeromq": ZeroMQTransport, "memory": join_process}
"""By name, what makes a member's end of its links; a study's members must all use the same."""

__all__ = [
    "MAX_FRAME_BYTES",
    "TRANSPORTS",
    "UNREADABLE",
    "Endpoint",
    "LinkCondition",
    "LinkState",
    "MemoryNetwork",
    "Received",
    "ReservedPort",
    "Transport",
    "ZeroMQTransport",
    "reserve_port",
]
