"""Kinds of events that a run records beside its numbers, each with the departure that it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Literal, Self

from p2pfl.runs.text import Row

DepartureKind = Literal["members_missing", "rounds_missed", "state_lost", "non_finite", "not_mixed"]


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
