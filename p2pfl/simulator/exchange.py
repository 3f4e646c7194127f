"""The exchange of rows' messages: who takes part, a gather over neighbour slots, and what ranks have to send each other for it.

Shapes: N nodes, M rows of this rank, K neighbour slots, E directed edges of the round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.algorithms import Inbox, over_an_edge
from p2pfl.algorithms.inbox import SlotMessages
from p2pfl.errors import ConfigError
from p2pfl.experiment.plan import Plan
from p2pfl.experiment.requirements import matches_flows
from p2pfl.faults.script import FaultKind, FaultScript
from p2pfl.simulator.events.clock import RoundTimes
from p2pfl.simulator.flow_ledger import FlowLedger, Flows
from p2pfl.simulator.mixing import Mixed, block_columns, mix_in_place
from p2pfl.simulator.sharding.halo import BlockedExchange, HaloExchange, HaloPlan
from p2pfl.simulator.sharding.shard import Shard
from p2pfl.simulator.tables import Tables
from p2pfl.topology import Topology
from p2pfl.wire.update import UpdateFormat

Ints = NDArray[np.int64]
Messages = Mapping[str, Tensor]

SIMULATED = (FaultKind.PAUSE, FaultKind.KILL, FaultKind.CUT, FaultKind.LOSS, FaultKind.PARTITION)
"""Faults that rows of a population can have; a killed node comes back with its state, and so is as a paused one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Participation:
    """Nodes that take part in one round, and messages that reach them."""

    tables: Tables
    times: RoundTimes | None
    """Times of the round, where there is a clock."""
    running_N: Tensor
    """bool, nodes that have not stopped."""
    there_N: Tensor | None
    """bool, nodes that send; None: all."""
    active_M: Tensor | None
    """bool, rows that merge; None: all."""
    trains_M: Tensor | None
    """bool, rows that train; None: all."""
    delivered: list[Tensor]
    """By phase, bool (N, K): whose messages reach their receivers."""
    both_NK: Tensor
    """bool, whether neither end of the slot has stopped."""
    skipped_NK: NDArray[np.bool_]
    """Neighbours whose message of any phase does not count."""

    def compared(self, phase: int) -> NDArray[np.bool_]:
        """Whether each node has compared its model with that of any neighbour in a phase, (N,)."""
        compared_N: NDArray[np.bool_] = (self.tables.linked_NK & self.both_NK & self.delivered[phase]).any(dim=1).cpu().numpy()
        return compared_N


class NeighbourTables:
    """Neighbours of every row, by round; lossy ones, whose messages may stay out, are looked up from both ends."""

    def __init__(self, plan: Plan, device: torch.device, *, is_lossy: bool) -> None:
        schedule, algorithm = plan.schedule, plan.recipe.algorithm
        self._schedule, self._dtype, self._device = schedule, plan.layout.dtype, device
        self._splits_mass, self._is_lossy = algorithm.splits_mass, is_lossy
        self._fixed_index_NK: Ints | None = None  # the same in every round
        self.reverse_NK: Tensor | None = None
        """int64, in fixed slots: the slot in which the neighbour has this node."""
        if "fixed slots" in algorithm.requires:
            links = plan.topology.undirected()
            self._fixed_index_NK = index_NK = links.with_weights(0.0).padded()[0]
            self.reverse_NK = torch.from_numpy(_slot_of(links, index_NK, np.arange(len(index_NK))[:, None])).to(device)
        self._cached = lru_cache(maxsize=schedule.period or 4)(self._make)

    def at(self, round: int) -> Tables:
        """Tables of a round."""
        return self._cached(round % self._schedule.period if self._schedule.period else round)

    def _make(self, round: int) -> Tables:
        graph = self._schedule.at(round)
        assert graph.weights is not None
        if self._fixed_index_NK is None:
            index_NK, weights_NK, linked_NK = graph.padded()
            slots_E = linked_NK.nonzero()[1]
        else:
            index_NK = self._fixed_index_NK
            weights_NK, linked_NK = np.zeros(index_NK.shape), np.zeros(index_NK.shape, dtype=np.bool_)
            slots_E = (index_NK[graph.receivers] == graph.senders[:, None]).argmax(axis=1)
            weights_NK[graph.receivers, slots_E], linked_NK[graph.receivers, slots_E] = graph.weights, True
        codes = graph.receivers * graph.num_nodes + graph.senders
        back_NK = index_NK * graph.num_nodes + np.arange(graph.num_nodes)[:, None]
        both_NK = linked_NK & (np.isin(back_NK, codes) if graph.directed else True)
        reverse_NK = np.zeros_like(index_NK)
        if self._is_lossy:
            back_E = np.searchsorted(codes, graph.senders * graph.num_nodes + graph.receivers).clip(max=max(len(codes) - 1, 0))
            reverse_NK[graph.receivers, slots_E] = slots_E[back_E]
            reverse_NK *= both_NK
        given_N = np.bincount(graph.senders, weights=graph.weights, minlength=graph.num_nodes)
        kept_N = 1 - given_N if self._splits_mass else graph.self_weights
        return Tables(
            index_NK=torch.from_numpy(index_NK).to(self._device),
            linked_NK=torch.from_numpy(linked_NK).to(self._device),
            weights_NK=torch.from_numpy(weights_NK).to(self._device, self._dtype),
            self_weights_N=torch.from_numpy(np.asarray(kept_N, dtype=np.float64)).to(self._device, self._dtype),
            both_NK=torch.from_numpy(both_NK).to(self._device),
            reverse_NK=torch.from_numpy(reverse_NK).to(self._device),
            num_messages_N=torch.from_numpy(np.bincount(graph.senders, minlength=graph.num_nodes)),
            receivers_E=torch.from_numpy(graph.receivers).to(self._device),
            slots_E=torch.from_numpy(slots_E).to(self._device),
        )


