"""Exchanges over one edge alone: one node asks, the other one answers, and either takes in the flow or gives it up."""

from __future__ import annotations

from collections.abc import Sequence

from p2pfl.paces.pairwise import Pairwise, Request
from p2pfl.protocol.deadlines import Deadlines
from p2pfl.protocol.edges import Edges, Flow
from p2pfl.protocol.neighbour import Neighbour
from p2pfl.protocol.transfers import Transfers
from p2pfl.runs.events import EventKind
from p2pfl.wire.messages import Busy
from p2pfl.wire.update import EncodedUpdate, ReceivedUpdate


class PairwiseExchanges:
    """The exchanges of one node at a pairwise pace."""

    def __init__(self, edges: Edges, pace: Pairwise, deadlines: Deadlines, transfers: Transfers) -> None:
        self._edges, self.pace, self._deadlines, self._transfers = edges, pace, deadlines, transfers

    def partner(self, *, seed: int, row: int, round: int) -> Neighbour | None:
        """Choose whom to ask in a round; None: nobody is there."""
        names = list(self._edges.neighbours)
        chosen = self.pace.partner(names, seed=seed, row=row, round=round, is_there=self._is_there)
        return None if chosen is None else self._edges.neighbours[chosen]

    def ask(self, update: EncodedUpdate, now_s: float) -> float:
        """Send this node's own request; returns until when its answer is waited for."""
        assert self.pace.asked is not None
        name, _ = self.pace.asked
        self._transfers.send_over_edge(name, update)
        self._deadlines.start_asking(now_s)
        self._edges.neighbours[name].begin_waiting(now_s)
        return now_s + self._deadlines.patience_with(name)

    def next_request(self) -> tuple[str, ReceivedUpdate] | None:
        """Take the next neighbour whose request is to be answered at once, with its update; None: there is none."""
        request = self.pace.next()
        taken = self._take([] if request is None else [request])
        return taken[0] if taken else None

    def answer(self) -> ReceivedUpdate | None:
        """Return the answer to this node's own request, where it has come and is no refusal."""
        answers = [self._edges.neighbours[name].session.kept(each.number) for name, each in self.pace.chosen().items()]
        return answers[0] if answers else None

    def conclude(self) -> list[tuple[str, ReceivedUpdate]]:
        """End this node's own request; returns neighbours whose requests have waited for that, with their updates."""
        return self._take(self.pace.conclude())

    def _take(self, requests: Sequence[Request]) -> list[tuple[str, ReceivedUpdate]]:
        """Hand out the updates of some requests; from now on they are not kept here, nor is what the pace has passed over."""
        neighbours = self._edges.neighbours
        taken = [(request.peer, neighbours[request.peer].session.kept(request.number)) for request in requests]
        self._transfers.release(*neighbours)
        return taken

    def decline(self, peer: str, number: int) -> None:
        """Turn a neighbour away: neither of both merges this exchange."""
        self.give_up(peer, number)
        self._edges.neighbours[peer].queue(Busy(exchange=number))

    def merged(self, name: str, flow: Flow, now_s: float, *, answer: EncodedUpdate | None = None) -> None:
        """End an exchange that has been merged; *answer*: to a neighbour's request, None where this node has asked itself."""
        if answer is not None:
            self._transfers.send_over_edge(name, answer)
        if self.pace.asked == (name, flow.exchange):
            self._deadlines.note_answered(name, now_s)
        self._edges.close(self._edges.neighbours[name], flow.exchange, flow)

    def give_up(self, name: str, number: int, *, missed: bool = False) -> None:
        """End an exchange, and all before it that never came, without a merge here; *missed*: the neighbour has not answered in time."""
        neighbour = self._edges.neighbours[name]
        if missed and not neighbour.missed:
            neighbour.note_missed()
            self._deadlines.note_miss(neighbour, self._deadlines.clock_s)
            self._edges.on_event(EventKind.SKIPPED, f"{name} did not answer", name)
        if number > self._edges.closed_through(name):  # it may have left in the meantime
            self._edges.close(neighbour, number)

    def _is_there(self, name: str) -> bool:
        neighbour = self._edges.neighbours[name]
        is_there = neighbour.session.is_open and not (neighbour.left or neighbour.closing or neighbour.missed)
        return is_there and self._deadlines.patience_with(name) > 0
