"""The edges of one node: its neighbours, the exchange that it is in, and flows that are matched or rolled back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from p2pfl.errors import PeerError
from p2pfl.protocol.ledger import EdgeLedger, SavedLedger
from p2pfl.protocol.neighbour import Neighbour
from p2pfl.runs.events import EventKind
from p2pfl.topology.schedule import Neighbourhood
from p2pfl.wire.messages import Goodbye, Report
from p2pfl.wire.update import ReceivedUpdate

_FAULTY_UPDATE = frozenset({"wrong_size", "wrong_format", "wrong_digest", "not_finite", "wrong_report", "too_large"})
HANDSHAKE_REFUSALS = frozenset({"wrong_name", "wrong_study", "wrong_layout", "wrong_start"})


OnEvent = Callable[..., None]
"""Takes the kind of an event, a sentence about it, and the name of the neighbour that it is about, if it is about one."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Amounts that a merge took in over one edge, kept until it is known whether the neighbour matched them."""

    exchange: int
    amounts: Mapping[str, Any]
    """By channel."""


Compensation = tuple[Neighbour, Flow]
"""A flow that the neighbour did not match: its negative goes into the next merge."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """An update that a merge takes in, and how often it was merged before."""

    update: ReceivedUpdate
    age: int = 0

    @property
    def number(self) -> int:
        """Exchange of its sender."""
        return self.update.exchange


@dataclass(frozen=True, kw_only=True, slots=True)
class DueMerge:
    """Everything that one merge takes in, handed out once its exchange waits no longer."""

    neighbourhood: Neighbourhood
    came: Mapping[str, ReceivedUpdate]
    """Updates that are here, also those that may not be merged, in the roster's order."""
    admitted: Mapping[str, Held]
    """Updates that may be merged, in the roster's order."""
    values: Mapping[str, Mapping[str, Any]]
    """By neighbour and encoded channel, what its update continues; zeros where there is none."""
    compensations: list[Compensation]


