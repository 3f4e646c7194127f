"""Everything that a node decides about its edges, without input or output: what to believe, to send, to wait for, to take back.

The loops around it (the daemon) hand in frames and the time, and send what lies in the neighbours' outboxes. It is owned by one event loop.
"""

from __future__ import annotations

import typing
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from p2pfl.algorithms.stopping import StopRule
from p2pfl.errors import BadMessage, PeerError
from p2pfl.protocol.asynchronous import Asynchronous
from p2pfl.protocol.barrier import ExchangeBarrier
from p2pfl.protocol.ledger import SavedLedger, goes_back
from p2pfl.protocol.neighbour import HELD_AFTER, LEAST_BYTES_PER_S, RESEND_AFTER_S, Neighbour, SendReady, SendRecords, SendUpdate
from p2pfl.protocol.push_sum import PushSumConversation
from p2pfl.protocol.round_pace import CEILING_S, RoundPace
from p2pfl.protocol.start_agreement import StartAgreement
from p2pfl.protocol.view import NetworkView
from p2pfl.runs.events import EventKind
from p2pfl.topology.links import Links
from p2pfl.wire.codec import Frame, encode
from p2pfl.wire.link import ReceivedMessage
from p2pfl.wire.messages import (
    NOTHING_REMEMBERED,
    NOTHING_SAID,
    Busy,
    Chunk,
    Closing,
    Goodbye,
    Heartbeat,
    Hello,
    News,
    ProofRequest,
    PushSum,
    Ready,
    Records,
    Remembered,
    ResendRequest,
    Sent,
    StopNews,
    Update,
)
from p2pfl.wire.update import EncodedUpdate, ReceivedUpdate, Whole

HELLO_EVERY_S = 0.5
TELL_AGAIN_S = 5.0
"""How often a neighbour that greets anew is told of everybody again, at most."""

_FAULTY_UPDATE = frozenset({"wrong_size", "wrong_format", "wrong_digest", "not_finite", "wrong_report", "too_large"})

_GOODBYES = frozenset({"wrong_name", "wrong_study", "wrong_layout", "wrong_start"})

WITHOUT_ITS_STATE = "it was started anew without its state"

STATE_LOST = "state_lost"
"""Two neighbours do not talk, because one of them knows less of itself than the other one remembers."""

STALL_S = 5.0
"""An update that is coming in is not asked for as long as no pause between two chunks is longer."""

PATIENCE_FACTOR = 2.0
"""An update of which a part is here is waited for, past the deadline, until for so many times the deadline's floor no more has come.
It is for links that carry a chunk of 1 MiB in a minute, and for one that was cut in the middle of an update."""

PLAUSIBLE_SPEED = 8.0
"""Where no records of the others are heard, a neighbour is believed to be at most so many times as fast as this node's rounds."""

LITTLE_PATIENCE = 1 / 16
"""With less than this part of the usual patience a neighbour is waited for rarely, for a round's usual time."""

IN_SYNC = 2
"""Whose update came to one of so many exchanges before this one is with the others."""

LATER_THAN_USUAL = 2.0
"""Such a neighbour may be so many times as late as updates usually are."""

RETURN_REACH = 4
"""A neighbour that was missed is waited for again once it is no more than so many exchanges behind: it cannot aim better where rounds are
short."""

_NO_NEIGHBOUR = 2
"""Links between this node and a member that is no neighbour, at least."""

PROOF_EVERY_S = 0.5
"""How often a neighbour is asked for proof, at most."""

PROOF_AFTER_S = 0.2
"""A neighbour that asks for proof more often than this gets one answer."""

PROOF_FOR_S = 2.0
"""For so long a neighbour that asked for proof is told what others answer."""

_MORE_KEPT = 16
"""Consensus counters that are kept beyond those that a stop round needs."""

HALF = 0.5
"""How far two that meet go towards each other."""


class OnEvent(typing.Protocol):
    """Takes the kind of an event, a sentence about it, and the neighbour that it is about, if it is about one."""

    def __call__(self, kind: str, detail: str, about: str = "") -> None:
        """Take one event; *about* is the neighbour's name."""


