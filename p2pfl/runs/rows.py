"""Rows of numbers that a run records, and the one rule that says when a round bounds the network's disagreement.

Symbols: x_i is the model of node i, S the sum over edges of ||x_i - x_j||**2 before mixing, L the graph's unweighted Laplacian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from p2pfl.runs.text import Row

RoundKind = Literal["train", "settle"]

_OF_A_NODE, _OF_THE_NETWORK = {"norm", "stop_round"}, {"bound_low", "bound_high", "rms_norm", "rms_disagreement", "consensus_distance"}
_ALWAYS_WRITTEN = {"loss", "disagreement"} | _OF_A_NODE | _OF_THE_NETWORK
"""Fields that are null on disk where nothing is known; others are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeRow:
    """Numbers of one round at one node, a line of nodes.jsonl; None is unknown."""

    round: int
    node: str
    kind: RoundKind
    loss: float | None
    disagreement: float | None
    """Half of the sum over the neighbours that came of ||x_i - x_j||**2; None where no models were compared."""
    norm: float | None
    """||x_i||; None where no model was sent."""
    skipped: Sequence[str]
    agreed_for: int
    stop_round: int | None = None
    bytes_sent: int
    seconds: Mapping[str, float]
    merged: Sequence[Any] | None = None
    """Which updates were merged, of nodes at their own pace."""
    metrics: Mapping[str, float] | None = None
    simulated_s: float | None = None
    """On the network's virtual clock; None: there is none, NaN: it is not known."""
    sending_s: float | None = None
    """Seconds from when a node's updates were ready until they had gone into its links, which is while it waits; None: not measured."""
    lateness: Mapping[str, float] | None = None
    """Seconds from when a node's update was ready until each neighbour's came, by neighbour: negative where it came before; of all
    exchanges of the round together. None: not measured."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """Read the row of a file or a checkpoint; fields that only another version knows are left out."""
        return cls(**{key: value for key, value in row.items() if key in NODE_KEYS})

    def as_row(self) -> Row:
        """Give fields by their names on disk, without those that this run does not have."""
        row = _written(self)
        if self.merged is not None and "metrics" in row:
            row["metrics"] = row.pop("metrics")  # last in every version
        return row


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkRow:
    """Numbers of one round of the network, a line of rounds.jsonl or of a node's network.jsonl; None is unknown."""

    round: int
    kind: RoundKind
    loss: float | None
    """Mean of the nodes' training losses."""
    disagreement: float | None
    """S, as far as it is known."""
    bound_low: float | None
    bound_high: float | None
    """The root mean square disagreement is between the two."""
    rms_norm: float | None
    rms_disagreement: float | None = None
    """sqrt(mean_i ||x_i - mean||**2) before mixing, where somebody sees all models."""
    consensus_distance: float | None = None
    """Root mean square distance of the models to their mean after mixing."""
    nodes: int
    missing: Sequence[str] | None = None
    """Members of whom no record of the round has come."""
    known_in: int | None = None
    """The round in which a node came to know this one."""
    bytes_sent: int | None = None
    skipped: int | None = None
    seconds: Mapping[str, float] | None = None
    simulated_s: float | None = None

    def as_row(self) -> Row:
        """Give fields by their names on disk, without those that this run does not have."""
        return _written(self)


NODE_KEYS = frozenset(each.name for each in fields(NodeRow))
NETWORK_KEYS = frozenset(each.name for each in fields(NetworkRow))

