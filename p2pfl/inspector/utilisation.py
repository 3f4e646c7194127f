"""How a network's nodes spend their rounds: training, waiting, mixing, writing; from the records of the newest rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from p2pfl.inspector.link_health import WINDOW
from p2pfl.inspector.verdict import COST_PARTS
from p2pfl.runs.records import RunRecords
from p2pfl.runs.text import Row

UTILISATION_PARTS = (*COST_PARTS, "sending")
"""Headings of fractions of a round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Utilisation:
    """How one node spent its newest rounds."""

    rounds: int
    """How many of them are recorded."""
    round_s: float
    """Mean seconds of one."""
    fractions: Mapping[str, float]
    """Fractions of its rounds, by `COST_PARTS`; they sum to 1."""
    sending: float | None
    """Fraction in which its updates were on their way into its links, which is while it waits; None: not measured."""

    def cells(self) -> list[float | None]:
        """Give the fractions in the order of `UTILISATION_PARTS`."""
        return [self.fractions[part] for part in COST_PARTS] + [self.sending]


def newest_training(run: RunRecords) -> list[Row]:
    """Rows of the newest rounds, those that train where there are any; none of a simulator, whose seconds are one machine's."""
    if str(run.environment.get("engine") or "daemons") != "daemons":
        return []
    rows = [row for row in run.nodes if row["kind"] == "train"] or run.nodes
    rows = [row for row in rows if row.get("seconds")]
    last = max((int(row["round"]) for row in rows), default=-1)
    return [row for row in rows if row["round"] > last - WINDOW]


def utilisation(run: RunRecords) -> dict[str, Utilisation]:
    """Each node's newest rounds, in the order of the names; without nodes of whose seconds nothing is known."""
    by_node: dict[str, list[Row]] = {}
    for row in newest_training(run):
        by_node.setdefault(str(row["node"]), []).append(row)
    return {name: found for name in sorted(by_node) if (found := _of(by_node[name])) is not None}


def busiest_first(found: Mapping[str, Utilisation]) -> list[tuple[str, Utilisation]]:
    """Order nodes so that those come first that wait least, for the others wait for them."""
    return sorted(found.items(), key=lambda pair: (pair[1].fractions["wait"], pair[0]))


def _of(rows: Sequence[Row]) -> Utilisation | None:
    parts = {part: fmean(float(row["seconds"].get(part, 0.0)) for row in rows) for part in COST_PARTS}
    total = sum(parts.values())
    if total <= 0:
        return None
    sent = [float(row["sending_s"]) for row in rows if row.get("sending_s") is not None]
    return Utilisation(
        rounds=len(rows),
        round_s=total,
        fractions={part: seconds / total for part, seconds in parts.items()},
        sending=fmean(sent) / total if sent else None,
    )
