"""The node or edge that costs a network most, and what would help: found by replaying the recorded times of its rounds.

Of nodes that go in step, node i sends its update of round r + 1 at

    s_i(r + 1) = max(s_i(r), max_j s_j(r) + d_ji(r)) + b_i(r)

where the maximum is over its neighbours, d_ji is the way of j's update and b_i all that i does itself from one merge to its next update.
b_i is recorded. The ways follow from how much later than its own each node's update came: what both ends of an edge recorded of a round
sums to d_ij + d_ji, whatever their clocks say, and each way counts half of it. A replay with some times replaced predicts the round's
seconds without them. Where the replay of the times as they are is not what was recorded, nothing is said.

Shapes: R rounds, N nodes, E edges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from p2pfl.inspector.cells import bytes_text, seconds_text
from p2pfl.inspector.utilisation import newest_training
from p2pfl.runs.records import RunRecords
from p2pfl.topology import Topology, rounds_to

Floats = NDArray[np.float64]

STANDS_OUT = 0.1
"""Fraction of a round that a node or an edge must cost beyond an ordinary one to be named, and that a remedy must save."""
_AGREES = 0.2
"""Relative difference between the recorded and the replayed seconds of a round from which on the records explain nothing."""
_FEWEST_ROUNDS = 5
_FEWEST_NODES = 3
_MOST_TRIED = 8
"""Nodes and edges that are tried, those furthest from the ordinary."""
_MOST_NODES = 400
"""Nodes up to which graphs are compared by their eigenvalues."""
_MOST_WARMED_UP = 200
_NARROW_FROM_BYTES = 2**18
"""Size of an update below which no link is narrow: it is far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """One way to save the seconds that a node or an edge costs."""

    kind: Literal["as the others", "no waiting", "graph", "local steps", "compressor"]
    sentence: str
    gain: float
    """Fraction of the seconds that it saves, as predicted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bottleneck:
    """The node or the edge that costs a network most."""

    kind: Literal["training", "disk", "edge"]
    names: tuple[str, ...]
    """The node, or both ends of the edge."""
    sentence: str
    round_s: float
    """Recorded seconds of a round."""
    remedies: tuple[Remedy, ...]
    """Those that would save anything worth it, the best first."""
    method: str
    """How the gains were computed."""

    @property
    def sentences(self) -> list[str]:
        """All of it in sentences; how it was computed stands last."""
        return [self.sentence, *(remedy.sentence for remedy in self.remedies), self.method]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Times:
    """Recorded times of some rounds in a row."""

    names: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    first: int
    parts_RN: Mapping[str, Floats]
    ways_RE: Floats
    """Seconds of an update's way over each edge; NaN where no round tells it."""
    round_s: float
    """Mean recorded seconds of a round, of the median node."""
    update_bytes: float

    def busy(self) -> Floats:
        """Sum the seconds that each node was busy itself, (R, N)."""
        return sum((each for part, each in self.parts_RN.items() if part != "wait"), np.zeros_like(self.parts_RN["wait"]))

    def replay(self, busy_RN: Floats | None = None, ways_RE: Floats | None = None, without: Sequence[int] = (), away: int = -1) -> float:
        """Predict the mean seconds of a round with other times, without some edges, or without a node."""
        busy_RN = self.busy() if busy_RN is None else busy_RN
        ways_RE = np.nan_to_num(self.ways_RE if ways_RE is None else ways_RE)
        kept = [k for k, ends in enumerate(self.edges) if k not in without and away not in ends]
        ends = np.array([self.edges[k] for k in kept], dtype=np.int64).reshape(-1, 2)
        senders, receivers = np.concatenate([ends[:, 0], ends[:, 1]]), np.concatenate([ends[:, 1], ends[:, 0]])
        counted = [i for i in range(len(self.names)) if i != away]
        sent_N, begun = np.zeros(len(self.names)), 0.0
        # a delay reaches nodes far away after as many rounds: so many go before, with all nodes begun together
        passes = 1 + -(-min(len(self.names), _MOST_WARMED_UP) // len(busy_RN))
        for _ in range(passes):
            begun = float(sent_N[counted].mean())
            for busy_N, ways_E in zip(busy_RN, ways_RE[:, kept], strict=True):
                came_N = sent_N.copy()
                np.maximum.at(came_N, receivers, sent_N[senders] + np.concatenate([ways_E, ways_E]))
                sent_N = came_N + busy_N
        return (float(sent_N[counted].mean()) - begun) / len(busy_RN)


def bottleneck(run: RunRecords) -> Bottleneck | None:
    """Find the node or edge that costs most; None where nothing stands out, or the records do not tell."""
    times = _times(run)
    if times is None:
        return None
    now_s = times.replay()
    if not abs(now_s - times.round_s) <= _AGREES * times.round_s:
        return None
    best = max(_candidates(times, now_s), key=lambda found: found[0], default=None)
    if best is None or best[0] < STANDS_OUT * now_s:
        return None
    saved_s, kind, place = best
    rounds = f"rounds {times.first}-{times.first + len(times.ways_RE) - 1}"
    method = (
        f"Gains are computed by a replay of the recorded times of {rounds}, with these changed. The replay of the times as they are gives "
        f"{seconds_text(now_s)} a round; recorded were {seconds_text(times.round_s)}."
    )
    if kind == "edge":
        return _of_edge(run, times, place, now_s, saved_s, method)
    return _of_node(times, kind, place, now_s, saved_s, method)


def _times(run: RunRecords) -> _Times | None:
    """Times of the newest rounds of which every node has a row; None where these are too few, or nodes do not go in step."""
    graph = run.topology or {}
    names = tuple(map(str, graph.get("nodes") or ()))
    pace = (run.experiment.get("pace") or {}).get("name", "synchronous")
    if len(names) < _FEWEST_NODES or pace != "synchronous":
        return None
    rows: dict[int, dict[str, Any]] = {}
    for row in newest_training(run):
        rows.setdefault(int(row["round"]), {})[str(row["node"])] = row
    numbers = sorted(number for number, found in rows.items() if found.keys() >= set(names))
    numbers = [number for place, number in enumerate(numbers) if numbers[-1] - number == len(numbers) - 1 - place]  # the last in a row
    if len(numbers) < _FEWEST_ROUNDS:
        return None
    table = [[rows[number][name] for name in names] for number in numbers]
    parts = sorted({part for row in table[-1] for part in row["seconds"]} | {"train", "wait", "checkpoint"})
    parts_RN = {part: np.array([[float(row["seconds"].get(part, 0.0)) for row in line] for line in table]) for part in parts}
    edges = tuple(dict.fromkeys((min(i, j), max(i, j)) for i, j, _ in graph.get("edges") or () if i != j))
    ways_RE = np.array([[_way(line[i], line[j], names[i], names[j]) for i, j in edges] for line in table], dtype=np.float64)
    ways_RE = _filled(ways_RE.reshape(len(table), len(edges)))
    degrees = np.bincount(np.array(edges, dtype=np.int64).reshape(-1), minlength=len(names)).clip(min=1)
    sizes = [float(row["bytes_sent"]) / degree for line in table for row, degree in zip(line, degrees, strict=True)]
    return _Times(
        names=names,
        edges=edges,
        first=numbers[0],
        parts_RN=parts_RN,
        ways_RE=ways_RE,
        round_s=float(np.median(sum(parts_RN.values(), np.zeros(len(names))).mean(axis=0))),
        update_bytes=float(np.median(sizes)),
    )


def _way(one: Mapping[str, Any], other: Mapping[str, Any], one_name: str, other_name: str) -> float:
    """Half of the way there and back, by what both ends recorded; NaN where one of them recorded nothing."""
    late = (one.get("lateness") or {}).get(other_name), (other.get("lateness") or {}).get(one_name)
    return math.nan if None in late else max(0.0, (float(late[0]) + float(late[1])) / 2)  # type: ignore[arg-type]  # neither is None


def _filled(ways_RE: Floats) -> Floats:
    """Put the median of an edge in the place of rounds that do not tell it; an edge that no round tells stays unknown."""
    known_E = ~np.isnan(ways_RE).all(axis=0)
    medians_E = np.full(ways_RE.shape[1], np.nan)
    if known_E.any():
        medians_E[known_E] = np.nanmedian(ways_RE[:, known_E], axis=0)
    return np.where(np.isnan(ways_RE), medians_E, ways_RE)


def _candidates(times: _Times, now_s: float) -> Iterator[tuple[float, Literal["training", "disk", "edge"], int]]:
    """Seconds of a round that each node or edge costs beyond an ordinary one, for those furthest from the ordinary."""
    excess: list[tuple[float, Literal["training", "disk", "edge"], int]] = []
    for kind, part in (("training", "train"), ("disk", "checkpoint")):
        seconds_RN = times.parts_RN[part]
        ordinary = np.median(seconds_RN, axis=1, keepdims=True)
        excess += [(float(over), kind, i) for i, over in enumerate((seconds_RN - ordinary).mean(axis=0))]  # type: ignore[misc]  # of two
    if len(times.edges) > 1 and not np.isnan(times.ways_RE).any():
        ordinary = np.median(times.ways_RE, axis=1, keepdims=True)
        excess += [(float(over), "edge", k) for k, over in enumerate((times.ways_RE - ordinary).mean(axis=0))]
    for over, kind, place in sorted(excess, reverse=True)[:_MOST_TRIED]:
        if over > 0:
            yield now_s - times.replay(*_as_the_others(times, kind, place)), kind, place


def _as_the_others(times: _Times, kind: str, place: int) -> tuple[Floats, Floats]:
    """Times in which one node or edge takes no longer than the median one, round by round."""
    part = {"training": "train", "disk": "checkpoint"}.get(kind)
    if part is None:
        ways_RE = times.ways_RE.copy()
        ways_RE[:, place] = np.minimum(ways_RE[:, place], np.median(ways_RE, axis=1))
        return times.busy(), ways_RE
    seconds_RN = times.parts_RN[part]
    busy_RN = times.busy()
    busy_RN[:, place] -= np.maximum(0.0, seconds_RN[:, place] - np.median(seconds_RN, axis=1))
    return busy_RN, times.ways_RE


def _of_node(times: _Times, kind: Literal["training", "disk"], place: int, now_s: float, saved_s: float, method: str) -> Bottleneck:
    name, part = times.names[place], "train" if kind == "training" else "checkpoint"
    own_s = float(times.parts_RN[part][:, place].mean())
    others_s = float(np.median(np.delete(times.parts_RN[part], place, axis=1).mean(axis=0)))
    does = "trains for" if kind == "training" else "writes its checkpoint for"
    means = "a faster machine, or fewer rows in a batch" if kind == "training" else "a faster disk"
    remedies = [
        Remedy(
            kind="as the others",
            gain=saved_s / now_s,
            sentence=f"If it took as long as the median node ({means}), a round would take {_changed(now_s, now_s - saved_s)}.",
        )
    ]
    rest_s = times.replay(away=place)
    remedies.append(
        Remedy(
            kind="no waiting",
            gain=1 - rest_s / now_s,
            sentence=(
                f"If nobody waited for it, a round of the others would take {_changed(now_s, rest_s)}: with pace: {{name: asynchronous}}, "
                "where the algorithm allows it."
            ),
        )
    )
    return Bottleneck(
        kind=kind,
        names=(name,),
        sentence=(
            f"{name} costs most: it {does} {seconds_text(own_s)} a round, the median node for {seconds_text(others_s)}. "
            f"The others wait for it: {seconds_text(saved_s)} of a round of {seconds_text(now_s)}."
        ),
        round_s=times.round_s,
        remedies=_worth_it(remedies),
        method=method,
    )


def _of_edge(run: RunRecords, times: _Times, place: int, now_s: float, saved_s: float, method: str) -> Bottleneck:
    ends = tuple(times.names[i] for i in times.edges[place])
    way_s, others_s = float(times.ways_RE[:, place].mean()), float(np.median(np.delete(times.ways_RE, place, axis=1).mean(axis=0)))
    sizes = f"updates of {bytes_text(times.update_bytes)}"
    is_narrow = times.update_bytes >= _NARROW_FROM_BYTES
    why = "" if is_narrow else f" With {sizes} the link is far, not narrow: a compressor would not help."
    remedies = [*_other_graph(run, times, place, now_s), *_more_local_steps(run, times, now_s)]
    if is_narrow:
        halved_RE = times.ways_RE.copy()
        halved_RE[:, place] /= 2
        halved_s = times.replay(ways_RE=halved_RE)
        remedies.append(
            Remedy(
                kind="compressor",
                gain=1 - halved_s / now_s,
                sentence=(
                    f"If the link is narrow and not far, which these records do not tell, a compressor would help. One that halves {sizes} "
                    f"(fp16) would make a round {_changed(now_s, halved_s)}."
                ),
            )
        )
    return Bottleneck(
        kind="edge",
        names=ends,
        sentence=(
            f"The link {' - '.join(ends)} costs most: an update takes {seconds_text(way_s)} over it, {seconds_text(others_s)} over the "
            f"median one. That is {seconds_text(saved_s)} of a round of {seconds_text(now_s)}.{why}"
        ),
        round_s=times.round_s,
        remedies=_worth_it(remedies),
        method=method,
    )


def _other_graph(run: RunRecords, times: _Times, place: int, now_s: float) -> Iterator[Remedy]:
    """The graph without an edge, if it still mixes, by the seconds until the models agree."""
    graph, size = run.topology or {}, len(times.names)
    if size > _MOST_NODES or graph.get("directed") or not times.edges:
        return
    weights = {(min(i, j), max(i, j)): float(weight) for i, j, weight in graph.get("edges") or () if i != j}
    rounds = [
        _rounds_to_agree(size, {ends: weight for ends, weight in weights.items() if ends != left}) for left in (None, times.edges[place])
    ]
    without_s = times.replay(without=[place])
    if rounds[0] is None or rounds[1] is None:
        return
    before_s, after_s = rounds[0] * now_s, rounds[1] * without_s
    yield Remedy(
        kind="graph",
        gain=1 - after_s / before_s,
        sentence=(
            f"Without this link a round would take {_changed(now_s, without_s)}. Agreement to 1e-6 would take {rounds[1]} rounds instead "
            f"of {rounds[0]}, which is {_changed(before_s, after_s)} of mixing. Its weight goes to the self-weights of its ends."
        ),
    )


def _rounds_to_agree(size: int, weights: Mapping[tuple[int, int], float]) -> int | None:
    """Rounds of mixing until the disagreement is 1e-6 of what it was; None: never."""
    if not weights:
        return None
    ends = np.array(list(weights), dtype=np.int64)
    return rounds_to(Topology.from_edges("some links", size, ends[:, 0], ends[:, 1], weights=list(weights.values())))


def _more_local_steps(run: RunRecords, times: _Times, now_s: float) -> Iterator[Remedy]:
    """Twice the local steps in half the rounds, by the seconds for as many steps."""
    steps = (run.experiment.get("algorithm") or {}).get("local_steps")
    if not isinstance(steps, int) or steps < 1 or not float(times.parts_RN["train"].sum()):
        return
    doubled_s = times.replay(busy_RN=times.busy() + times.parts_RN["train"]) / 2
    yield Remedy(
        kind="local steps",
        gain=1 - doubled_s / now_s,
        sentence=(
            f"With algorithm.local_steps {2 * steps} instead of {steps}, as many steps would take {_changed(now_s, doubled_s)}. "
            "Exchanges are half as many then, and models come further apart between them."
        ),
    )


def _worth_it(remedies: Sequence[Remedy]) -> tuple[Remedy, ...]:
    return tuple(sorted((remedy for remedy in remedies if remedy.gain >= STANDS_OUT), key=lambda remedy: -remedy.gain))


def _changed(before_s: float, after_s: float) -> str:
    return f"{seconds_text(after_s)} instead of {seconds_text(before_s)} ({1 - after_s / before_s:.0%} less)"
