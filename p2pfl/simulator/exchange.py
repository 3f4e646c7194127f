"""How rows of one process exchange their messages: a gather over neighbour slots, with the ledger of every edge where messages are lost.

Shapes: N nodes, K neighbour slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pfl.algorithms import Channel, SlotInbox, flow
from p2pfl.errors import ConfigError
from p2pfl.simulator.faults import Faults
from p2pfl.topology import Topology
from p2pfl.wire.codec import CHUNK_BYTES, encode
from p2pfl.wire.ledger import EdgeLedger
from p2pfl.wire.messages import Chunk, Report, StopNews, Update
from p2pfl.wire.update import ChannelFormat, UpdateFormat

Messages = Mapping[str, Tensor]


@dataclass
class _Open:
    """A flow that the receiver took in and the sender has not yet said it matched."""

    own: dict[str, Tensor]
    theirs: dict[str, Tensor]


class Exchange:
    """All rows' exchanges.

    Args:
        topology: weighted.
        channels: of the algorithm.
        dtype: of the messages.
        device: where they are.
        faults: what is lost; None: nothing ever, and no ledger is kept.
    """

    def __init__(
        self, topology: Topology, channels: Mapping[str, Channel], *, dtype: torch.dtype, device: torch.device, faults: Faults | None
    ) -> None:
        index_NK, weights_NK, present_NK = topology.padded()
        self.index_NK = torch.from_numpy(index_NK).to(device)
        self.linked_NK = torch.from_numpy(present_NK).to(device)
        self._weights_NK = torch.from_numpy(weights_NK).to(device, dtype)
        self._channels, self._faults = channels, faults
        assert topology.names is not None
        self._names = topology.names
        self._ledgers: dict[tuple[int, int], EdgeLedger] = {}
        self._open: dict[tuple[int, int, int], _Open] = {}
        self._returns: dict[str, Tensor] = {}  # what rows have to take back at their next merge, (N, ...)
        if faults is not None:
            if topology.directed:
                raise ConfigError("topology: a directed graph; faults need an undirected one, where each side can match what the other did")
            self._ledgers = {(i, j): EdgeLedger() for i, _, j in self._edges()}

    def delivered(self, round: int) -> Tensor:
        """Whose messages reach whom in a round, bool (N, K)."""
        delivered_NK = self.linked_NK.clone()
        if self._faults is not None:
            for i, k, j in self._edges():
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
        present_NK = delivered_NK & running_N[:, None] & running_N[self.index_NK]
        returns: dict[str, Tensor] = {}
        if self._faults is not None:
            self._settle_round(exchange, delivered_NK, present_NK, sent)
            for name, owed in self._returns.items():
                running = running_N.reshape(-1, *[1] * (owed.dim() - 1))
                returns[name] = owed.where(running, 0)
                self._returns[name] = owed.where(~running, 0)  # a row that has stopped takes back at the end

        def slot(channel: str, k: int, rows: Tensor | None) -> Tensor:
            index = self.index_NK[:, k] if rows is None else self.index_NK[rows, k]
            return sent[channel][index]

        return SlotInbox(channels=self._channels, sent=sent, weights_NK=self._weights_NK, present_NK=present_NK, slot=slot, returns=returns)

    def bytes_sent(self, exchange: int, sent: Messages) -> int:
        """What daemons would send for this exchange where nothing is late: every update once over every edge, in each direction."""
        channels = tuple(
            ChannelFormat(name=name, dtype=str(m.dtype).removeprefix("torch."), shape=tuple(m.shape[1:]))
            for name, m in sorted(sent.items())
        )
        update_format = UpdateFormat(channels=channels)
        recent = tuple(range(max(exchange - 2, 0), exchange))
        report = Report(closed_through=exchange - 1, merged=recent, confirmed=max(exchange - 3, -1), settled=exchange - 1)
        size_bytes = update_format.size_bytes
        update = Update(
            exchange=exchange,
            channels=update_format.entries,
            size_bytes=size_bytes,
            digest=bytes(32),
            report=report,
            stop=StopNews(agreed_for=0, stop_round=None),
        )
        first = len(encode(update, memoryview(b"\0"))[0])
        chunks = sum(
            len(encode(Chunk(exchange=exchange, offset=o), memoryview(b"\0"))[0]) for o in range(CHUNK_BYTES, size_bytes, CHUNK_BYTES)
        )
        return int(self.linked_NK.sum()) * (first + chunks + size_bytes)

    def settle(self) -> dict[str, Tensor]:
        """The closing exchange: every node tells its neighbours what it merged; what has to be taken back, (N, ...), by channel."""
        reports = {edge: ledger.report() for edge, ledger in self._ledgers.items()}
        for (i, j), ledger in self._ledgers.items():
            self._take_back(i, j, ledger.hear(reports[j, i]))
        return self._returns

    def active(self, round: int) -> Tensor | None:
        """Which rows take part in a round, bool (N,); None: all."""
        if self._faults is None:
            return None
        return torch.tensor([not self._faults.is_paused(name, round) for name in self._names])

    def _edges(self) -> Iterator[tuple[int, int, int]]:
        for i, k in self.linked_NK.nonzero().tolist():
            yield i, k, int(self.index_NK[i, k])

    def _settle_round(self, exchange: int, delivered_NK: Tensor, present_NK: Tensor, sent: Messages) -> None:
        """Keep every edge's ledger, and what earlier flows have to be taken back."""
        reports = {edge: ledger.report() for edge, ledger in self._ledgers.items()}
        for i, k, j in self._edges():
            if delivered_NK[i, k]:
                self._take_back(i, j, self._ledgers[i, j].hear(reports[j, i]))
        for i, k, j in self._edges():
            merged = bool(present_NK[i, k])
            if merged:
                self._open[i, j, exchange] = _Open(
                    own={c: m[i].clone() for c, m in sent.items()}, theirs={c: m[j].clone() for c, m in sent.items()}
                )
            ledger = self._ledgers[i, j]
            self._take_back(i, j, ledger.close(exchange, merged=merged))
            ledger.checkpointed(ledger.to_dict())
            for edge in [edge for edge in self._open if edge[:2] == (i, j) and edge[2] != ledger.open_flow]:
                del self._open[edge]

    def _take_back(self, i: int, j: int, exchange: int | None) -> None:
        """Add the negative of a flow to what row i has to take back."""
        if exchange is None:
            return
        held = self._open.pop((i, j, exchange))
        slot = int((self.index_NK[i] == j).nonzero()[0])
        weight = self._weights_NK[i, slot]
        for name, channel in self._channels.items():
            if channel.missing == "own":
                own = held.own[name]
                owed = self._returns.setdefault(name, own.new_zeros((len(self._names), *own.shape)))
                owed[i] -= flow(weight, held.theirs[name], own)
