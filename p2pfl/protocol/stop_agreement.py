"""Agreement to stop at the same round as all others: counters, stop rounds that this node believes, and the messages that tell of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from p2pfl.algorithms.stopping import StopRule
from p2pfl.errors import PeerError
from p2pfl.protocol.edges import Edges
from p2pfl.protocol.neighbour import Neighbour, Others
from p2pfl.runs.events import EventKind
from p2pfl.wire.messages import Closing, Heartbeat, Hello, StopNews

_MORE_KEPT = 16
"""Consensus counters that are kept beyond those that a stop round needs."""


class StopAgreement:
    """One node's part in agreeing to stop; *rule* and *earliest* are those of `Protocol`."""

    def __init__(self, edges: Edges, others: Others, *, rule: StopRule | None = None, earliest: int | None = None) -> None:
        self._edges, self._others, self._rule, self._earliest = edges, others, rule, earliest
        self.stop_round: int | None = None
        self.consensus_counter = 0
        """The one of the last round that is over."""
        self._counters: dict[int, int] = {}
        """By round, of the last rounds."""
        self._said: dict[str, int] = {}
        """By neighbour, the stop round that it last spoke of, while this node cannot tell whether it holds."""
        self._converged: set[str] = set()
        """Neighbours whose last word was that they have stopped because all agree."""

    def news(self, consensus_counter: int | None = None) -> StopNews:
        """News of stopping for a neighbour."""
        return StopNews(agreed_for=self.consensus_counter if consensus_counter is None else consensus_counter, stop_round=self.stop_round)

    def hello(self, neighbour: Neighbour) -> Hello:
        """Make the first message of a handshake."""
        ledger, edges = neighbour.ledger, self._edges
        return neighbour.session.hello(
            exchange=edges.exchange, report=ledger.report(), stop=self.news(), anew=edges.anew, remembered=ledger.remembered()
        )

    def where_it_is(self, neighbour: Neighbour) -> Heartbeat | Closing:
        """Say where this node is, while it runs and after it has stopped."""
        report, stop, closing = neighbour.ledger.report(), self.news(), self._edges.closing
        if closing is None:
            return Heartbeat(exchange=self._edges.exchange, report=report, stop=stop)
        return Closing(exchange=self._edges.exchange, report=report, stop=stop, reason=closing)

    def check(self, stop_round: int | None) -> None:
        """Raise PeerError "implausible_stop" for news of a stop before the network can have agreed."""
        if stop_round is not None and (self._earliest is None or stop_round < self._earliest):
            earliest = "this network stops at its cap" if self._earliest is None else f"not before {self._earliest}"
            raise PeerError(f"a stop after round {stop_round}: {earliest}", reason="implausible_stop")

    def hear(self, neighbour: Neighbour, stop_round: int | None, closing: str) -> None:
        """Take up what a neighbour says of stopping; *closing*: why it has stopped, empty while it runs."""
        self._converged.discard(neighbour.name)
        if closing == "converged":
            self._converged.add(neighbour.name)
        self._hear_stop(neighbour, stop_round)

    def agree(self, number: int, consensus_counter: int, stop_round: int | None) -> None:
        """Take up this node's own counter and stop round of a round; stop rounds that could not be told to hold are looked at again."""
        self.consensus_counter = self._counters[number] = consensus_counter
        if self._rule is not None:
            oldest = number - 4 * self._rule.diameter - self._rule.patience - _MORE_KEPT
            self._counters = {of: counter for of, counter in self._counters.items() if of >= oldest}
        for neighbour in self._edges.neighbours.values():
            self._hear_stop(neighbour, self._said.get(neighbour.name))
        if stop_round not in (None, self.stop_round):
            self._edges.on_event(EventKind.AGREED, f"to stop after round {stop_round}")
            self.stop_round = stop_round

    def interrupt(self) -> None:
        """Count anew after a jump."""
        self.consensus_counter = 0

    def _hear_stop(self, neighbour: Neighbour, stop_round: int | None) -> None:
        """Believe a stop round where this node's own tests have passed as they must have if it is true."""
        self._said.pop(neighbour.name, None)
        if stop_round is None or (self.stop_round is not None and stop_round >= self.stop_round):
            return
        holds = None if self._rule is None else self._rule.admits(stop_round, self._counters)
        if holds is None and self._rule is not None:
            was_away = max(self._counters, default=-1) > stop_round - 3 * self._rule.diameter
            holds = True if (was_away and self.consensus_counter) or self._others.have_stopped(self._converged) else None
        if holds or self._rule is None:
            self.stop_round = stop_round
        elif holds is None:
            self._said[neighbour.name] = stop_round
        else:
            detail = f"a stop after round {stop_round}: this node's own test did not pass when it must have"
            self._edges.count(neighbour, PeerError(detail, reason="implausible_stop"))

    def snapshot(self) -> dict[str, Any]:
        """Metadata for a checkpoint."""
        agreements = [[number, counter] for number, counter in self._counters.items()]
        return {"agreed_for": self.consensus_counter, "stop_round": self.stop_round, "agreements": agreements}

    def restore(self, metadata: Mapping[str, Any]) -> None:
        """Take up what `snapshot` gave; an earlier version did not write `agreements`."""
        self.consensus_counter, self.stop_round = metadata["agreed_for"], metadata["stop_round"]
        self._counters = dict(map(tuple, metadata.get("agreements", [])))
