"""The edge ledger: why the network's mean does not drift when messages are lost, nodes are late, or a process is killed.

A merge over the edge to a neighbour j is a flow w_ij (x_j - x_i) into i that must be matched by its negative into j. Whether j merged too
is not known when i merges; j's next report says so. If j did not, i rolls its flow back, late but exactly. At most one flow an edge is ever
open, because an update of exchange t is merged only together with a report that has closed t - 1.

What a report says are durable facts about closed exchanges, so hearing one twice, late, or from before a restart changes nothing. That is
also why it must come from the last checkpoint and never from memory: a node that is killed wakes up without what it had not written.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from p2pfl.wire.messages import MAX_MERGED, NOTHING_CLOSED, Remembered, Report

SavedLedger = dict[str, Any]
"""A ledger as a checkpoint holds it; plain JSON. Earlier versions did not keep "heard" and "anew"."""


@dataclass(slots=True)
class EdgeLedger:
    """One node's side of one edge, integers only: the caller keeps the tensors, the ledger says which exchange's flow to roll back.

    A flow that is to be rolled back leaves the ledger when its exchange is given out; from then on it is the caller's, whose next
    checkpoint must hold either the compensation that is still due or its effect, together with this ledger.
    """

    closed_through: int = -1
    """The last exchange that is over here."""
    open_flow: int | None = None
    """The exchange that we merged and of which we do not know yet whether the neighbour did."""
    merged: tuple[int, ...] = ()
    """Exchanges that we merged and the neighbour may not know of yet, rising."""
    confirmed: int = -1
    """The neighbour has acknowledged our reports through this exchange."""
    acknowledged: int = -1
    """We have acknowledged the neighbour's reports through this exchange."""
    heard: Report | None = None
    """The neighbour's latest report."""
    anew: int = 0
    """When the neighbour was last started anew without its state, by its own clock; 0: never."""
    _admitted_before: int = -1
    """The last exchange that could be merged by what the neighbour said before it was started anew, until the next one is closed."""
    counters: Counter[str] = field(default_factory=Counter)
    """ "lost_history": the neighbour was told more than we remember."""
    _durable: Report = NOTHING_CLOSED

    def admits(self, exchange: int) -> bool:
        """Whether an update of this exchange may be merged: it is not over, everything before it is known, there is room to report it."""
        return (
            exchange > self.closed_through
            and self.heard is not None
            and self.heard.closed_through >= exchange - 1
            and len(self.merged) < MAX_MERGED
        )

    def refuses(self, exchange: int) -> bool:
        """Whether the neighbour has closed this exchange without merging it, so that nothing more of it will come."""
        return self.heard is not None and self.heard.confirmed < exchange <= self.heard.closed_through and exchange not in self.heard.merged

    def close(self, exchange: int, *, merged: bool) -> int | None:
        """This exchange is over here; any before it that were jumped over are closed too, not merged.

        Returns:
            The exchange whose flow is to be rolled back, None where there is none. It may be this very one, when the neighbour's report on
            it came first.

        Raises:
            ValueError: it is closed already, or merged without being admitted.
        """
        if exchange <= self.closed_through:
            raise ValueError(f"exchange {exchange} is over: closed through {self.closed_through}")
        if merged and not self.admits(exchange) and exchange > self._admitted_before:
            raise ValueError(f"exchange {exchange} merged without a report that closes the one before it: heard {self.heard}")
        self.closed_through, self._admitted_before = exchange, -1
        if merged:
            assert self.open_flow is None  # the admitting report has acknowledged what came before
            self.open_flow = exchange
            self.merged = (*self.merged, exchange)
        return self._acknowledge()

    def hear(self, report: Report) -> int | None:
        """Learn what the neighbour has done; returns as `close`."""
        if self.heard is None or _age(report) > _age(self.heard):
            self.heard = report
        return self._acknowledge()

    def report(self) -> Report:
        """Report to the neighbour, in the state of the last checkpoint."""
        return self._durable

    def to_dict(self) -> SavedLedger:
        """For a checkpoint; hand the same dict to `checkpointed` when the checkpoint is on the disk."""
        return {
            "closed_through": self.closed_through,
            "open_flow": self.open_flow,
            "merged": list(self.merged),
            "confirmed": self.confirmed,
            "settled": self.acknowledged,
            "heard": None if self.heard is None else _saved(self.heard),
            "anew": self.anew,
        }

    def checkpointed(self, saved: SavedLedger) -> None:
        """This state is durable: from now on it is what we report, even if more has happened since it was taken."""
        self._durable = _report(saved)

    @classmethod
    def from_dict(cls, saved: SavedLedger) -> EdgeLedger:
        """The ledger of a checkpoint that has been read back."""
        durable, heard = _report(saved), saved.get("heard")
        return cls(
            closed_through=durable.closed_through,
            open_flow=saved["open_flow"],
            merged=durable.merged,
            confirmed=durable.confirmed,
            acknowledged=durable.settled,
            heard=None if heard is None else _report(heard),
            anew=saved.get("anew", 0),
            _durable=durable,
        )

    def remembered(self) -> Remembered:
        """The furthest that the neighbour has said of itself; no less than what it has acknowledged."""
        report = self.heard
        if report is None:
            known = self.anew == 0  # what was acknowledged before the neighbour was started anew says nothing of it now
            report = Report(closed_through=self.acknowledged, merged=(), confirmed=-1, settled=self.confirmed) if known else NOTHING_CLOSED
        return Remembered(anew=self.anew, report=report)

    def begin_anew(self, anew: int) -> None:
        """The neighbour has begun without its state: what it said before counts no more, but for a merge that is under way."""
        self._admitted_before = -1 if self.heard is None else self.heard.closed_through + 1
        self.anew, self.heard = anew, None

    @property
    def is_acknowledged(self) -> bool:
        """Whether nothing is open on our side and the neighbour has acknowledged all that we ever merged, durably."""
        return self.open_flow is None and self._durable.closed_through == self.closed_through and not self._durable.merged

    @property
    def neighbour_is_acknowledged(self) -> bool:
        """Whether the neighbour has said the same, for every exchange that we have closed: it needs us no longer."""
        return self.heard is not None and self.heard.closed_through >= self.closed_through and not self.heard.merged

    @property
    def is_untouched(self) -> bool:
        """Whether the two have never met: nothing was heard of the neighbour, in this process or before, and nothing merged."""
        return self.heard is None and self.open_flow is None and not self.merged and self.acknowledged == self.confirmed == -1

    def _acknowledge(self) -> int | None:
        """Draw every conclusion from the latest report that what is closed here allows."""
        report = self.heard
        if report is None:
            return None
        roll_back = None
        if self.open_flow is not None and self.open_flow <= report.closed_through:
            if self.open_flow <= report.confirmed:
                # we told it that we had acknowledged this, and no longer know: our disk was lost. What it did with it is lost as well
                self.counters["lost_history"] += 1
            elif self.open_flow not in report.merged:
                roll_back = self.open_flow
            self.open_flow = None
        self.acknowledged = max(self.acknowledged, min(self.closed_through, report.closed_through))
        self.confirmed = max(self.confirmed, min(self.closed_through, report.settled))
        # what the neighbour says it did not merge needs no report from us: it has no flow there that could wait for one
        self.merged = tuple(e for e in self.merged if e > self.confirmed and (e > report.closed_through or e in report.merged))
        return roll_back


def goes_back(before: Remembered, now: Remembered) -> bool:
    """Whether a node that has once said the one cannot, with all its state, say the other: what a report counts never falls."""
    if now.anew != before.anew:
        return now.anew < before.anew
    return any(then > later for then, later in zip(_age(before.report), _age(now.report), strict=True))


def _report(saved: SavedLedger) -> Report:
    return Report(merged=tuple(saved["merged"]), **{name: saved[name] for name in ("closed_through", "confirmed", "settled")})


def _saved(report: Report) -> dict[str, Any]:
    return {
        "closed_through": report.closed_through,
        "merged": list(report.merged),
        "confirmed": report.confirmed,
        "settled": report.settled,
    }


def _age(report: Report) -> tuple[int, int, int]:
    """Orders one node's reports: each of the three only grows."""
    return report.closed_through, report.settled, report.confirmed
