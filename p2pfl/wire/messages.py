"""The fifteen messages of neighbours, and the two pieces of news that ride in most of them.

The protocol's clock is the exchange number, round * phases + phase. The dataclasses are the schema: `codec` checks what comes from the wire
against exactly these types and ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, get_args

from pydantic import Field, Strict

SCHEMA: Final = 4
"""The schema that every member speaks; in the headers of its messages. A number that is not known is refused as "wrong_schema"."""

NEWEST_SCHEMA: Final = 5
"""The newest schema that is spoken here. It adds messages to the older one, which neighbours that announce it get; see `negotiation`."""

MAX_MERGED: Final = 16
"""Entries in a report. Nodes that keep the rules never have more than three."""

MAX_CHANNELS: Final = 16
MAX_RECORDS: Final = 32
"""Round records in one message."""

MAX_RECORD_BYTES: Final = 512

MAX_READY: Final = 16
"""Ready records, and receipts, in one message."""

MAX_READY_BYTES: Final = 2048
RECEIPT_BYTES: Final = 8

MAX_LARGE_BYTES: Final = 60_000
MAX_OUTPUTS: Final = 8

_LARGEST = 2**53 - 1  # exact in a float64 too, and far from overflowing an int64 when rounds are added
_LARGEST_63 = 2**63 - 1

Exchange = Annotated[int, Strict(), Field(ge=0, le=_LARGEST)]
LastExchange = Annotated[int, Strict(), Field(ge=-1, le=_LARGEST)]
"""An exchange, or -1 for "none yet"."""

Positive = Annotated[int, Strict(), Field(ge=1, le=_LARGEST_63)]
Natural = Annotated[int, Strict(), Field(ge=0, le=_LARGEST_63)]
Anew = Annotated[int, Strict(), Field(ge=0, le=_LARGEST)]
"""When a node was last started anew without its state, in milliseconds since 1970 by its own clock; 0: never."""

Flag = Annotated[bool, Strict()]
LARGEST_AMOUNT: Final = 3e38
"""Largest amount that fits into 32 bits: sums and squares of such numbers, by the thousand, are still numbers of 64 bits."""

Amount = Annotated[float, Strict(), Field(ge=0, le=LARGEST_AMOUNT)]
Digest = Annotated[bytes, Strict(), Field(min_length=32, max_length=32)]
StateDigest = Annotated[bytes, Strict(), Field(min_length=8, max_length=8)]
"""Stands for the values that a node's updates have led to: equal digests, equal values."""

StateDigests = tuple[StateDigest | None, StateDigest]
"""State digests of the values that an update continues, None for a full update, and of those that it leads to."""

Padding = Annotated[bytes, Strict(), Field(max_length=255)]
Name = Annotated[str, Strict(), Field(min_length=1, max_length=128)]
Reason = Annotated[str, Strict(), Field(pattern=r"\A[a-z][a-z_]{0,31}\z")]
"""Lower case words joined by underscores: safe to print and to count by."""

LargePadding = Annotated[bytes, Strict(), Field(max_length=MAX_LARGE_BYTES)]
Output = Annotated[float, Strict(), Field(ge=-LARGEST_AMOUNT, le=LARGEST_AMOUNT)]

SealedRecord = Annotated[bytes, Strict(), Field(min_length=65, max_length=MAX_RECORD_BYTES)]

SealedReady = Annotated[bytes, Strict(), Field(min_length=65, max_length=MAX_READY_BYTES)]
Receipt = Annotated[bytes, Strict(), Field(min_length=RECEIPT_BYTES, max_length=RECEIPT_BYTES)]

