"""One node's protocol: what a message means to each of its parts, and what is due to be said; without input or output.

The loops around it (the daemon) hand in frames and the time, and send what lies in the neighbours' outboxes. It is owned by one event loop.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from p2pfl.algorithms.stopping import StopRule
from p2pfl.errors import BadMessage, PeerError
from p2pfl.paces import PACES, Pace
from p2pfl.paces.pairwise import Pairwise
from p2pfl.protocol.agreed_start import StartAgreement
from p2pfl.protocol.arrivals import Arrivals
from p2pfl.protocol.claims import Claims
from p2pfl.protocol.deadlines import Deadlines
from p2pfl.protocol.edges import HANDSHAKE_REFUSALS, DueMerge, Edges, Flow, Held
from p2pfl.protocol.neighbour import Neighbour, Others, SendNew
from p2pfl.protocol.pairwise_exchanges import PairwiseExchanges
from p2pfl.protocol.probes import Probes, hear_question
from p2pfl.protocol.push_sum import PushSumConversation
from p2pfl.protocol.state_check import STATE_LOST, StateCheck
from p2pfl.protocol.stop_agreement import StopAgreement
from p2pfl.protocol.transfers import RESEND_AFTER_S, EncodedValues, Transfers
from p2pfl.runs.events import EventKind
from p2pfl.wire.codec import Frame, encode
from p2pfl.wire.link import ReceivedMessage
from p2pfl.wire.messages import (
    Busy,
    Chunk,
    Closing,
    DoctorAnswer,
    DoctorQuestion,
    Goodbye,
    Heartbeat,
    Hello,
    News,
    ProofRequest,
    PushSum,
    Ready,
    Records,
    ResendRequest,
    Sent,
    Update,
)
from p2pfl.wire.update import EncodedUpdate, FullUpdate, ReceivedUpdate

HELLO_EVERY_S = 0.5
TELL_AGAIN_S = 5.0
"""How often a neighbour that greets anew is told of everybody again, at most."""

RETURN_REACH = 4
"""A neighbour that was missed is waited for again once it is no more than so many exchanges behind: it cannot aim better where rounds are
short."""


class Protocol:
    """One node's side of all its edges.

    Args:
        num_exchanges: as many as the run can have at most: nobody can be further.
        others: the members beside this one; None: its neighbours are all.
        stop_rule: by which the network agrees to stop; None: it does not, or this node cannot tell whether a stop round holds.
        earliest_stop: the first round after which the network can have agreed to stop; None: it stops at its cap.
        push_sum: its part in a sum over all nodes, where these are too many to hear of each.
        probes: the facts that it tells neighbours' doctors; None: it answers none.
    """

    def __init__(
        self,
        edges: Edges,
        deadlines: Deadlines,
        *,
        num_exchanges: int,
        pace: str = "synchronous",
        max_age: int = 0,
        others: Others | None = None,
        stop_rule: StopRule | None = None,
        earliest_stop: int | None = None,
        push_sum: PushSumConversation | None = None,
        start: StartAgreement | None = None,
        probes: Probes | None = None,
    ) -> None:
        self._probes = probes
        self.edges, self.deadlines, self.neighbours = edges, deadlines, edges.neighbours
        self.pace: Pace = PACES[pace].of(edges, deadlines, max_age=max_age)
        others = others if others is not None else Others(edges.neighbours)
        self.view, self._push_sum, self._start, self._num_exchanges = others.view, push_sum, start, num_exchanges
        self.stopping = StopAgreement(edges, others, rule=stop_rule, earliest=earliest_stop)
        self.arrivals = Arrivals()
        self.transfers = Transfers(edges, self.pace, self.stopping)
        self.values = EncodedValues(edges, self.transfers)
        self.states = StateCheck(edges, self.stopping, forget=self.values.forget, counts_edges=self.pace.counts_edges)
        self.claims = Claims(edges, deadlines, others, self.transfers, in_step=self.pace.in_step)
        self._next_hello_s = float("-inf")
        self._closing_answered_s = dict.fromkeys(edges.neighbours, float("-inf"))
        """By neighbour, when this node last told it, after its closing words, what it has done itself."""
        self._told_again_s = dict.fromkeys(edges.neighbours, float("-inf"))
        """By neighbour, when it was last told of everybody again."""

    def pairwise_exchanges(self) -> PairwiseExchanges:
        """Exchanges over one edge alone, at the pairwise pace."""
        assert isinstance(self.pace, Pairwise)
        return PairwiseExchanges(self.edges, self.pace, self.deadlines, self.transfers)

    # ---- messages that come in

    def hear(self, peer: str, frames: tuple[Frame, ...], now_s: float) -> bool:
        """Take one message from the link that the key of `peer` authenticated. Whatever is wrong with it is counted, never raised.

        Returns:
            False where an update has only grown by a chunk, or nothing was taken: there is nothing to decide and nothing to send.
        """
        neighbour, edges = self.neighbours[peer], self.edges
        self.deadlines.note_time(now_s)
        if not neighbour.allowance.admits(sum(memoryview(frame).nbytes for frame in frames), now_s):
            return False
        heard = self._read(neighbour, frames, now_s)
        if heard is None:
            return True
        neighbour.note_seen(now_s)
        message = heard.message
        if isinstance(message, Hello) and not self.states.passes(neighbour, message):
            return True
        if heard.dropped is not None:
            edges.refused[heard.dropped] += 1
            if isinstance(message, Update) and edges.exchange - edges.ahead <= message.exchange < edges.exchange:
                self.deadlines.note_late(neighbour, now_s)
        elif isinstance(message, Chunk) and heard.received is None and edges.closing is None:
            return False
        if isinstance(message, News):
            self._hear_news(neighbour, message, now_s)
        self._take_in(neighbour, heard, now_s)
        if heard.dropped in ("out_of_order", "stray_chunk") and isinstance(message, Chunk):
            self.transfers.ask_for_lost(neighbour, message.exchange, now_s, full=False)
        if heard.received is not None:
            self.deadlines.note_update(now_s)
            self._hear_update(neighbour, heard.received, now_s)
        return True

    def _read(self, neighbour: Neighbour, frames: tuple[Frame, ...], now_s: float) -> ReceivedMessage | None:
        """A message that is in order, with what it says of the start and of others taken up; None: it is done with, or refused."""
        try:
            heard = neighbour.session.receive(frames, exchange=self.pace.expected_from(neighbour.name))
            message = heard.message
            if isinstance(message, DoctorQuestion | DoctorAnswer):
                if not hear_question(self._probes, neighbour, message, now_s):
                    self.edges.refused["too_many_probes"] += 1
                return None
            if isinstance(message, News):
                self.stopping.check(message.stop.stop_round)
            if self._push_sum is not None and isinstance(message, PushSum):
                self._push_sum.hear(neighbour.name, message)
            if isinstance(message, Records):
                self._hear_records(neighbour.name, message, now_s)
            if self._start is not None and isinstance(message, Ready):
                self._start.hear(neighbour.name, message, now_s)
                self._say_ready(now_s)
        except PeerError as error:
            self.edges.refuse(neighbour, error)
            neighbour.allowance.refused(error.reason, now_s)
            return None
        return heard

    def _hear_records(self, peer: str, message: Records, now_s: float) -> None:
        if self.view is None:
            return
        known = self.view.furthest()
        self.view.hear(peer, message.sealed, now_s, furthest=self.claims.furthest_round())
        if self.view.furthest() != known:  # or three that want proof would answer each other without end
            self.claims.pass_on(peer, now_s)
        if self.edges.closing is not None:  # no round will take it further
            self._pass_on_records(now_s)

    def _hear_news(self, neighbour: Neighbour, message: News, now_s: float) -> None:
        before, edges, in_step = neighbour.heard_exchange, self.edges, self.pace.in_step
        is_there = not in_step or message.exchange <= self._num_exchanges
        if is_there:
            neighbour.note_exchange(max(before, message.exchange))
        is_believed = is_there and self.claims.is_plausible(neighbour)
        if not is_believed:  # what it says of the edge and of stopping may be true all the same
            neighbour.note_exchange(before)
            detail = f"exchange {message.exchange} while this node is at {edges.exchange}"
            edges.count(neighbour, PeerError(detail, reason="implausible_exchange"))
        self.claims.look_at(neighbour, now_s)
        if isinstance(message, Heartbeat) and message.exchange < edges.exchange and edges.exchange in self.transfers.sent:
            self.deadlines.note_behind(neighbour.name, now_s)
        edges.hear(neighbour, message.report)
        if in_step:
            self.transfers.forget_sent()
        if self.pace.counts_edges and (edges.closing is not None or isinstance(message, Closing)):
            through = message.report.closed_through  # what only the neighbour has closed will not be met any more
            if through > neighbour.ledger.closed_through:
                edges.close(neighbour, through)
        self.stopping.hear(neighbour, message.stop.stop_round, message.reason if isinstance(message, Closing) else "")
        in_reach = is_believed and (not in_step or message.exchange >= edges.exchange - max(edges.ahead, RETURN_REACH))
        if neighbour.missed and not neighbour.is_faulty and in_reach:
            neighbour.note_return()
            edges.on_event(EventKind.CAME_BACK, f"{neighbour.name} is back at exchange {message.exchange}", neighbour.name)

    def _take_in(self, neighbour: Neighbour, heard: ReceivedMessage, now_s: float) -> None:
        """Do what a message asks of this node, beside what it brings."""
        match heard.message:
            case ProofRequest() as message:
                self.claims.answer(neighbour, message, now_s)
            case Hello() as message:
                self._hear_hello(neighbour, message, heard, now_s)
            case ResendRequest() as message:
                self.transfers.answer(neighbour, message, now_s)
            case Sent() as message:
                self.transfers.hear_sent(neighbour, message, now_s)
            case Goodbye() as message:
                self._hear_goodbye(neighbour, message)
            case Busy() as message if self.edges.closing is None:
                self.pace.note_busy(neighbour.name, message.exchange)
            case Closing():
                self._hear_closing(neighbour, now_s)
            case Update() | Chunk() | Heartbeat() if self.edges.closing is not None:
                neighbour.queue(self.stopping.where_it_is(neighbour))

    def _hear_closing(self, neighbour: Neighbour, now_s: float) -> None:
        """Tell a neighbour that merges nothing more, over one edge alone, what this node has done, for which it waits."""
        if not self.pace.counts_edges or self.edges.closing is not None:
            return
        neighbour.note_closing()
        if now_s - self._closing_answered_s[neighbour.name] >= RESEND_AFTER_S:  # without a pause both would do nothing else
            self._closing_answered_s[neighbour.name] = now_s
            neighbour.queue(self.stopping.where_it_is(neighbour))

    def _hear_hello(self, neighbour: Neighbour, message: Hello, heard: ReceivedMessage, now_s: float) -> None:
        if heard.needs_answer:
            neighbour.queue(self.stopping.hello(neighbour))
        greeted = f"{neighbour.name} at exchange {message.exchange}"
        was_paused = neighbour.is_paused and neighbour.session.is_open
        is_another = neighbour.note_handshake(message.incarnation)
        if was_paused:  # always: otherwise the events would call it paused for ever
            self.edges.on_event(EventKind.HANDSHAKE, greeted, neighbour.name)
        if not is_another:
            return
        if self._start is not None:
            self._start.say_again(neighbour.name)
        if not self.transfers.begin_again(neighbour, now_s):
            return
        neighbour.count_handshake()
        if not was_paused:
            self.edges.on_event(EventKind.HANDSHAKE, greeted, neighbour.name)
        if self.view is not None and now_s - self._told_again_s[neighbour.name] >= TELL_AGAIN_S:
            self._told_again_s[neighbour.name] = now_s
            self.view.say_again(neighbour.name, now_s)
        self.transfers.send_again(neighbour, message.exchange)

    def _hear_goodbye(self, neighbour: Neighbour, message: Goodbye) -> None:
        refused, on_event = self.edges.refused, self.edges.on_event
        if message.reason in ("finished", "pausing"):
            for_good = message.reason == "finished"
            neighbour.note_leaving(for_good=for_good)
            on_event(EventKind.LEFT, f"{neighbour.name} {'has finished' if for_good else 'is pausing'}", neighbour.name)
        elif message.reason == STATE_LOST:  # the Hello before it, or the next one, says what is remembered
            refused[f"refused_by_neighbour_{STATE_LOST}"] += 1
        else:
            refused[f"refused_by_neighbour_{message.reason if message.reason in HANDSHAKE_REFUSALS else 'otherwise'}"] += 1
            neighbour.note_refusal(neighbour.refusal or f"it refuses this node: {message.reason}")
            on_event(EventKind.REFUSED, f"{neighbour.name} does not talk to this node: {message.reason}", neighbour.name)

    def _hear_update(self, neighbour: Neighbour, received: ReceivedUpdate, now_s: float) -> None:
        neighbour.note_return(is_sound=True)
        if self.pace.in_step:  # else nobody asks, and numbers of single edges are never past
            self.arrivals.note_came(neighbour.name, received.exchange, now_s)
        if self.edges.closing is not None:
            return  # a stopped node merges nothing more and has left its last exchange behind
        is_due = received.exchange == self.edges.exchange and not self.pace.counts_edges  # what is early is looked at in its exchange
        if is_due and not self.values.continues(neighbour, received.exchange, received.state_digests):
            return
        if self.pace.receive(neighbour.name, received.exchange):
            neighbour.session.keep(received)
        self.transfers.release(neighbour.name)

    # ---- rounds

    def start_with(self, company: Collection[str], now_s: float) -> None:
        """Begin in the company of some members, this node perhaps among them: nobody can be further than it, whatever they say."""
        if self.edges.me in company and not self.edges.anew:
            self.claims.note_company(self.edges.exchange, now_s)
        for name, neighbour in self.neighbours.items():
            if name not in company and not neighbour.session.is_open:
                neighbour.note_missed()
            else:
                neighbour.note_return()

    def begin(self, exchange: int, now_s: float) -> None:
        """Be at an exchange from now on, with what has come early for it."""
        self.deadlines.begin(now_s)
        self.edges.enter(exchange)
        self.pace.begin(exchange)
        self.transfers.release(*self.neighbours)
        self.arrivals.begin(exchange)
        for neighbour in self.neighbours.values():
            neighbour.allowance.earn()
        if not self.pace.in_step:
            return
        self.transfers.forget_sent()
        early = self.pace.chosen()
        for name in self.edges.neighbourhood.weights:
            neighbour = self.neighbours[name]
            neighbour.begin_waiting(now_s)
            is_here = name in early or neighbour.is_flowing(exchange, now_s, self.deadlines.may_rest_s(neighbour))
            if name in early and not self.values.continues(neighbour, exchange, neighbour.session.kept(exchange).state_digests):
                self.transfers.drop(name)
            if neighbour.session.is_open and neighbour.heard_exchange >= exchange and not is_here:
                self.transfers.ask(neighbour, exchange)  # it came too early to be kept

    def send(
        self,
        updates: Mapping[str, EncodedUpdate],
        now_s: float,
        *,
        full: Mapping[str, FullUpdate] | None = None,
        state_digest: bytes | None = None,
    ) -> None:
        """Send this exchange's updates, by receiver, and wait for those of the neighbours until the deadline."""
        self.deadlines.start_waiting(now_s)
        self.arrivals.note_sent(now_s)
        for neighbour in self.neighbours.values():
            neighbour.begin_waiting(now_s)
        self.transfers.send(updates, full or {}, state_digest)

    def due(self, now_s: float, channels: Collection[str]) -> DueMerge | None:
        """Hand out what this exchange merges into some channels, once it waits no longer; None: it waits."""
        if not self.pace.is_over(now_s):
            return None
        came, admitted, unmatched = self.came(), self.admitted(), self.edges.take_compensations(channels)
        self.transfers.release(*self.neighbours)  # what has become too old
        values = {name: dict(self.values.values[name]) for name in came}  # a neighbour may begin anew during the merge
        return DueMerge(neighbourhood=self.edges.neighbourhood, came=came, admitted=admitted, values=values, compensations=unmatched)

    def came(self) -> dict[str, ReceivedUpdate]:
        """Updates that are here for this merge, also those that may not be merged, in the roster's order."""
        chosen, neighbours = self.pace.chosen(), self.neighbours
        return {name: neighbours[name].session.kept(chosen[name].number) for name in self.edges.neighbourhood.weights if name in chosen}

    def admitted(self) -> dict[str, Held]:
        """Updates that this exchange may merge, in the roster's order."""
        both, exchange, chosen, came = self.edges.neighbourhood.both, self.edges.exchange, self.pace.chosen(), self.came()
        names = [name for name in came if name not in both or self.neighbours[name].ledger.admits(exchange)]
        return {name: Held(update=came[name], age=chosen[name].age) for name in names}

    def hold(self, name: str, received: ReceivedUpdate, values: Mapping[str, Any] | BadMessage) -> None:
        """Keep what a neighbour's update leads to, or refuse it, so that its next one will not continue what is here."""
        self.values.hold(name, received, values)

    def close(self, merged: Mapping[str, Flow], now_s: float) -> list[str]:
        """End this exchange, in which the flows of the neighbours in `merged` were taken in. Returns who was skipped."""
        skipped, edges = [], self.edges
        mixing_row, refusing = edges.neighbourhood, edges.refusing()
        for name, neighbour in self.neighbours.items():
            if name in mixing_row.weights and name not in merged:
                skipped.append(name)
                if not neighbour.missed and name not in refusing:
                    self.deadlines.note_miss(neighbour, now_s)
                if not neighbour.missed:
                    edges.on_event(EventKind.SKIPPED, f"{name} did not come to exchange {edges.exchange}", name)
                if name not in refusing:  # else it is there, further on
                    neighbour.note_missed()
            # what goes one way only has no other side to match it
            edges.close(neighbour, edges.exchange, merged[name] if name in merged and name in mixing_row.both else None)
        self.deadlines.close(merged.keys(), skipped, now_s)
        if merged:
            self.claims.note_company(edges.exchange + 1, now_s)
        return skipped

    def jump(self, exchange: int, now_s: float, left_out: str = "") -> None:
        """Leave out the exchanges before this one, which took place without this node; *left_out* names their rounds in the record."""
        edges = self.edges
        senders = edges.neighbourhoods(exchange // edges.phases).weights
        for name, neighbour in self.neighbours.items():
            edges.close(neighbour, exchange - 1)
            if neighbour.session.is_open and neighbour.heard_exchange >= exchange and name in senders:
                self.transfers.ask(neighbour, exchange)  # it came too early to be kept, and nobody waits long for one who is late
            if neighbour.heard_exchange < exchange - edges.ahead:
                neighbour.note_missed()  # who has fallen silent and is waited for once more makes this node late for the others again
        edges.on_event(EventKind.JUMPED, left_out or f"from exchange {edges.exchange} to {exchange}")
        self.deadlines.jump(exchange)
        self.claims.note_jump(exchange, now_s)
        self.stopping.interrupt()

    def stop(self, reason: str, exchange: int) -> None:
        """Merge nothing more: this node has left its last exchange behind, or gives it up."""
        self.edges.stop(reason)
        if self.pace.in_step and exchange in self.transfers.sent:
            self.edges.give_up(exchange)
        self.edges.enter(exchange)

    def unacknowledged(self) -> list[str]:
        """Neighbours that are still there with which something is open."""
        return self.edges.unacknowledged() if self.pace.balances else []

    def is_spreading(self) -> bool:
        """Whether records of the end are still to come or to go, and there is somebody left for that."""
        nearby = {neighbour.name for neighbour in self.neighbours.values() if neighbour.session.is_open and not neighbour.left}
        return self.view is not None and bool(nearby) and not self.view.is_told_of_the_end(nearby)

    # ---- messages that go out

    def tick(self, now_s: float) -> None:
        """Put into the outboxes what is due: Hellos, questions, closing words."""
        self.deadlines.note_time(now_s)
        self.claims.look(now_s)
        if now_s >= self._next_hello_s:
            self._next_hello_s = now_s + HELLO_EVERY_S
            for neighbour in self.neighbours.values():
                ledger = neighbour.ledger
                if not neighbour.session.is_open:
                    neighbour.queue(self.stopping.hello(neighbour))
                elif self.edges.closing is not None or (
                    self.pace.counts_edges and not (ledger.is_acknowledged and ledger.neighbour_is_acknowledged)
                ):
                    neighbour.queue(self.stopping.where_it_is(neighbour))
        self.transfers.ask_again(now_s)
        self._pass_on_records(now_s)
        self._say_ready(now_s)

    def spread(self, now_s: float) -> None:
        """Say what is new of the network at the end of a round: it goes out with the next round's updates."""
        for neighbour in self.neighbours.values():
            if not neighbour.session.is_open:
                continue
            neighbour.queue(SendNew.RECORDS)
            if self._push_sum is not None and self.view is not None and self.edges.closing is None:
                part = self._push_sum.message_for(neighbour.name)
                if self.view.spend(sum(memoryview(frame).nbytes for frame in encode(part)), now_s):
                    neighbour.queue(part)  # what is not said now is in what is said next

    def _say_ready(self, now_s: float) -> None:
        """Say what is new of the start, or was said and has no receipt."""
        for neighbour in self.neighbours.values():
            if self._start is not None and neighbour.session.is_open and self._start.is_due(neighbour.name, now_s):
                neighbour.queue(SendNew.READY)

    def _pass_on_records(self, now_s: float) -> None:
        """Pass on what is new of the network and has waited long enough."""
        for neighbour in self.neighbours.values():
            if self.view is not None and neighbour.session.is_open and self.view.is_due(neighbour.name, now_s):
                neighbour.queue(SendNew.RECORDS)
