"""The mixing of one round: rows are averaged in place or merged by the algorithm's phases, and the models sent are measured.

Shapes: N nodes, M rows of this rank, K neighbour slots, P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.algorithms import Notice
from p2pfl.evaluation.mean_model import squared_distances_from_mean
from p2pfl.experiment.plan import Plan
from p2pfl.faults.script import FaultScript
from p2pfl.runs.events import EventKind
from p2pfl.simulator.events.clock import RoundTimes
from p2pfl.simulator.exchange import Exchange, Participation
from p2pfl.simulator.mixing import load_compiled
from p2pfl.simulator.sharding.shard import Shard
from p2pfl.training import Population

WORTH = 10**9
"""Numbers from which on compiled loops are worth their loading, which takes a second."""

_LEFT, _WITHOUT_LOSS = 1, 2  # how a row's training ended, where it did not end well


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """Measures of one round, of all nodes; of the models that its exchanges sent, zeros where none were sent."""

    losses: list[float | None]
    squared_N: NDArray[np.float64]
    """sum_j ||x_i - x_j||**2."""
    norms_N: NDArray[np.float64]
    """||x_i||**2."""
    moved_N: NDArray[np.float64]
    """||x_i - x_i of the round before||, where the stop rule asks."""
    bytes_N: NDArray[np.int64]
    phase: int | None
    """The phase in which models were sent; None: in no phase."""
    rms_disagreement: float | None
    """Root mean square distance of the models sent from their mean; None where none were sent."""
    consensus_distance: float
    """Root mean square distance of the mixed models from their mean."""
    diverged: tuple[str, ...]
    """Nodes whose last training became non-finite."""
    without_loss: tuple[str, ...]
    """Nodes whose last training gave no finite loss, with finite weights."""
    notices: list[tuple[EventKind | str, int, str]]
    """Events to record: kind, node and detail; complete at the first rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """Figures of one round's mixing, of this rank's rows unless they say otherwise."""

    columns: tuple[Tensor, ...]
    """Squares of the sent models' distances and of their norms, their moves, their deviations, (M,) each; empty where none were sent."""
    bytes_N: NDArray[np.int64]
    """Bytes that each node has sent."""
    phase: int | None
    """The phase in which models were sent; None: in no phase."""
    notices: list[tuple[EventKind | str, int, str]]
    """Events to record: kind, node and detail; complete at the first rank."""


