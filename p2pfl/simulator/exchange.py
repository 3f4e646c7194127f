"""How rows exchange their messages: a gather over neighbour slots, with the ledger of every edge where messages are lost.

Shapes: N nodes, M rows of this rank, K neighbour slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from p2pfl.algorithms import Algorithm, SlotInbox, over_an_edge
from p2pfl.algorithms.base import SlotMessages
from p2pfl.errors import ConfigError
from p2pfl.plan import links_between
from p2pfl.simulator.faults import Faults
from p2pfl.simulator.mixing import Mixed, block_columns, mix_in_place
from p2pfl.simulator.part import Columns, Crossing, Mail, Part
from p2pfl.simulator.ranks import Ranks
from p2pfl.topology import Schedule, Topology
from p2pfl.wire.ledger import EdgeLedger
from p2pfl.wire.update import UpdateFormat

Messages = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Tables:
    """Who exchanges with whom in one round."""

    index_NK: Tensor
    """int64, the neighbour in each slot."""

    linked_NK: Tensor
    """bool, whether it sends in this round."""

    weights_NK: Tensor
    self_weights_N: Tensor
    both_NK: Tensor
    """bool, whether the edge goes both ways in this round."""

    num_messages_N: Tensor
    """int64, to how many each node sends."""


Flows = dict[tuple[int, int], dict[str, Tensor]]
"""What a merge took in, by row and slot and by channel."""


class Exchange:
    """All rows' exchanges.

    Args:
        schedule: weighted graphs, by round.
        algorithm: whose messages they are.
        dtype: of the model.
        device: where they are.
        faults: what is lost; None: nothing ever, and no ledger is kept.
        part: which rows are here; None: all.
    """

    def __init__(
        self,
        schedule: Schedule,
        algorithm: Algorithm,
        *,
        dtype: torch.dtype,
        device: torch.device,
        faults: Faults | None,
        part: Part | None = None,
    ) -> None:
        self._part = part if part is not None else Part.of(Ranks(device=device), schedule.union())
        self._mail: Mail | None = None
        self._schedule, self._channels, self._phases = schedule, algorithm.channels, algorithm.phases
        self._dtype, self._device, self._faults = dtype, device, faults
        self._splits_mass = "column stochastic" in algorithm.requires
        assert schedule.names is not None
        self._names = schedule.names
        self._slots: tuple[np.ndarray, np.ndarray] | None = None  # index (N, K) and what is padding, the same in every round
        self._reverse_NK: Tensor | None = None
        if "fixed slots" in algorithm.requires:
            links = links_between(schedule.union())
            index_NK, _, linked_NK = links.with_weights(0.0).padded()
            self._slots = index_NK, linked_NK
            self._reverse_NK = torch.from_numpy(_slot_of(links, index_NK, np.arange(len(index_NK))[:, None])).to(device)
        self._ledgers: dict[tuple[int, int], EdgeLedger] = {}
        self._open: dict[tuple[int, int, int], tuple[Flows, int]] = {}  # of (receiver, sender, exchange): where to find it, and its slot
        self._returns: dict[str, Tensor] = {}  # what rows have to take back at their next merge, (N, ...)
        self._led_to: dict[tuple[int, int], int] = {}  # by phase and row: the exchange whose update is in its own values
        self._held: dict[tuple[int, int, int], int] = {}  # by phase, receiver and sender: the exchange whose update is in what it holds
        self.resynchronised: list[tuple[int, int]] = []
        """(receiver, sender) where in the last exchange values had to be sent whole."""
        if faults is not None:
            union = schedule.union()
            if self._splits_mass or len(links_between(union).senders) != len(union.senders):
                raise ConfigError("topology: a directed graph; faults need an undirected one, where each side can match what the other did")
            self._ledgers = {(int(i), int(j)): EdgeLedger() for i, j in zip(union.receivers, union.senders, strict=True)}
        self._cached = lru_cache(maxsize=schedule.period or 4)(self._make_tables)
        self._cached_crossing = lru_cache(maxsize=schedule.period or 4)(self._make_crossing)

    def tables(self, round: int) -> Tables:
        """Who exchanges with whom in a round."""
        return self._cached(round % self._schedule.period if self._schedule.period else round)

    def _crossing(self, round: int) -> Crossing:
        return self._cached_crossing(round % self._schedule.period if self._schedule.period else round)

    def _make_crossing(self, round: int) -> Crossing:
        reverse_NK = self._reverse_NK.cpu().numpy() if self._reverse_NK is not None else None
        return Crossing.of(self._part, self._schedule.at(round), self.tables(round).index_NK.cpu().numpy(), reverse_NK, self._device)

    def _make_tables(self, round: int) -> Tables:
        graph = self._schedule.at(round)
        assert graph.weights is not None
        if self._slots is None:
            index_NK, weights_NK, linked_NK = graph.padded()
        else:
            index_NK, (num_nodes, num_slots) = self._slots[0], self._slots[0].shape
            weights_NK, linked_NK = np.zeros((num_nodes, num_slots)), np.zeros((num_nodes, num_slots), dtype=np.bool_)
            slots_E = (index_NK[graph.receivers] == graph.senders[:, None]).argmax(axis=1)
            weights_NK[graph.receivers, slots_E], linked_NK[graph.receivers, slots_E] = graph.weights, True
        codes = graph.receivers * graph.num_nodes + graph.senders
        back_NK = index_NK * graph.num_nodes + np.arange(graph.num_nodes)[:, None]
        both_NK = linked_NK & (np.isin(back_NK, codes) if graph.directed else True)
        given_N = np.bincount(graph.senders, weights=graph.weights, minlength=graph.num_nodes)
        kept_N = 1 - given_N if self._splits_mass else graph.self_weights
        return Tables(
            index_NK=torch.from_numpy(index_NK).to(self._device),
            linked_NK=torch.from_numpy(linked_NK).to(self._device),
            weights_NK=torch.from_numpy(weights_NK).to(self._device, self._dtype),
            self_weights_N=torch.from_numpy(np.asarray(kept_N, dtype=np.float64)).to(self._device, self._dtype),
            both_NK=torch.from_numpy(both_NK).to(self._device),
            num_messages_N=torch.from_numpy(np.bincount(graph.senders, minlength=graph.num_nodes)),
        )

    def delivered(self, round: int) -> Tensor:
        """Whose messages reach whom in a round, bool (N, K)."""
        delivered_NK = self.tables(round).linked_NK.clone()
        if self._faults is not None:
            for i, k, j in self._edges(round):
                delivered_NK[i, k] = self._faults.delivers(self._names[j], self._names[i], round)
        return delivered_NK

    def inbox(self, exchange: int, delivered_NK: Tensor, running_N: Tensor, sent: Messages) -> SlotInbox:
        """What every row takes in in one exchange.

        Args:
            exchange: round * phases + phase.
            delivered_NK: from `delivered`.
            running_N: bool; a row that has stopped still says so, and neither gives nor takes.
            sent: by channel, (N, ...).
        """
        tables = self.tables(exchange // self._phases)
        index_NK, reverse_NK = tables.index_NK, self._reverse_NK
        present_NK = delivered_NK & running_N[:, None] & running_N[index_NK]
        returns: dict[str, Tensor] = {}
        flows: Flows | None = None
        if self._faults is not None:
            flows = {}
            self._settle_exchange(exchange, delivered_NK, present_NK, flows)
            self._resynchronise(exchange, present_NK, running_N, sent)
            merges_N = running_N & self._active(exchange // self._phases).to(self._device)
            for name in self._returns.keys() & sent.keys():
                owed = self._returns[name]
                merges = merges_N.reshape(-1, *[1] * (owed.dim() - 1))
                returns[name] = owed.where(merges, 0)
                self._returns[name] = owed.where(~merges, 0)  # a row that stands still takes back later, one that has stopped at the end

        def slot(channel: str, k: int, rows: Tensor | None) -> Tensor:
            index = index_NK[:, k] if rows is None else index_NK[rows, k]
            if not self._channels[channel].per_edge:
                return sent[channel][index]
            assert reverse_NK is not None
            return sent[channel][index, reverse_NK[:, k] if rows is None else reverse_NK[rows, k]]

        return SlotInbox(
            channels=self._channels,
            sent=sent,
            weights_NK=tables.weights_NK,
            self_weights_N=tables.self_weights_N,
            present_NK=present_NK,
            slot=slot,
            returns=returns,
            flows=flows,
        )

    def inboxes(self, exchange: int, delivered_NK: Tensor, running_N: Tensor, sent: Messages) -> list[tuple[slice, SlotInbox]]:
        """What the rows of this rank take in, in parts: those that need no other rank's come first, and meanwhile the others' travel.

        Args:
            exchange: round * phases + phase.
            delivered_NK: from `delivered`, of all nodes.
            running_N: bool, of all nodes.
            sent: by channel, (M, ...).
        """
        if self._part.is_all:
            return [(slice(0, len(self._names)), self.inbox(exchange, delivered_NK, running_N, sent))]
        if self._mail is not None:
            self._mail.done()
        number = exchange // self._phases
        tables, crossing = self.tables(number), self._crossing(number)
        mail = self._mail = Mail(self._part.ranks, crossing, self._channels, sent)
        present_MK = self.present(number, delivered_NK, running_N)
        reverse_MK = self._part.own(self._reverse_NK) if self._reverse_NK is not None else None
        weights_MK, self_weights_M = self._part.own(tables.weights_NK), self._part.own(tables.self_weights_N)

        def slot(channel: str, k: int, rows: Tensor | slice) -> Tensor:
            near, single = crossing.near_MK[rows, k], self._channels[channel].per_edge
            if single:
                assert reverse_MK is not None
                theirs = sent[channel][near, reverse_MK[rows, k]]
            else:
                theirs = sent[channel].index_select(0, near)
            far = (crossing.single_far_MK if single else crossing.far_MK)[rows, k]
            away = (far >= 0).nonzero().squeeze(-1)
            if len(away):
                theirs[away] = mail.far(channel)[far[away]]
            return theirs

        def slot_from(part: slice) -> SlotMessages:
            return lambda channel, k, rows: slot(channel, k, part if rows is None else rows + part.start)

        return [
            (
                part,
                SlotInbox(
                    channels=self._channels,
                    sent={name: tensor[part] for name, tensor in sent.items()},
                    weights_NK=weights_MK[part],
                    self_weights_N=self_weights_M[part],
                    present_NK=present_MK[part],
                    slot=slot_from(part),
                ),
            )
            for part in self._part.slices
        ]

    def present(self, round: int, delivered_NK: Tensor, running_N: Tensor) -> Tensor:
        """Whose messages count at the rows of this rank, bool (M, K)."""
        return self._part.own(delivered_NK & running_N[:, None] & running_N[self.tables(round).index_NK])

    def mix_in_place(
        self, round: int, x_MP: Tensor, delivered_NK: Tensor, running_N: Tensor, *, threads: int, active_M: Tensor | None
    ) -> Mixed:
        """Plain gossip of this rank's rows."""
        tables, present_MK = self.tables(round), self.present(round, delivered_NK, running_N)
        if self._part.is_all:
            return mix_in_place(x_MP, tables.index_NK, tables.weights_NK, present_MK, threads=threads, active_N=active_M)
        crossing = self._crossing(round)
        columns = Columns(self._part.ranks, crossing, self._part.num_inner)
        mixed = mix_in_place(
            x_MP,
            torch.where(crossing.far_MK >= 0, crossing.far_MK + len(x_MP), crossing.near_MK),
            self._part.own(tables.weights_NK),
            present_MK,
            threads=threads,
            active_N=active_M,
            elsewhere=columns,
            # the same at all ranks, which may share one cache
            width=block_columns(len(self._names), x_MP.shape[1], x_MP.element_size()),
        )
        columns.done()
        return mixed

    def done(self) -> None:
        """Wait until other ranks have what they were sent."""
        if self._mail is not None:
            self._mail.done()

    def bytes_sent(self, exchange: int, sent: Messages) -> np.ndarray:
        """What each daemon would send for this exchange, int64 (N,): its update over every edge, and whole where it was asked for so."""
        update_format = UpdateFormat.of(over_an_edge(self._channels, sent), over_an_edge(self._channels, sent, whole=True))
        number = exchange // self._phases
        num_messages_N, active_N = self.tables(number).num_messages_N.numpy(), self.active(number)
        bytes_N: np.ndarray = num_messages_N * update_format.encoded_bytes(exchange)
        if active_N is not None:
            bytes_N = np.where(active_N.numpy(), bytes_N, 0)
        for _, sender in self.resynchronised:
            bytes_N[sender] += update_format.encoded_bytes(exchange, whole=True)
        return bytes_N

    def settle(self) -> dict[str, Tensor]:
        """The closing exchange: every node tells its neighbours what it merged; what has to be taken back, (N, ...), by channel."""
        reports = {edge: ledger.report() for edge, ledger in self._ledgers.items()}
        for (i, j), ledger in self._ledgers.items():
            self._take_back(i, j, ledger.hear(reports[j, i]))
        return self._returns

    def active(self, round: int) -> Tensor | None:
        """Which rows take part in a round, bool (N,); None: all."""
        return None if self._faults is None else self._active(round)

    def _active(self, round: int) -> Tensor:
        assert self._faults is not None
        return torch.tensor([not self._faults.is_paused(name, round) for name in self._names])

    def _edges(self, round: int) -> Iterator[tuple[int, int, int]]:
        tables = self.tables(round)
        for i, k in tables.linked_NK.nonzero().tolist():
            yield i, k, int(tables.index_NK[i, k])

    def _settle_exchange(self, exchange: int, delivered_NK: Tensor, present_NK: Tensor, flows: Flows) -> None:
        """Keep every edge's ledger, and what earlier flows have to be taken back."""
        number = exchange // self._phases
        tables = self.tables(number)
        reports = {edge: ledger.report() for edge, ledger in self._ledgers.items()}
        merged: set[tuple[int, int]] = set()
        for i, k, j in self._edges(number):
            if delivered_NK[i, k]:
                self._take_back(i, j, self._ledgers[i, j].hear(reports[j, i]))
            if present_NK[i, k] and tables.both_NK[i, k]:
                merged.add((i, j))
                self._open[i, j, exchange] = flows, k  # filled by the merge
        for (i, j), ledger in self._ledgers.items():
            self._take_back(i, j, ledger.close(exchange, merged=(i, j) in merged))
            ledger.checkpointed(ledger.to_dict())
            for edge in [edge for edge in self._open if edge[:2] == (i, j) and edge[2] != ledger.open_flow]:
                del self._open[edge]

    def _resynchronise(self, exchange: int, present_NK: Tensor, running_N: Tensor, sent: Messages) -> None:
        """Note which receivers did not hold the values that an update continues."""
        self.resynchronised = []
        if all(self._channels[name].encodes is None for name in sent):
            return
        number, phase = divmod(exchange, self._phases)
        for i, k, j in self._edges(number):
            if present_NK[i, k]:
                if self._held.get((phase, i, j), -1) != self._led_to.get((phase, j), -1):
                    self.resynchronised.append((i, j))
                self._held[phase, i, j] = exchange
        for j in (running_N.cpu() & self._active(number)).nonzero().flatten().tolist():
            self._led_to[phase, j] = exchange

    def _take_back(self, i: int, j: int, exchange: int | None) -> None:
        """Add the negative of a flow to what row i has to take back."""
        if exchange is None:
            return
        flows, k = self._open.pop((i, j, exchange))
        for name, amount in flows.get((i, k), {}).items():
            owed = self._returns.setdefault(name, amount.new_zeros((len(self._names), *amount.shape)))
            owed[i] -= amount


def _slot_of(links: Topology, receivers: np.ndarray, senders: np.ndarray) -> np.ndarray:
    """In which slot of a receiver a sender stands; 0 where they are no neighbours."""
    receivers, senders = np.broadcast_arrays(receivers, senders)
    codes = links.receivers * links.num_nodes + links.senders
    position = np.searchsorted(codes, receivers * links.num_nodes + senders).clip(max=max(len(codes) - 1, 0))
    starts = np.concatenate([[0], np.cumsum(links.degrees)])
    found = codes[position] == receivers * links.num_nodes + senders
    return np.where(found, position - starts[receivers], 0)
