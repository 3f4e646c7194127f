"""The exchange of rows' messages: a gather over neighbour slots, and what ranks have to send each other for it.

Shapes: N nodes, M rows of this rank, K neighbour slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.algorithms import Inbox, over_an_edge
from p2pfl.algorithms.base import SlotMessages
from p2pfl.errors import ConfigError
from p2pfl.experiment.plan import Plan
from p2pfl.experiment.requirements import matches_flows
from p2pfl.faults.script import FaultKind, FaultScript
from p2pfl.simulator.flow_ledger import FlowLedger, Flows
from p2pfl.simulator.mixing import Mixed, block_columns, mix_in_place
from p2pfl.simulator.resynchronisation import Resynchronisation
from p2pfl.simulator.sharding.halo import BlockedExchange, HaloExchange, HaloPlan
from p2pfl.simulator.sharding.shard import Shard
from p2pfl.simulator.tables import NeighbourTables, Tables
from p2pfl.wire.update import UpdateFormat

Messages = Mapping[str, Tensor]

_SIMULATED = (FaultKind.PAUSE, FaultKind.CUT, FaultKind.LOSS)
"""Faults that rows of a population can have."""


class Exchange:
    """Exchanges of all rows.

    Args:
        plan: of the network.
        shard: rows that are here.
        device: where they are.
        faults: what is lost by script.
        is_lossy: whether messages may stay out also without a script; where rows are shared none does.
    """

    def __init__(self, plan: Plan, shard: Shard, device: torch.device, faults: FaultScript | None, *, is_lossy: bool) -> None:
        algorithm, schedule = plan.recipe.algorithm, plan.schedule
        self._shard, self._device, self._faults = shard, device, faults
        self._halo_exchange: HaloExchange | None = None
        self._inboxes, self._names = plan.recipe.inboxes, plan.names
        self._schedule, self._channels, self._phases = schedule, algorithm.channels, algorithm.phases
        self._is_lossy = is_lossy or faults is not None
        if faults is not None:
            faults.check(self._names, kinds=_SIMULATED, in_seconds=False)
        self.tables = NeighbourTables(plan, device, is_lossy=self._is_lossy)
        self.ledger = FlowLedger(len(self._names), device)
        self._resynchronisation = Resynchronisation()
        self.resynchronised: list[tuple[int, int]] = []
        """(receiver, sender) where daemons would have sent a full update in the last exchange."""
        if self._is_lossy and not matches_flows(algorithm, plan.topology):
            raise ConfigError("topology: a directed graph; faults need an undirected one, where each side can match what the other did")
        self._cached_halo = lru_cache(maxsize=schedule.period or 4)(self._make_halo)

    def _halo(self, round: int) -> HaloPlan:
        return self._cached_halo(round % self._schedule.period if self._schedule.period else round)

    def _make_halo(self, round: int) -> HaloPlan:
        reverse_NK = self.tables.reverse_NK.cpu().numpy() if self.tables.reverse_NK is not None else None
        return HaloPlan.of(self._shard, self._schedule.at(round), self.tables.at(round).index_NK.cpu().numpy(), reverse_NK, self._device)

    def delivered(self, round: int, came_E: NDArray[np.bool_] | None = None) -> Tensor:
        """Find out whose messages reach whom in a round, bool (N, K).

        Args:
            round: of the run.
            came_E: of the round's edges; None: all but what the script takes away.
        """
        tables = self.tables.at(round)
        delivered_NK = tables.linked_NK.clone()
        if came_E is not None:
            delivered_NK[tables.receivers_E, tables.slots_E] = torch.from_numpy(came_E).to(self._device)
        elif self._faults is not None:
            for i, k, j in tables.edges():
                delivered_NK[i, k] = self._faults.delivers(self._names[j], self._names[i], round)
        return delivered_NK

    def inbox(self, exchange: int, delivered_NK: Tensor, running_N: Tensor, sent: Messages, active_N: Tensor | None = None) -> Inbox:
        """Inbox of all rows for one exchange.

        Args:
            exchange: round * phases + phase.
            delivered_NK: from `delivered`.
            running_N: bool; a row that has stopped still says so, and neither gives nor takes.
            sent: by channel, (N, ...).
            active_N: bool, who takes part; None: all.
        """
        tables = self.tables.at(exchange // self._phases)
        index_NK, reverse_NK = tables.index_NK, self.tables.reverse_NK
        present_NK = delivered_NK & running_N[:, None] & running_N[index_NK]
        compensation: dict[str, Tensor] = {}
        flows: Flows | None = None
        unmatched_NK: Tensor | None = None
        if self._is_lossy:
            flows, unmatched_NK = self.ledger.match(tables, delivered_NK, present_NK)
            merges_N = running_N if active_N is None else running_N & active_N
            self._resynchronise(exchange, tables, present_NK, merges_N, sent)
            compensation = self.ledger.compensation(sent.keys(), merges_N)

        def slot(channel: str, k: int, rows: Tensor | None) -> Tensor:
            index = index_NK[:, k] if rows is None else index_NK[rows, k]
            if not self._channels[channel].per_edge:
                return sent[channel][index]
            assert reverse_NK is not None
            return sent[channel][index, reverse_NK[:, k] if rows is None else reverse_NK[rows, k]]

        return self._inboxes.for_rows(
            sent,
            slot,
            weights_NK=tables.weights_NK,
            self_weights_N=tables.self_weights_N,
            present_NK=present_NK,
            compensation=compensation,
            flows=flows,
            asked_NK=unmatched_NK,
        )

    def inboxes(
        self, exchange: int, delivered_NK: Tensor, running_N: Tensor, sent: Messages, active_M: Tensor | None = None
    ) -> list[tuple[slice, Inbox]]:
        """Inboxes of this rank's rows for one exchange: first of those that need no other rank's rows, while these travel.

        Args:
            exchange: round * phases + phase.
            delivered_NK: from `delivered`, of all nodes.
            running_N: bool, of all nodes.
            sent: by channel, (M, ...).
            active_M: bool, who takes part; None: all.
        """
        if self._shard.is_all:
            return [(slice(0, len(self._names)), self.inbox(exchange, delivered_NK, running_N, sent, active_M))]
        if self._halo_exchange is not None:
            self._halo_exchange.done()
        number = exchange // self._phases
        tables, halo = self.tables.at(number), self._halo(number)
        received = self._halo_exchange = HaloExchange(self._shard.ranks, halo, self._channels, sent)
        if self._is_lossy:
            self._resynchronise(exchange, tables, delivered_NK & running_N[:, None] & running_N[tables.index_NK], running_N, sent)
        present_MK = self.present(number, delivered_NK, running_N)
        reverse_MK = self._shard.local(self.tables.reverse_NK) if self.tables.reverse_NK is not None else None
        weights_MK, self_weights_M = self._shard.local(tables.weights_NK), self._shard.local(tables.self_weights_N)

        def slot(channel: str, k: int, rows: Tensor | slice) -> Tensor:
            near, single = halo.near_MK[rows, k], self._channels[channel].per_edge
            if single:
                assert reverse_MK is not None
                theirs = sent[channel][near, reverse_MK[rows, k]]
            else:
                theirs = sent[channel].index_select(0, near)
            far = (halo.single_far_MK if single else halo.far_MK)[rows, k]
            away = (far >= 0).nonzero().squeeze(-1)
            if len(away):
                theirs[away] = received.far(channel)[far[away]]
            return theirs

        def slot_from(part: slice) -> SlotMessages:
            return lambda channel, k, rows: slot(channel, k, part if rows is None else rows + part.start)

        return [
            (
                part,
                self._inboxes.for_rows(
                    {name: tensor[part] for name, tensor in sent.items()},
                    slot_from(part),
                    weights_NK=weights_MK[part],
                    self_weights_N=self_weights_M[part],
                    present_NK=present_MK[part],
                ),
            )
            for part in self._shard.slices
        ]

    def present(self, round: int, delivered_NK: Tensor, running_N: Tensor) -> Tensor:
        """Messages that count at the rows of this rank, bool (M, K)."""
        return self._shard.local(delivered_NK & running_N[:, None] & running_N[self.tables.at(round).index_NK])

    def mix_in_place(
        self, round: int, x_MP: Tensor, delivered_NK: Tensor, running_N: Tensor, *, threads: int, active_M: Tensor | None, compiled: bool
    ) -> Mixed:
        """Average this rank's rows with their neighbours, in place."""
        tables, present_MK = self.tables.at(round), self.present(round, delivered_NK, running_N)
        if self._shard.is_all:
            whole = (x_MP, tables.index_NK, tables.weights_NK, present_MK)
            return mix_in_place(*whole, threads=threads, active_N=active_M, compiled=compiled)
        halo = self._halo(round)
        columns = BlockedExchange(self._shard.ranks, halo, self._shard.num_inner)
        mixed = mix_in_place(
            x_MP,
            torch.where(halo.far_MK >= 0, halo.far_MK + len(x_MP), halo.near_MK),
            self._shard.local(tables.weights_NK),
            present_MK,
            threads=threads,
            active_N=active_M,
            halo=columns,
            # the same at all ranks, which may share one cache
            width=block_columns(len(self._names), x_MP.shape[1], x_MP.element_size()),
            compiled=compiled,
        )
        columns.done()
        return mixed

    def done(self) -> None:
        """Wait until other ranks have what they were sent."""
        if self._halo_exchange is not None:
            self._halo_exchange.done()

    def bytes_sent(self, exchange: int, sent: Messages, active_N: Tensor | None = None) -> np.ndarray:
        """Bytes that each daemon would send in this exchange, (N,): its update over every edge, and a full one where that was asked for."""
        update_format = UpdateFormat.of(over_an_edge(self._channels, sent), over_an_edge(self._channels, sent, whole=True))
        number = exchange // self._phases
        num_messages_N = self.tables.at(number).num_messages_N.numpy()
        bytes_N: np.ndarray = num_messages_N * update_format.encoded_bytes(exchange)
        if active_N is not None:
            bytes_N = np.where(active_N.cpu().numpy(), bytes_N, 0)
        for _, sender in self.resynchronised:
            bytes_N[sender] += update_format.encoded_bytes(exchange, full=True)
        return bytes_N

    def active(self, round: int) -> Tensor | None:
        """Nodes that are not paused by the script in a round, bool (N,); None: all."""
        faults = self._faults
        return None if faults is None else torch.tensor([not faults.is_paused(name, round) for name in self._names]).to(self._device)

    def _resynchronise(self, exchange: int, tables: Tables, present_NK: Tensor, merges_N: Tensor, sent: Messages) -> None:
        is_encoded = any(self._channels[name].encodes is not None for name in sent)
        phase = exchange % self._phases
        self.resynchronised = self._resynchronisation.note(exchange, phase, tables, present_NK, merges_N) if is_encoded else []

    def metadata(self) -> dict[str, Any]:
        """Metadata of a checkpoint."""
        return {"open": self.ledger.open_edges, **self._resynchronisation.metadata()}

    def restore(self, tensors: Messages, metadata: Mapping[str, Any]) -> None:
        """Take up the ledger's tensors and the metadata of a checkpoint."""
        self.ledger.restore(tensors, metadata["open"])
        self._resynchronisation.restore(metadata["led_to"], metadata["held"])
