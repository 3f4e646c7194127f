"""How rows exchange their messages: a gather over neighbour slots, and what is taken back where messages are lost.

What the edge ledger does in daemons (wire/ledger.py) is done here for all edges at once: a flow whose other side was not taken in is open
until its receiver hears the sender again, and then taken back.

Shapes: N nodes, M rows of this rank, K neighbour slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.algorithms import SlotInbox, over_an_edge
from p2pfl.algorithms.inbox import SlotMessages
from p2pfl.errors import ConfigError
from p2pfl.experiment.plan import links_between, matches_flows
from p2pfl.faults.script import FaultKind, FaultScript
from p2pfl.simulator.mixing import Mixed, block_columns, mix_in_place
from p2pfl.simulator.sharding.halo import BlockedExchange, HaloExchange, HaloPlan
from p2pfl.simulator.sharding.ranks import Ranks
from p2pfl.simulator.sharding.shard import Shard
from p2pfl.topology import Schedule, Topology
from p2pfl.training import Recipe
from p2pfl.wire.update import UpdateFormat

Messages = Mapping[str, Tensor]

_SIMULATED = (FaultKind.PAUSE, FaultKind.CUT, FaultKind.LOSS)
"""Faults that rows of a population can have."""


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

    reverse_NK: Tensor
    """int64, the slot in which the neighbour has this node; 0 where the edge goes one way."""

    num_messages_N: Tensor
    """int64, to how many each node sends."""

    receivers_E: Tensor
    slots_E: Tensor
    """Where the round's edges, in their order, stand in these tables."""


Flows = dict[tuple[int, int], dict[str, Tensor]]
"""What a merge took in, by row and slot and by channel."""