ChannelEntry = tuple[Name, Name, Positive]
"""A channel's name, its dtype, how many numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Report of what a node has durably done on one edge; facts that never change again, so that a repeated or late one does no harm."""

    closed_through: LastExchange
    """The last exchange that is over for me, merged or not."""
    merged: Annotated[tuple[Exchange, ...], Strict(), Field(max_length=MAX_MERGED)]
    """Exchanges in (confirmed, closed_through] whose message of yours I merged, rising. One that you have told me you did not
    merge may be left out."""
    confirmed: LastExchange
    """You have told me that you have acknowledged my reports through this exchange."""
    settled: LastExchange
    """I have acknowledged your reports through this exchange: I need to hear nothing more about it."""

    def __post_init__(self) -> None:
        low = self.confirmed
        for high in (*self.merged, self.closed_through + 1):
            if low >= high:
                raise ValueError(f"merged {self.merged}: expected rising exchanges in ({self.confirmed}, {self.closed_through}]")
            low = high
        if not self.confirmed <= self.settled <= self.closed_through:
            raise ValueError(f"settled {self.settled}: expected confirmed {self.confirmed} to closed_through {self.closed_through}")


NOTHING_SAID: Final = bytes(8)
"""State digest of the values before the first update: zeros."""

NOTHING_CLOSED: Final = Report(closed_through=-1, merged=(), confirmed=-1, settled=-1)
"""Before the first exchange."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StopNews:
    """News of a neighbour that the agreement to stop needs."""

    agreed_for: Exchange
    """Consensus counter of the round before the one that the message belongs to."""
    stop_round: Exchange | None
    """The smallest stop round announced so far, None where there is none."""


NO_STOP: Final = StopNews(agreed_for=0, stop_round=None)
"""Before the first round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Remembered:
    """The furthest that one node has heard another say of itself. It never goes back, unless the other one has lost its state."""

    anew: Anew
    report: Report


NOTHING_REMEMBERED: Final = Remembered(anew=0, report=NOTHING_CLOSED)
"""Memory of a neighbour that was never heard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """The handshake: who I am and what we must have in common."""

    code: ClassVar[int] = 1
    member: Name
    """Must be the member whose key authenticated the link."""
    study: Digest
    layout: Digest
    start: Digest
    """SHA-256 of the study, of the parameter layout, of the initial parameters."""
    incarnation: Positive
    """Drawn at random when a process starts, so that a restart is seen."""
    echo: Natural
    """The receiver's incarnation as far as I have heard, 0 if I have not."""
    is_open: Flag
    """I have heard a Hello that bears my incarnation. Until then I need an answer, and my last one may have been lost."""
    anew: Anew
    """When I was last started anew without my state, which my administrator agreed to."""
    remembered: Remembered
    """My memory of you. If you know less of yourself, you have lost state."""
    exchange: Exchange
    """Where I am."""
    report: Report
    stop: StopNews


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """A node's outgoing channels of one exchange; its first chunk of payload follows in the second frame."""

    code: ClassVar[int] = 2
    exchange: Exchange
    channels: Annotated[tuple[ChannelEntry, ...], Strict(), Field(min_length=1, max_length=MAX_CHANNELS)]
    size_bytes: Positive
    """Size of the whole payload. A receiver compares it with its own format and allocates from that alone."""
    digest: Digest
    """SHA-256 of the whole payload."""
    marks: StateDigests | None
    """None where none of its channels is encoded."""
    report: Report
    stop: StopNews
    pad: Padding
    """Fills the header up to a length that follows from channels and exchange alone, whatever the news."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A further piece of the payload of the last Update."""

    code: ClassVar[int] = 3
    exchange: Exchange
    offset: Positive
    """In bytes from the start of the payload."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResendRequest:
    """Request for an Update of this exchange, or for the part of it that is missing."""

    code: ClassVar[int] = 4
    exchange: Exchange
    whole: Flag
    """As a full update: I do not hold the values that the other one continues."""
    lost: Flag
    """I know that what you have sent of it is lost: something came that you sent later. Where it may still be on its way this is false."""
    offset: Natural
    """So many bytes of its payload are here, from its start."""
    digest: Digest | None
    """Digest of the payload that those bytes are of, as its Update announced it; None where none are here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """Where I am and what I know, said now and then while there is nothing else to say."""

    code: ClassVar[int] = 5
    exchange: Exchange
    report: Report
    stop: StopNews


