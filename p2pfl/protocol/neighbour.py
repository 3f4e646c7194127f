"""The members beside this one: all that a node knows of each neighbour, and who is where by their own words and signed records."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum

from p2pfl.protocol.allowance import NeighbourAllowance
from p2pfl.protocol.ledger import EdgeLedger
from p2pfl.protocol.view import NetworkView
from p2pfl.wire.link import LinkSession
from p2pfl.wire.messages import DoctorAnswer, DoctorQuestion, Goodbye, Message

ASK_AFTER_S = 0.5
"""How long a node waits for a message before it asks for it once more; doubled with each asking."""

ASK_AT_MOST_S = 5.0
OUTBOX_LIMIT = 64

LAST_WORDS = frozenset({"finished", "pausing"})
"""Reasons of a Goodbye after which a node says nothing more to the neighbour."""

_NO_NEIGHBOUR = 2
"""Links between this node and a member that is no neighbour, at least."""


@dataclass(frozen=True, slots=True)
class SendUpdate:
    """The Update of an exchange, packed when its turn comes, so that it carries the newest report."""

    exchange: int
    again: bool
    full: bool = False
    """As a full update, which continues nothing."""
    offset: int = 0
    """Only from this byte on: the neighbour has what is before it."""


class SendNew(Enum):
    """News that are gathered when their turn comes."""

    RECORDS = "records"
    """Round records that are new to a neighbour."""
    READY = "ready"
    """Ready records and receipts."""


Item = Message | SendUpdate | SendNew
"""Anything that lies in an outbox."""


@dataclass(slots=True)
class Neighbour:
    """One end of an edge. Owned by the node's protocol."""

    name: str
    session: LinkSession
    allowance: NeighbourAllowance = field(default_factory=NeighbourAllowance)
    ledger: EdgeLedger = field(default_factory=EdgeLedger)
    outbox: deque[Item] = field(default_factory=deque)
    heard_exchange: int = -1
    """The furthest exchange that it has spoken of."""
    last_seen_s: float | None = None
    missed: bool = False
    """It did not come in time, so nobody waits for it until it is heard again."""
    is_faulty: bool = False
    """Its last update was refused for what is in it; being alive is not enough to be waited for again."""
    left: bool = False
    """It said that it has finished for good."""
    closing: bool = False
    """It has stopped, and is there only to close what is open."""
    is_paused: bool = False
    """It said that it pauses, and there was no handshake since."""
    refusal: str = ""
    """Why the two do not talk although they are connected, such as another study; empty where nothing stands in the way."""
    state_lost: str = ""
    """Evidence that its state went back, as long as that stands; empty where there is none."""
    incarnation: int = 0
    """Random number of the process of its last handshake."""
    handshakes: int = 0
    """Handshakes with another process of it than before."""
    said_last: bool = False
    """Whether this node has said goodbye to it. Anything said afterwards would be refused, and a Hello would take the goodbye back."""
    next_ask_s: float = 0.0
    ask_pause_s: float = ASK_AFTER_S
    progress: tuple[int, int] | None = None
    progress_s: float = float("-inf")
    """When the update that is coming in last grew."""
    progress_since_s: float = float("-inf")
    """When it began to come in."""

    # ---- the outbox

    def queue(self, item: Item) -> None:
        """Put something into the outbox, once: what is lost there is asked for again. Nothing follows a last word, which ends the link."""
        if self.said_last:
            return
        if isinstance(item, Goodbye) and item.reason in LAST_WORDS:
            self.said_last = True
            self.outbox.append(item)  # however full it is: without it the neighbour waits for this node
            return
        if isinstance(item, SendUpdate):
            waiting_update = self.waiting_update(item.exchange, full=item.full)
            if waiting_update is not None:
                self.outbox[self.outbox.index(waiting_update)] = item  # it knows better from where on
                return
        elif item is SendNew.RECORDS and item in self.outbox:
            return  # it keeps its turn, when all that is new goes: before an update that was queued after it
        elif not isinstance(item, DoctorQuestion | DoctorAnswer):
            # only the newest of a kind says anything
            for waiting in [waiting for waiting in self.outbox if _kind(waiting) is _kind(item)]:
                self.outbox.remove(waiting)
        if len(self.outbox) < OUTBOX_LIMIT:
            self.outbox.append(item)

    def waiting_update(self, exchange: int, *, full: bool) -> SendUpdate | None:
        """Find the update of an exchange that is still in the outbox."""
        updates = (waiting for waiting in self.outbox if isinstance(waiting, SendUpdate))
        return next((waiting for waiting in updates if (waiting.exchange, waiting.full) == (exchange, full)), None)

    def next_short(self) -> Message | SendNew | None:
        """Take from the outbox what may overtake an update: neither a last word, which ends the link, nor what is large itself."""
        for item in self.outbox:
            if not isinstance(item, SendUpdate | Goodbye) and not is_large(item):
                self.outbox.remove(item)
                return item
        return None

    def next_large(self) -> Message | None:
        """Take from the outbox a doctor's large message."""
        for item in self.outbox:
            if isinstance(item, DoctorQuestion | DoctorAnswer) and is_large(item):
                self.outbox.remove(item)
                return item
        return None

    # ---- what was heard of it

    def note_seen(self, now_s: float) -> None:
        """Note that it has spoken, and whether more of an update has come in."""
        self.last_seen_s, progress = now_s, self.session.progress
        # an update that is begun again is no progress before it is longer than it has been
        if progress is not None and (self.progress is None or progress > self.progress):
            if self.progress is None or progress[0] != self.progress[0]:
                self.progress_since_s = now_s
            self.progress, self.progress_s = progress, now_s

    def was_seen(self, now_s: float, within_s: float) -> bool:
        """Whether anything was heard of it lately."""
        return self.last_seen_s is not None and now_s - self.last_seen_s <= within_s

    def is_flowing(self, exchange: int, now_s: float, stall_s: float) -> bool:
        """Whether its update of an exchange is coming in just now."""
        progress = self.session.progress
        return progress is not None and progress[0] == exchange and now_s - self.progress_s <= stall_s

    @property
    def flowed_s(self) -> float:
        """How long the update that is coming in, or came in last, has been growing."""
        return 0.0 if self.progress is None else self.progress_s - self.progress_since_s

    def note_exchange(self, exchange: int) -> None:
        """Take up the exchange that it has spoken of."""
        self.heard_exchange = exchange

    def note_handshake(self, incarnation: int) -> bool:
        """Note a Hello; returns whether it is from another process, over an open link."""
        self.left = self.closing = self.is_paused = False
        self.refusal = ""
        is_another = self.session.is_open and self.incarnation != incarnation
        self.incarnation = incarnation if is_another else self.incarnation
        return is_another

    def count_handshake(self) -> None:
        """Count a handshake with another process."""
        self.handshakes += 1

    def note_missed(self) -> None:
        """Wait for it no more until it is heard again."""
        self.missed = True

    def note_fault(self) -> None:
        """Wait for it no more until an update of it can be merged."""
        self.missed = self.is_faulty = True

    def note_return(self, *, is_sound: bool = False) -> None:
        """Wait for it again; *is_sound*: an update has come, whatever was wrong with the last one."""
        self.missed = False
        self.is_faulty = self.is_faulty and not is_sound

    def note_leaving(self, *, for_good: bool) -> None:
        """Note its last word; one that only pauses has its time in this round like anybody, and when closing."""
        if for_good:
            self.missed = self.left = True
        else:
            self.is_paused = True

    def note_closing(self) -> None:
        """Note that it has stopped and merges nothing more."""
        self.closing = True

    def note_refusal(self, why: str) -> None:
        """Note why the two do not talk."""
        self.refusal = why

    def note_state(self, lost: str) -> None:
        """Note the evidence that its state went back; empty: there is none."""
        self.state_lost = lost

    def begin_anew(self, anew: int) -> None:
        """Forget what it said before it began without its state."""
        self.ledger.begin_anew(anew)
        self.session.forget_updates()
        self.heard_exchange, self.progress = -1, None

    def restore_ledger(self, ledger: EdgeLedger) -> None:
        """Take up the ledger of a checkpoint."""
        self.ledger = ledger

    # ---- asking for what has not come

    def begin_waiting(self, now_s: float) -> None:
        """A new exchange: be patient again before asking."""
        self.ask_pause_s = ASK_AFTER_S
        self.next_ask_s = now_s + ASK_AFTER_S

    def is_time_to_ask(self, now_s: float) -> bool:
        """Whether it is time to ask once more; asks more and more rarely."""
        if now_s < self.next_ask_s:
            return False
        self.ask_pause_s = min(2 * self.ask_pause_s, ASK_AT_MOST_S)
        self.next_ask_s = now_s + self.ask_pause_s
        return True


