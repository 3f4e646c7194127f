"""Whether a network agrees, how fast it came there, where it is stuck and when it was good enough: from the records alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from p2pfl.errors import ConfigError
from p2pfl.runs.records import RunRecords
from p2pfl.runs.summary_fields import lower_is_better
from p2pfl.runs.text import Row

MIN_FIT_POINTS = 3

_FLOOR = 100
"""A distance below this many units of rounding is noise and tells nothing about a rate."""

_SURE = 2.0
"""Standard errors to either side."""

_RECENT = 10
"""Rounds whose seconds stand for those to come."""

_MAX_SLOWEST = 10
_NEWEST_AMONG = 20_000  # rows

Basis = Literal["exact", "upper bound", "after mixing", "local"]

DISAGREEMENT, CONSENSUS = "disagreement (before mixing)", "consensus distance (after mixing)"
"""The names of the two distances on every page: of the models sent in a round, and of what each node had made of them."""

BASES: Mapping[Basis, str] = {
    "exact": DISAGREEMENT,
    "upper bound": f"{DISAGREEMENT}, upper bound",
    "after mixing": CONSENSUS,
    "local": "disagreement with the neighbours (before mixing)",
}
"""How a page calls the distance that it shows, round by round."""

AGREEMENT = "relative_consensus"
"""The consensus distance, after mixing, over the models' root mean square norm; of older runs, which lack it, the disagreement before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowNode:
    """How far one node still was from its neighbours in the last round."""

    node: str
    fraction: float
    """Fraction of the network's remaining disagreement, 0 to 1."""
    relative: float | None
    """The value that its own stop test compares with the tolerance: sqrt(disagreement / lambda_2(L)) / ||x_i||."""
    consensus_counter: int | None

    def as_row(self) -> Row:
        """The keys of `p2pfl inspect --json`."""
        return {"node": self.node, "share": self.fraction, "relative": self.relative, "agreed_for": self.consensus_counter}


@dataclass(frozen=True, kw_only=True, slots=True)
class Skip:
    """A neighbour that did not come in time."""

    node: str
    by: str
    rounds: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Convergence:
    """The course of a run. Lists run along `rounds`; distances are of the models sent in that round, before mixing; `basis` says more."""

    rounds: list[int]
    simulated_s: list[float | None]
    """When the last node had ended the round, on the network's own clock; None where it has none."""
    distance: list[float | None]
    """The disagreement, sqrt(1/n sum ||x_i - mean||**2) of the models sent, or what stands for it: see basis."""
    consensus: list[float | None]
    """The consensus distance: the same of the models after mixing, where somebody sees them all."""
    low: list[float | None]
    high: list[float | None]
    """Bounds that the nodes' own records give: sqrt(S / (n lambda_max(L))) and sqrt(S / (n lambda_2(L)))."""
    certified: list[tuple[int, float, float]]
    """Round, low and high where both are known: in rounds without a missed message. Not to be joined over gaps: see `gaps`."""
    basis: Basis
    """Tells what `distance` is: the "exact" value or its "upper bound"; where both are unknown the consensus distance "after mixing", or
    what a "local" node saw of its neighbours, sqrt(S)."""
    bound: list[float | None]
    """The spectral bound: the distance of the first round that only mixes, times |lambda| to the power of the rounds since."""
    first_mixing_round: int | None
    predicted_rate: float | None
    """max(|lambda_2|, |lambda_min|) of the mixing matrix: no start contracts more slowly in the long run."""
    fitted_rate: float | None
    """Least squares on the logarithm of distance over the rounds that only mix."""
    fitted_points: int
    fit_missing: str | None
    """Why there is no fitted rate."""
    relative: float | None
    """The last distance over the models' root mean square norm, which the tolerance is for."""
    relative_consensus: float | None
    """The last consensus distance in the same way: of a run that has ended as its summary has it."""
    tolerance: float | None
    rounds_to_go: int | None
    """About how many more rounds of mixing reach the tolerance; None where that is not foreseeable or not needed."""
    rounds_to_go_between: tuple[int, int | None] | None
    """The fewest and the most that the records allow; None in it: they do not say that it ever will."""
    seconds_to_go: float | None
    """How long that many rounds take if they take as long as the last ones that mixed."""
    slowest: list[SlowNode]
    """The nodes with the largest disagreement with their neighbours in the last round, the largest first."""
    skipped: list[Skip]
    """The most frequent first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reached:
    """The first round after which a figure was good enough."""

    what: str
    wanted: float
    rounds: int | None
    """How many there had been, that one included; agreement is of the models after mixing in it. None: it was never so good."""
    simulated_s: float | None
    """When the last node had ended them; None also where the run has no clock."""


def convergence(run: RunRecords) -> Convergence:
    """The course of a run so far; of a node's own folder that of the network, as far as the node came to know it."""
    rows, graph = (run.network or run.rounds), run.topology or {}
    basis, distance = _distances(rows)
    mixing = _only_mixing(rows)
    first = next((t for t, mixes in enumerate(mixing) if mixes and distance[t]), None)
    predicted = max((abs(value) for value in (graph.get("lambda_2"), graph.get("lambda_min")) if value is not None), default=None)
    scales = _resolutions(run, rows)
    points = [(row["round"], d) for row, d, mixes, scale in zip(rows, distance, mixing, scales, strict=True) if mixes and d and d > scale]
    fitted, missing = fit_rate(points, any(mixing))
    consensus = [row.get("consensus_distance") for row in rows]
    rounds, low, high = [row["round"] for row in rows], *([row.get(key) for row in rows] for key in ("bound_low", "bound_high"))
    relative, recorded = _relative(rows, distance), (run.summary or {}).get("relative_consensus")
    tolerance = (run.experiment.get("stop") or {}).get("relative_consensus")
    to_go, between = None, None
    if mixing and mixing[-1] and run.summary is None:
        to_go, between = _forecast(relative, tolerance, points, fitted, predicted)
    return Convergence(
        rounds=rounds,
        simulated_s=[row.get("simulated_s") for row in rows],
        distance=distance,
        consensus=consensus,
        low=low,
        high=high,
        certified=[(t, a, b) for t, a, b in zip(rounds, low, high, strict=True) if a is not None and b is not None],
        basis=basis,
        bound=_spectral_bound(rows, distance, first, predicted),
        first_mixing_round=rows[first]["round"] if first is not None else None,
        predicted_rate=predicted,
        fitted_rate=fitted,
        fitted_points=len(points),
        fit_missing=missing,
        relative=relative,
        relative_consensus=recorded if recorded is not None else _relative(rows, consensus),
        tolerance=tolerance,
        rounds_to_go=to_go,
        rounds_to_go_between=between,
        seconds_to_go=to_go * pace if to_go is not None and (pace := _seconds_a_round(rows, mixing)) is not None else None,
        slowest=_slowest(run.nodes, graph.get("laplacian_lambda_2")),
        skipped=_skips(run.nodes),
    )


