"""What a node knows of one neighbour: its link, its ledger, where it is, and what still has to be sent to it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from p2pfl.protocol.allowance import NeighbourAllowance
from p2pfl.protocol.ledger import EdgeLedger
from p2pfl.wire.link import LinkSession
from p2pfl.wire.messages import Goodbye, Message

WANT_AFTER_S = 0.5
"""How long a node waits for a message before it asks for it once more; doubled with each asking."""

WANT_AT_MOST_S = 5.0

RESEND_AFTER_S = 0.25
"""A neighbour that asks more often than this gets one answer."""

OUTBOX_LIMIT = 64

LEAST_BYTES_PER_S = 2**16
"""An update that takes longer than at so many bytes a second is not waited for to its end."""

SOON = 2
"""So many complete updates in a row double the patience with a neighbour after its first miss."""

LATER = 64
"""The same after further misses."""

MOST_MISSES = 8
"""So many misses count; more of them change nothing."""

FORGIVEN_AFTER_S = 3600.0
"""A miss counts for so long at most."""

REST_FACTOR = 4
"""After a miss with little patience a neighbour is not waited for in so many exchanges, after the next one in that many times more."""

HELD_AFTER = 3
"""A neighbour that speaks and does not come to so many exchanges that waited for it has held this node."""

LAST_WORDS = frozenset({"finished", "pausing"})
"""Reasons of a Goodbye after which a node says nothing more to the neighbour."""


@dataclass(frozen=True, slots=True)
class SendUpdate:
    """The Update of an exchange, packed when its turn comes, so that it carries the newest report."""

    exchange: int
    again: bool
    whole: bool = False
    """As one that stands by itself."""
    offset: int = 0
    """Only from this byte on: the neighbour has what is before it."""


@dataclass(frozen=True, slots=True)
class SendRecords:
    """What is new of the whole network, gathered when its turn comes."""


@dataclass(frozen=True, slots=True)
class SendReady:
    """Ready records and receipts, gathered when their turn comes."""


@dataclass(slots=True)
class Neighbour:
    """One end of an edge. Owned by the node's protocol."""

    name: str
    session: LinkSession
    allowance: NeighbourAllowance = field(default_factory=NeighbourAllowance)
    ledger: EdgeLedger = field(default_factory=EdgeLedger)
    outbox: deque[Message | SendUpdate | SendRecords | SendReady] = field(default_factory=deque)
    heard_exchange: int = -1
    """The furthest exchange that it has spoken of."""
    last_seen_s: float | None = None
    behind_s: float = float("-inf")
    """When it last said that it is still at an earlier exchange than this node, which has sent its own: it waits for somebody else."""
    missed: bool = False
    """It did not come in time, so nobody waits for it until it is heard again."""
    patience: float = 1.0
    """Fraction of the usual time for which it is waited for: halved by each miss, doubled by complete updates."""
    misses: int = 0
    """How often it was waited for in vain and has not made up for it."""
    complete: int = 0
    """Complete updates in a row since its last miss."""
    rests: int = 0
    """How often it was waited for in vain with so little patience that it could not have caught up in a round's usual time."""
    rests_until: int = -1
    """Before this exchange nobody waits for it, because of that."""
    came_to: int = -(2**53)
    """The last exchange that its update came to."""
    missed_s: float = float("-inf")
    """When it was last waited for in vain."""
    extended_s: float = 0.0
    """How long this exchange has waited for it beyond its own time, for an update that was coming in or because it said that it waits."""
    held: int = 0
    """Exchanges that waited for it in vain although it spoke."""
    held_s: float = 0.0
    """Seconds that they took."""
    unconfirmed_s: float | None = None
    """Since when it says that it is further than anybody confirms; None: it does not."""
    hurried: int = 0
    """How often such a claim lasted longer than an exchange may take."""
    asked_proof_s: float = float("-inf")
    """When this node last asked it for proof of where the others are."""
    relayed_proof_s: float = float("-inf")
    """When it was last asked for proof for somebody else."""
    gave_proof_s: float = float("-inf")
    """When it last got proof from this node."""
    wants_proof_until_s: float = float("-inf")
    """Until then it is told of what others answer."""
    stop_said: int | None = None
    """The stop round that it last spoke of, while this node cannot tell whether it holds."""
    has_converged: bool = False
    """Its last word was that it has stopped because all agree."""
    is_faulty: bool = False
    """Its last update was refused for what is in it; being alive is not enough to be waited for again."""
    left: bool = False
    """It said that it has finished for good."""
    closing: bool = False
    """It has stopped, and is there only to settle what is open."""
    closing_answered_s: float = float("-inf")
    """When this node last told it, after its closing words, what it has done itself."""
    is_paused: bool = False
    """It said that it pauses, and has not greeted since."""
    refusal: str = ""
    """Why the two do not talk although they are connected, such as another study; empty where nothing stands in the way."""
    next_want_s: float = 0.0
    want_pause_s: float = WANT_AFTER_S
    last_resent_s: float = float("-inf")
    whole_resent_s: dict[int, float] = field(default_factory=dict)
    """When an update was last sent that stands by itself, by exchange."""
    incarnation: int = 0
    """Of the process that it last greeted from."""
    greetings: int = 0
    """How often it has greeted from another process."""
    state_lost: str = ""
    """What shows that its state went back, as long as that stands; empty where nothing does."""
    accepted: deque[int] = field(default_factory=lambda: deque(maxlen=8))
    """Incarnations whose state was as it is remembered here: a process does not go back."""
    state_lost_of: int = 0
    """The last incarnation of which that was said."""
    said_last: bool = False
    """Whether this node has said goodbye to it. Anything said afterwards would be refused, and a greeting would take the goodbye back."""
    told_again_s: float = float("-inf")
    """When it was last told of everybody again."""
    sending: tuple[int, bool] | None = None
    """The exchange whose update is going out just now, and whether one that stands by itself."""
    handed: set[tuple[int, bool]] = field(default_factory=set)
    """The same of updates that have gone out to their end, to the process that it greets from."""
    asked_from: tuple[int, bool, int] | None = None
    """The exchange, the kind and the byte from which it was last asked for what is known to be lost."""
    progress: tuple[int, int] | None = None
    progress_s: float = float("-inf")
    """When the update that is coming in last grew."""
    sent_once: set[tuple[int, bool]] = field(default_factory=set)
    """The same of updates that have been sent: again is a repetition."""
    values: dict[str, Any] = field(default_factory=dict)
    """Of its encoded channels, as far as its updates have led here; zeros where there is none."""
    marks: dict[int, bytes] = field(default_factory=dict)
    """What these values are, by phase."""
    lacks: int | None = None
    """The exchange whose update continues values that are not here."""

    def queue(self, item: Message | SendUpdate | SendRecords | SendReady) -> None:
        """Put something into the outbox, once: what is lost there is asked for again. Nothing follows a last word, which ends the link."""
        if self.said_last:
            return
        if isinstance(item, Goodbye) and item.reason in LAST_WORDS:
            self.said_last = True
            self.outbox.append(item)  # however full it is: without it the neighbour waits for this node
            return
        if isinstance(item, SendUpdate):
            waiting_update = self.waiting_update(item.exchange, whole=item.whole)
            if waiting_update is not None:
                self.outbox[self.outbox.index(waiting_update)] = item  # it knows better from where on
                return
        else:
            # only the newest of a kind says anything
            for waiting in [waiting for waiting in self.outbox if type(waiting) is type(item)]:
                self.outbox.remove(waiting)
        if len(self.outbox) < OUTBOX_LIMIT:
            self.outbox.append(item)

    def begin_sending(self, item: SendUpdate) -> None:
        """An update has left the outbox and goes out."""
        self.sending = (item.exchange, item.whole)

    def end_sending(self) -> None:
        """Nothing is going out any more."""
        self.sending = None

    def waiting_update(self, exchange: int, *, whole: bool) -> SendUpdate | None:
        """The update of an exchange that is still in the outbox."""
        updates = (waiting for waiting in self.outbox if isinstance(waiting, SendUpdate))
        return next((waiting for waiting in updates if (waiting.exchange, waiting.whole) == (exchange, whole)), None)

    def next_short(self) -> Message | SendRecords | SendReady | None:
        """Take from the outbox what may overtake an update: all but a last word, which ends the link for what is behind it."""
        for item in self.outbox:
            if not isinstance(item, SendUpdate | Goodbye):
                self.outbox.remove(item)
                return item
        return None

    def note_progress(self, now_s: float) -> None:
        """Look whether more of an update has come in."""
        progress = self.session.progress
        # an update that is begun again is no progress before it is longer than it has been
        if progress is not None and (self.progress is None or progress > self.progress):
            self.progress, self.progress_s = progress, now_s

    def rest(self, exchange: int) -> None:
        """Wait for it more and more rarely, where waiting for a shorter time would never let it catch up."""
        self.rests = min(self.rests + 1, MOST_MISSES)
        self.rests_until = exchange + 1 + REST_FACTOR**self.rests

    def note_miss(self, now_s: float) -> None:
        """It was waited for in vain: the next time it is waited for half as long, or a quarter where it has used up more than its time."""
        halvings = 2 if self.extended_s > 0 else 1
        self.misses = min(self.misses + halvings, MOST_MISSES)
        self.patience = max(self.patience / 2**halvings, 2.0**-MOST_MISSES)
        self.complete, self.missed_s = 0, now_s

    def note_complete(self) -> None:
        """Its update came in time: enough of them in a row double the patience with it, and then make its misses forgotten."""
        if not self.misses:
            return
        self.complete += 1
        if self.complete < (SOON if self.misses == 1 and self.patience < 1 else LATER):
            return
        self.complete = 0
        if self.patience < 1:
            self.patience = min(1.0, 2 * self.patience)
        else:
            self.misses = self.rests = 0

    def forgive(self, now_s: float) -> None:
        """Take back one miss for each hour since the last one."""
        while self.misses and now_s - self.missed_s >= FORGIVEN_AFTER_S:
            self.missed_s += FORGIVEN_AFTER_S
            self.misses, self.rests = self.misses - 1, max(0, self.rests - 1)
            self.patience = min(1.0, 2 * self.patience) if self.misses else 1.0

    def is_flowing(self, exchange: int, now_s: float, stall_s: float) -> bool:
        """Whether its update of an exchange is coming in just now."""
        progress = self.session.progress
        return progress is not None and progress[0] == exchange and now_s - self.progress_s <= stall_s

    def was_seen(self, now_s: float, within_s: float) -> bool:
        """Whether anything was heard of it lately."""
        return self.last_seen_s is not None and now_s - self.last_seen_s <= within_s

    def begin_waiting(self, now_s: float) -> None:
        """A new exchange: be patient again before asking."""
        self.want_pause_s = WANT_AFTER_S
        self.next_want_s = now_s + WANT_AFTER_S

    def wants(self, now_s: float) -> bool:
        """Whether it is time to ask once more; asks more and more rarely."""
        if now_s < self.next_want_s:
            return False
        self.want_pause_s = min(2 * self.want_pause_s, WANT_AT_MOST_S)
        self.next_want_s = now_s + self.want_pause_s
        return True