REQUIRED = {
    "rounds.jsonl": {"round", "kind"},
    "network.jsonl": {"round", "kind", "nodes"},
    "nodes.jsonl": {"round", "node", "kind"},
    "events.jsonl": {"round", "node", "event"},
}
KNOWN = {
    "rounds.jsonl": NETWORK_KEYS - {"known_in", "missing"},
    "nodes.jsonl": NODE_KEYS,
    "network.jsonl": NETWORK_KEYS - {"simulated_s"},
    "events.jsonl": REQUIRED["events.jsonl"] | {"time", "detail"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundRule:
    """Says when S of a round bounds the root mean square disagreement, and by how much.

    S / lambda_max(L) <= sum_i ||x_i - mean||**2 <= S / lambda_2(L), if all distances are of the models of one round and over a graph that
    stays as it is. With edges missing from S only the lower bound holds.
    """

    num_nodes: int
    sends_models: bool
    """Whether any channel carries models, so that there is something to compare."""
    in_step: bool
    """Whether the updates that are merged together are of one round."""
    is_constant: bool
    """Whether the graph stays as it is: where it changes, nodes that do not meet in a round may be anywhere."""
    extremes: tuple[float, float] | None
    """lambda_2(L) and lambda_max(L); None where they would take too long."""

    def bounds(self, lowest: float, highest: float, *, is_complete: bool, rounding: float) -> tuple[float | None, float | None]:
        """Compute the bounds for lowest <= S <= highest, the upper one only if S has the distance over every edge.

        *rounding* is the relative room for the rounding of distances.
        """
        if self.extremes is None:
            return None, None
        lambda_2, lambda_max = self.extremes
        low = math.sqrt(lowest / (self.num_nodes * lambda_max)) * (1 - rounding)
        high = math.sqrt(highest / (self.num_nodes * lambda_2)) * (1 + rounding) if is_complete else None
        return low, high


def kind_of_round(number: int, training_rounds: int) -> RoundKind:
    """Tell whether a round trains, or only mixes until the network agrees to stop."""
    return "train" if number < training_rounds else "settle"


def network_row(
    rule: BoundRule | None,
    number: int,
    kind: RoundKind,
    *,
    losses: Sequence[float | None],
    disagreement: float | None,
    mean_squared_norm: float | None,
    nodes: int,
    skipped: int | None = None,
    unknown: int = 0,
    between: tuple[float, float] | None = None,
    rounding: float = 0.0,
    **known: Any,
) -> NetworkRow:
    """Put together what a round says of the network; the only place that decides whether bounds hold.

    Args:
        rule: of the network; None: the row is of a part of it and bounds nothing.
        number: the round.
        kind: of the round.
        losses: each node's mean training loss; None or NaN where it did not train.
        disagreement: S as far as it is known; None where no models were compared.
        mean_squared_norm: of the models sent; None where none were.
        nodes: how many are in the sums.
        skipped: messages that were missed; None: not counted, because a sum over the whole network came whole.
        unknown: how many of the nodes have a part in S that is not known.
        between: numbers between which S lies, where itself it is not known.
        rounding: relative room for the rounding of distances.
        known: further fields of the row.
    """
    defined = [loss for loss in losses if loss is not None and not math.isnan(loss)]
    low = high = None
    span = between if between is not None else None if disagreement is None else (disagreement, disagreement)
    if rule is not None and span is not None:
        is_complete = not skipped and not unknown and nodes == rule.num_nodes
        low, high = rule.bounds(*span, is_complete=is_complete, rounding=rounding)
    return NetworkRow(
        round=number,
        kind=kind,
        loss=math.fsum(defined) / len(defined) if defined else None,
        disagreement=disagreement,
        bound_low=low,
        bound_high=high,
        rms_norm=None if mean_squared_norm is None else math.sqrt(mean_squared_norm),
        nodes=nodes,
        skipped=skipped,
        **known,
    )


def row_of_nodes(rule: BoundRule | None, rows: Sequence[NodeRow], number: int, kind: RoundKind, **known: Any) -> NetworkRow:
    """Sum the rows of nodes that have recorded a round; see `network_row`."""
    return network_row(
        rule,
        number,
        kind,
        losses=[row.loss for row in rows],
        disagreement=disagreement_of(rule, rows),
        mean_squared_norm=squared_norm_of(rule, rows),
        nodes=len(rows),
        skipped=sum(len(row.skipped) for row in rows),
        bytes_sent=sum(row.bytes_sent for row in rows),
        **known,
    )


def disagreement_of(rule: BoundRule | None, rows: Sequence[NodeRow]) -> float | None:
    """Sum what nodes saw in a round; None where none compared models, infinite where one saw more than a number holds."""
    seen = [row.disagreement for row in rows if row.disagreement is not None]
    # null is unknown where a node heard nobody: it skipped somebody, or it may have had no neighbour in this round
    if rule is not None and rule.sends_models and rule.in_step and rule.is_constant:
        seen += [math.inf for row in rows if row.disagreement is None and not row.skipped]
    return sum(seen) if seen else None


def squared_norm_of(rule: BoundRule | None, rows: Sequence[NodeRow]) -> float | None:
    """Average the models' squared norms; None where none were sent, infinite where one is more than a number holds."""
    if rule is not None and not rule.sends_models:
        return None
    in_step = rule is not None and rule.in_step
    norms = [math.inf if row.norm is None else row.norm for row in rows if in_step or row.norm is not None]
    return math.fsum(norm**2 for norm in norms) / len(norms) if norms else None


def _written(row: NodeRow | NetworkRow) -> Row:
    return {name: value for name in row.__slots__ if (value := getattr(row, name)) is not None or name in _ALWAYS_WRITTEN}