@dataclass(frozen=True, slots=True)
class Flow:
    """What a merge over one edge took in, kept until it is known whether the neighbour matched it."""

    exchange: int
    amounts: Mapping[str, Any]
    """By channel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SentUpdates:
    """What this node has sent in one exchange, for neighbours that ask again."""

    updates: Mapping[str, EncodedUpdate]
    """By receiver."""
    agreed_for: int
    """The h that went with them."""
    wholes: Mapping[str, Whole] = field(default_factory=dict)
    """By receiver, where the updates continue what was sent before."""
    mark: bytes | None = None
    """Of the values that they lead to."""

    def metadata(self) -> dict[str, Any]:
        """For a checkpoint, beside the numbers themselves."""
        marks = next((encoded.marks for encoded in self.updates.values()), None)
        return {"agreed_for": self.agreed_for, "marks": marks and [mark and mark.hex() for mark in marks]}


@dataclass(kw_only=True, slots=True)
class Protocol:
    """One node's side of all its edges."""

    me: str
    neighbours: dict[str, Neighbour]
    """By name, in the roster's order: everybody whom this node ever exchanges with."""

    links: Callable[[int], Links]
    """Whom it exchanges with in a round."""

    phases: int = 1
    """Exchanges in a round."""

    ahead: int = 1
    """So many exchanges are kept for a neighbour that is behind, and from one that is ahead."""

    num_exchanges: int
    """As many as the run can have at most: nobody can be further."""

    pace: RoundPace
    on_event: OnEvent
    earliest_stop: int | None = None
    """The first round after which the network can have agreed to stop; None: it does not agree, it stops at its cap."""

    exchange: int = 0
    """Where this node is."""

    train_exchanges: int = 0
    """Exchanges of the training rounds: those after them take next to no time."""

    start_by_s: float = float("-inf")
    """Until then the first exchanges wait for every neighbour that is alive: it may still hear of the start, or wait for who does."""

    starting_exchanges: int = 1
    """So many exchanges after the start everybody has gone through one, as far as news need from end to end of the graph."""

    start: StartAgreement | None = None
    """Its part in agreeing to start."""

    num_others: int = 0
    """Members beside this one; 0: its neighbours are all."""

    places: Mapping[str, int] = field(default_factory=dict)
    """Places in the roster, by name; without them a neighbour's word and its records count as those of two members."""

    steps_to: Mapping[int, int] = field(default_factory=dict)
    """Links between this node and each member, by place in the roster; a member that is not in it is no neighbour."""

    prove: Callable[[], bytes | None] = lambda: None
    """This node's own signed record of its last round; None: there is none."""

    waits_for_others: Callable[[str, int], bool] = lambda _name, _round: False
    """Whether a third member has signed that a neighbour may be waiting for somebody in a round."""

    stop_rule: StopRule | None = None
    """By which the network agrees to stop; None: it does not, or this node cannot tell whether a stop round holds."""

    agreements: dict[int, int] = field(default_factory=dict)
    """The consensus counter by round, of the last rounds."""

    stop_round: int | None = None
    agreed_for: int = 0
    """h of the last round that is over."""

    closing: str | None = None
    """Why this node has stopped; None while it runs."""

    anew: int = 0
    """When this node was last started anew without its state, in milliseconds since 1970; 0: never."""

    lost: dict[str, str] = field(default_factory=dict)
    """Neighbours that remember more of this node than it knows itself, with what they remember: its state went back."""

    refused: Counter[str] = field(default_factory=Counter)
    flows: dict[tuple[str, int], Flow] = field(default_factory=dict)
    """Merged, and not yet known to be matched."""

    taken_back: list[tuple[Neighbour, Flow]] = field(default_factory=list)
    """Not matched: their negatives go into the next merge."""

    sent: dict[int, SentUpdates] = field(default_factory=dict)
    """By exchange, this one and the last ones."""

    marks: dict[int, bytes] = field(default_factory=dict)
    """Of the values that this node's own encoded channels have, by phase."""

    resynchronised: int = 0
    """How often a neighbour's values came whole, because something before them is not here."""

    newest: Asynchronous[ReceivedUpdate] | None = None
    """Where nodes go on with their neighbours' newest models: what this one holds of them."""

    meetings: deque[tuple[str, int, ReceivedUpdate | None]] | None = None
    """Where nodes meet in pairs: neighbour, number over its edge and what came, None for a refusal, in the order of arrival;
    of each neighbour at most one of either."""

    asked: tuple[str, int] | None = None
    """The neighbour, and the number over its edge, whose answer this node waits for."""

    view: NetworkView | None = None
    """What this node hears of the whole network, and passes on; None: it takes no part in that."""

    push_sum: PushSumConversation | None = None
    """Its part in a sum over all nodes, where these are too many to hear of each."""

    barrier: ExchangeBarrier | None = None
    _next_hello_s: float = float("-inf")
    _in_step: tuple[int, float] = (0, 0.0)
    """The exchange, and when, at which this node last began in company."""
    _was_in_step: bool = False
    """Whether it ever was in company."""
    _began_s: float = 0.0
    _clock_s: float = float("nan")
    """The newest time that this node knows of."""
    _stood_still: bool = False
    """Whether this process has stood still since it sent its last update: nobody else is to blame for what did not come."""
    _away_exchanges: float = 0.0
    """How many exchanges the others can have made while this process stood still or did not run."""
    _untrained_before: int = 0
    """Exchanges before this one are of a round that was jumped to: they take less time than others."""
    _posted_s: float = 0.0
    _waits_s: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    """From this node's own update to the last one of the others, of exchanges to which everybody came."""
    _own_s: float = 0.0
    """How long this node took to send its last update."""
    _last_came_s: float = float("-inf")
    """When the last update of this exchange was complete."""
    _recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=20))

    # ---- what comes in

    def hear(self, peer: str, frames: tuple[Frame, ...], now_s: float) -> bool:
        """Take one message from the link that the key of `peer` authenticated. Whatever is wrong with it is counted, never raised.

        Returns:
            False where an update has only grown by a chunk, or nothing was taken: there is nothing to decide and nothing to send.
        """
        neighbour = self.neighbours[peer]
        self._note_time(now_s)
        if not neighbour.allowance.admits(sum(memoryview(frame).nbytes for frame in frames), now_s):
            return False
        heard = self._read(neighbour, frames, now_s)
        if heard is None:
            return True
        neighbour.last_seen_s = now_s
        neighbour.note_progress(now_s)
        message = heard.message
        if isinstance(message, Hello) and not self._has_its_state(neighbour, message):
            return True
        if heard.dropped is not None:
            self.refused[heard.dropped] += 1
            if (
                isinstance(message, Update)
                and self.exchange - self.ahead <= message.exchange < self.exchange
                and neighbour.missed
                and not neighbour.is_faulty
                and neighbour.misses <= 1
            ):
                self.pace.record(now_s - self._began_s)  # a deadline too short for a neighbour must find that out
        elif isinstance(message, Chunk) and heard.received is None and self.closing is None:
            return False
        if isinstance(message, News):
            self._news(neighbour, message, now_s)
        self._take_in(neighbour, heard, now_s)
        if heard.dropped in ("out_of_order", "stray_chunk") and isinstance(message, Chunk):
            self._ask_for_lost(neighbour, message.exchange, whole=False)
        if heard.received is not None:
            self._last_came_s = now_s
            self._arrived(neighbour, heard.received)
        return True

    def _read(self, neighbour: Neighbour, frames: tuple[Frame, ...], now_s: float) -> ReceivedMessage | None:
        """A message that is in order, with what it says of the start and of others taken up; None: it was refused and counted."""
        try:
            heard = neighbour.session.receive(frames, exchange=self._expected_from(neighbour.name))
            self._check(heard.message)
            self._hear_records(neighbour.name, heard.message, now_s)
            if self.start is not None and isinstance(heard.message, Ready):
                self.start.hear(neighbour.name, heard.message, now_s)
                self._say_ready(now_s)
        except PeerError as error:
            self._refuse(neighbour, error)
            neighbour.allowance.refused(error.reason, now_s)
            return None
        return heard

    def exclusion(self, peer: str, now_s: float) -> tuple[float, str] | None:
        """How long a neighbour is to be disconnected from now on, because it sends too much, and why; None: not at all."""
        neighbour = self.neighbours[peer]
        found = neighbour.allowance.exclusion(now_s)
        if found is not None:
            neighbour.missed = neighbour.is_faulty = True  # nobody waits for it until it sends an update
            for_s, why = found
            self.on_event(EventKind.EXCLUDED, f"{peer} is disconnected for {for_s:g} s: it sends {why}", peer)
        return found

    def _hear_records(self, peer: str, message: object, now_s: float) -> None:
        if self.push_sum is not None and isinstance(message, PushSum):
            self.push_sum.hear(peer, message)
        if self.view is None or not isinstance(message, Records):
            return
        self.view.hear(peer, message.sealed, now_s, furthest=self._furthest_round())
        for asker in self.neighbours.values():
            if asker.name != peer and now_s < asker.wants_proof_until_s:
                self._give_proof(asker)
        if self.closing is not None:  # no round will take it further
            self._pass_on(now_s)

    def _furthest_round(self) -> int | None:
        """A round that no member can have passed: nodes in step are apart by no more than there are links between them."""
        if not self.in_step or self.view is None:
            return None
        heard = max((neighbour.heard_exchange for neighbour in self.neighbours.values()), default=0)
        exchange = max(self.exchange, self._as_believed(heard), 0)
        return exchange // self.phases + self.view.news_rounds * self.ahead

    def is_spreading(self) -> bool:
        """Whether records of the end are still to come or to go, and there is somebody left for that."""
        nearby = [neighbour for neighbour in self.neighbours.values() if neighbour.session.is_open and not neighbour.left]
        return self.view is not None and bool(nearby) and not self.view.is_settled({neighbour.name for neighbour in nearby})

    def _take_in(self, neighbour: Neighbour, heard: ReceivedMessage, now_s: float) -> None:
        """What a message asks of this node, beside what it brings."""
        message = heard.message
        if isinstance(message, ProofRequest):
            self._asked_for_proof(neighbour, message, now_s)
        elif isinstance(message, Hello):
            self._greeted(neighbour, message, heard, now_s)
        elif isinstance(message, ResendRequest):
            self._answer(neighbour, message, now_s)
        elif isinstance(message, Sent):
            self._sent_all(neighbour, message)
        elif isinstance(message, Goodbye):
            self._goodbye(neighbour, message)
        elif isinstance(message, Busy):
            if self.closing is None and self.asked == (neighbour.name, message.exchange):
                self._meet(neighbour.name, message.exchange, None)
        elif isinstance(message, Closing) and self.meetings is not None and self.closing is None:
            self._partner_closed(neighbour, now_s)
        elif self.closing is not None and not isinstance(message, Closing | Records | PushSum | Sent | Ready | ProofRequest):
            neighbour.queue(self.closing_message(neighbour))

    def _partner_closed(self, neighbour: Neighbour, now_s: float) -> None:
        """Tell a neighbour that meets nobody any more what this node has done, for which it waits."""
        neighbour.closing = True
        if now_s - neighbour.closing_answered_s >= RESEND_AFTER_S:  # it answers an answer: without a pause both would do nothing else
            neighbour.closing_answered_s = now_s
            neighbour.queue(self._alive(neighbour))

    def _sent_all(self, neighbour: Neighbour, message: Sent) -> None:
        if not neighbour.session.has(message.exchange, whole=message.whole):
            neighbour.asked_from = None  # a repeated answer shows that the last request was lost
            self._ask_for_lost(neighbour, message.exchange, whole=message.whole)

    @property
    def in_step(self) -> bool:
        """Whether nodes go round by round, together."""
        return self.newest is None and self.meetings is None

    def _expected_from(self, peer: str) -> int:
        """The earliest exchange whose update is of use."""
        if self.meetings is not None:
            return self.neighbours[peer].ledger.closed_through + 1
        if self.newest is None:
            return self.exchange
        return self.newest.expected_from(peer)

    def _note_time(self, now_s: float) -> None:
        """Take up the time; a gap that is as long as a deadline shows that this process has stood still, or did not run."""
        gap_s = now_s - self._clock_s
        if gap_s >= self.pace.floor_s:
            self._stood_still = True
            self._away_exchanges += gap_s / (median(self._recent_s) if self._recent_s and median(self._recent_s) else self.allowance_s())
        self._clock_s = now_s

    # ---- where the others are

    def start_with(self, company: Collection[str], now_s: float) -> None:
        """The members in *company* start now; others are not waited for until they are there."""
        if self.me in company and not self.anew:
            self.start_in_company(now_s)
        for name, neighbour in self.neighbours.items():
            neighbour.missed = name not in company and not neighbour.session.is_open

    def wait_longer_at_start(self, now_s: float, within_s: float, grace_s: float) -> None:
        """Wait in the first exchanges for neighbours that are alive: news of the start may still be on their way to them."""
        self.start_by_s = now_s + min(within_s, grace_s + self.allowance_s())

    def start_in_company(self, now_s: float) -> None:
        """Everybody begins now: nobody can be further than this node, whatever they say."""
        self._in_step, self._was_in_step = (self.exchange, now_s), True

    def believed(self) -> float:
        """The furthest exchange to which this node lets itself be taken.

        A single member's word is not enough: a second one has to be there, by what it says itself over its own link or by its signed record
        of the round before. Where there is no second one, because all others are silent, the two have been alone, and then each waits for
        its deadline in each exchange, so the other one cannot be further than the time allows. No jump gives any of that time back.
        """
        is_pair = len(self.neighbours) <= 1 and self.num_others <= 1
        if not self._was_in_step and (self.view is None or is_pair):
            return float("inf")
        exchange, since_s = self._in_step
        now_s = self._clock_s
        if self.view is None:  # nothing signed can be heard
            usual_s = median(self._recent_s) if self._recent_s else self.allowance_s()
            by_time = exchange + PLAUSIBLE_SPEED * (now_s - since_s) / usual_s if usual_s else float("inf")
            return max(by_time, self._second_furthest())
        # how long this node itself trains tells how long others may be silent, also while it does
        is_training = self.exchange not in self.sent
        allowance_s = self._allowance_of(max(self._own_s, now_s - self._began_s) if is_training else self._own_s)
        num_others = max(self.num_others, len(self.neighbours))
        there = sum(n.session.is_open and n.was_seen(now_s, 2 * allowance_s) for n in self.neighbours.values())
        is_left_with_one = num_others == len(self.neighbours) and there <= 1
        by_time = exchange + (now_s - since_s) / allowance_s if is_left_with_one else 0.0  # both have been alone, or one was away
        return max(by_time, self.exchange + self._away_exchanges, self._second_furthest())

    def _second_furthest(self) -> int:
        """The exchange that two members have reached; one of them may lie about itself, and no more than one does.

        Each link lets the members at its ends be apart by as many exchanges as are kept. A member that is no further ahead than the links
        to it explain has not gone on without this node: what it has reached confirms nobody.
        """
        reached: dict[int | str, tuple[int, int]] = {}
        if self.view is not None:
            for place, rounds in self.view.furthest().items():
                reached[place] = rounds * self.phases, self.steps_to.get(place, _NO_NEIGHBOUR)
        for name, neighbour in self.neighbours.items():
            member = self.places.get(name, name)
            reached[member] = max(reached.get(member, (-1, 1))[0], neighbour.heard_exchange), 1
        gone_on = (exchange for exchange, steps in reached.values() if exchange > self.exchange + steps * self.ahead)
        return sorted([-1, -1, *gone_on])[-2]

    def _claims_too_much(self, neighbour: Neighbour) -> bool:
        """Whether a neighbour says that it is so far ahead that this node has to jump, and nobody confirms it."""
        return self.closing is None and neighbour.heard_exchange > max(
            self.exchange + self.ahead, self._as_believed(neighbour.heard_exchange)
        )

    def _as_believed(self, exchange: int) -> int:
        """An exchange that somebody has spoken of, or the furthest that is believed; what this node can make up for needs no proof."""
        return exchange if exchange <= self.exchange + self.ahead else int(min(exchange, self.believed()))

    def _look_at_claims(self, now_s: float) -> None:
        """Ask for proof of what is claimed, and say so where none comes."""
        if self.view is None or not self.in_step or self.closing is not None:
            return
        for neighbour in self.neighbours.values():
            if not neighbour.session.is_open or not self._claims_too_much(neighbour):
                neighbour.unconfirmed_s = None
                continue
            if neighbour.unconfirmed_s is None:
                neighbour.unconfirmed_s = now_s
            if now_s - neighbour.asked_proof_s >= PROOF_EVERY_S:
                for other in self.neighbours.values():  # whoever is there may know
                    if other.session.is_open and now_s - other.asked_proof_s >= PROOF_EVERY_S:
                        other.asked_proof_s = now_s
                        other.queue(ProofRequest(relayed=False))
            if now_s - neighbour.unconfirmed_s > self.allowance_s():
                neighbour.unconfirmed_s = now_s
                neighbour.hurried += 1
                if _is_power_of_two(neighbour.hurried):
                    where = f"it is at exchange {neighbour.heard_exchange} while this node is at {self.exchange}"
                    detail = f"{neighbour.name} says that {where}, and no other member confirms it{_times(neighbour.hurried)}"
                    self.on_event(EventKind.HURRIED, detail, neighbour.name)

    def _asked_for_proof(self, neighbour: Neighbour, message: ProofRequest, now_s: float) -> None:
        """Say where the furthest members are, and ask the other neighbours, which may be further by now."""
        if self.view is None or now_s - neighbour.gave_proof_s < PROOF_AFTER_S:
            return
        neighbour.gave_proof_s = now_s
        self._give_proof(neighbour)
        if message.relayed:
            return
        neighbour.wants_proof_until_s = now_s + PROOF_FOR_S
        for other in self.neighbours.values():
            if other is not neighbour and other.session.is_open and now_s - other.relayed_proof_s >= PROOF_AFTER_S:
                other.relayed_proof_s = now_s
                other.queue(ProofRequest(relayed=True))

    def _give_proof(self, neighbour: Neighbour) -> None:
        assert self.view is not None
        sealed = self.view.proof(self.prove(), without=self.places.get(neighbour.name))
        if sealed:
            neighbour.queue(Records(sealed=tuple(sealed)))

    def _check(self, message: object) -> None:
        """The network cannot have agreed to stop before its time."""
        if not isinstance(message, News):
            return
        stop_round = message.stop.stop_round
        if stop_round is not None and (self.earliest_stop is None or stop_round < self.earliest_stop):
            earliest = "this network stops at its cap" if self.earliest_stop is None else f"not before {self.earliest_stop}"
            raise PeerError(f"a stop after round {stop_round}: {earliest}", reason="implausible_stop")

    def _news(self, neighbour: Neighbour, message: News, now_s: float) -> None:
        before, is_there = neighbour.heard_exchange, not self.in_step or message.exchange <= self.num_exchanges
        if is_there:
            neighbour.heard_exchange = max(before, message.exchange)
        is_believed = is_there and not (self.in_step and self.view is None and self._claims_too_much(neighbour))
        if not is_believed:  # what it says of the edge and of stopping may be true all the same
            neighbour.heard_exchange = before
            detail = f"exchange {message.exchange} while this node is at {self.exchange}"
            self._count(neighbour, PeerError(detail, reason="implausible_exchange"))
        self._look_at_claims(now_s)
        if isinstance(message, Heartbeat) and message.exchange < self.exchange and self.exchange in self.sent:
            neighbour.behind_s = now_s
        self._take_back(neighbour, neighbour.ledger.hear(message.report))
        if self.in_step:
            self._forget_sent()
        if self.meetings is not None and (self.closing is not None or isinstance(message, Closing)):
            through = message.report.closed_through  # what only the neighbour has closed will not be met any more
            if through > neighbour.ledger.closed_through:
                self._take_back(neighbour, neighbour.ledger.close(through, merged=False))
        neighbour.has_converged = isinstance(message, Closing) and message.reason == "converged"
        self._hear_stop(neighbour, message.stop.stop_round)
        in_reach = is_believed and (not self.in_step or message.exchange >= self.exchange - max(self.ahead, RETURN_REACH))
        if neighbour.missed and not neighbour.is_faulty and in_reach:
            neighbour.missed = False
            self.on_event(EventKind.CAME_BACK, f"{neighbour.name} is back at exchange {message.exchange}", neighbour.name)

    # ---- agreeing to stop

    def agree(self, number: int, agreed_for: int) -> None:
        """Take up the consensus counter of a round, and look again at stop rounds that could not be told to hold before it."""
        self.agreed_for = self.agreements[number] = agreed_for
        if self.stop_rule is not None:
            oldest = number - 4 * self.stop_rule.diameter - self.stop_rule.patience - _MORE_KEPT
            self.agreements = {of: counter for of, counter in self.agreements.items() if of >= oldest}
        for neighbour in self.neighbours.values():
            self._hear_stop(neighbour, neighbour.stop_said)

    def announce_stop(self, number: int) -> None:
        """The network stops after a round: this node has found out first."""
        self.stop_round = number

    def _hear_stop(self, neighbour: Neighbour, stop_round: int | None) -> None:
        """Believe a stop round where this node's own tests have passed as they must have if it is true."""
        neighbour.stop_said = None
        if stop_round is None or (self.stop_round is not None and stop_round >= self.stop_round):
            return
        holds = None if self.stop_rule is None else self.stop_rule.admits(stop_round, self.agreements)
        if holds is None and self.stop_rule is not None:
            was_away = max(self.agreements, default=-1) > stop_round - 3 * self.stop_rule.diameter
            holds = True if (was_away and self.agreed_for) or self._others_have_stopped() else None
        if holds or self.stop_rule is None:
            self.stop_round = stop_round
        elif holds is None:
            neighbour.stop_said = stop_round
        else:
            detail = f"a stop after round {stop_round}: this node's own test did not pass when it must have"
            self._count(neighbour, PeerError(detail, reason="implausible_stop"))

    def _others_have_stopped(self) -> bool:
        """Whether two members say of themselves that they have stopped because all agree, or the only other one does."""
        stopped = [name for name, neighbour in self.neighbours.items() if neighbour.has_converged]
        signed = (
            0
            if self.view is None
            else self.view.num_closed([self.view.me, *(self.places[name] for name in stopped if name in self.places)])
        )
        return len(stopped) + signed >= min(2, max(self.num_others, len(self.neighbours)))

    def _has_its_state(self, neighbour: Neighbour, message: Hello) -> bool:
        """Whether both ends know of themselves what the other one remembers; if not they do not talk, and nothing is averaged."""
        ledger = neighbour.ledger
        here, there = Remembered(anew=self.anew, report=ledger.report()), Remembered(anew=message.anew, report=message.report)
        if goes_back(message.remembered, here):
            is_new = neighbour.name not in self.lost
            if is_new:
                then, now = self._as_of(message.remembered, here), self._as_of(here, message.remembered)
                self.lost[neighbour.name] = f"{neighbour.name} remembers it {then}, and it is {now}"
                remedy = "restore its newest state, or start it with --start-anew"
                self.on_event(
                    EventKind.STATE_LOST, f"{self.me}: its state went back: {self.lost[neighbour.name]}; {remedy}", neighbour.name
                )
            self._refuse_state(neighbour, is_new=is_new)
            return False
        if message.incarnation in neighbour.accepted:
            return True
        before = ledger.remembered()
        if there.anew <= before.anew and goes_back(before, there):
            is_new = neighbour.state_lost_of != message.incarnation
            if is_new:
                neighbour.state_lost_of = message.incarnation
                neighbour.state_lost = f"it was {self._as_of(before, there)}, and now is {self._as_of(there, before)}"
                remedy = "nothing of it is taken in until its state is restored, or it is started with --start-anew"
                self.on_event(
                    EventKind.STATE_LOST, f"{neighbour.name}: its state went back: {neighbour.state_lost}; {remedy}", neighbour.name
                )
            self._refuse_state(neighbour, is_new=is_new)
            return False
        neighbour.accepted.append(message.incarnation)
        if there.anew > before.anew:
            self._begin_anew(neighbour, before, there)
        elif neighbour.state_lost:
            self.on_event(EventKind.STATE_RESTORED, f"{neighbour.name}: its state is again that of {self._as_of(there)}", neighbour.name)
        neighbour.state_lost = ""
        return True

    def _begin_anew(self, neighbour: Neighbour, before: Remembered, now: Remembered) -> None:
        """The neighbour has begun without its state, as its administrator has agreed to: what it said before counts no more."""
        neighbour.ledger.begin_anew(now.anew)
        neighbour.session.forget_updates()
        neighbour.heard_exchange = -1
        neighbour.progress = None
        neighbour.marks.clear()
        neighbour.values.clear()
        if self.barrier is not None:
            self.barrier.forget(neighbour.name)
        if self.newest is not None:
            self.newest.forget(neighbour.name)
        if self.meetings is not None:
            kept = [meeting for meeting in self.meetings if meeting[0] != neighbour.name]
            self.meetings.clear()
            self.meetings.extend(kept)
        if before != NOTHING_REMEMBERED:
            states = f"it was {self._as_of(before)}, and now is {self._as_of(now)}"
            self.on_event(EventKind.STARTED_ANEW, f"{neighbour.name}: {WITHOUT_ITS_STATE}: {states}", neighbour.name)

    def _refuse_state(self, neighbour: Neighbour, *, is_new: bool) -> None:
        """Talk no more to the neighbour, but to say what is remembered of it: once now, and with every Hello."""
        self.refused[STATE_LOST] += 1
        neighbour.missed = True
        neighbour.session.refuse()
        if is_new:
            neighbour.queue(self.hello(neighbour))
            neighbour.queue(Goodbye(reason=STATE_LOST))

    def _as_of(self, state: Remembered, other: Remembered | None = None) -> str:
        """The place in the run that a node's state belongs to, in words; told apart from another one."""
        report = state.report
        if report.closed_through < 0:
            return "at the start"
        if self.meetings is not None:
            through = f"after meeting {report.closed_through} over this link"
        else:
            through = f"after round {report.closed_through // self.phases}"
            through += f" (phase {report.closed_through % self.phases})" if self.phases > 1 else ""
        if other is None or other.report.closed_through != report.closed_through:
            return through
        return f"{through} (settled {report.settled}, confirmed {report.confirmed}, started anew {state.anew})"

    def _greeted(self, neighbour: Neighbour, message: Hello, heard: ReceivedMessage, now_s: float) -> None:
        if heard.greet:
            neighbour.queue(self.hello(neighbour))
        was_paused = neighbour.is_paused and neighbour.session.is_open
        neighbour.left = neighbour.closing = neighbour.is_paused = False
        neighbour.refusal = ""
        if was_paused:  # always: otherwise the events would call it paused for ever
            self.on_event(EventKind.HANDSHAKE, f"{neighbour.name} at exchange {message.exchange}", neighbour.name)
        if neighbour.session.is_open and neighbour.incarnation != message.incarnation:
            neighbour.incarnation = message.incarnation
            neighbour.handed.clear()  # its memory of them has gone
            if self.start is not None:
                self.start.say_again(neighbour.name)
            if now_s - neighbour.last_resent_s < RESEND_AFTER_S:
                return  # it asks for what it lacks
            neighbour.last_resent_s = now_s
            neighbour.greetings += 1
            if not was_paused:
                self.on_event(EventKind.HANDSHAKE, f"{neighbour.name} at exchange {message.exchange}", neighbour.name)
            if self.view is not None and now_s - neighbour.told_again_s >= TELL_AGAIN_S:
                neighbour.told_again_s = now_s
                self.view.say_again(neighbour.name, now_s)
            for exchange in sorted(self.sent):
                in_reach = not self.in_step or exchange >= message.exchange
                if in_reach and neighbour.name in self.sent[exchange].updates:
                    neighbour.queue(SendUpdate(exchange=exchange, again=(exchange, False) in neighbour.sent_once))

    def _answer(self, neighbour: Neighbour, want: ResendRequest, now_s: float) -> None:
        posted = self.sent.get(want.exchange)
        if posted is not None and neighbour.name in posted.updates:
            self._answer_with_update(neighbour, want, posted, now_s)
        elif self.closing is not None:
            neighbour.queue(self.closing_message(neighbour))
        else:
            neighbour.queue(self._alive(neighbour))

    def _answer_with_update(self, neighbour: Neighbour, want: ResendRequest, posted: SentUpdates, now_s: float) -> None:
        """Send what is missing of an update; nothing of one that is over there, or that is queued or on its way."""
        exchange, whole = kind = want.exchange, want.whole and neighbour.name in posted.wholes
        if not self.is_of_use(exchange, neighbour):
            return
        if not want.lost and (neighbour.sending == kind or neighbour.waiting_update(exchange, whole=whole) is not None):
            return
        if not want.lost and kind in neighbour.handed:
            neighbour.queue(Sent(exchange=exchange, whole=whole))
            return
        if whole:
            resent_s = neighbour.whole_resent_s.get(exchange, float("-inf"))
            neighbour.whole_resent_s = {e: s for e, s in neighbour.whole_resent_s.items() if e in self.sent}
        else:
            resent_s = neighbour.last_resent_s
        if now_s - resent_s < RESEND_AFTER_S:
            return
        if whole:
            neighbour.whole_resent_s[exchange] = now_s
        else:
            neighbour.last_resent_s = now_s
        # one that stands by itself is packed when its turn comes, so here nothing is known of its digest
        encoded = None if whole else posted.updates[neighbour.name]
        offset = want.offset if encoded is not None and encoded.can_go_on(want.offset, want.digest) else 0
        neighbour.queue(SendUpdate(exchange=exchange, again=not whole or kind in neighbour.sent_once, whole=whole, offset=offset))

    def _ask_for_lost(self, neighbour: Neighbour, exchange: int, *, whole: bool) -> None:
        """Ask for an update of which a part is known to be lost, once for each place where it broke off."""
        if self.closing is not None or not self._may_ask(neighbour, exchange):
            return
        want = neighbour.session.want(exchange, whole=whole, lost=True)
        if neighbour.asked_from != (exchange, whole, want.offset):
            neighbour.asked_from = (exchange, whole, want.offset)
            neighbour.queue(want)

    def _may_ask(self, neighbour: Neighbour, exchange: int) -> bool:
        """Whether an update of this exchange would be taken now."""
        first = self._expected_from(neighbour.name)
        return first <= exchange <= first + self.ahead

    def _goodbye(self, neighbour: Neighbour, message: Goodbye) -> None:
        if message.reason == "finished":
            neighbour.missed = neighbour.left = True
            self.on_event(EventKind.LEFT, f"{neighbour.name} has finished", neighbour.name)
        elif message.reason == "pausing":  # it may be back in a moment, so it has its time in this round like anybody, and when closing
            neighbour.is_paused = True
            self.on_event(EventKind.LEFT, f"{neighbour.name} is pausing", neighbour.name)
        elif message.reason == STATE_LOST:  # the Hello before it, or the next one, says what is remembered
            self.refused[f"refused_by_neighbour_{STATE_LOST}"] += 1
        else:
            key = f"refused_by_neighbour_{message.reason if message.reason in _GOODBYES else 'otherwise'}"
            self.refused[key] += 1
            neighbour.refusal = neighbour.refusal or f"it refuses this node: {message.reason}"
            self.on_event(EventKind.REFUSED, f"{neighbour.name} does not talk to this node: {message.reason}", neighbour.name)

    def _arrived(self, neighbour: Neighbour, received: ReceivedUpdate) -> None:
        neighbour.missed = neighbour.is_faulty = False
        if self.closing is not None:
            return  # a stopped node merges nothing more and has left its last barrier behind
        if self.meetings is not None:
            self._meet(neighbour.name, received.exchange, received)
        elif self.newest is not None:
            self.newest.receive(neighbour.name, received.exchange, received)
        elif self.barrier is None:
            return
        elif received.exchange != self.barrier.exchange or self._continues(
            neighbour, received
        ):  # what is early is looked at in its exchange
            self.barrier.receive(neighbour.name, received)

    def _meet(self, name: str, number: int, received: ReceivedUpdate | None) -> None:
        """Keep what a neighbour says to meeting: its newest update, the one that is waited for, and its newest refusal.

        No more, so that no neighbour fills the memory.
        """
        assert self.meetings is not None
        # an answer that is waited for is not forgotten for the next question
        kind = (name, received is None, (name, number) == self.asked)
        kept = [meeting for meeting in self.meetings if (meeting[0], meeting[2] is None, meeting[:2] == self.asked) == kind]
        if any(other > number for _, other, _ in kept):
            return
        for meeting in kept:
            self.meetings.remove(meeting)
        self.meetings.append((name, number, received))

    def _continues(self, neighbour: Neighbour, received: ReceivedUpdate) -> bool:
        """Whether the values are here that an update continues; if not they are asked for."""
        held = neighbour.marks.get(received.exchange % self.phases, NOTHING_SAID)
        if received.marks is None or received.marks[0] in (None, held):
            return True
        neighbour.lacks, neighbour.missed = received.exchange, False
        neighbour.queue(_want(neighbour, received.exchange))
        return False

    def _count(self, neighbour: Neighbour, error: PeerError) -> None:
        self.refused[error.reason] += 1
        self.on_event(EventKind.REFUSED, f"{neighbour.name}: {error}", neighbour.name)

    def _refuse(self, neighbour: Neighbour, error: PeerError) -> None:
        self._count(neighbour, error)
        if error.reason in _FAULTY_UPDATE:
            neighbour.missed = neighbour.is_faulty = True  # what it sends cannot be merged: nobody waits for it until it can
        if error.reason in _GOODBYES:
            neighbour.refusal = str(error).removeprefix(f"{error.reason}: ")
            neighbour.queue(Goodbye(reason=error.reason))

    # ---- rounds

    def begin(self, exchange: int, now_s: float) -> None:
        """Be at an exchange from now on, with what has come early for it."""
        self._note_time(now_s)
        self.exchange, self._began_s = exchange, now_s
        for neighbour in self.neighbours.values():
            neighbour.allowance.earn()
        if self.newest is not None:
            self.newest.begin(exchange)
        if not self.in_step:
            return
        senders, never_s = frozenset(self.now_linked.weights), float("inf")
        if self.barrier is not None and self.barrier.exchange < exchange:
            self.barrier = self.barrier.next(exchange=exchange, expected=senders, deadline_s=never_s)
        elif self.barrier is None or self.barrier.exchange != exchange:
            self.barrier = ExchangeBarrier(exchange=exchange, expected=senders, deadline_s=never_s, ahead=self.ahead)
        self._forget_sent()
        for name in senders:
            neighbour, received = self.neighbours[name], self.barrier.received.get(name)
            neighbour.begin_waiting(now_s)
            is_here = received is not None or neighbour.is_flowing(exchange, now_s, self._patience_s)
            if received is not None and not self._continues(neighbour, received):
                del self.barrier.received[name]
            if neighbour.session.is_open and neighbour.heard_exchange >= exchange and not is_here:
                neighbour.queue(_want(neighbour, exchange))  # it came too early to be kept

    def _forget_sent(self) -> None:
        """Let go of what was sent in exchanges before this one and nobody can ask for any more: each update is as large as a model."""
        self.sent = {
            e: posted
            for e, posted in self.sent.items()
            if e >= self.exchange
            or (e >= self.exchange - self.ahead and any(self.is_of_use(e, self.neighbours[name]) for name in posted.updates))
        }

    @property
    def now_linked(self) -> Links:
        """Whom this node exchanges with in the round that it is in."""
        return self.links(self.exchange // self.phases)

    def post(
        self, updates: Mapping[str, EncodedUpdate], now_s: float, *, wholes: Mapping[str, Whole] | None = None, mark: bytes | None = None
    ) -> None:
        """Send this exchange's updates, by receiver, and wait for those of the neighbours until the deadline."""
        if self.newest is not None:
            self.sent.clear()  # nobody asks for what is not the newest
        else:
            assert self.barrier is not None
            self.barrier.deadline_s = now_s + self.allowance_s()
        self._note_time(now_s)
        self._posted_s = now_s
        self._stood_still, self._last_came_s, self._own_s = False, now_s, now_s - self._began_s
        self.sent[self.exchange] = SentUpdates(updates=updates, agreed_for=self.agreed_for, wholes=wholes or {}, mark=mark)
        for name, neighbour in self.neighbours.items():
            neighbour.begin_waiting(now_s)
            neighbour.forgive(now_s)
            neighbour.extended_s = 0.0
            if neighbour.session.is_open and name in updates:
                neighbour.queue(SendUpdate(exchange=self.exchange, again=False))

    def ask(self, name: str, encoded: EncodedUpdate, now_s: float) -> None:
        """Offer a neighbour an exchange of this edge alone, and wait for its answer."""
        self._post_to(name, encoded)
        self._note_time(now_s)
        self._stood_still = False
        self.asked, self._began_s = (name, encoded.exchange), now_s
        self.neighbours[name].begin_waiting(now_s)

    def answer(self, name: str, encoded: EncodedUpdate) -> None:
        """Accept a neighbour's offer; the flow goes to `met`."""
        self._post_to(name, encoded)

    def met(self, name: str, flow: Flow, now_s: float) -> None:
        """An exchange of an edge alone has been merged."""
        neighbour = self.neighbours[name]
        if self.asked == (name, flow.exchange):
            self.asked = None
            self.pace.record(now_s - self._began_s)
            neighbour.note_complete()
            neighbour.came_to = self.exchange
        self.flows[name, flow.exchange] = flow
        self._take_back(neighbour, neighbour.ledger.close(flow.exchange, merged=True))

    def give_up(self, name: str, number: int, *, missed: bool) -> None:
        """An exchange of an edge alone, and all before it that never came, will not be merged here."""
        neighbour = self.neighbours[name]
        if self.asked is not None and self.asked[0] == name:
            self.asked = None
        if missed and not neighbour.missed:
            neighbour.missed = True
            self._note_miss(neighbour, self._clock_s)
            self.on_event(EventKind.SKIPPED, f"{name} did not answer", name)
        if number > neighbour.ledger.closed_through:  # it may have left in the meantime
            self._take_back(neighbour, neighbour.ledger.close(number, merged=False))

    def _post_to(self, name: str, encoded: EncodedUpdate) -> None:
        heard = self.neighbours[name].ledger.heard
        known = -1 if heard is None else heard.closed_through  # what it has closed it needs no more
        kept = {e: {to: p for to, p in posted.updates.items() if to != name or e > known} for e, posted in self.sent.items()}
        kept[encoded.exchange] = {**kept.get(encoded.exchange, {}), name: encoded}
        self.sent = {e: SentUpdates(updates=updates, agreed_for=0) for e, updates in kept.items() if updates}
        self.neighbours[name].queue(SendUpdate(exchange=encoded.exchange, again=False))

    def is_over(self, now_s: float) -> bool:
        """Whether everybody who is waited for has come, or the time is up.

        Where nobody is waited for, because all were late before, the time has to pass: a node that is alone must not run ahead.
        """
        if self.newest is not None:
            return True
        assert self.barrier is not None
        self._note_time(now_s)
        came, senders = self.barrier.received.keys(), self.now_linked.weights
        refused = self._refused_here()
        awaited = [self.neighbours[name] for name in senders if name not in {*came, *refused} and not self.neighbours[name].missed]
        is_in_company = bool(came or refused)
        if not senders or (is_in_company and not awaited):
            return True
        if not is_in_company and now_s < self.barrier.deadline_s:
            return False
        waits = [self._waits_for(neighbour, now_s) for neighbour in awaited]  # each says how long it was waited for beyond its time
        return not any(waits)

    def _waits_for(self, neighbour: Neighbour, now_s: float) -> bool:
        """Whether a neighbour that has not come still has time."""
        assert self.barrier is not None
        its_time_s, deadline_s = self.patience_with(neighbour.name), self._deadline_of(neighbour)
        if now_s < deadline_s:
            return True
        if self._has_little_patience(neighbour):
            return False
        longer = (
            self._is_flowing(neighbour, now_s)
            or now_s < self._deadline_after_waiting(neighbour)
            or (
                self.exchange < self.starting_exchanges
                and now_s < self.start_by_s
                and not neighbour.misses
                and neighbour.heard_exchange <= self.exchange
                and neighbour.was_seen(now_s, self.allowance_s())
            )
        )
        if longer and now_s - deadline_s > its_time_s / 2:
            neighbour.extended_s = now_s - deadline_s
        return longer

    def _deadline_of(self, neighbour: Neighbour) -> float:
        """Until when a neighbour is waited for; sooner for one that was waited for in vain before."""
        assert self.barrier is not None
        return self.barrier.deadline_s - self.allowance_s() + self.patience_with(neighbour.name)

    def _deadline_after_waiting(self, neighbour: Neighbour) -> float:
        """Until when a neighbour is waited for that has itself waited for somebody else.

        Its time for this exchange begins when it has left the one before; it has at most as much once more. With one deadline for all,
        a node that is gone would make its neighbours late for theirs, and those for the next. A neighbour that was waited for in vain
        before has that time only where a third member has signed that somebody near it did not come.
        """
        if neighbour.misses and not self.waits_for_others(neighbour.name, self.exchange // self.phases - 1):
            return float("-inf")
        its_time_s = self.patience_with(neighbour.name)
        return min(neighbour.behind_s, self._deadline_of(neighbour)) + its_time_s

    def _is_flowing(self, neighbour: Neighbour, now_s: float) -> bool:
        """Whether a neighbour's update is coming in, and is not slower than a link may be.

        Its time for that begins with the deadline, or when the last update of another neighbour was complete: they share a link.
        """
        assert self.barrier is not None
        if not neighbour.is_flowing(self.exchange, now_s, self._patience_s * neighbour.patience):
            return False
        began_s = max(self._deadline_of(neighbour), self._last_came_s)
        return now_s <= began_s + neighbour.patience * neighbour.session.announced_bytes / LEAST_BYTES_PER_S

    def patience_with(self, name: str) -> float:
        """How long a neighbour has for an exchange.

        Where the patience with it is little, it has as long as updates usually need where it came to one of the last exchanges. Else it may
        be late by a round, and needs a round's usual time to catch up: it has that, but more and more rarely, and in between none.
        """
        neighbour = self.neighbours[name]
        its_time_s = neighbour.patience * self.allowance_s()
        if not self._has_little_patience(neighbour):
            return its_time_s
        usual_s = self.pace.usual_s()
        if self._is_in_sync(neighbour):
            return min(usual_s, LATER_THAN_USUAL * max(self._waits_s, default=usual_s))
        return 0.0 if self.exchange < neighbour.rests_until else usual_s

    def _is_in_sync(self, neighbour: Neighbour) -> bool:
        return self.exchange - neighbour.came_to <= IN_SYNC

    def _has_little_patience(self, neighbour: Neighbour) -> bool:
        return neighbour.patience * self.allowance_s() < max(self.pace.usual_s(), LITTLE_PATIENCE * self.allowance_s())

    def look_again_s(self, now_s: float, soon_s: float) -> float:
        """When this exchange may be over if nothing comes: the next deadline of anybody, or soon where none is left."""
        assert self.barrier is not None
        deadlines_s = [self.barrier.deadline_s, *(self._deadline_of(self.neighbours[name]) for name in self.awaited())]
        return min((each for each in deadlines_s if each > now_s), default=now_s + soon_s)

    def awaited(self) -> list[str]:
        """Neighbours whose update of this exchange is not here, and that are still waited for."""
        if self.newest is not None or self.barrier is None:
            return []
        there = {*self.barrier.received, *self._refused_here()}
        return [name for name in self.now_linked.weights if name not in there and not self.neighbours[name].missed]

    @property
    def _patience_s(self) -> float:
        """How long an update of which a part is here may rest."""
        return max(STALL_S, PATIENCE_FACTOR * self.pace.floor_s)

    def _refused_here(self) -> frozenset[str]:
        """Neighbours that have closed this exchange without merging this node's update: a merge here would be rolled back."""
        return frozenset(name for name in self.now_linked.both if self.neighbours[name].ledger.refuses(self.exchange))

    def allowance_s(self) -> float:
        """How long a neighbour has for an exchange."""
        return self._allowance_of(self._own_s)

    def _allowance_of(self, own_s: float) -> float:
        return min(self.pace.allowance_s(own_s), max(CEILING_S, self.pace.floor_s))

    def is_behind(self) -> bool:
        """Whether a neighbour is so far ahead that this exchange cannot be made up for."""
        return self.in_step and self.furthest() > self.exchange + self.ahead

    def furthest(self) -> int:
        """The furthest exchange that a neighbour of this round has spoken of, as far as it is believed.

        While this node has not been in company, it is the furthest that all of them have reached.
        """
        if not self.in_step:
            return -1
        links = self.now_linked
        heard = [
            neighbour.heard_exchange
            for name, neighbour in self.neighbours.items()
            if neighbour.session.is_open and (name in links.weights or name in links.receivers)
        ]
        return self._as_believed((max if self._recent_s or self._was_in_step else min)(heard, default=-1))

    def arrivals(self) -> dict[str, ReceivedUpdate]:
        """What this exchange may merge, in the roster's order."""
        both = self.now_linked.both
        return {
            name: received
            for name, received in self.came().items()
            if name not in both or self.neighbours[name].ledger.admits(self.exchange)
        }

    def ages(self) -> dict[str, int]:
        """How often each of the newest arrivals has been merged before."""
        return {name: held.age for name, held in (self.newest.updates() if self.newest is not None else {}).items()}

    def came(self) -> dict[str, ReceivedUpdate]:
        """What is here for this exchange, also what may not be merged, in the roster's order."""
        if self.newest is not None:
            held = self.newest.updates()
            return {name: held[name].update for name in self.now_linked.weights if name in held}
        assert self.barrier is not None
        return {name: self.barrier.received[name] for name in self.now_linked.weights if name in self.barrier.received}

    def take_unmatched(self, channels: Collection[str]) -> list[tuple[Neighbour, Flow]]:
        """Flows over some channels that no neighbour has matched, for the merge that rolls them back."""
        taken = [(neighbour, flow) for neighbour, flow in self.taken_back if flow.amounts.keys() & channels]
        self.taken_back = [(neighbour, flow) for neighbour, flow in self.taken_back if not flow.amounts.keys() & channels]
        return taken

    def put_back(self, unmatched: list[tuple[Neighbour, Flow]]) -> None:
        """Leave flows to a later merge, which this one has not rolled back."""
        self.taken_back = unmatched + self.taken_back

    def hold(self, name: str, received: ReceivedUpdate, values: Mapping[str, Any] | BadMessage) -> None:
        """Keep what a neighbour's update leads to, or refuse it, so that its next one will not continue what is here."""
        neighbour = self.neighbours[name]
        if isinstance(values, BadMessage):
            self._refuse(neighbour, values)
            if self.newest is not None:  # it would be merged again
                self.newest.forget(name)
        elif received.marks is not None:
            neighbour.values.update(values)
            after, neighbour.marks[received.exchange % self.phases] = received.marks
            if after is None:
                self.resynchronised += 1
                self.on_event(EventKind.RESYNCHRONISED, f"{name} at exchange {received.exchange}", name)

    def advance(self) -> None:
        """What was posted in this exchange is in this node's own values now: its next update continues it."""
        posted = self.sent.get(self.exchange)
        if posted is not None and posted.mark is not None:
            self.marks[self.exchange % self.phases] = posted.mark

    def close(self, merged: Mapping[str, Flow], now_s: float) -> list[str]:
        """This exchange is over; the flows of the neighbours in `merged` were taken in. Returns who was skipped."""
        skipped, links, refused = [], self.now_linked, self._refused_here()
        for name, neighbour in self.neighbours.items():
            matched = name in merged and name in links.both  # what goes one way only has no other side to match it
            if matched:
                self.flows[name, self.exchange] = merged[name]
            elif name in links.weights and name not in merged:
                skipped.append(name)
                if not neighbour.missed and name not in refused:
                    self._note_miss(neighbour, now_s)
                if not neighbour.missed:
                    self.on_event(EventKind.SKIPPED, f"{name} did not come to exchange {self.exchange}", name)
                neighbour.missed = neighbour.missed or name not in refused  # it is there, further on
            self._take_back(neighbour, neighbour.ledger.close(self.exchange, merged=matched))
            if name in merged:
                neighbour.note_complete()
                neighbour.came_to = self.exchange
        if not skipped:
            self.pace.record(now_s - self._began_s)
            self._waits_s.append(max(0.0, self._last_came_s - self._posted_s))
            if self.exchange >= self._untrained_before:
                self._recent_s.append(now_s - self._began_s)
        self._away_exchanges = 0.0 if merged else max(0.0, self._away_exchanges - 1)
        if merged:
            self._in_step, self._was_in_step = (self.exchange + 1, now_s), True
        return skipped

    def _note_miss(self, neighbour: Neighbour, now_s: float) -> None:
        """A neighbour was waited for in vain; one that speaks all the same holds this node."""
        if self._stood_still or not self.patience_with(neighbour.name):
            return
        if self._has_little_patience(neighbour) and not self._is_in_sync(neighbour):
            neighbour.rest(self.exchange)
        neighbour.note_miss(now_s)
        if neighbour.last_seen_s is None or neighbour.last_seen_s < self._began_s:
            return
        neighbour.held += 1
        neighbour.held_s += now_s - self._began_s
        if neighbour.held >= HELD_AFTER and _is_power_of_two(neighbour.held // HELD_AFTER) and neighbour.held % HELD_AFTER == 0:
            spoke = f"{neighbour.name} spoke and did not come to {neighbour.held} exchanges"
            self.on_event(EventKind.HELD, f"{spoke}, which waited for it for {neighbour.held_s:.0f} s in all", neighbour.name)

    def jump(self, exchange: int, now_s: float, left_out: str = "") -> None:
        """Leave out the exchanges before this one: they took place without this node.

        Args:
            exchange: the next one with it.
            now_s: on its clock.
            left_out: for the record, which rounds these are; empty: the exchanges are named.
        """
        senders = self.links(exchange // self.phases).weights
        for name, neighbour in self.neighbours.items():
            self._take_back(neighbour, neighbour.ledger.close(exchange - 1, merged=False))
            if neighbour.session.is_open and neighbour.heard_exchange >= exchange and name in senders:
                neighbour.queue(_want(neighbour, exchange))  # it came too early to be kept, and nobody waits long for one who is late
            if neighbour.heard_exchange < exchange - self.ahead:
                neighbour.missed = True  # who has fallen silent and is waited for once more makes this node late for the others again
        self.agreed_for = 0
        self.on_event(EventKind.JUMPED, left_out or f"from exchange {self.exchange} to {exchange}")
        self._away_exchanges = max(0.0, self._away_exchanges - (exchange - self.exchange))
        self._in_step, self._untrained_before = (exchange, now_s), exchange + self.phases

    def ledgers(self) -> dict[str, SavedLedger]:
        """Every edge's ledger, for a checkpoint."""
        return {name: neighbour.ledger.to_dict() for name, neighbour in self.neighbours.items()}

    def checkpointed(self, ledgers: Mapping[str, SavedLedger]) -> None:
        """These are on disk: from now on they may be told."""
        for name, saved in ledgers.items():
            self.neighbours[name].ledger.checkpointed(saved)

    # ---- closing

    def end(self, reason: str, exchange: int) -> None:
        """Stop before an exchange, and merge nothing more."""
        self.closing, self.exchange = reason, exchange

    def is_settled(self) -> bool:
        """Whether nothing is open with any neighbour that is still there."""
        return not self.unsettled()

    def unsettled(self) -> list[str]:
        """Neighbours that are still there with which something is open."""
        if self.newest is not None:
            return []
        return [
            name
            for name, each in self.neighbours.items()
            if not (each.left or each.ledger.is_untouched or (each.ledger.is_settled and each.ledger.neighbour_is_settled))
        ]

    def closing_message(self, neighbour: Neighbour) -> Closing:
        """What a stopped node has to say."""
        assert self.closing is not None
        return Closing(exchange=self.exchange, report=neighbour.ledger.report(), stop=self.stop_news(), reason=self.closing)

    # ---- what goes out

    def tick(self, now_s: float) -> None:
        """Put into the outboxes what is due: greetings, questions, closing words."""
        self._note_time(now_s)
        self._look_at_claims(now_s)
        if now_s >= self._next_hello_s:
            self._next_hello_s = now_s + HELLO_EVERY_S
            for neighbour in self.neighbours.values():
                if not neighbour.session.is_open:
                    neighbour.queue(self.hello(neighbour))
                elif self.closing is not None:
                    neighbour.queue(self.closing_message(neighbour))
                elif self.meetings is not None and not (neighbour.ledger.is_settled and neighbour.ledger.neighbour_is_settled):
                    neighbour.queue(self._alive(neighbour))
        self._ask_again(now_s)
        self._pass_on(now_s)
        self._say_ready(now_s)

    def _say_ready(self, now_s: float) -> None:
        """What is new of the start, or was said and has no receipt."""
        for neighbour in self.neighbours.values():
            if self.start is not None and neighbour.session.is_open and self.start.is_due(neighbour.name, now_s):
                neighbour.queue(SendReady())

    def _pass_on(self, now_s: float) -> None:
        """What is new of the network and has waited long enough."""
        for neighbour in self.neighbours.values():
            if self.view is not None and neighbour.session.is_open and self.view.is_due(neighbour.name, now_s):
                neighbour.queue(SendRecords())

    def spread(self, now_s: float) -> None:
        """A round is over: what is new of the network goes out with the next round's updates."""
        for neighbour in self.neighbours.values():
            if neighbour.session.is_open:
                neighbour.queue(SendRecords())
                if self.push_sum is not None and self.view is not None and self.closing is None:
                    part = self.push_sum.message_for(neighbour.name)
                    if self.view.spend(sum(memoryview(frame).nbytes for frame in encode(part)), now_s):
                        neighbour.queue(part)  # what is not said now is in what is said next

    def _ask_again(self, now_s: float) -> None:
        """For what has not come."""
        if self.asked is not None and self.neighbours[self.asked[0]].wants(now_s):
            name, number = self.asked  # the question or its answer was lost
            neighbour, kind = self.neighbours[name], (number, False)
            if neighbour.sending == kind or neighbour.waiting_update(number, whole=False) is not None:
                return
            neighbour.queue(Sent(exchange=number, whole=False) if kind in neighbour.handed else SendUpdate(exchange=number, again=True))
            if not neighbour.is_flowing(number, now_s, STALL_S):
                neighbour.queue(_want(neighbour, number))
        if self.closing is None and self.barrier is not None and self.exchange in self.sent:
            for name in self.now_linked.weights:
                neighbour = self.neighbours[name]
                if not neighbour.session.is_open or name in self.barrier.received or neighbour.is_flowing(self.exchange, now_s, STALL_S):
                    continue
                if neighbour.wants(now_s):
                    neighbour.queue(_want(neighbour, self.exchange))

    def _alive(self, neighbour: Neighbour) -> Heartbeat:
        return Heartbeat(exchange=self.exchange, report=neighbour.ledger.report(), stop=self.stop_news())

    def hello(self, neighbour: Neighbour) -> Hello:
        """The greeting."""
        ledger = neighbour.ledger
        return neighbour.session.hello(
            exchange=self.exchange, report=ledger.report(), stop=self.stop_news(), anew=self.anew, remembered=ledger.remembered()
        )

    def stop_news(self, agreed_for: int | None = None) -> StopNews:
        """What a neighbour hears about stopping."""
        return StopNews(agreed_for=self.agreed_for if agreed_for is None else agreed_for, stop_round=self.stop_round)

    def is_of_use(self, exchange: int, neighbour: Neighbour) -> bool:
        """Whether a neighbour may still merge an update that is on its way.

        It may not where the exchange is past here, or where its own report has closed it. Where nodes go on with the newest it always
        may, or a slow link would bring nothing.
        """
        heard = neighbour.ledger.heard
        return self.newest is not None or (exchange in self.sent and (heard is None or heard.closed_through < exchange))

    def prepare(self, name: str, exchange: int) -> None:
        """Copy and digest what `frames_of` will need of an update that stands by itself; as long as that takes, in any thread."""
        posted = self.sent.get(exchange)
        if posted is not None and name in posted.wholes:
            _ = posted.wholes[name].encoded

    def frames_of(self, neighbour: Neighbour, item: SendUpdate) -> Iterable[list[Frame]]:
        """An update as messages for one neighbour, with the newest report; nothing where the exchange is past."""
        posted = self.sent.get(item.exchange)
        if posted is None or neighbour.name not in (posted.wholes if item.whole else posted.updates):
            return ()
        kind = item.exchange, item.whole
        neighbour.sent_once = {sent for sent in neighbour.sent_once if sent[0] in self.sent} | {kind}
        neighbour.handed = {sent for sent in neighbour.handed if sent[0] in self.sent} - {kind}
        encoded = posted.wholes[neighbour.name].encoded if item.whole else posted.updates[neighbour.name]
        return encoded.messages(neighbour.ledger.report(), self.stop_news(posted.agreed_for), item.offset)

    def handed_over(self, neighbour: Neighbour, item: SendUpdate) -> None:
        """All of an update is with the link: what comes later over it comes behind the update."""
        neighbour.handed.add((item.exchange, item.whole))

    # ---- checkpoints

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint says of the edges; the open flows' tensors are stored beside it."""
        return {
            "exchange": self.exchange,
            "agreed_for": self.agreed_for,
            "stop_round": self.stop_round,
            "closing": self.closing,
            "in_step": self._in_step[0],
            "recent_s": list(self._recent_s),
            "agreements": [[number, counter] for number, counter in self.agreements.items()],
            "ledgers": self.ledgers(),
            "newest": {name: [held.number, held.age] for name, held in (self.newest.held if self.newest is not None else {}).items()},
            "sent": {str(exchange): posted.metadata() for exchange, posted in self.sent.items()} if self.meetings is None else {},
            "marks": _in_hex(self.marks),
            "held": {name: _in_hex(neighbour.marks) for name, neighbour in self.neighbours.items()},
            "anew": self.anew,
            STATE_LOST: {name: neighbour.state_lost for name, neighbour in self.neighbours.items() if neighbour.state_lost},
        }

    def restore_pace(self, in_step: int, recent_s: Iterable[float], since_s: float) -> None:
        """Take up what `metadata` said, which was at since_s on this process's clock."""
        self._in_step, self._was_in_step = (in_step, since_s), in_step > 0
        self._recent_s.extend(recent_s)
        self._clock_s = since_s

    def _take_back(self, neighbour: Neighbour, exchange: int | None) -> None:
        flow = self.flows.pop((neighbour.name, exchange), None) if exchange is not None else None
        if flow is not None and flow.amounts:
            self.taken_back.append((neighbour, flow))
            self.on_event(EventKind.ROLLED_BACK, f"{neighbour.name} did not match exchange {exchange}", neighbour.name)
        for key in [key for key in self.flows if key[0] == neighbour.name and key[1] != neighbour.ledger.open_flow]:
            del self.flows[key]


def _want(neighbour: Neighbour, exchange: int) -> ResendRequest:
    return neighbour.session.want(exchange, whole=neighbour.lacks == exchange, lost=False)


def _in_hex(marks: Mapping[int, bytes]) -> dict[str, str]:
    return {str(phase): mark.hex() for phase, mark in marks.items()}


def _is_power_of_two(count: int) -> bool:
    return count & (count - 1) == 0


def _times(count: int) -> str:
    return "" if count == 1 else f" ({count} times)"
