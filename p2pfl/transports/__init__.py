"""Moving frames between members: in memory, or over ZeroMQ with CURVE."""

from __future__ import annotations

from p2pfl.transports.base import MAX_FRAME_BYTES, UNREADABLE, Endpoint, LinkCondition, LinkState, Received, Transport, TransportFactory
from p2pfl.transports.broker import Broker
from p2pfl.transports.by_kind import LinksByKind
from p2pfl.transports.memory import MemoryNetwork, join_process
from p2pfl.transports.mqtt import join_broker
from p2pfl.transports.ports import ReservedPort, reserve_port
from p2pfl.transports.proxies import Proxy, ProxyWay
from p2pfl.transports.relay import join_relays
from p2pfl.transports.relay_service import RELAYED, RELAYING, RelayService
from p2pfl.transports.zeromq import ZeroMQTransport

TRANSPORTS: dict[str, TransportFactory] = {
    "zeromq": ZeroMQTransport,
    "relay": join_relays,
    "mqtt": join_broker,
    "memory": join_process,
}
"""By name, what makes a member's end of its links of one kind; both ends of a link must use the same."""

__all__ = [
    "MAX_FRAME_BYTES",
    "RELAYED",
    "RELAYING",
    "TRANSPORTS",
    "UNREADABLE",
    "Broker",
    "Endpoint",
    "LinkCondition",
    "LinkState",
    "LinksByKind",
    "MemoryNetwork",
    "Proxy",
    "ProxyWay",
    "Received",
    "RelayService",
    "ReservedPort",
    "Transport",
    "ZeroMQTransport",
    "reserve_port",
]