class Mixer:
    """Mixing of this rank's rows with those of all ranks, plainly in place on the CPU where nothing of earlier rounds is remembered.

    Args:
        faults: script of what is lost, where no clock says it.
        is_lossy: whether messages may stay out also without a script.
        moves: whether the stop rule asks how far models have moved.
    """

    def __init__(
        self, plan: Plan, population: Population, shard: Shard, faults: FaultScript | None, *, is_lossy: bool, moves: bool
    ) -> None:
        self._plan, self._population, self._shard, self._asks_for_moves = plan, population, shard, moves
        self._exchange = Exchange(plan, shard, population.device, faults, is_lossy=is_lossy)
        self.ledger = self._exchange.ledger
        self._is_plain = plan.recipe.mixes_in_place and not moves and faults is None and population.device.type == "cpu"
        self._compiled = self._is_plain and mixing_is_worth_it(plan) and load_compiled(plan.layout.dtype)
        self.sent_MP: Tensor | None = None
        """Models sent in the last round, where the graph changes."""

    def participation(self, number: int, running_N: NDArray[np.bool_], times: RoundTimes | None) -> Participation:
        """Find out who of the running nodes takes part in a round, and whose messages come; see `Exchange.participation`."""
        return self._exchange.participation(number, running_N, times)

    def mix(self, number: int, local_steps: int, who: Participation) -> Mixing:
        """Let the rows of one round exchange their messages and merge them."""
        if self._is_plain and (who.times is None or who.times.is_whole) and not self.ledger.is_open:
            return self._mix_plainly(number, who)
        return self._merge(number, local_steps, who)

    def measures(self, mixing: Mixing, losses_M: Tensor | None, mixed_MP: Tensor) -> Measures:
        """Gather a round's measures of all ranks, from the losses of its training and the models to evaluate after its mixing."""
        names, population = self._plan.names, self._population
        nothing_M = torch.zeros(len(self._shard.mine), dtype=torch.float64)
        ended_M = nothing_M.clone()
        if population.diverged or population.without_loss:
            row_of = {names[node]: row for node, row in self._shard.row_of.items()}
            ended_M[[row_of[name] for name in population.diverged]] = _LEFT
            ended_M[[row_of[name] for name in population.without_loss]] = _WITHOUT_LOSS
        columns = mixing.columns or (nothing_M,) * 4
        mixed_M = self._deviation(self._plan.layout.shared_of(mixed_MP))
        whole_M = torch.stack([losses_M.double() if losses_M is not None else nothing_M, *columns, ended_M, mixed_M], dim=1)
        losses_N, squared_N, norms_N, moved_N, deviation_N, ended_N, mixed_N = self._shard.all_gather(whole_M).unbind(dim=1)
        return Measures(
            losses=losses_N.tolist() if losses_M is not None else [None] * len(names),
            squared_N=squared_N.numpy(),
            norms_N=norms_N.numpy(),
            moved_N=moved_N.numpy(),
            bytes_N=mixing.bytes_N,
            phase=mixing.phase,
            rms_disagreement=float(deviation_N.mean().sqrt()) if mixing.phase is not None else None,
            consensus_distance=float(mixed_N.mean().sqrt()),
            diverged=tuple(names[node] for node in (ended_N == _LEFT).nonzero().flatten().tolist()),
            without_loss=tuple(names[node] for node in (ended_N == _WITHOUT_LOSS).nonzero().flatten().tolist()),
            notices=mixing.notices,
        )

    def _mix_plainly(self, number: int, who: Participation) -> Mixing:
        """Average in place: the rule sends the rows' models as they are."""
        x_MP, threads = self._population.state["x"], self._population.threads
        bytes_N = self._exchange.bytes_sent(number, {"x": x_MP}, who.there_N)
        mixed = self._exchange.mix_in_place(
            number, x_MP, who.delivered[0], who.running_N, threads=threads, active_M=who.active_M, compiled=self._compiled
        )
        deviation_M = mixed.deviation_N
        if not self._shard.is_all:  # measured from the mean of this rank's rows
            off_P = mixed.mean_P.double()
            off_P = off_P - self._shard.ranks.all_reduce(off_P * len(deviation_M)) / len(self._plan.names)
            deviation_M = deviation_M + off_P.square().sum()
        columns = mixed.squared_N, mixed.squared_norms_N, torch.zeros_like(deviation_M), deviation_M
        return Mixing(columns=columns, bytes_N=bytes_N, phase=0, notices=[])

    def _merge(self, number: int, local_steps: int, who: Participation) -> Mixing:
        """Go through the algorithm's phases."""
        algorithm, names = self._plan.recipe.algorithm, self._plan.names
        notices: list[tuple[EventKind | str, int, str]] = []
        measured: tuple[Tensor, ...] = ()
        model_phase, bytes_N = None, np.zeros(len(names), dtype=np.int64)
        for phase in range(algorithm.phases):
            exchange = number * algorithm.phases + phase
            sent = self._population.outgoing(number, phase, local_steps=local_steps)
            inboxes = self._exchange.inboxes(exchange, who.delivered[phase], who.running_N, sent, who.active_M)
            changes = self._population.merge_in_parts(number, phase, inboxes, local_steps=local_steps, active_N=who.active_M)
            if algorithm.has_notices:
                notices += self._of_all_ranks(number, changes)
            bytes_N += self._exchange.bytes_sent(exchange, sent, who.there_N)
            for receiver, sender in self._exchange.resynchronised:
                notices.append((EventKind.RESYNCHRONISED, receiver, f"{names[sender]} at exchange {exchange}"))
            channel = algorithm.model_channel
            if channel in sent and model_phase is None:
                model_phase = phase
                squared_M = torch.cat([inbox.squared_distances(channel) for _, inbox in inboxes]).cpu()
                norms_M = torch.linalg.vector_norm(sent[channel], dim=-1).double().square().cpu()
                measured = squared_M, norms_M, self._moved(sent[channel]), self._deviation(sent[channel])
        self._exchange.done()
        return Mixing(columns=measured, bytes_N=bytes_N, phase=model_phase, notices=notices)

    def _of_all_ranks(self, number: int, notices: Sequence[Notice]) -> list[tuple[EventKind | str, int, str]]:
        """Gather what the rule has changed of its own accord, at all ranks."""
        here = [(int(self._shard.mine[notice.row]), notice.event, f"round {number}: {notice.detail}") for notice in notices]
        told = sorted(told for rank in self._shard.ranks.all_gather_object(here) for told in rank)
        return [(kind, node, detail) for node, kind, detail in told]

    def _deviation(self, x_MP: Tensor) -> Tensor:
        """||x_i - mean||**2 of rows, (M,) float64 on the CPU."""
        if self._shard.is_all:
            return squared_distances_from_mean(x_MP)
        mean_P = (self._shard.ranks.all_reduce(x_MP.sum(dim=0, dtype=torch.float64)) / len(self._plan.names)).to(x_MP.dtype)
        return squared_distances_from_mean(x_MP, mean_P)

    def _moved(self, sent_MP: Tensor) -> Tensor:
        """How far the models exchanged have moved since the last round, (M,) float64 on the CPU; 0 where nobody asks."""
        moved_M = torch.zeros(len(sent_MP), dtype=torch.float64)
        if self._asks_for_moves:
            if self.sent_MP is not None:
                moved_M = torch.linalg.vector_norm(sent_MP - self.sent_MP, dim=-1).double().cpu()
            self.sent_MP = sent_MP.clone()
        return moved_M

    def roll_back(self, number: int) -> None:
        """Take back the flows that are open when the run ends, in one closing exchange that carries no messages."""
        recipe, compensation = self._plan.recipe, dict(self.ledger.close())
        for phase in range(recipe.algorithm.phases if compensation else 0):
            num_slots = self._exchange.tables.at(number).linked_NK.shape[1]
            sent = self._population.outgoing(number, phase, local_steps=0)
            due = {name: compensation.pop(name) for name in compensation.keys() & sent.keys()}  # once, though phases share a channel
            closing = recipe.inboxes.without_messages(sent, num_slots, self._plan.layout.dtype, due)
            self._population.merge(number, phase, closing, local_steps=0)

    def restore(self, sent_MP: Tensor | None) -> None:
        """Take up the models sent last, from a checkpoint."""
        self.sent_MP = sent_MP.to(self._population.device) if sent_MP is not None and self._asks_for_moves else None


def mixing_is_worth_it(plan: Plan) -> bool:
    """Whether compiled mixing is faster, by the numbers that pass over edges in all rounds; it gives the same bits as torch."""
    num_numbers = len(plan.topology.senders) * plan.layout.size * plan.experiment.last_possible_round
    return plan.experiment.compiled != "off" and num_numbers >= WORTH
