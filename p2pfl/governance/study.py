"""Study files: the experiment, the members' public cards and the graph between them that institutions agree on.

Everything here is public. The digest of a study is what people compare over the telephone; it covers the meaning of the file and not its
bytes, so that re-formatting the YAML does not change it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from p2pfl.errors import ConfigError, TopologyError, some
from p2pfl.governance.card import Card
from p2pfl.governance.continuation import Continuation
from p2pfl.governance.edge_kinds import EdgeKind, checked_kind, edge_kinds
from p2pfl.governance.encoding import canonical, plain_digest, unencodable
from p2pfl.governance.names import NEW_RULE, is_loopback, is_new_name
from p2pfl.governance.result_contract import ResultContract
from p2pfl.statistics.moments import Moments
from p2pfl.topology import Topology, check_connected
from p2pfl.yaml_files import check, dump_yaml, load_yaml

_STUDY_DOMAIN = b"p2pfl study v1\0"


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """The graph of a study: edges between members, with their weights."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    name: str
    """Name of the topology it came from."""
    edges: tuple[tuple[str, str, Annotated[float, Field(allow_inf_nan=False)]], ...]
    """Two members and w_ij = w_ji, each edge once; in a directed graph the receiver i, the sender j and w_ij."""
    directed: bool = False
    transports: tuple[tuple[str, str, Annotated[str, AfterValidator(checked_kind)]], ...] = ()
    """Edges whose kind of transport is agreed on, each with it; the others go as the study says, or as addresses allow."""

    def as_dict(self) -> dict[str, Any]:
        """The graph as the study's file holds it."""
        content: dict[str, Any] = {"name": self.name, "edges": [list(edge) for edge in self.edges]}
        content |= {"directed": True} if self.directed else {}
        return content | ({"transports": [list(edge) for edge in self.transports]} if self.transports else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRow:
    """One tensor of the model that the members train."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    name: Annotated[str, Field(min_length=1)]
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    dtype: Annotated[str, Field(min_length=1)]
    trains: bool
    """Whether training moves it; the others are frozen."""
    travels: bool
    """Whether neighbours see it; what does not travel stays at its node."""
    values: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """SHA-256 of a frozen tensor's values, which are the same at all members."""

    def as_dict(self) -> dict[str, Any]:
        """The row as the study's file holds it."""
        row = {"name": self.name, "shape": list(self.shape), "dtype": self.dtype, "trains": self.trains, "travels": self.travels}
        return row | ({"values": self.values} if self.values is not None else {})

    def __str__(self) -> str:
        trains = ("trains and travels" if self.travels else "trains and stays") if self.trains else "is frozen"
        return f"{self.dtype} {list(self.shape)}, {trains}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """An experiment, its members' cards and the graph between them. Made by create and load only, which check it."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    schema: Literal[1, 2, 3] = 1
    """Number of this file's format: 3 with a result contract, 2 with a layout alone, 1 with neither, as before there were any."""
    experiment: dict[str, Any]
    """The resolved experiment."""
    members: tuple[Card, ...]
    """Sorted by name."""
    graph: Graph
    """Edges sorted, the smaller name first."""
    transport: Annotated[str, AfterValidator(checked_kind)] | None = None
    """Kind of transport of all edges that say none themselves; None: as their addresses allow."""
    layout: tuple[TensorRow, ...] | None = None
    """Tensors of the model, in the order of its flat vector, the frozen ones behind; None: not known when the study was made."""
    result_contract: ResultContract | None = None
    """The contract that each site's code and versions are held against; None: nothing of that is bound, as before there were any."""
    continues: Continuation | None = None
    """The study whose models its members go on from; None: all begin as the experiment says."""
    contract: dict[str, Any] | None = None
    """The data contract with every default written out; None: the study names no table."""
    analyses: dict[str, dict[str, Any]] | None = None
    """Analyses that members may run together, by name, written out; None: the study lists none."""

    @classmethod
    def create(
        cls,
        experiment: Mapping[str, Any],
        cards: Sequence[Card],
        topology: Topology,
        *,
        transport: str | None = None,
        transports: Mapping[tuple[str, str], str] | None = None,
    ) -> Study:
        """Make a study of these members on a weighted topology whose names are theirs; ConfigError with everything that cannot be.

        *transport* is the kind of all edges, *transports* that of single ones; None: as addresses allow.
        """
        if topology.weights is None or topology.names is None:
            raise ValueError("the topology of a study has weights and names")
        names = topology.names
        on_graph, with_card = set(names), {card.name for card in cards}
        faults = [f"topology {topology.name!r}: its node {name!r} has no card" for name in sorted(on_graph - with_card)]
        faults += [f"topology {topology.name!r}: has no node {name!r}, but there is a card" for name in sorted(with_card - on_graph)]
        weights = {
            (names[i], names[j]): weight
            for i, j, weight in zip(topology.receivers.tolist(), topology.senders.tolist(), topology.weights.tolist(), strict=True)
        }
        faults += [
            f"topology {topology.name!r}: weighs {a} - {b} with {weight!r} one way and {weights[b, a]!r} the other"
            for (a, b), weight in weights.items()
            if a < b and not topology.directed and weight != weights[b, a]
        ]
        faults += [f"members: name = {card.name!r}: expected {NEW_RULE}" for card in cards if not is_new_name(card.name)]
        if faults:
            raise ConfigError(faults)
        edges = [[a, b, weight] for (a, b), weight in weights.items() if a < b or topology.directed]
        graph: dict[str, Any] = {"name": topology.name, "edges": edges} | ({"directed": True} if topology.directed else {})
        graph |= {"transports": [[a, b, kind] for (a, b), kind in transports.items()]} if transports else {}
        members = [card.as_dict() for card in cards]
        content, task = dict(experiment), experiment.get("task")
        if isinstance(task, Mapping) and task.get("standardise") == "pooled" and "scale" not in task:
            content["task"] = {**task, "scale": _agreed_scale(cards)}
        said = {"transport": transport} if transport is not None else {}
        return cls.from_mapping({"experiment": content, "members": members, "graph": graph, **said}, "the new study")

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any], place: str) -> Study:
        """Check a study's content, the signature of every card included; ConfigError with all faults."""
        read = check(cls, content, place)
        directed = read.graph.directed
        edges = sorted((a, b, weight) if directed else (min(a, b), max(a, b), weight) for a, b, weight in read.graph.edges)
        members = tuple(sorted(read.members, key=lambda card: card.name))
        kinds = tuple(sorted((min(a, b), max(a, b), kind) for a, b, kind in read.graph.transports))
        study = replace(read, members=members, graph=replace(read.graph, edges=tuple(edges), transports=kinds))
        if faults := list(study.faults()):
            raise ConfigError(faults, place)
        return study

    @classmethod
    def read(cls, path: Path | str) -> Study:
        """Read a study from its file, which a ConfigError names; `experiment.loading.load_study` also checks its experiment."""
        return cls.from_mapping(load_yaml(path), str(path))

    def with_layout(self, table: Sequence[Mapping[str, Any]]) -> Study:
        """Add a table of the model's tensors to the study."""
        content = {**self.as_dict(), "layout": [dict(row) for row in table]}
        return Study.from_mapping({**content, "schema": max(self.schema, 2)}, "the new study")

    def with_result_contract(self, contract: ResultContract) -> Study:
        """Add a result contract to the study."""
        return Study.from_mapping({**self.as_dict(), "schema": 3, "result_contract": contract.as_dict()}, "the new study")

    def with_continuation(self, continuation: Continuation) -> Study:
        """Add to the study which one it continues."""
        return Study.from_mapping({**self.as_dict(), "continues": continuation.as_dict()}, "the new study")

    def with_contract(self, contract: Mapping[str, Any], analyses: Mapping[str, Mapping[str, Any]]) -> Study:
        """Add to the study the data contract, and the analyses where there are any."""
        listed = {"analyses": {name: dict(content) for name, content in analyses.items()}} if analyses else {}
        return Study.from_mapping({**self.as_dict(), "contract": dict(contract), **listed}, "the new study")

    def save(self, path: Path) -> None:
        """Write the study to a new file; FileExistsError if there is one."""
        with path.open("x", encoding="utf-8") as file:
            file.write("# Public: the same file at every member. Its digest (p2pfl study show) is what the members compare.\n")
            file.write(dump_yaml(self.as_dict()))

    def as_dict(self) -> dict[str, Any]:
        """The content of the study's file."""
        content: dict[str, Any] = {
            "schema": self.schema,
            "experiment": self.experiment,
            "members": [card.as_dict() for card in self.members],
            "graph": self.graph.as_dict(),
        }
        if self.transport is not None:
            content["transport"] = self.transport
        if self.layout is not None:  # what was not there keeps the digest that it had without
            content["layout"] = [row.as_dict() for row in self.layout]
        if self.result_contract is not None:
            content["result_contract"] = self.result_contract.as_dict()
        if self.continues is not None:
            content["continues"] = self.continues.as_dict()
        if self.contract is not None:
            content["contract"] = self.contract
        if self.analyses is not None:
            content["analyses"] = self.analyses
        return content

    @property
    def digest(self) -> str:
        """SHA-256 of the content, 64 hex digits; `grouped` makes it readable, `confirms` compares."""
        return sha256(_STUDY_DOMAIN + canonical(self.as_dict())).hexdigest()

    @property
    def task_name(self) -> str:
        """Name of the experiment's task; empty where it names none."""
        task = self.experiment.get("task")
        return str(task.get("name", "")) if isinstance(task, Mapping) else ""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the members, sorted."""
        return tuple(card.name for card in self.members)

    def member(self, name: str) -> Card:
        """The card of a member; ConfigError if there is no such member."""
        for card in self.members:
            if card.name == name:
                return card
        raise ConfigError(f"member = {name!r}: not in this study; one of {some(self.names)}")

    def neighbours(self, name: str) -> tuple[str, ...]:
        """Names of the members that a member exchanges with, sorted; ConfigError if there is no such member."""
        self.member(name)
        return tuple(sorted({b if a == name else a for a, b, _ in self.graph.edges if name in (a, b)}))

    def edge_kinds(self) -> dict[tuple[str, str], EdgeKind]:
        """How each edge is carried, by its ends in the order of their names: the same at every member."""
        wanted = {(a, b): kind for a, b, kind in self.graph.transports}
        return edge_kinds(self.members, [(a, b) for a, b, _ in self.graph.edges], wanted, self.transport)

    def topology(self) -> Topology:
        """The graph with its weights, bit for bit; row i is the i-th member."""
        row = {name: i for i, name in enumerate(self.names)}
        receivers = [row[a] for a, _, _ in self.graph.edges]
        senders = [row[b] for _, b, _ in self.graph.edges]
        weights = [weight for _, _, weight in self.graph.edges]
        return Topology.from_edges(
            self.graph.name, len(self.members), senders, receivers, directed=self.graph.directed, names=self.names, weights=weights
        )

    def faults(self) -> Iterator[str]:
        """Find everything that is wrong with the study, a sentence each."""
        if not self.members:
            yield "members = []: a study has members"
        yield from self._faults_of_layout()
        if self.continues is not None:
            yield from self.continues.faults(self.names)
        yield from (f"members: {fault}" for card in self.members if (fault := card.fault()))
        for field in ("name", "address", "identity", "curve"):
            addresses = {id(card): (*card.addresses, *card.relay_addresses) for card in self.members}
            values = addresses if field == "address" else {id(card): (getattr(card, field),) for card in self.members}
            counts = Counter(value for card in self.members for value in values[id(card)])
            for value, count in counts.items():
                if count > 1:
                    bearers = ", ".join(card.name for card in self.members if value in values[id(card)])
                    yield f"members: {field} = {value!r} stands in {count} cards ({bearers}); expected one"
        yield from self._graph_faults()
        yield from unencodable(self.experiment, "experiment")
        yield from self._faults_of_analyses()
        if self.experiment.get("nodes") is not None:
            afar = [card.name for card in self.members if not all(map(is_loopback, card.addresses))]
            if afar:
                yield (
                    f"experiment.nodes = {self.experiment['nodes']!r}: partitions data that lie on one machine, but {', '.join(afar)} "
                    "have addresses elsewhere; expected null"
                )
        if self.experiment.get("weighting") == "samples":
            silent = [card.name for card in self.members if card.samples is None]
            if silent:
                yield f"experiment.weighting = 'samples': needs `samples` in every card; missing in {some(silent)}"

    def _faults_of_layout(self) -> Iterator[str]:
        expected = 3 if self.result_contract is not None else 2 if self.layout is not None else 1
        if self.schema != expected:
            yield (
                f"schema = {self.schema}: schema 3 is that of a study with a result contract, 2 that of one with a layout alone, "
                f"1 that of one with neither; expected {expected}"
            )
        agreed = self.result_contract.task if self.result_contract is not None else None
        if agreed is not None and agreed.name != self.task_name:
            yield f"result_contract.task.name = {agreed.name!r}: expected {self.task_name!r}, which is the experiment's task"
        for name, count in Counter(row.name for row in self.layout or ()).items():
            if count > 1:
                yield f"layout: tensor {name} is given {count} times; expected once"

    def _faults_of_analyses(self) -> Iterator[str]:
        """Find faults of contract and analyses that need no knowledge of either; `load_study` looks into both."""
        if self.contract is not None:
            yield from unencodable(self.contract, "contract")
        if self.analyses is None:
            return
        if self.contract is None:
            yield "contract: required, but missing: the table that the analyses are about"
        if not self.analyses:
            yield "analyses = {}: expected at least one; leave the key out where the study lists none"
        yield from (f"analyses: the name {name!r}: expected {NEW_RULE}" for name in self.analyses if not is_new_name(name))
        yield from unencodable(self.analyses, "analyses")

    def _graph_faults(self) -> list[str]:
        addresses = {card.name: card.address for card in self.members}
        edges = {(min(a, b), max(a, b)) for a, b, _ in self.graph.edges}
        found = [
            f"graph.edges: {name!r} has no card"
            for name in sorted({name for a, b, _ in self.graph.edges for name in (a, b)} - set(addresses))
        ]
        for (a, b), count in Counter((a, b) for a, b, _ in self.graph.edges).items():
            if a == b:
                found.append(f"graph.edges: {a} is joined to itself")
            if count > 1:
                found.append(f"graph.edges: {a} - {b} is given {count} times; expected once")
        for (a, b), count in Counter((a, b) for a, b, _ in self.graph.transports).items():
            if (a, b) not in edges or count > 1:
                found.append(f"graph.transports: {a} - {b} is given {count} times; expected once, and an edge of the graph")
        if self.members and len(addresses) == len(self.members) and not found:
            try:
                self.edge_kinds()
            except ConfigError as error:
                found += error.findings
            try:
                check_connected(self.topology())
            except TopologyError as error:
                found += [f"graph.edges: {finding}" for finding in error.findings]
        return found


def _agreed_scale(cards: Sequence[Card]) -> dict[str, Any]:
    """Merge the moments of all members' training rows, by whose means and deviations the task standardises."""
    silent = sorted(card.name for card in cards if card.moments is None)
    if silent:
        raise ConfigError(
            f"task.standardise = 'pooled': needs `moments` in every card; missing in {some(silent)}; there: p2pfl keys describe"
        )
    try:
        return Moments.merged(card.moments for card in cards if card.moments is not None).as_dict()
    except ValueError as error:
        raise ConfigError(f"members: {error}") from error


