"""The network as a node sees it, for its administrator: everybody's newest record, certified rounds, and the same as records of a run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from p2pfl.experiment.graph import diameter_bound
from p2pfl.experiment.plan import Plan
from p2pfl.protocol.agreed_start import Signing
from p2pfl.protocol.equivocation import Equivocation, update_digest
from p2pfl.protocol.push_sum import PushSumConversation
from p2pfl.protocol.view import NetworkRound, NetworkView
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run
from p2pfl.runs.rows import NetworkRow, NodeRow, kind_of_round, network_row
from p2pfl.runs.text import Row
from p2pfl.topology import is_spectrum_quick, rounds_to
from p2pfl.wire.round_record import MAX_METRICS, MAX_NAMED, PARTS, RoundRecord

Counts = Literal["exact", "tens", "withheld"]

SMALL_CELL = 10
"""Fewest test rows of which a metric leaves the site."""

ROWS_UP_TO = 256
"""With more members than this nobody hears of every round of each: the certificate is summed by push-sum."""

_TENS = 10
_MOST_STEPS = 200
_UNSURE_ROUNDS = 2
"""Nobody is more than one exchange ahead of its neighbours, so no more than these can have been begun by an earlier process."""

_WELL_MIXED = 0.05
_ROUNDING = 4.0
_LARGEST = 3e38
_MOST_ROWS = 2000  # of all nodes together that are kept for who asks


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewPolicy:
    """Policy of a site: what it says of itself to the whole network, and what that may cost it."""

    bytes_per_s: float | None = 1000.0
    """Sent for the view; None: as much as there is to say."""
    metrics: bool = True
    """Whether metrics on the site's test rows, and losses, are said."""
    counts: Counts = "exact"
    """How many rows the site has: as it is, rounded down to tens, or not at all."""


