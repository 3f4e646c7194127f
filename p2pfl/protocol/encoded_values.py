"""Values of encoded channels: what each neighbour's updates have led to here, and what this node's own have led to there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from p2pfl.errors import BadMessage
from p2pfl.protocol.edges import Edges
from p2pfl.protocol.neighbour import Neighbour
from p2pfl.protocol.transfers import Transfers
from p2pfl.runs.events import EventKind
from p2pfl.wire.messages import NOTHING_SAID
from p2pfl.wire.update import ReceivedUpdate


class EncodedValues:
    """Values and their state digests on both sides of a node's edges; an update counts where it continues the values that are here."""

    def __init__(self, edges: Edges, transfers: Transfers) -> None:
        self._edges, self._transfers = edges, transfers
        self.own: dict[int, bytes] = {}
        """State digest of this node's own values, by phase."""
        self.values: dict[str, dict[str, Any]] = {name: {} for name in edges.neighbours}
        """By neighbour and channel, as far as its updates have led here; zeros where there is none."""
        self.digests: dict[str, dict[int, bytes]] = {name: {} for name in edges.neighbours}
        """State digest of these values, by neighbour and phase."""
        self.resynchronised = 0
        """How often a neighbour's full update came, because something before it is not here."""

    def continues(self, neighbour: Neighbour, received: ReceivedUpdate) -> bool:
        """Whether the values are here that an update continues; if not they are asked for."""
        held = self.digests[neighbour.name].get(received.exchange % self._edges.phases, NOTHING_SAID)
        if received.state_digests is None or received.state_digests[0] in (None, held):
            return True
        neighbour.note_return()
        self._transfers.ask_for_full(neighbour, received.exchange)
        return False

    def hold(self, name: str, received: ReceivedUpdate, values: Mapping[str, Any] | BadMessage) -> None:
        """Keep what a neighbour's update leads to, or refuse it, so that its next one will not continue what is here."""
        if isinstance(values, BadMessage):
            self._edges.refuse(self._edges.neighbours[name], values)
        elif received.state_digests is not None:
            self.values[name].update(values)
            after, self.digests[name][received.exchange % self._edges.phases] = received.state_digests
            if after is None:
                self.resynchronised += 1
                self._edges.on_event(EventKind.RESYNCHRONISED, f"{name} at exchange {received.exchange}", name)

    def advance(self) -> None:
        """Take up what was sent in this exchange into this node's own values: its next update continues it."""
        sent = self._transfers.sent.get(self._edges.exchange)
        if sent is not None and sent.state_digest is not None:
            self.own[self._edges.exchange % self._edges.phases] = sent.state_digest

    def forget(self, name: str) -> None:
        """Drop the values of a neighbour that has begun without its state."""
        self.values[name].clear()
        self.digests[name].clear()

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Metadata and tensors for a checkpoint."""
        tensors = {f"value/{name}/{channel}": value for name, values in self.values.items() for channel, value in values.items()}
        return {"marks": _in_hex(self.own), "held": {name: _in_hex(digests) for name, digests in self.digests.items()}}, tensors

    def restore(self, metadata: Mapping[str, Any], tree: Mapping[str, Any]) -> None:
        """Take up what `snapshot` gave."""
        self.own = _from_hex(metadata["marks"])
        for name in self.values:
            self.values[name], self.digests[name] = dict(tree.get("value", {}).get(name, {})), _from_hex(metadata["held"][name])


def _in_hex(digests: Mapping[int, bytes]) -> dict[str, str]:
    return {str(phase): digest.hex() for phase, digest in digests.items()}


def _from_hex(digests: Mapping[str, str]) -> dict[int, bytes]:
    return {int(phase): bytes.fromhex(digest) for phase, digest in digests.items()}
