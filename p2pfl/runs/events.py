"""Events that a run records beside its numbers, and departures: ways in which it was not as agreed, told by summary.json and the exit code.

Events survive a restart, and `up` gathers those of all nodes. When the run ends, an event of a kind that declares a departure becomes one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Literal, Self

from p2pfl.runs.text import Row

DepartureKind = Literal["members_missing", "rounds_missed", "state_lost", "non_finite", "not_mixed"]

DEPARTED: Final = 3
"""Exit code of a run that has ended, and not as agreed."""


class EventKind(StrEnum):
    """Kind of an event, named on disk by its value; a run of another version may hold kinds that are not here."""

    departure: DepartureKind | None
    """The way in which a run with such an event was not as agreed; None: it says nothing of that."""

    sentence: str
    """How many such events are told together, with the first as the example; empty: each is told by its own detail."""

    is_alarming: bool
    """Whether somebody should look at it at once."""

    def __new__(
        cls, text: str, departure: DepartureKind | None = None, sentence: str = "", is_alarming: Literal["", "alarming"] = ""
    ) -> Self:
        """Make a kind with its facts, as the lines below list them."""
        member = str.__new__(cls, text)
        member._value_ = text
        member.departure, member.sentence, member.is_alarming = departure, sentence, bool(is_alarming)
        return member

    STARTED = "started"
    RESUMED = "resumed"
    CONTINUED = "continued"
    """This node begins in a study that continues another one: with its model of that study, or as a new member."""
    CONTINUED_WITHOUT = "continued_without", "state_lost", "", "alarming"
    """This node should go on from its model of the older study, and begins without it."""
    STARTED_ANEW = "started_anew", "state_lost", "", "alarming"
    START_AGREED = "start_agreed"
    STARTED_WITHOUT = "started_without"
    NOT_STARTED = "not_started"
    PAUSED = "paused"
    INTERRUPTED = "interrupted"
    DIED = "died"

    HANDSHAKE = "greeted"
    LEFT = "left"
    CAME_BACK = "returned"
    WAITING = "waiting"
    LINK_DOWN = "link_down"
    LINK_UP = "link_up"
    REFUSED = "refused", None, "", "alarming"
    EXCLUDED = "excluded", None, "", "alarming"
    """A neighbour is disconnected because it sends too much: from then on it is written of as of one that repeats."""

    SKIPPED = "skipped"
    RESYNCHRONISED = "resynchronised"
    ROLLED_BACK = "took_back"
    HELD = "held", "rounds_missed"
    JUMPED = "jumped", "rounds_missed", "jumped over rounds"
    HURRIED = "hurried", "rounds_missed"
    INEXACT = "inexact", "rounds_missed"
    ROUNDS_ALONE = "rounds_alone", "rounds_missed"
    ALONE = "alone"

    AGREED = "agreed"
    STOPPED_LATE = "stopped_late", "rounds_missed", "did not hear in time that the network had agreed to stop"
    UNACKNOWLEDGED = "unsettled", "rounds_missed"
    GONE = "gone", "rounds_missed"
    END_UNKNOWN = "end_unknown", "rounds_missed"

    STATE_LOST = "state_lost", "state_lost", "", "alarming"
    STATE_RESTORED = "state_restored"
    DISK_FULL = "disk_full", None, "", "alarming"
    DISK_FREE = "disk_free"
    NOT_SPILLED = "not_spilled", None, "", "alarming"
    """There was no room on the disk for neighbours' updates, which then take memory."""

    DIVERGED = "diverged", "non_finite", "training became non-finite and was rolled back"
    NO_LOSS = "no_loss", "non_finite", "the training loss was infinite or no number, while the weights stayed finite"
    OVERFLOW = "overflow", "non_finite", "a sum of what neighbours sent was not finite and was not taken in"
    GAMMA_HALVED = "gamma_halved"
    GAMMA_EXHAUSTED = "gamma_exhausted", "not_mixed", "choco has halved its gamma as often as it may, and hardly mixes"
    RUNNING_AWAY = "running_away", "not_mixed", "choco's exchange drives the models apart at the gamma that was set"

    FAR_UPDATE = "far_update", None, "", "alarming"
    """A neighbour's update is unusually far from this node's model."""
    EQUIVOCATION = "equivocation", None, "", "alarming"
    """A member has signed two different updates of one round."""
    UPDATE_DIFFERS = "update_differs", None, "", "alarming"
    """A neighbour has sent another update here than it has signed."""
    UNMEASURED = "unmeasured"
    DIFFERENCE_ACCEPTED = "difference_accepted"
    """This site differs from the study's result contract and has accepted that."""


def kind_of(event: Mapping[str, Any]) -> EventKind | None:
    """Kind of an event that was read from disk; None for one that only another version writes."""
    try:
        return EventKind(event["event"])
    except ValueError:
        return None


def training_rows(number: int, diverged: Sequence[str], without_loss: Sequence[str]) -> list[Row]:
    """Rows of events.jsonl for nodes whose training of a round became non-finite, or gave no finite loss."""
    detail = f"round {number}: training became non-finite and was rolled back; lower optimizer.lr or set clip_norm"
    rows = [event_row(EventKind.DIVERGED, number, name, detail) for name in diverged]
    return rows + [event_row(EventKind.NO_LOSS, number, name, f"round {number}") for name in without_loss]