class Exchange:
    """Exchanges of all rows; lossy ones may lose messages also without a script of faults, but none where ranks share the rows."""

    def __init__(self, plan: Plan, shard: Shard, device: torch.device, faults: FaultScript | None, *, is_lossy: bool) -> None:
        algorithm, schedule = plan.recipe.algorithm, plan.schedule
        self._shard, self._device, self._faults = shard, device, faults
        self._halo_exchange: HaloExchange | None = None
        self._inboxes, self._names = plan.recipe.inboxes, plan.names
        self._schedule, self._channels, self._phases = schedule, algorithm.channels, algorithm.phases
        self._is_lossy = is_lossy or faults is not None
        if faults is not None:
            faults.check(self._names, kinds=SIMULATED, in_seconds=False)
        self.tables = NeighbourTables(plan, device, is_lossy=self._is_lossy)
        self.ledger = FlowLedger(len(self._names), device)
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

    def _delivered(self, round: int, came_E: NDArray[np.bool_] | None = None) -> Tensor:
        """Find out whose messages reach whom in a round, bool (N, K): those of `came_E`, or all but what the script takes away."""
        tables = self.tables.at(round)
        delivered_NK = tables.linked_NK.clone()
        if came_E is not None:
            delivered_NK[tables.receivers_E, tables.slots_E] = torch.from_numpy(came_E).to(self._device)
        elif self._faults is not None:
            for i, k, j in tables.edges():
                delivered_NK[i, k] = self._faults.delivers(self._names[j], self._names[i], round)
        return delivered_NK

    def participation(self, number: int, running: NDArray[np.bool_], times: RoundTimes | None) -> Participation:
        """Find out who of the *running* nodes takes part in a round: a script says who is there, or a clock's *times* who is late.

        Raises:
            ConfigError: messages come too late, and rows are shared by ranks, which keep no account of what the other side did not take in.
        """
        tables, shard = self.tables.at(number), self._shard
        running_N = torch.from_numpy(running).to(tables.index_NK.device)
        there_N = trains_N = came = None
        if (script := self._faults) is not None:
            there_N = torch.tensor([not script.is_away(name, number) for name in self._names]).to(running_N.device)
        if times is not None and not times.is_whole:
            there_N, trains_N = (torch.from_numpy(mask_N).to(running_N.device) for mask_N in (times.active_N, times.trains_N))
            there_N, came = there_N | ~running_N, times.came
        active_N = there_N
        if not running.all():
            active_N = running_N if active_N is None else active_N & running_N
        delivered = [self._delivered(number, came_E) for came_E in came or (None,) * self._phases]
        both_NK = running_N[:, None] & running_N[tables.index_NK]
        skipped_NK = tables.linked_NK & ~(torch.stack(delivered).all(dim=0) & both_NK)
        if times is not None and not shard.is_all and (num_late := int((skipped_NK & both_NK).sum())):
            raise ConfigError(
                f"clock: in round {number} the deadline is over for {num_late} messages, which {shard.ranks.count} ranks cannot take back; "
                "go on with --resume in one process, without torchrun, or start again with a higher clock.deadline_floor_s"
            )
        active_M = shard.local(active_N) if active_N is not None else None
        return Participation(
            tables=tables,
            times=times,
            running_N=running_N,
            there_N=there_N,
            active_M=active_M,
            trains_M=shard.local(trains_N) if trains_N is not None else active_M,
            delivered=delivered,
            both_NK=both_NK,
            skipped_NK=skipped_NK.cpu().numpy(),
        )

    def inboxes(
        self, exchange: int, delivered_NK: Tensor, running_N: Tensor, sent: Messages, active_M: Tensor | None = None
    ) -> list[tuple[slice, Inbox]]:
        """Inboxes of this rank's rows for one exchange: first of those that need no other rank's rows, while these travel.

        Args:
            exchange: round * phases + phase.
            delivered_NK: of all nodes, as `participation` has it.
            running_N: bool, of all nodes; one that has stopped still says so, and neither gives nor takes.
            sent: by channel, (M, ...).
            active_M: bool, who takes part; None: all.
        """
        number, is_all = exchange // self._phases, self._shard.is_all
        tables, compensation = self.tables.at(number), dict[str, Tensor]()
        flows: Flows | None = None
        unmatched_NK: Tensor | None = None
        present_NK = delivered_NK & running_N[:, None] & running_N[tables.index_NK]
        if self._is_lossy:
            merges_N = running_N if active_M is None or not is_all else running_N & active_M
            if is_all:  # where rows are shared every message comes
                flows, unmatched_NK = self.ledger.match(tables, delivered_NK, present_NK)
                compensation = self.ledger.compensation(sent.keys(), merges_N)
            self.resynchronised = []
            if any(self._channels[name].encodes is not None for name in sent):
                self.resynchronised = self.ledger.note(exchange, exchange % self._phases, tables, present_NK, merges_N)
        halo = None if is_all else self._halo(number)
        near_MK = tables.index_NK if halo is None else halo.near_MK
        self.done()
        received = self._halo_exchange = None if halo is None else HaloExchange(self._shard.ranks, halo, self._channels, sent)
        reverse_MK = self._shard.local(self.tables.reverse_NK) if self.tables.reverse_NK is not None else None

        def slot(channel: str, k: int, rows: Tensor | slice) -> Tensor:
            near = near_MK[rows, k]
            if self._channels[channel].per_edge:
                assert reverse_MK is not None
                theirs = sent[channel][near, reverse_MK[rows, k]]
            else:
                theirs = sent[channel].index_select(0, near)
            if received is not None:
                received.fill(theirs, channel, rows, k)
            return theirs

        def slot_from(part: slice) -> SlotMessages:
            return lambda channel, k, rows: slot(channel, k, part if rows is None else rows + part.start)

        weights_MK, self_weights_M = self._shard.local(tables.weights_NK), self._shard.local(tables.self_weights_N)
        present_MK, parts = self._shard.local(present_NK), self._shard.slices
        return [
            (
                part,
                self._inboxes.for_rows(
                    sent if len(parts) == 1 else {name: tensor[part] for name, tensor in sent.items()},
                    slot_from(part),
                    weights_NK=weights_MK[part],
                    self_weights_N=self_weights_M[part],
                    present_NK=present_MK[part],
                    compensation=compensation,
                    flows=flows,
                    asked_NK=unmatched_NK,
                ),
            )
            for part in parts
        ]

    def mix_in_place(
        self, round: int, x_MP: Tensor, delivered_NK: Tensor, running_N: Tensor, *, threads: int, active_M: Tensor | None, compiled: bool
    ) -> Mixed:
        """Average this rank's rows with their neighbours, in place."""
        tables = self.tables.at(round)
        present_MK = self._shard.local(delivered_NK & running_N[:, None] & running_N[tables.index_NK])
        halo = None if self._shard.is_all else self._halo(round)
        columns = None if halo is None else BlockedExchange(self._shard.ranks, halo, self._shard.num_inner)
        mixed = mix_in_place(
            x_MP,
            tables.index_NK if halo is None else torch.where(halo.far_MK >= 0, halo.far_MK + len(x_MP), halo.near_MK),
            self._shard.local(tables.weights_NK),
            present_MK,
            threads=threads,
            active_N=active_M,
            halo=columns,
            # the same at all ranks, which may share one cache
            width=block_columns(len(self._names), x_MP.shape[1], x_MP.element_size()),
            compiled=compiled,
        )
        if columns is not None:
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


def _slot_of(links: Topology, receivers: np.ndarray, senders: np.ndarray) -> np.ndarray:
    """Slot of a sender at a receiver; 0 where they are no neighbours."""
    receivers, senders = np.broadcast_arrays(receivers, senders)
    codes = links.receivers * links.num_nodes + links.senders
    position = np.searchsorted(codes, receivers * links.num_nodes + senders).clip(max=max(len(codes) - 1, 0))
    starts = np.concatenate([[0], np.cumsum(links.degrees)])
    found = codes[position] == receivers * links.num_nodes + senders
    return np.where(found, position - starts[receivers], 0)
