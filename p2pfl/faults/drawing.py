"""Draw a script of faults from a seed: one fault after the other, each of some kind, somewhere, for a while."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from p2pfl.errors import ConfigError
from p2pfl.faults.script import OF_EDGES, Fault, FaultKind, FaultScript

KINDS = (
    FaultKind.KILL,
    FaultKind.PAUSE,
    FaultKind.PARTITION,
    FaultKind.THROTTLE,
    FaultKind.LOSS,
    FaultKind.CORRUPT,
    FaultKind.CLOCK,
    FaultKind.DNS,
)
"""Kinds of a plan unless somebody asks for others."""

_AWAY = frozenset({FaultKind.KILL, FaultKind.PAUSE})
_BYTES_PER_S = (2_000, 200_000)
_OFFSETS_S = (-86400.0, -3600.0, -60.0, 60.0, 3600.0, 86400.0)
_LOSSES = (0.05, 0.2, 0.5, 1.0)
_SLOWNESS = (2.0, 4.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """When faults begin and how long they last, in rounds or in seconds; each a least and a most."""

    begins: tuple[float, float]
    """The first fault begins at the one; none begins after the other."""

    every: tuple[float, float]
    """From one beginning to the next."""

    lasts: tuple[float, float]
    """From beginning to end."""

    in_rounds: bool = True


def kinds_of(text: str) -> tuple[FaultKind, ...]:
    """Read kinds of faults from a list with commas.

    Raises:
        ConfigError: one is no kind, or there is none.
    """
    known = {kind.value: kind for kind in FaultKind}
    said = [part.strip() for part in text.split(",") if part.strip()]
    if strange := [part for part in said if part not in known]:
        raise ConfigError([f"{part!r}: no kind of fault; known: {', '.join(known)}" for part in strange], "--plan")
    if not said:
        raise ConfigError(f"no kind of fault; known: {', '.join(known)}", "--plan")
    return tuple(dict.fromkeys(known[part] for part in said))


def draw_faults(kinds: Sequence[FaultKind], *, seed: int, neighbours: Mapping[str, Sequence[str]], pace: Pace) -> FaultScript:
    """Draw a script. It is a function of its arguments, on every machine.

    At most half of the nodes are killed or paused at the same moment, and none is twice.

    Args:
        kinds: of the faults; each is as likely as any other.
        seed: of the draws.
        neighbours: of every node.
        pace: when faults begin and how long they last.
    """
    draw, names = random.Random(seed), sorted(neighbours)  # noqa: S311  # nothing is secret here
    away_until: dict[str, float] = {}
    faults: list[Fault] = []
    now = pace.begins[0]
    while now <= pace.begins[1]:
        kind = _one_of(draw, kinds)
        lasts = _between(draw, pace.lasts)
        if pace.in_rounds:
            first, num = int(now), max(1, round(lasts))
            when: dict[str, Any] = {"rounds": frozenset(range(first, first + num))}
            until = float(first + num)
        else:
            until = round(now + lasts, 3)
            when = {"from_s": round(now, 3), "until_s": until}
        fault = _somewhere(draw, kind, names, neighbours, when)
        is_away = sum(now < end for end in away_until.values())
        fits = kind not in _AWAY or (away_until.get(fault.nodes[0], -1.0) < now and 2 * (is_away + 1) <= len(names))
        if fits:
            faults.append(fault)
            if kind in _AWAY:
                away_until[fault.nodes[0]] = until
        now += _between(draw, pace.every)
    return FaultScript(tuple(faults), seed)


def _somewhere(
    draw: random.Random, kind: FaultKind, names: Sequence[str], neighbours: Mapping[str, Sequence[str]], when: Mapping[str, Any]
) -> Fault:
    """Draw where a fault is, and how bad."""
    node = _one_of(draw, names)
    if kind is FaultKind.PARTITION:
        side = sorted(names, key=lambda _: draw.random())[: 1 + int(draw.random() * (len(names) // 2))]
        return Fault(kind=kind, nodes=tuple(sorted(side)), **when)
    other = _one_of(draw, sorted(neighbours[node]))
    fault = Fault(kind=kind, nodes=(node, other) if kind in OF_EDGES else (node,), **when)
    match kind:
        case FaultKind.LOSS:
            return replace(fault, probability=_one_of(draw, _LOSSES))
        case FaultKind.THROTTLE:
            return replace(fault, bytes_per_s=float(round(_between(draw, _BYTES_PER_S))))
        case FaultKind.CLOCK:
            return replace(fault, offset_s=_one_of(draw, _OFFSETS_S))
        case FaultKind.SLOW:
            return replace(fault, factor=_between(draw, _SLOWNESS))
    return fault


def _one_of(draw: random.Random, choices: Sequence[Any]) -> Any:
    return choices[int(draw.random() * len(choices))]  # random() is the same in every version of Python


def _between(draw: random.Random, bounds: tuple[float, float]) -> float:
    return bounds[0] + draw.random() * (bounds[1] - bounds[0])
