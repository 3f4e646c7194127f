"""When a run was good enough: after how many rounds, and after how many seconds where its records know seconds of the network."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from p2pfl.errors import ConfigError
from p2pfl.inspector.verdict import lower_is_better
from p2pfl.runs.records import RunRecords

AGREEMENT = "relative_consensus"
"""The consensus distance, after mixing, over the models' root mean square norm; of older runs, which lack it, the disagreement before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reached:
    """The first round after which a figure was good enough."""

    what: str
    wanted: float
    rounds: int | None
    """How many there had been, that one included; agreement is of the models after mixing in it. None: it was never so good."""
    simulated_s: float | None
    """When the last node had ended them; None also where the run has no clock."""


def course_of(run: RunRecords, what: str) -> dict[int, float]:
    """A figure by round: agreement, or the mean of a metric over the nodes whose metrics are recorded, where they were.

    Raises:
        ConfigError: no such figure; the message names those that there are.
    """
    if what == AGREEMENT:
        has_any = any(row.get("consensus_distance") is not None for row in run.rounds)
        key = "consensus_distance" if has_any else "rms_disagreement"
        rows = [(row["round"], row.get(key), row.get("rms_norm")) for row in run.rounds]
        return {number: distance / norm for number, distance, norm in rows if distance is not None and norm}
    values: defaultdict[int, list[float]] = defaultdict(list)
    for row in run.nodes:
        if (value := (row.get("metrics") or {}).get(what)) is not None:
            values[row["round"]].append(value)
    if not values:
        there = sorted({metric for row in run.nodes for metric in row.get("metrics") or ()})
        raise ConfigError(f"{what!r}: expected one of {', '.join([AGREEMENT, *there])}", "--reach")
    return {number: math.fsum(found) / len(found) for number, found in sorted(values.items())}


def reached(run: RunRecords, what: str, wanted: float) -> Reached:
    """The first round after which a figure was as good as wanted, or better.

    Raises:
        ConfigError: no such figure.
    """
    falls = what == AGREEMENT or lower_is_better(what)
    good = (number for number, value in course_of(run, what).items() if (value <= wanted if falls else value >= wanted))
    first = next(good, None)
    seconds = {row["round"]: row.get("simulated_s") for row in run.rounds}
    return Reached(
        what=what,
        wanted=wanted,
        rounds=None if first is None else first + 1,
        simulated_s=None if first is None else seconds.get(first),
    )
