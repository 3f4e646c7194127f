"""Moving frames between members: in memory, or over ZeroMQ with CURVE."""

from __future__ import annotations

from p2pfl.transports.base import MAX_FRAME_BYTES, MAX_QUEUED, UNREADABLE, Endpoint, LinkCondition, LinkState, Received, Transport
from p2pfl.transports.memory import MemoryNetwork, MemoryTransport
from p2pfl.transports.ports import ReservedPort, reserve_port
from p2pfl.transports.zeromq import ZeroMQTransport

__all__ = [
    "MAX_FRAME_BYTES",
    "MAX_QUEUED",
    "UNREADABLE",
    "Endpoint",
    "LinkCondition",
    "LinkState",
    "MemoryNetwork",
    "MemoryTransport",
    "Received",
    "ReservedPort",
    "Transport",
    "ZeroMQTransport",
    "reserve_port",
]
