"""Files of faults: a script that people read, for a run of any number of nodes.

Nodes are given by name, or by place: 0 is the first in the order of names. An edge is two names, or a place and the number of one of that
node's neighbours. With `repeats_every: 8` the faults of place 3 are those of 3, 11, 19 and so on, so that a script drawn for 8 nodes
disturbs 1,000 as much as 8.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from p2pfl.errors import ConfigError, some
from p2pfl.faults.script import OF_EDGES, Fault, FaultKind, FaultScript
from p2pfl.yaml_files import check, load_yaml

Who = str | Annotated[int, Field(ge=0)]
Neighbours = Mapping[str, Sequence[str]]
"""Every node's neighbours, in the order of names, whose keys are all nodes in that order."""

_OPTIONS: Mapping[FaultKind, str] = {
    FaultKind.SLOW: "factor",
    FaultKind.LOSS: "probability",
    FaultKind.THROTTLE: "bytes_per_s",
    FaultKind.CLOCK: "offset_s",
}
"""The one number that some kinds of faults have."""

_REQUIRED = frozenset({FaultKind.SLOW, FaultKind.THROTTLE, FaultKind.CLOCK})


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedFault:
    """One fault as a file has it."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    kind: Literal["pause", "kill", "slow", "cut", "loss", "partition", "throttle", "corrupt", "clock", "dns"]
    node: Who | None = None
    edge: tuple[Who, Who] | None = None
    """Two ends; a loss is from the first to the second."""
    nodes: list[Who] | None = None
    """One side of a partition."""
    rounds: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = None
    """The first and the last."""
    from_s: Annotated[float, Field(ge=0)] | None = None
    """Seconds since the start."""
    until_s: Annotated[float, Field(ge=0)] | None = None
    """Seconds since the start; left out: for ever."""
    factor: float | None = None
    probability: float | None = None
    bytes_per_s: float | None = None
    offset_s: float | None = None

    @property
    def fault_kind(self) -> FaultKind:
        """Kind of the fault as scripts have it."""
        return FaultKind(self.kind)

    def faults_in_form(self) -> list[str]:
        """Sentences on what is missing, too much or the wrong way round."""
        kind, found = self.fault_kind, []
        place = "nodes" if kind is FaultKind.PARTITION else "edge" if kind in OF_EDGES else "node"
        given = [name for name in ("node", "edge", "nodes") if getattr(self, name) is not None]
        if given != [place]:
            found.append(f"{self.kind}: expected {place}, got {' and '.join(given) or 'none'}")
        if (self.rounds is None) == (self.from_s is None):
            found.append(f"{self.kind}: expected rounds, or from_s and until_s; not both")
        if self.rounds is not None and self.rounds[0] > self.rounds[1]:
            found.append(f"{self.kind}: rounds = {list(self.rounds)}: expected the first and the last")
        if self.until_s is not None and (self.from_s is None or self.until_s <= self.from_s):
            found.append(f"{self.kind}: until_s = {self.until_s:g}: expected more than from_s")
        own = _OPTIONS.get(kind)
        strange = [name for name in _OPTIONS.values() if name != own and getattr(self, name) is not None]
        found += [f"{self.kind}: {name} means nothing here" for name in strange]
        if own is not None and kind in _REQUIRED and getattr(self, own) is None:
            found.append(f"{self.kind}: {own} is required, but missing")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Keys that are given, as a file has them."""
        names = ("kind", "node", "edge", "nodes", "rounds", "from_s", "until_s", *_OPTIONS.values())
        values = ((name, getattr(self, name)) for name in names)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultPlan:
    """A file of faults."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    schema: Literal[1] = 1
    seed: int = 0
    """Seed of messages that are lost with some probability."""
    repeats_every: Annotated[int, Field(ge=2)] | None = None
    """So many nodes have the same faults as the next so many; None: places are single nodes."""
    faults: list[PlannedFault] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> FaultPlan:
        """Read the faults of a file.

        Raises:
            ConfigError: all that is wrong with it, a sentence each.
        """
        plan = check(cls, load_yaml(path, "a list of faults"), str(path))
        found = [f"faults.{number}: {sentence}" for number, each in enumerate(plan.faults) for sentence in each.faults_in_form()]
        if found:
            raise ConfigError(found, str(path))
        return plan

    @property
    def text(self) -> str:
        """Content of its file."""
        lines = [f"schema: {self.schema}", f"seed: {self.seed}"]
        if self.repeats_every is not None:
            lines.append(f"repeats_every: {self.repeats_every}")
        lines.append("faults:" if self.faults else "faults: []")
        return "\n".join([*lines, *(f"  - {json.dumps(each.as_dict())}" for each in self.faults)]) + "\n"  # each on a line of its own

    @classmethod
    def of(cls, script: FaultScript, neighbours: Neighbours) -> FaultPlan:
        """Write down a script by places, which repeat themselves in larger networks; rounds of a fault follow each other."""
        places = {name: place for place, name in enumerate(neighbours)}
        planned = []
        for fault in script.faults:
            where: dict[str, Any] = {"node": places[fault.nodes[0]]}
            if fault.kind is FaultKind.PARTITION:
                where = {"nodes": [places[name] for name in fault.nodes]}
            elif fault.kind in OF_EDGES:
                one, other = fault.nodes
                where = {"edge": (places[one], sorted(neighbours[one]).index(other))}
            when: dict[str, Any] = {"rounds": (min(fault.rounds), max(fault.rounds))} if fault.rounds else {"from_s": fault.from_s}
            if not fault.rounds and fault.until_s < math.inf:
                when["until_s"] = fault.until_s
            option = {_OPTIONS[fault.kind]: getattr(fault, _OPTIONS[fault.kind])} if fault.kind in _OPTIONS else {}
            planned.append(PlannedFault(kind=fault.kind.value, **where, **when, **option))
        return cls(seed=script.seed, repeats_every=len(neighbours), faults=planned)

    def script(self, neighbours: Neighbours, place: str = "faults") -> FaultScript:
        """Make the script for a run.

        Args:
            neighbours: of every node of the run.
            place: what errors are said to be in.

        Raises:
            ConfigError: it names nodes or edges that the run does not have.
        """
        names, found, made = list(neighbours), [], []
        for number, planned in enumerate(self.faults):
            try:
                made += [self._fault(planned, nodes) for nodes in self._targets(planned, names, neighbours)]
            except _UnknownError as error:
                found.append(f"faults.{number}: {planned.kind}: {error}")
        if found:
            raise ConfigError(found, place)
        script = FaultScript(tuple(made), self.seed)
        try:
            script.check(names)
        except ConfigError as error:
            raise ConfigError([finding.removeprefix("faults: ") for finding in error.findings], place) from error
        return script

    def _fault(self, planned: PlannedFault, nodes: tuple[str, ...]) -> Fault:
        option = _OPTIONS.get(planned.fault_kind)
        value = getattr(planned, option) if option is not None else None
        more: dict[str, Any] = {option: float(value)} if option is not None and value is not None else {}
        if planned.rounds is not None:
            more["rounds"] = frozenset(range(planned.rounds[0], planned.rounds[1] + 1))
        else:
            assert planned.from_s is not None
            more |= {"from_s": planned.from_s, "until_s": math.inf if planned.until_s is None else planned.until_s}
        return Fault(kind=planned.fault_kind, nodes=nodes, **more)

    def _targets(self, planned: PlannedFault, names: Sequence[str], neighbours: Neighbours) -> Iterator[tuple[str, ...]]:
        """Nodes of each fault that one line stands for."""
        if planned.nodes is not None:
            side = tuple(sorted({name for who in planned.nodes for name in self._named(who, names)}))
            if len(side) == len(names):
                raise _UnknownError("all nodes are on one side")
            yield side
        elif planned.edge is not None:
            one, other = planned.edge
            if isinstance(one, str) != isinstance(other, str):
                raise _UnknownError(f"edge = [{one}, {other}]: expected two names, or a place and the number of a neighbour")
            for name in self._named(one, names):
                near = sorted(neighbours[name])
                if isinstance(other, str):
                    if other not in near:
                        raise _UnknownError(f"{name} has no neighbour {other}, only {some(near)}")
                    yield name, other
                elif near:
                    yield name, near[other % len(near)]
        else:
            assert planned.node is not None
            for name in self._named(planned.node, names):
                yield (name,)

    def _named(self, who: Who, names: Sequence[str]) -> list[str]:
        """Names of the nodes that one name or place stands for."""
        if isinstance(who, str):
            if who not in names:
                raise _UnknownError(f"no node {who}; known: {some(names)}")
            return [who]
        if self.repeats_every is not None:
            if who >= self.repeats_every:
                raise _UnknownError(f"place {who}: expected less than repeats_every = {self.repeats_every}")
            return list(names[who :: self.repeats_every])
        if who >= len(names):
            raise _UnknownError(f"place {who}: this run has {len(names)} nodes; places begin at 0")
        return [names[who]]


class _UnknownError(Exception):
    """A fault is where the run has nothing."""