@dataclass(kw_only=True, slots=True)
class Edges:
    """One node's neighbours, its place in the run, and the ledger of each edge."""

    me: str
    neighbours: dict[str, Neighbour]
    """By name, in the roster's order: everybody whom this node ever exchanges with."""
    neighbourhoods: Callable[[int], Neighbourhood]
    """Whom it exchanges with in a round."""
    on_event: OnEvent
    phases: int = 1
    """Exchanges in a round."""
    ahead: int = 1
    """So many exchanges are kept for a neighbour that is behind, and from one that is ahead."""
    anew: int = 0
    """When this node was last started anew without its state, in milliseconds since 1970; 0: never."""
    exchange: int = 0
    """The exchange that this node is in."""
    closing: str | None = None
    """Why this node has stopped; None while it runs."""
    refused: Counter[str] = field(default_factory=Counter)
    flows: dict[tuple[str, int], Flow] = field(default_factory=dict)
    """Merged, and not yet known to be matched."""
    compensations: list[Compensation] = field(default_factory=list)

    @property
    def neighbourhood(self) -> Neighbourhood:
        """Whom this node exchanges with in the round that it is in."""
        return self.neighbourhoods(self.exchange // self.phases)

    def enter(self, exchange: int) -> None:
        """Be in an exchange from now on."""
        self.exchange = exchange

    def stop(self, reason: str) -> None:
        """Merge nothing more; what is open is still closed."""
        self.closing = reason

    # ---- the ledger

    def hear(self, neighbour: Neighbour, report: Report) -> None:
        """Learn what a neighbour has done on its side of the edge."""
        self._roll_back(neighbour, neighbour.ledger.hear(report))

    def close(self, neighbour: Neighbour, exchange: int, flow: Flow | None = None) -> None:
        """End an exchange over one edge; *flow*: what was merged in it."""
        if flow is not None:
            self.flows[neighbour.name, exchange] = flow
        self._roll_back(neighbour, neighbour.ledger.close(exchange, merged=flow is not None))

    def give_up(self, exchange: int) -> None:
        """Close an exchange without having merged: whoever has merged this node's update of it hears so, and takes its own side back."""
        for neighbour in self.neighbours.values():
            if neighbour.ledger.closed_through < exchange:
                self.close(neighbour, exchange)

    def refusing(self) -> frozenset[str]:
        """Neighbours that have closed this exchange without merging this node's update: a merge here would be rolled back."""
        return frozenset(name for name in self.neighbourhood.both if self.neighbours[name].ledger.refuses(self.exchange))

    def is_missed(self, name: str) -> bool:
        """Whether nobody waits for a neighbour now."""
        return self.neighbours[name].missed

    def closed_through(self, name: str) -> int:
        """The last exchange over an edge that is over here."""
        return self.neighbours[name].ledger.closed_through

    def may_answer(self, name: str, number: int) -> bool:
        """Whether a neighbour may still merge an exchange over its edge alone."""
        neighbour = self.neighbours[name]
        return not (neighbour.left or neighbour.closing or neighbour.ledger.refuses(number))

    def ledgers(self) -> dict[str, SavedLedger]:
        """Every edge's ledger, for a checkpoint."""
        return {name: neighbour.ledger.to_dict() for name, neighbour in self.neighbours.items()}

    def checkpointed(self, ledgers: Mapping[str, SavedLedger]) -> None:
        """Ledgers that are on disk may be told from now on."""
        for name, saved in ledgers.items():
            self.neighbours[name].ledger.checkpointed(saved)

    def unacknowledged(self) -> list[str]:
        """Neighbours that are still there with which something is open."""
        return [
            name
            for name, each in self.neighbours.items()
            if not (each.left or each.ledger.is_untouched or (each.ledger.is_acknowledged and each.ledger.neighbour_is_acknowledged))
        ]

    def take_compensations(self, channels: Collection[str] | None = None) -> list[Compensation]:
        """Hand out the compensations of some channels, or all, once."""
        is_due = [channels is None or bool(flow.amounts.keys() & set(channels)) for _, flow in self.compensations]
        due = [each for each, now in zip(self.compensations, is_due, strict=True) if now]
        self.compensations = [each for each, now in zip(self.compensations, is_due, strict=True) if not now]
        return due

    def put_back(self, compensations: list[Compensation]) -> None:
        """Keep compensations that were handed out and did not go into a merge."""
        self.compensations = compensations + self.compensations

    def _roll_back(self, neighbour: Neighbour, exchange: int | None) -> None:
        flow = self.flows.pop((neighbour.name, exchange), None) if exchange is not None else None
        if flow is not None and flow.amounts:
            self.compensations.append((neighbour, flow))
            self.on_event(EventKind.ROLLED_BACK, f"{neighbour.name} did not match exchange {exchange}", neighbour.name)
        for key in [key for key in self.flows if key[0] == neighbour.name and key[1] != neighbour.ledger.open_flow]:
            del self.flows[key]

    # ---- refusals

    def count(self, neighbour: Neighbour, error: PeerError) -> None:
        """Count something that was refused, and say so."""
        self.refused[error.reason] += 1
        self.on_event(EventKind.REFUSED, f"{neighbour.name}: {error}", neighbour.name)

    def refuse(self, neighbour: Neighbour, error: PeerError) -> None:
        """Refuse a neighbour's message: nobody waits for one whose updates cannot be merged, or who belongs to another study."""
        self.count(neighbour, error)
        if error.reason in _FAULTY_UPDATE:
            neighbour.note_fault()
        if error.reason in HANDSHAKE_REFUSALS:
            neighbour.note_refusal(str(error).removeprefix(f"{error.reason}: "))
            neighbour.queue(Goodbye(reason=error.reason))

    def exclusion(self, peer: str, now_s: float) -> tuple[float, str] | None:
        """How long a neighbour is to be disconnected from now on, because it sends too much, and why; None: not at all."""
        neighbour = self.neighbours[peer]
        found = neighbour.allowance.exclusion(now_s)
        if found is not None:
            neighbour.note_fault()  # nobody waits for it until it sends an update
            for_s, why = found
            self.on_event(EventKind.EXCLUDED, f"{peer} is disconnected for {for_s:g} s: it sends {why}", peer)
        return found

    # ---- checkpoints

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Metadata and tensors for a checkpoint."""
        flows = {f"flow/{name}": flow for (name, _), flow in self.flows.items()}
        flows |= {f"back/{i}/{neighbour.name}": flow for i, (neighbour, flow) in enumerate(self.compensations)}
        tensors = {f"{place}/{flow.exchange}/{channel}": each for place, flow in flows.items() for channel, each in flow.amounts.items()}
        return {"exchange": self.exchange, "closing": self.closing, "ledgers": self.ledgers(), "anew": self.anew}, tensors

    def restore(self, metadata: Mapping[str, Any], tree: Mapping[str, Any]) -> None:
        """Take up what `snapshot` gave; an earlier version did not write `anew`."""
        self.exchange, self.closing, self.anew = metadata["exchange"], metadata["closing"], metadata.get("anew", 0)
        for name, saved in metadata["ledgers"].items():
            self.neighbours[name].restore_ledger(EdgeLedger.from_dict(saved))
        for name, exchanges in tree.get("flow", {}).items():
            for exchange, amounts in exchanges.items():
                self.flows[name, int(exchange)] = Flow(exchange=int(exchange), amounts=amounts)
        for number in sorted(tree.get("back", {}), key=int):
            for name, exchanges in tree["back"][number].items():
                for exchange, amounts in exchanges.items():
                    self.compensations.append((self.neighbours[name], Flow(exchange=int(exchange), amounts=amounts)))