class Others:
    """Members whose word counts, each once: one of them may lie about itself, and no more than one does.

    Args:
        num_others: members beside this one; 0: its neighbours are all.
        places: in the roster, by name; without them a neighbour's word and its records count as those of two members.
        steps_to: links between this node and each member, by place in the roster; a member that is not in it is no neighbour.
        view: what this node hears of the whole network; None: nothing signed can be heard.
        prove: this node's own signed record of its last round; None: there is none.
    """

    def __init__(
        self,
        neighbours: Mapping[str, Neighbour],
        *,
        num_others: int = 0,
        places: Mapping[str, int] | None = None,
        steps_to: Mapping[int, int] | None = None,
        view: NetworkView | None = None,
        prove: Callable[[], bytes | None] = lambda: None,
    ) -> None:
        self._neighbours, self._places, self._steps_to, self._prove = neighbours, places or {}, steps_to or {}, prove
        self.view = view
        self.count = max(num_others, len(neighbours))
        self.is_one = len(neighbours) <= 1 and num_others <= 1
        """Whether there is one member beside this one."""
        self.are_neighbours = self.count == len(neighbours)
        """Whether this node exchanges with everybody."""

    def have_stopped(self, converged: Collection[str]) -> bool:
        """Whether two members, or the only other one, have stopped because all agree; the *converged* neighbours have said so."""
        signed = 0
        if self.view is not None:
            signed = self.view.num_closed([self.view.me, *(self._places[name] for name in converged if name in self._places)])
        return len(converged) + signed >= min(2, self.count)

    def second_furthest(self, exchange: int, *, phases: int, ahead: int) -> int:
        """The exchange that two members have reached, seen from one.

        Each link lets the members at its ends be apart by as many exchanges as are kept. A member that is no further ahead than the links
        to it explain has not gone on without this node: what it has reached confirms nobody.
        """
        reached: dict[int | str, tuple[int, int]] = {}
        if self.view is not None:
            for place, rounds in self.view.furthest().items():
                reached[place] = rounds * phases, self._steps_to.get(place, _NO_NEIGHBOUR)
        for name, neighbour in self._neighbours.items():
            member = self._places.get(name, name)
            reached[member] = max(reached.get(member, (-1, 1))[0], neighbour.heard_exchange), 1
        gone_on = (there for there, steps in reached.values() if there > exchange + steps * ahead)
        return sorted([-1, -1, *gone_on])[-2]

    def proof_for(self, name: str) -> list[bytes]:
        """Signed records that show a neighbour where the furthest members are."""
        return [] if self.view is None else self.view.proof(self._prove(), without=self._places.get(name))


def is_large(item: Item) -> bool:
    """Whether a message is a doctor's, made large to measure a link."""
    return isinstance(item, DoctorQuestion | DoctorAnswer) and len(item.pad) > 0


def _kind(item: Item) -> object:
    return item if isinstance(item, SendNew) else type(item)