@dataclass(frozen=True, kw_only=True, slots=True)
class Closing:
    """I have stopped, and stay connected only until you and I have closed our open exchanges."""

    code: ClassVar[int] = 6
    exchange: Exchange
    report: Report
    stop: StopNews
    reason: Reason
    """Why I stopped: "converged", "rounds"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodbye:
    """I leave, or I do not talk to you."""

    code: ClassVar[int] = 7
    reason: Reason
    """ "pausing", "finished", or what a Hello was refused for: "wrong_name", "wrong_study", "wrong_layout", "wrong_start",
    "state_lost"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Busy:
    """Not this exchange: I am in the middle of another one."""

    code: ClassVar[int] = 8
    exchange: Exchange


@dataclass(frozen=True, kw_only=True, slots=True)
class Records:
    """Round records of nodes, near and far, each under its own signature."""

    code: ClassVar[int] = 9
    sealed: Annotated[tuple[SealedRecord, ...], Strict(), Field(min_length=1, max_length=MAX_RECORDS)]
    """As `round_record` seals them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PushSum:
    """My part in a sum over all nodes, where these are too many to hear of each; see `push_sum`."""

    code: ClassVar[int] = 10
    round: Exchange
    """The round whose numbers are summed."""
    step: Exchange
    """How many rounds ago I began."""
    sum: Amount
    weight: Amount
    """All that I have given over this edge."""
    low: Amount | None
    high: Amount | None
    """The extreme ratios that I know of; None before my last step."""
    outage: Exchange
    hops: Exchange
    void: Flag
    """The sum comes to nothing: somebody has no number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """Answer to a ResendRequest: all of that Update has gone out before this message; what of it is not there is lost."""

    code: ClassVar[int] = 11
    exchange: Exchange
    whole: Flag
    """Whether it was the full update."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """How far nodes, near and far, are with their start, each under its own signature; said again until there is a receipt."""

    code: ClassVar[int] = 12
    sealed: Annotated[tuple[SealedReady, ...], Strict(), Field(max_length=MAX_READY)]
    """As `ready_record` seals them."""
    receipts: Annotated[tuple[Receipt, ...], Strict(), Field(max_length=MAX_READY)]
    """Receipts of records that have come from you."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProofRequest:
    """Request for the newest signed records of the members that are furthest: one member's word does not move this node."""

    code: ClassVar[int] = 13
    relayed: Flag
    """The sender asks for a neighbour of its own: answer with your own newest record, and ask nobody else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorQuestion:
    """Question of a doctor that changes nothing: what do you hold, what does your clock say, and how fast is the way between us?"""

    code: ClassVar[int] = 14
    number: Natural
    """Comes back with the answer."""
    pad: LargePadding
    """Makes the message large; the answer is made as large."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorAnswer:
    """Answer to a DoctorQuestion, in any state of the link."""

    code: ClassVar[int] = 15
    number: Natural
    clock: Exchange
    """Milliseconds since 1970 by my clock."""
    version: Name
    torch: Name
    """Versions of p2pfl and of torch, the latter as major.minor."""
    arithmetic: Natural
    """My arithmetic revision."""
    study: Digest
    layout: Digest
    start: Digest
    forward: Digest | None
    """SHA-256 of what my first model makes of the agreed numbers; None where it was not computed."""
    outputs: Annotated[tuple[Output, ...], Strict(), Field(max_length=MAX_OUTPUTS)]
    """The first of those numbers, by which a difference in rounding is told from another model."""
    pad: LargePadding


Message = (
    Hello
    | Update
    | Chunk
    | ResendRequest
    | Heartbeat
    | Closing
    | Goodbye
    | Busy
    | Records
    | PushSum
    | Sent
    | Ready
    | ProofRequest
    | DoctorQuestion
    | DoctorAnswer
)
News = Hello | Update | Heartbeat | Closing
"""Messages that carry `exchange`, `report` and `stop`."""

MESSAGES: Final[dict[int, type[Message]]] = {kind.code: kind for kind in get_args(Message)}
"""By type code. A code is never used for anything else again."""

SINCE: Final[dict[type[Message], int]] = {DoctorQuestion: 5, DoctorAnswer: 5}
"""Schemas of the messages that were added after the oldest one; only neighbours that announce it get them."""

SCHEMA_OF: Final[dict[int, int]] = {code: SINCE.get(kind, SCHEMA) for code, kind in MESSAGES.items()}
"""By type code, the schema that a message is of: the number in its header."""