def layout_faults(agreed: Sequence[TensorRow], own: Sequence[TensorRow]) -> list[str]:
    """Name each tensor in which a node's own model differs from the study's, a sentence each."""
    theirs, mine = {row.name: row for row in agreed}, {row.name: row for row in own}
    found = [f"tensor {name}: is in the study's model ({row}) and not in this one" for name, row in theirs.items() if name not in mine]
    found += [f"tensor {name}: is in this model ({row}) and not in the study's" for name, row in mine.items() if name not in theirs]
    for name in theirs.keys() & mine.keys():
        if str(theirs[name]) != str(mine[name]):
            found.append(f"tensor {name}: {mine[name]} here; {theirs[name]} in the study")
        elif theirs[name].values != mine[name].values:
            found.append(f"tensor {name}: its frozen values are not the study's; take the same pretrained weights")
    if not found and [row.name for row in agreed] != [row.name for row in own]:
        first = next(here.name for there, here in zip(agreed, own, strict=True) if there.name != here.name)
        found.append(f"tensor {first}: stands in another place of the model than in the study's")
    return sorted(found)


def confirms(study: Study, text: str) -> bool:
    """Whether a digest that somebody typed is the study's; spaces, dashes and case do not matter."""
    try:
        return plain_digest(text) == study.digest
    except ValueError:
        return False
