"""Rules of decentralised learning, each a pure function of tensors."""

from __future__ import annotations

from collections.abc import Callable

from p2pfl.algorithms.base import Algorithm, Channel, Context, Inbox, SlotInbox, State, flow
from p2pfl.algorithms.gossip import DPSGD, AllReduce

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {"dpsgd": DPSGD, "allreduce": AllReduce}

__all__ = ["ALGORITHMS", "DPSGD", "Algorithm", "AllReduce", "Channel", "Context", "Inbox", "SlotInbox", "State", "flow"]
