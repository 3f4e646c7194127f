"""Where a curve over rounds has to break because nothing is known there, and the reason if one is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from p2pfl.inspector.convergence import Convergence
from p2pfl.inspector.outages import Outages, outages
from p2pfl.inspector.run_state import names_text
from p2pfl.runs.records import RunRecords

_AROUND = 3
_TIMES = 2
"""A step between recorded rounds that is longer than so many usual ones is a gap."""
_NAMED = 2

Point = tuple[int, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """Rounds between two known ones of which nothing is certified."""

    first: int
    last: int
    why: str
    """Two to five words, such as "not certified: hospital-5 offline"."""


def jumps(rounds: Sequence[int]) -> set[int]:
    """Places before which rounds are missing: rounds recorded in regular steps, of whatever length, have no gap between them."""
    steps = [after - before for before, after in pairwise(rounds)]
    found = set()
    for place, step in enumerate(steps):
        before, after = steps[max(0, place - _AROUND) : place], steps[place + 1 : place + 1 + _AROUND]
        usual = max((median(some) for some in (before, after) if some), default=step)
        if step > _TIMES * usual:
            found.add(place + 1)
    return found


def pieces(rounds: Sequence[int], values: Sequence[float | None]) -> list[list[Point]]:
    """The curve in pieces without a gap: it breaks where a round has no value and where rounds are missing."""
    found: list[list[Point]] = [[]]
    broken = jumps(rounds)
    for place, (number, value) in enumerate(zip(rounds, values, strict=True)):
        if place in broken or value is None:
            found.append([])
        if value is not None:
            found[-1].append((number, value))
    return [piece for piece in found if piece]


def broken_line(rounds: Sequence[int], values: Sequence[float | None]) -> tuple[list[int | None], list[float | None]]:
    """The curve with None where rounds are missing, as plotting libraries break lines."""
    at, found, broken = list[int | None](), list[float | None](), jumps(rounds)
    for place, (number, value) in enumerate(zip(rounds, values, strict=True)):
        at += [None, number] if place in broken else [number]
        found += [None, value] if place in broken else [value]
    return at, found


def isolated_points(rounds: Sequence[int], values: Sequence[float | None]) -> list[Point]:
    """Points between two gaps, which a line does not show."""
    return [piece[0] for piece in pieces(rounds, values) if len(piece) == 1]


def certified_pieces(course: Convergence) -> list[list[tuple[int, float, float]]]:
    """Rounds in a row with both bounds: (round, low, high)."""
    lows = {number: low for number, low, _ in course.certified}
    highs = {number: high for number, _, high in course.certified}
    found = pieces(course.rounds, [highs.get(number) for number in course.rounds])
    return [[(number, lows[number], high) for number, high in piece] for piece in found]


def gaps(run: RunRecords, course: Convergence) -> list[Gap]:
    """Rounds about which the nodes' records certify nothing, although they do before or after; empty where they never do."""
    known = certified_pieces(course)
    if not known:
        return []
    ends = [(piece[0][0], piece[-1][0]) for piece in known]
    between = [(before[1] + 1, after[0] - 1) for before, after in pairwise(ends)]
    first, last = course.rounds[0], course.rounds[-1]
    spans = [(first, ends[0][0] - 1), *between, (ends[-1][1] + 1, last)]
    explained = outages(run)
    return [Gap(first=begin, last=end, why=_why(run, course, explained, begin, end)) for begin, end in spans if begin <= end]


def _why(run: RunRecords, course: Convergence, away: Outages, begin: int, end: int) -> str:
    absent = [outage for outage in away.found if outage.first <= end + 1 and outage.last >= begin - 1]
    names = list(dict.fromkeys(outage.node for outage in absent))
    if not names:
        rows = [row for row in run.network if begin <= row["round"] <= end]
        names = sorted({str(name) for row in rows for name in row.get("missing") or ()})
        word = "not heard of"
    else:
        word = "late" if all(outage.kind == "late" for outage in absent) else "offline"
        word = next((kind for kind in ("unheard", "not started") if all(outage.kind == kind for outage in absent)), word)
    if names:
        return f"not certified: {names_text(names, _NAMED)} {word}"
    if any(skip for skip in course.skipped if any(begin <= number <= end for number in skip.rounds)):
        return "not certified: messages missed"
    return "not certified" if any(begin <= number <= end for number in course.rounds) else "no records"
