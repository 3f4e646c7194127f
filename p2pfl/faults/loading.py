"""A script of faults as a user writes it: checked, with all that is wrong at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from p2pfl.errors import ConfigError
from p2pfl.faults.script import Fault, FaultKind, FaultScript

_KEYS = {kind.value: kind for kind in FaultKind}
_WHEN = {"rounds", "seconds"}
_EDGE = 2
_MOST_ROUNDS = 10**7


def script_from(raw: Sequence[Mapping[str, Any]]) -> FaultScript:
    """Read a list of faults, such as `[{pause: a, rounds: [3, 7-9]}, {cut: [a, b], seconds: [10, 20]}, {slow: c, factor: 4, seconds: 0}]`.

    Args:
        raw: each has one of pause, kill, slow (a node), cut, loss (an edge: two nodes), and either `rounds` (numbers, or "first-last") or
            `seconds` ([from, until]; from alone: for ever).

    Raises:
        ConfigError: all that is wrong, a sentence each.
    """
    findings: list[str] = []
    faults = []
    for place, entry in enumerate(raw):
        try:
            faults.append(_fault_of(entry))
        except ValueError as error:
            findings.append(f"faults[{place}]{error}")
    if findings:
        raise ConfigError(findings)
    return FaultScript(tuple(faults))


def _fault_of(entry: Any) -> Fault:
    """One fault; a ValueError begins with the key in it."""
    kinds = [key for key in entry if key in _KEYS] if isinstance(entry, Mapping) else []
    if len(kinds) != 1:
        raise ValueError(f" = {entry!r}: expected one of {', '.join(_KEYS)}, with rounds or seconds")
    (key,) = kinds
    kind, given = _KEYS[key], entry[key]
    nodes = tuple(given) if isinstance(given, list | tuple) else (given,)
    if len(nodes) != kind.num_nodes or len(set(nodes)) != len(nodes) or not all(isinstance(name, str) for name in nodes):
        raise ValueError(f".{key} = {given!r}: expected {'two nodes, [a, b]' if kind.num_nodes == _EDGE else 'the name of one node'}")
    known = {key, *_WHEN, *(["factor"] if kind is FaultKind.SLOW else [])}
    for other in sorted(entry.keys() - known, key=str):
        raise ValueError(f".{other}: unknown key; {key} has {', '.join(sorted(known - {key}))}")
    if len(entry.keys() & _WHEN) != 1:
        raise ValueError(f".{key}: say when, by either rounds or seconds")
    factor = entry.get("factor", 1.0)
    if kind is FaultKind.SLOW and not (_is_number(factor) and factor > 1):
        raise ValueError(f".factor = {factor!r}: expected more than 1, how many times as long local steps take")
    if "rounds" in entry:
        return Fault(kind=kind, nodes=nodes, rounds=_rounds_of(entry["rounds"]), factor=float(factor))
    from_s, until_s = _seconds_of(entry["seconds"])
    return Fault(kind=kind, nodes=nodes, from_s=from_s, until_s=until_s, factor=float(factor))


def _rounds_of(given: Any) -> frozenset[int]:
    rounds: set[int] = set()
    for item in given if isinstance(given, list | tuple) else [given]:
        first, dash, last = str(item).partition("-")
        ends = (first, last if dash else first)
        if isinstance(item, bool) or not all(end.isdecimal() for end in ends) or not int(ends[0]) <= int(ends[1]) < _MOST_ROUNDS:
            raise ValueError(f".rounds = {given!r}: expected numbers from 0, or first-last, such as [3, 7-9]")
        rounds.update(range(int(ends[0]), int(ends[1]) + 1))
    return frozenset(rounds)


def _seconds_of(given: Any) -> tuple[float, float]:
    ends = list(given) if isinstance(given, list | tuple) else [given]
    ends += [math.inf] * (_EDGE - len(ends))
    if len(ends) != _EDGE or not all(map(_is_number, ends)) or not 0 <= ends[0] < ends[1]:
        raise ValueError(f".seconds = {given!r}: expected [from, until] with 0 <= from < until, or from alone")
    return float(ends[0]), float(ends[1])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