class Exchange:
    """All rows' exchanges.

    Args:
        schedule: weighted graphs, by round.
        recipe: how the nodes learn and aggregate.
        dtype: of the model.
        device: where they are.
        faults: what is lost by script.
        is_lossy: whether messages may stay out also without a script; where rows are shared none does.
        shard: which rows are here; None: all.
    """

    def __init__(
        self,
        schedule: Schedule,
        recipe: Recipe,
        *,
        dtype: torch.dtype,
        device: torch.device,
        faults: FaultScript | None,
        is_lossy: bool = False,
        shard: Shard | None = None,
    ) -> None:
        self._shard = shard if shard is not None else Shard.of(Ranks(device=device), schedule.union())
        self._halo_exchange: HaloExchange | None = None
        algorithm, self._inboxes = recipe.algorithm, recipe.inboxes
        self._schedule, self._channels, self._phases = schedule, algorithm.channels, algorithm.phases
        self._dtype, self._device, self._faults = dtype, device, faults
        self._is_lossy = is_lossy or faults is not None
        self._splits_mass = algorithm.splits_mass
        assert schedule.names is not None
        self._names = schedule.names
        if faults is not None:
            faults.check(self._names, kinds=_SIMULATED, in_seconds=False)
        self._slots: tuple[np.ndarray, np.ndarray] | None = None  # index (N, K) and what is padding, the same in every round
        self._reverse_NK: Tensor | None = None
        if "fixed slots" in algorithm.requires:
            links = links_between(schedule.union())
            index_NK, _, linked_NK = links.with_weights(0.0).padded()
            self._slots = index_NK, linked_NK
            self._reverse_NK = torch.from_numpy(_slot_of(links, index_NK, np.arange(len(index_NK))[:, None])).to(device)
        self._open: dict[tuple[int, int], tuple[Flows, int]] = {}  # of (receiver, sender), unmatched: where to find it, and its slot
        self._compensation: dict[str, Tensor] = {}  # what rows have to take back at their next merge, (N, ...)
        self._led_to: dict[tuple[int, int], int] = {}  # by phase and row: the exchange whose update is in its own values
        self._held: dict[tuple[int, int, int], int] = {}  # by phase, receiver and sender: the exchange whose update is in what it holds
        self.resynchronised: list[tuple[int, int]] = []
        """(receiver, sender) where in the last exchange values had to be sent whole."""
        if self._is_lossy and not matches_flows(algorithm, schedule.union()):
            raise ConfigError("topology: a directed graph; faults need an undirected one, where each side can match what the other did")
        self._cached = lru_cache(maxsize=schedule.period or 4)(self._make_tables)
        self._cached_halo = lru_cache(maxsize=schedule.period or 4)(self._make_halo)

    def tables(self, round: int) -> Tables:
        """Who exchanges with whom in a round."""
        return self._cached(round % self._schedule.period if self._schedule.period else round)

    def _halo(self, round: int) -> HaloPlan:
        return self._cached_halo(round % self._schedule.period if self._schedule.period else round)

    def _make_halo(self, round: int) -> HaloPlan:
        reverse_NK = self._reverse_NK.cpu().numpy() if self._reverse_NK is not None else None
        return HaloPlan.of(self._shard, self._schedule.at(round), self.tables(round).index_NK.cpu().numpy(), reverse_NK, self._device)

    def _make_tables(self, round: int) -> Tables:
        graph = self._schedule.at(round)
        assert graph.weights is not None
        if self._slots is None:
            index_NK, weights_NK, linked_NK = graph.padded()
            slots_E = linked_NK.nonzero()[1]
        else:
            index_NK, (num_nodes, num_slots) = self._slots[0], self._slots[0].shape
            weights_NK, linked_NK = np.zeros((num_nodes, num_slots)), np.zeros((num_nodes, num_slots), dtype=np.bool_)
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

    def delivered(self, round: int, came_E: NDArray[np.bool_] | None = None) -> Tensor:
        """Whose messages reach whom in a round, bool (N, K).

        Args:
            round: of the run.
            came_E: of the round's edges; None: all but what the script takes away.
        """
        tables = self.tables(round)
        delivered_NK = tables.linked_NK.clone()
        if came_E is not None:
            delivered_NK[tables.receivers_E, tables.slots_E] = torch.from_numpy(came_E).to(self._device)
        elif self._faults is not None:
            for i, k, j in self._edges(round):
                delivered_NK[i, k] = self._faults.delivers(self._names[j], self._names[i], round)
        return delivered_NK

    @property
    def is_open(self) -> bool:
        """Whether anything has to be taken back, or may have to be."""
        return bool(self._open or self._compensation)

    def inbox(self, exchange: int, delivered_NK: Tensor, running_N: Tensor, sent: Messages, active_N: Tensor | None = None) -> SlotInbox:
        """What every row takes in in one exchange.

        Args:
            exchange: round * phases + phase.
            delivered_NK: from `delivered`.
            running_N: bool; a row that has stopped still says so, and neither gives nor takes.
            sent: by channel, (N, ...).
            active_N: bool, who takes part; None: all.
        """
        tables = self.tables(exchange // self._phases)
        index_NK, reverse_NK = tables.index_NK, self._reverse_NK
        present_NK = delivered_NK & running_N[:, None] & running_N[index_NK]
        compensation: dict[str, Tensor] = {}
        flows: Flows | None = None
        unmatched_NK: Tensor | None = None
        if self._is_lossy:
            flows, unmatched_NK = self._settle_exchange(tables, delivered_NK, present_NK)
            merges_N = running_N if active_N is None else running_N & active_N
            self._resynchronise(exchange, present_NK, merges_N, sent)
            for name in self._compensation.keys() & sent.keys():
                owed = self._compensation.pop(name)
                merges = merges_N.reshape(-1, *[1] * (owed.dim() - 1))
                compensation[name] = owed.where(merges, 0)
                later = owed.where(~merges, 0)  # a row that stands still takes back later, one that has stopped at the end
                if bool(later.any()):
                    self._compensation[name] = later

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
    ) -> list[tuple[slice, SlotInbox]]:
        """What the rows of this rank take in, in parts: those that need no other rank's come first, and meanwhile the others' travel.

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
        tables, halo = self.tables(number), self._halo(number)
        received = self._halo_exchange = HaloExchange(self._shard.ranks, halo, self._channels, sent)
        if self._is_lossy:
            self._resynchronise(exchange, delivered_NK & running_N[:, None] & running_N[tables.index_NK], running_N, sent)
        present_MK = self.present(number, delivered_NK, running_N)
        reverse_MK = self._shard.local(self._reverse_NK) if self._reverse_NK is not None else None
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
        """Whose messages count at the rows of this rank, bool (M, K)."""
        return self._shard.local(delivered_NK & running_N[:, None] & running_N[self.tables(round).index_NK])

    def mix_in_place(
        self, round: int, x_MP: Tensor, delivered_NK: Tensor, running_N: Tensor, *, threads: int, active_M: Tensor | None, compiled: bool
    ) -> Mixed:
        """Plain gossip of this rank's rows."""
        tables, present_MK = self.tables(round), self.present(round, delivered_NK, running_N)
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
            elsewhere=columns,
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
        """What each daemon would send for this exchange, int64 (N,): its update over every edge, and whole where it was asked for so."""
        update_format = UpdateFormat.of(over_an_edge(self._channels, sent), over_an_edge(self._channels, sent, whole=True))
        number = exchange // self._phases
        num_messages_N = self.tables(number).num_messages_N.numpy()
        bytes_N: np.ndarray = num_messages_N * update_format.encoded_bytes(exchange)
        if active_N is not None:
            bytes_N = np.where(active_N.cpu().numpy(), bytes_N, 0)
        for _, sender in self.resynchronised:
            bytes_N[sender] += update_format.encoded_bytes(exchange, whole=True)
        return bytes_N

    def settle(self) -> dict[str, Tensor]:
        """The closing exchange: every node tells its neighbours what it merged; what has to be taken back, (N, ...), by channel."""
        for i, j in sorted(self._open):
            self._take_back(i, j)
        return self._compensation

    def active(self, round: int) -> Tensor | None:
        """Which rows take part in a round, bool (N,); None: all."""
        faults = self._faults
        return None if faults is None else torch.tensor([not faults.is_paused(name, round) for name in self._names]).to(self._device)

    def _edges(self, round: int) -> Iterator[tuple[int, int, int]]:
        tables = self.tables(round)
        for i, k in tables.linked_NK.nonzero().tolist():
            yield i, k, int(tables.index_NK[i, k])

    def _settle_exchange(self, tables: Tables, delivered_NK: Tensor, present_NK: Tensor) -> tuple[Flows | None, Tensor | None]:
        """Take back what neighbours that are heard had not taken in; what this exchange leaves unmatched, and whose that is, (N, K)."""
        if self._open:
            edges = sorted(self._open)
            to, of = torch.tensor(edges, device=self._device).T
            heard = (delivered_NK[to] & (tables.index_NK[to] == of[:, None])).any(dim=1)
            for place in heard.nonzero().flatten().tolist():
                self._take_back(*edges[place])
        matched_NK = present_NK[tables.index_NK, tables.reverse_NK]
        unmatched_NK = present_NK & tables.both_NK & ~matched_NK
        places = unmatched_NK.nonzero().tolist()
        if not places:
            return None, None
        flows: Flows = {}  # filled by the merge
        senders = tables.index_NK[unmatched_NK].tolist()
        self._open |= {(i, j): (flows, k) for (i, k), j in zip(places, senders, strict=True)}
        return flows, unmatched_NK

    def _resynchronise(self, exchange: int, present_NK: Tensor, merges_N: Tensor, sent: Messages) -> None:
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
        for j in merges_N.nonzero().flatten().tolist():
            self._led_to[phase, j] = exchange

    def _take_back(self, i: int, j: int) -> None:
        """Add the negative of the open flow from j to what row i has to take back."""
        flows, k = self._open.pop((i, j))
        for name, amount in flows.get((i, k), {}).items():
            if name not in self._compensation:
                self._compensation[name] = amount.new_zeros((len(self._names), *amount.shape))
            self._compensation[name][i] -= amount

    def tensors(self) -> dict[str, Tensor]:
        """What is open, for a checkpoint."""
        found = {f"returns/{name}": owed for name, owed in self._compensation.items()}
        for (i, j), (flows, k) in self._open.items():
            found |= {f"open/{i}-{j}/{name}": amount for name, amount in flows.get((i, k), {}).items()}
        return found

    def story(self) -> dict[str, Any]:
        """What the checkpoint says beside these."""
        return {
            "open": sorted(self._open),
            "led_to": [[*key, exchange] for key, exchange in self._led_to.items()],
            "held": [[*key, exchange] for key, exchange in self._held.items()],
        }

    def restore(self, tensors: Messages, story: Mapping[str, Any]) -> None:
        """Take up what `tensors` and `story` gave."""
        self._compensation, self._open = {}, {(i, j): ({(i, 0): {}}, 0) for i, j in story["open"]}
        for key, tensor in tensors.items():
            kind, *edge, name = key.split("/", 2)
            if kind == "returns":
                self._compensation[name] = tensor.to(self._device)
            else:
                i, j = map(int, edge[0].split("-"))
                self._open[i, j][0][i, 0][name] = tensor.to(self._device)
        self._led_to = {(phase, row): exchange for phase, row, exchange in story["led_to"]}
        self._held = {(phase, receiver, sender): exchange for phase, receiver, sender, exchange in story["held"]}


def _slot_of(links: Topology, receivers: np.ndarray, senders: np.ndarray) -> np.ndarray:
    """In which slot of a receiver a sender stands; 0 where they are no neighbours."""
    receivers, senders = np.broadcast_arrays(receivers, senders)
    codes = links.receivers * links.num_nodes + links.senders
    position = np.searchsorted(codes, receivers * links.num_nodes + senders).clip(max=max(len(codes) - 1, 0))
    starts = np.concatenate([[0], np.cumsum(links.degrees)])
    found = codes[position] == receivers * links.num_nodes + senders
    return np.where(found, position - starts[receivers], 0)