class NetworkViewAdapter:
    """One node's view of the network, in names and rows."""

    def __init__(self, plan: Plan, me: str, signing: Signing, policy: ViewPolicy, study_digest: str) -> None:
        self._plan, self._me, self._policy = plan, me, policy
        self._metrics = sorted(plan.task.metrics)[:MAX_METRICS]
        self._places = {name: place for place, name in enumerate(plan.names)}
        self._kept: deque[NetworkRound] = deque(maxlen=max(1, _MOST_ROWS // len(plan.names)))
        self._summed: NetworkRow | None = None
        self._began_ms = 0
        self._unsure_rounds = 0
        self._bounds = False
        """Whether the disagreement of this node's last round bounds anything."""
        self._neighbours = {name: frozenset(plan.neighbours(name)) for name in plan.names} if len(plan.names) <= ROWS_UP_TO else {}
        self._measured: tuple[int, tuple[float | None, ...]] | None = None
        self._num_found = 0
        self._update: tuple[int, Sequence[bytes]] | None = None
        """The round of the last update that went to all neighbours alike, and its digests by phase."""
        self._last_row: NodeRow | None = None
        """This process's last round, for a record of it that may be asked for."""
        is_many = len(plan.names) > ROWS_UP_TO
        self.push_sum = self._push_sum_conversation() if is_many and self._is_steady else None
        """Where records are not summed: the sum of everybody's disagreement."""
        self.view = NetworkView(
            me=self._places[me],
            keys=[signing.keys[name] for name in plan.names],
            sign=signing.sign,
            study=bytes.fromhex(study_digest),
            neighbours=plan.neighbours(me),
            diameter=diameter_bound(plan.topology) if is_spectrum_quick(plan.topology) else None,
            last_round=plan.experiment.last_possible_round,
            bytes_per_s=policy.bytes_per_s,
            sums=not is_many,
        )

    def start(self, began_ms: int, *, again: bool) -> None:
        """Take up when the run began, in milliseconds since 1970, 0 if not known, before the first round of this process.

        *again*: whether an earlier process has sent updates. It may have sent one of the exchanges that this one takes part in next, with
        another model: neighbours keep the first, so the distances of these rounds are not said.
        """
        self._began_ms = began_ms
        self._unsure_rounds = _UNSURE_ROUNDS if again else 0

    @property
    def _is_steady(self) -> bool:
        """Whether everybody exchanges with all its neighbours in every round."""
        return self._plan.experiment.pace.kind.in_step and self._plan.schedule.is_steady

    def _push_sum_conversation(self) -> PushSumConversation:
        plan = self._plan
        diameter = diameter_bound(plan.topology)
        steps = (rounds_to(plan.topology, _WELL_MIXED) if is_spectrum_quick(plan.topology) else None) or 2 * diameter
        return PushSumConversation(
            neighbours=plan.neighbours(self._me), num_nodes=len(plan.names), diameter=diameter, steps=min(max(steps, 1), _MOST_STEPS)
        )

    def end_round(self, row: NodeRow, now_s: float, *, agreed: bool) -> None:
        """A round of this node's own is over: say so, and take the next step of the sum; *agreed*: what was exchanged were models."""
        self.view.begin(row.round + 1, now_s)
        if self._unsure_rounds:  # an earlier process may have sent, and signed, another one
            self._update = None
        self._bounds = agreed and not self._unsure_rounds
        self._unsure_rounds = max(self._unsure_rounds - 1, 0)
        self.say(row, now_s)
        self._last_row = row
        if self.push_sum is not None:
            value = _finite(row.disagreement) if self._bounds and not row.skipped else None
            self.push_sum.end_round(row.round, value)

    def say(self, row: NodeRow, now_s: float, *, closing: bool = False) -> None:
        """Tell the network of a round of this node's own, if it is one that is spoken of; the row has the bytes of this round alone."""
        if row.metrics is not None and self._policy.metrics and self._test_patients() >= SMALL_CELL:
            self._measured = row.round, tuple(_finite(row.metrics.get(name)) for name in self._metrics)
        if not closing and not self.view.speaks_of(row.round):
            return
        self.view.publish(self._record(row, closing=closing), now_s)

    def proof(self) -> bytes | None:
        """Signed record of this process's last round, also where that is not one that is spoken of; None before its first."""
        return None if self._last_row is None else self.view.sealed(self._record(self._last_row, closing=False))

    def waits_for_others(self, name: str, number: int) -> bool:
        """Whether a third member has signed that a neighbour of a member did not come to a round, or to a later one: it may wait."""
        third = self.view.newest.keys() - {self.view.me, self._places[name]}
        return any(self._has_missed(member, name, number) for member in third)

    def was_held_up(self, name: str, number: int) -> bool:
        """Whether a neighbour has signed that one of its other neighbours did not come to a round, or to a later one."""
        return self._has_missed(self._places[name], name, number)

    def _has_missed(self, member: int, name: str, number: int) -> bool:
        """Whether a member has signed that one near another did not come; this node knows itself whether it came."""
        heard = self.view.newest.get(member)
        nearby = {self._places[other] for other in self._plan.neighbours(name) if other != self._me}
        return heard is not None and heard.record.round >= number and bool(nearby & {*heard.record.without})

    def _record(self, row: NodeRow, *, closing: bool) -> RoundRecord:
        without = [self._places[name] for name in row.skipped]
        measured, metrics = self._measured or (None, ())
        return RoundRecord(
            member=self._places[self._me],
            began=self._began_ms,
            round=row.round,
            level=self.view.level,
            settles=row.kind == "settle",
            closing=closing,
            disagreement=_finite(row.disagreement) if self._bounds else None,
            norm=_finite(row.norm) if self._bounds else None,
            loss=_finite(row.loss) if self._policy.metrics else None,
            skipped=len(without),
            without=tuple(without[:MAX_NAMED]),
            agreed_for=row.agreed_for,
            sent=row.bytes_sent,
            milliseconds=_milliseconds(row.seconds),
            measured=measured,
            metrics=metrics,
            rows=self._rows(),
            update=update_digest(self._update[1]) if self._update is not None and self._update[0] == row.round else None,
        )

    def note_sent(self, number: int, digests: Sequence[bytes]) -> None:
        """Take up the digests, by phase, of what went to all neighbours alike in a round; the round's record says so."""
        self._update = number, digests

    def note_came(self, name: str, number: int, digests: Sequence[bytes]) -> None:
        """Take up the digests, by phase, of updates that came from a neighbour."""
        self.view.witness.note_update(self._places[name], number, digests)

    def equivocations(self) -> list[tuple[str, Equivocation]]:
        """Equivocations found since the last call, with the members' names."""
        found = [(self._plan.names[each.member], each) for each in self.view.witness.found[self._num_found :]]
        self._num_found = len(self.view.witness.found)
        return found

    def differing(self) -> list[tuple[str, int]]:
        """Neighbours and rounds, since the last call, in which an update was another one than its sender has signed."""
        return [(self._plan.names[place], number) for place, number in self.view.witness.differing()]

    def take_note(self, folder: RunFolder) -> None:
        """Write down the rounds that have become known."""
        for known in self.view.known_rounds():
            self._kept.append(known)
            folder.append_network(self._network_row(known))
        if self.push_sum is not None and (summed := self.push_sum.known()) is not None:
            self._summed = self._push_sum_row(*summed)
            folder.append_network(self._summed)

    def begun_again(self) -> set[str]:
        """Members that have been seen, since the last call, to begin once more."""
        return {self._plan.names[place] for place in self.view.begun_again()}

    def unended(self, rounds: int, company: Collection[str], ahead: int = 1) -> dict[str, int | None]:
        """Members that have not ended with the others, and the newest round that was heard of each, None where none was; in step only.

        No last record has come of such a member, and either all its neighbours of which one has come made their last rounds without it, or
        nothing has come of it for longer than news need. Two neighbours can be *ahead* exchanges apart.
        """
        if not self._plan.experiment.pace.kind.in_step:
            return {}
        newest = {self._plan.names[place]: heard.record for place, heard in self.view.newest.items()}
        step = 1 << max([self.view.level, *(record.level for record in newest.values())])
        late = rounds - 1 - self.view.news_rounds * ahead - step
        found: dict[str, int | None] = {}
        for name in self._plan.names:
            record = newest.get(name)
            if name not in company or (record is not None and record.closing):
                continue
            heard = -1 if record is None else record.round
            if heard < late or self._is_left_behind(name, heard, newest):
                found[name] = None if record is None else heard
        return found

    def _is_left_behind(self, name: str, heard: int, newest: Mapping[str, RoundRecord]) -> bool:
        """Whether all that exchange with a member and can tell made their last rounds, which are newer than its records, without it."""
        place = self._places[name]
        last = [newest[other] for other in self._plan.neighbours(name) if other in newest]
        able = [each for each in last if each.closing and each.round > heard and (place in each.without or each.skipped <= MAX_NAMED)]
        says = [place in each.without for each in able]
        return any(says) and (all(says) or not self._is_steady)  # where the graph changes, not everybody waited for it in the last round

    def sees_most_end(self, company: Collection[str]) -> bool:
        """Whether the last records of more than half of the started members are here, so that the whole network has ended."""
        ended = sum(heard.record.closing and self._plan.names[place] in company for place, heard in self.view.newest.items())
        return 2 * ended > len(company)

    def rows(self, now_s: float, paused: Collection[str] = ()) -> list[Row]:
        """Everybody's newest record, as rows of nodes.jsonl with their age, in the roster's order; *paused*: who has said so of itself."""
        newest = sorted(self.view.newest.items())
        last = max((heard.record.round for _, heard in newest), default=0)
        return [
            self._node_row(heard.record)
            | {"age_s": round(now_s - heard.at_s, 3), "age_rounds": last - heard.record.round}
            | {"state": "finished" if heard.record.closing else "paused" if self._plan.names[place] in paused else "running"}
            for place, heard in newest
        ]

    def status(self, now_s: float, paused: Collection[str] = ()) -> dict[str, Any]:
        """For the status endpoint; see `rows`."""
        last = self._network_row(self._kept[-1]) if self._kept else self._summed
        return {
            "rows": self.rows(now_s, paused),
            "not_heard_of": [name for name, place in self._places.items() if place not in self.view.newest],
            "certificate": last and last.as_row(),
            "every": 2**self.view.level,
            "bytes_sent": self.view.bytes_sent,
        }

    def document(self, folder: RunFolder, now_s: float, paused: Collection[str] = ()) -> Callable[[], dict[str, Any]]:
        """All that this node knows of the run, by the names of `RunRecords`: what is returned gathers it from the disk, in any thread."""
        records = [record for known in self._kept for record in known.records.values()] + self.view.open_records()
        newest = self.rows(now_s, paused)

        def gather() -> dict[str, Any]:
            own = read_run(folder.path, experiment=self._plan.experiment.as_dict())
            rows = {(row["node"], row["round"]): row for row in map(self._node_row, records)}
            rows |= {(row["node"], row["round"]): row for row in own.nodes}  # all of its own rounds, which it has spoken of in part only
            for row in newest:
                rows[row["node"], row["round"]] = rows.get((row["node"], row["round"]), {}) | row
            return {
                "experiment": own.experiment,
                "environment": own.environment,
                "topology": own.topology,
                "rounds": own.rounds,
                "nodes": [rows[key] for key in sorted(rows, key=lambda key: (key[1], key[0]))],
                "events": own.events,
                "network": list(own.network),
                "summary": own.summary,
                "cross_site": own.cross_site,
                "subgroups": list(own.subgroups),
                "worth": list(own.gains),
            }

        return gather

    def _test_rows(self) -> int:
        site = self._plan.sites.get(self._me)
        return len(site.test[0]) if site is not None and site.test is not None else 0

    def _test_patients(self) -> int:
        site = self._plan.sites.get(self._me)
        return site.num_test_patients if site is not None else 0

    def _rows(self) -> tuple[int, int] | None:
        site = self._plan.sites.get(self._me)
        if site is None or self._policy.counts == "withheld":
            return None
        counts = (len(site.train[0]) if site.train is not None else 0, self._test_rows())
        return counts if self._policy.counts == "exact" else (counts[0] // _TENS * _TENS, counts[1] // _TENS * _TENS)

    def _node_row(self, record: RoundRecord) -> Row:
        row = NodeRow(
            round=record.round,
            node=self._plan.names[record.member],
            kind="settle" if record.settles else "train",
            loss=record.loss,
            disagreement=record.disagreement,
            norm=record.norm,
            skipped=self._without(record),
            agreed_for=record.agreed_for,
            stop_round=None,
            bytes_sent=record.sent,
            seconds={part: spent / 1000 for part, spent in zip(PARTS, record.milliseconds, strict=True)},
        ).as_row()
        del row["stop_round"]  # a record does not say it
        if record.measured is not None:
            row |= {"metrics": dict(zip(self._metrics, record.metrics, strict=False)), "measured": record.measured}
        if record.rows is not None:
            row |= {"rows": {"train": record.rows[0], "test": record.rows[1]}}
        return row

    def _without(self, record: RoundRecord) -> list[str]:
        """Whom a member says it went on without, if these are its neighbours."""
        names = [self._plan.names[place] for place in record.without if place < len(self._plan.names)]
        known = self._neighbours.get(self._plan.names[record.member])
        return names if known is None else [name for name in names if name in known]

    @property
    def _rounding(self) -> float:
        """Relative room for rounding: distances are sums of P squares in the model's own precision."""
        layout = self._plan.layout
        return _ROUNDING * torch.finfo(layout.dtype).eps * (math.log2(layout.size + 1) + 4)

    def _network_row(self, known: NetworkRound) -> NetworkRow:
        """Row of the network that the records of a round certify."""
        records, plan = list(known.records.values()), self._plan
        squares = [record.norm**2 for record in records if record.norm is not None]
        return network_row(
            plan.bound_rule,
            known.number,
            kind_of_round(known.number, plan.experiment.rounds),
            losses=[record.loss for record in records],
            disagreement=known.disagreement,
            mean_squared_norm=sum(squares) / len(squares) if squares else None,
            nodes=len(records),
            skipped=sum(record.skipped for record in records),
            unknown=sum(record.disagreement is None for record in records),
            rounding=self._rounding,
            bytes_sent=sum(record.sent for record in records),
            seconds={part: max(r.milliseconds[i] for r in records) / 1000 for i, part in enumerate(PARTS)},
            missing=[name for name, place in self._places.items() if place not in known.records],
            known_in=known.known_in,
        )

    def _push_sum_row(self, number: int, low: float, high: float, known_in: int) -> NetworkRow:
        """Row of the network that a sum of everybody's disagreement certifies."""
        own = self.view.newest.get(self._places[self._me])
        norm = own.record.norm if own is not None else None
        return network_row(
            self._plan.bound_rule,
            number,
            kind_of_round(number, self._plan.experiment.rounds),
            losses=[],
            disagreement=None,
            mean_squared_norm=None if norm is None else norm**2,
            nodes=len(self._plan.names),
            between=(low, high),
            rounding=self._rounding,
            missing=[],
            known_in=known_in,
        )


def _finite(value: float | None) -> float | None:
    """A number that a record can hold, in 32 bits if need be."""
    return float(value) if value is not None and abs(value) < _LARGEST else None


def _milliseconds(seconds: Mapping[str, float]) -> tuple[int, int, int, int]:
    train, wait, mix, evaluate = (round(1000 * (seconds.get(part) or 0.0)) for part in PARTS)
    return train, wait, mix, evaluate