def fit_rate(points: Sequence[tuple[int, float]], mixes: bool = True) -> tuple[float | None, str | None]:
    """The factor by which a distance shrinks in a round, or the reason why none can be told.

    Distances are above zero and above the floor of rounding; *mixes* tells whether there was a round that only mixed at all.
    """
    if not mixes:
        return None, "no round has mixed without training yet"
    if len(points) < MIN_FIT_POINTS:
        return None, f"{len(points)} of at least {MIN_FIT_POINTS} mixing rounds lie above the floor of rounding"
    rounds, distances = np.array(points, dtype=np.float64).T
    slope = np.polyfit(rounds - rounds.mean(), np.log(distances), 1)[0]
    return float(np.exp(slope)), None


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


def _distances(rows: Sequence[Row]) -> tuple[Basis, list[float | None]]:
    """One kind of value for the whole run: two kinds in one curve would show a jump that never was."""
    if rows and all(row.get("rms_disagreement") is not None for row in rows):
        return "exact", [row["rms_disagreement"] for row in rows]
    if any(row.get("bound_high") is not None for row in rows):
        return "upper bound", [row.get("bound_high") for row in rows]
    if rows and all(row.get("consensus_distance") is not None for row in rows):
        return "after mixing", [row["consensus_distance"] for row in rows]
    return "local", [math.sqrt(s) if (s := row.get("disagreement")) is not None else None for row in rows]


def _only_mixing(rows: Sequence[Row]) -> list[bool]:
    """Which rounds had no local steps: those that settle, and all of a task that has nothing to train."""
    trains = any(row.get("loss") is not None for row in rows)
    return [row["kind"] == "settle" or not trains for row in rows]


def _resolutions(run: RunRecords, rows: Sequence[Row]) -> list[float]:
    """Below which distance each round's value is rounding."""
    trains = any(row.get("loss") is not None for row in rows)
    # a task without training is plain averaging, whose own default is float64
    dtype = run.experiment.get("dtype") or ("float32" if trains else "float64")
    unit = float(np.finfo(np.dtype(dtype)).eps)
    return [_FLOOR * unit * (row.get("rms_norm") or 0.0) for row in rows]


