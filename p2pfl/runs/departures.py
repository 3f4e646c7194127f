"""Departures: ways in which a finished run was not as agreed, listed in summary.json and told by the exit code.

A departure is first written down as an event: events survive a restart, and `up` gathers those of all nodes. When the run ends, an event of
a kind that declares a departure becomes one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from p2pfl.runs.events import DepartureKind, EventKind, kind_of

DEPARTED: Final = 3
"""Exit code of a run that has ended, and not as agreed."""

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
