"""Messages in which a node says of itself where it is: Hello, Heartbeat and Closing."""

from __future__ import annotations

from dataclasses import dataclass

from p2pfl.protocol.edges import Edges
from p2pfl.protocol.neighbour import Neighbour
from p2pfl.protocol.stop_agreement import StopAgreement
from p2pfl.wire.messages import Closing, Heartbeat, Hello


@dataclass(frozen=True, slots=True)
class Announcer:
    """The news of one node for each neighbour: exchange, report and stop round as they are now."""

    edges: Edges
    stopping: StopAgreement

    def hello(self, neighbour: Neighbour) -> Hello:
        """Make the first message of a handshake."""
        ledger, edges = neighbour.ledger, self.edges
        return neighbour.session.hello(
            exchange=edges.exchange, report=ledger.report(), stop=self.stopping.news(), anew=edges.anew, remembered=ledger.remembered()
        )

    def heartbeat(self, neighbour: Neighbour) -> Heartbeat:
        """Say where a running node is."""
        return Heartbeat(exchange=self.edges.exchange, report=neighbour.ledger.report(), stop=self.stopping.news())

    def closing(self, neighbour: Neighbour) -> Closing:
        """Say where a stopped node is."""
        assert self.edges.closing is not None
        report, stop = neighbour.ledger.report(), self.stopping.news()
        return Closing(exchange=self.edges.exchange, report=report, stop=stop, reason=self.edges.closing)

    def where_it_is(self, neighbour: Neighbour) -> Heartbeat | Closing:
        """Say where this node is."""
        return self.heartbeat(neighbour) if self.edges.closing is None else self.closing(neighbour)