def _spectral_bound(rows: Sequence[Row], distance: Sequence[float | None], first: int | None, rate: float | None) -> list[float | None]:
    start = distance[first] if first is not None else None
    if first is None or start is None or rate is None:
        return [None] * len(rows)
    begin = rows[first]["round"]
    return [start * rate ** (row["round"] - begin) if row["round"] >= begin else None for row in rows]


def _relative(rows: Sequence[Row], distance: Sequence[float | None]) -> float | None:
    if not rows or distance[-1] is None or not rows[-1].get("rms_norm"):
        return None
    return float(distance[-1] / rows[-1]["rms_norm"])


def _forecast(
    relative: float | None, tolerance: float | None, points: Sequence[tuple[int, float]], fitted: float | None, predicted: float | None
) -> tuple[int | None, tuple[int, int | None] | None]:
    """Rounds left, and between how many they may be.

    The later half of the rounds tells the rate best, as what contracts fast is gone by then; how sure it is follows from how they scatter
    about it, from the rate of all rounds and from the spectrum, to which every rate comes in the end.
    """
    if not relative or not tolerance or relative <= tolerance:
        return None, None
    late = points[len(points) // 2 :]
    best, error = _late_rate(late) if len(late) >= MIN_FIT_POINTS else (fitted or predicted, 0.0)
    if not best or best >= 1:
        return None, None
    rates = [best * math.exp(-_SURE * error), best * math.exp(_SURE * error), *(rate for rate in (fitted, predicted) if rate)]
    needed = math.log(tolerance / relative)
    slowest, fastest = max(rates), min(rates)
    return math.ceil(needed / math.log(best)), (
        math.ceil(needed / math.log(fastest)),
        math.ceil(needed / math.log(slowest)) if slowest < 1 else None,
    )


def _late_rate(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """The factor of a round, and the standard error of its logarithm."""
    rounds, distances = np.array(points, dtype=np.float64).T
    centred, logs = rounds - rounds.mean(), np.log(distances)
    slope = float((centred * logs).sum() / (centred**2).sum())
    left = logs - logs.mean() - slope * centred
    return math.exp(slope), math.sqrt(float((left**2).sum()) / max(len(points) - 2, 1) / float((centred**2).sum()))


def _seconds_a_round(rows: Sequence[Row], mixing: Sequence[bool]) -> float | None:
    """Mean duration of the last mixing-only rounds: on the network's own clock where it has one, else by the records' seconds."""
    last = [row for row, mixes in zip(rows, mixing, strict=True) if mixes][-_RECENT:]
    if len(last) > 1 and all(row.get("simulated_s") is not None for row in last):
        return float((last[-1]["simulated_s"] - last[0]["simulated_s"]) / (last[-1]["round"] - last[0]["round"]))
    spent = [math.fsum(value for value in row["seconds"].values() if value is not None) for row in last if row.get("seconds")]
    return float(np.median(spent)) if spent else None


def _slowest(rows: Sequence[Row], lambda_2: float | None) -> list[SlowNode]:
    """By each node's newest row, where these are of about the same round: a node's view has some that are older than its own."""
    newest = {row["node"]: row for row in sorted(rows[-_NEWEST_AMONG:], key=lambda row: row["round"])}
    views = any("age_s" in row for row in newest.values())
    last = max((row["round"] for row in newest.values()), default=None)
    latest = [row for row in newest.values() if (views or row["round"] == last) and row.get("disagreement") is not None]
    total = math.fsum(row["disagreement"] for row in latest)
    if not total:
        return []
    ordered = sorted(latest, key=lambda row: (-row["disagreement"], row["node"]))
    return [
        SlowNode(
            node=row["node"],
            fraction=row["disagreement"] / total,
            relative=math.sqrt(row["disagreement"] / lambda_2) / row["norm"] if lambda_2 and row.get("norm") else None,
            consensus_counter=row.get("agreed_for"),
        )
        for row in ordered[:_MAX_SLOWEST]
    ]


def _skips(rows: Sequence[Row]) -> list[Skip]:
    rounds: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for row in rows:
        for node in row.get("skipped") or ():
            rounds[node, row["node"]].append(row["round"])
    found = [Skip(node=node, by=by, rounds=sorted(when)) for (node, by), when in rounds.items()]
    return sorted(found, key=lambda skip: (-len(skip.rounds), skip.node, skip.by))