def event_row(kind: str, number: int, node: str, detail: str) -> Row:
    """Row of events.jsonl for an event at a node in a round; the time is added when it is written."""
    return {"round": number, "node": node, "event": kind, "detail": detail}


_NEVER_ASKED_FOR = frozenset({"non_finite", "not_mixed"})
_OF_MIXING = frozenset({EventKind.JUMPED, EventKind.STOPPED_LATE})
_NAMED = 5
_LISTED = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Departure:
    """One way in which a run was not as agreed."""

    kind: DepartureKind
    """members_missing: who was not there at the start. rounds_missed: rounds were jumped over or held, or a node did not come back.
    state_lost: a node's past was lost or rolled back. non_finite: weights or a loss became infinite or no number.
    not_mixed: the exchange drove the models apart, or was made so small that it hardly mixes."""

    detail: str
    """A sentence without a full stop that names the nodes."""

    def as_row(self) -> dict[str, str]:
        """Convert to a row of summary.json."""
        return {"kind": self.kind, "detail": self.detail}


def departures_of_events(
    events: Iterable[Mapping[str, Any]], *, simulated: bool = False, agreed_from: int | None = None
) -> list[Departure]:
    """Derive departures from events, each once, in the order of their first events.

    Args:
        events: rows of events.jsonl, of one node or of many; those of other kinds are passed over.
        simulated: outages and losses are what was asked for, so that only what became non-finite, or did not mix, is a departure.
        agreed_from: the first round that only mixes, of a network that has agreed to stop: what it agreed on holds, whoever jumped over
            such rounds or mixed on for some more. None: it has not agreed.
    """
    found: dict[tuple[EventKind, str], list[Mapping[str, Any]]] = defaultdict(list)
    seen = set()
    for event in events:
        kind = kind_of(event)
        if kind == EventKind.STATE_RESTORED:
            _forget_lost_state(found, event)
        if kind is None or kind.departure is None:
            continue
        same = event.get("round"), event["node"], kind, event.get("detail")
        is_harmless = agreed_from is not None and kind in _OF_MIXING and int(event.get("round", 0)) >= agreed_from
        is_asked_for = simulated and kind.departure not in _NEVER_ASKED_FOR
        if same not in seen and not is_harmless and not is_asked_for:
            seen.add(same)  # a run that is resumed goes through some rounds again
            found[kind, "" if kind.sentence else str(event.get("detail", ""))].append(event)
    listed: list[Departure] = []
    for kind in dict.fromkeys(kind for kind, _ in found):
        told = [_told(kind, same) for (of, _), same in found.items() if of == kind]
        if len(told) > _LISTED:
            told = [*told[:_LISTED], f"{len(told) - _LISTED} more of the kind {kind}, which events.jsonl holds"]
        assert kind.departure is not None
        listed += [Departure(kind=kind.departure, detail=detail) for detail in told]
    return listed


def _forget_lost_state(found: dict[tuple[EventKind, str], list[Mapping[str, Any]]], restored: Mapping[str, Any]) -> None:
    """Drop the departure of a lost state that has been restored: details of both events begin with the member's name."""
    name = str(restored.get("detail", "")).partition(":")[0]
    for key in [key for key in found if key[0] == EventKind.STATE_LOST and key[1].startswith(f"{name}:")]:
        found[key] = [event for event in found[key] if event["node"] != restored["node"]]
        if not found[key]:
            del found[key]


def departure_rows(departures: Iterable[Departure]) -> list[dict[str, str]]:
    """Convert departures to rows of summary.json, each once."""
    return [departure.as_row() for departure in dict.fromkeys(departures)]


def departures_in(summary: Mapping[str, Any] | None) -> list[str]:
    """Read the sentences on departures from a summary; none from one that an earlier version wrote."""
    listed: Sequence[Any] = (summary or {}).get("departures") or ()
    return [str(each.get("detail") or each.get("kind")) if isinstance(each, Mapping) else str(each) for each in listed]


def exit_code_of(summary: Mapping[str, Any] | None) -> int:
    """Derive a run's exit code from its summary: 3 where it has ended, and not as agreed, else 0."""
    return DEPARTED if departures_in(summary) else 0


def _told(kind: EventKind, same: Sequence[Mapping[str, Any]]) -> str:
    """Put events that are alike into one sentence."""
    nodes = dict.fromkeys(str(event["node"]) for event in same)
    named, more = ", ".join(list(nodes)[:_NAMED]), len(nodes) - _NAMED
    who = f"{named} and {more:,} more" if more > 0 else named
    first = str(same[0].get("detail", ""))
    if not kind.sentence:
        return f"{who}: {first.removeprefix(f'{who}: ')}" if first else f"{who}: {kind.replace('_', ' ')}"
    times = f"{len(same):,} times, first " if len(same) > 1 else ""
    return f"{who}: {kind.sentence} ({times}{first})"
