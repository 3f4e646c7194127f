"""The ledger of all edges: flows that one end took in and the other did not are rolled back, and values that a receiver lacks are noted.

What the edge ledger of the protocol does for one daemon is done here for all edges at once: a flow whose other end was not taken in is open
until its receiver hears the sender again, and is then compensated. Where an encoded update continues a value that its receiver does not
hold, daemons would send a full update.

Shapes: N nodes, K neighbour slots.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from p2pfl.simulator.tables import Tables

Flows = dict[tuple[int, int], dict[str, Tensor]]
"""Flows that a merge took in, by row and slot and by channel."""


class FlowLedger:
    """Open flows of all edges, what rows still have to add for those that were rolled back, and which updates both ends hold."""

    def __init__(self, num_nodes: int, device: torch.device) -> None:
        self._num_nodes, self._device = num_nodes, device
        self._open: dict[tuple[int, int], tuple[Flows, int]] = {}  # of (receiver, sender), unmatched: where to find it, and its slot
        self._compensation: dict[str, Tensor] = {}  # (N, ...) by channel
        self._led_to: dict[tuple[int, int], int] = {}  # by phase and row: the exchange whose update is in its own values
        self._held: dict[tuple[int, int, int], int] = {}  # by phase, receiver and sender: the exchange whose update is in what it holds

    @property
    def is_open(self) -> bool:
        """Whether any flow of an edge has to be compensated, or may have to be later."""
        return bool(self._open or self._compensation)

    def match(self, tables: Tables, delivered_NK: Tensor, present_NK: Tensor) -> tuple[Flows | None, Tensor | None]:
        """Roll back what neighbours that are heard had not taken in, and note what this exchange leaves unmatched.

        Returns:
            What the merge is to fill with the flows that are unmatched, and whose these are, (N, K); None where all are matched.
        """
        if self._open:
            edges = sorted(self._open)
            to, of = torch.tensor(edges, device=self._device).T
            heard = (delivered_NK[to] & (tables.index_NK[to] == of[:, None])).any(dim=1)
            for place in heard.nonzero().flatten().tolist():
                self._roll_back(*edges[place])
        matched_NK = present_NK[tables.index_NK, tables.reverse_NK]
        unmatched_NK = present_NK & tables.both_NK & ~matched_NK
        places = unmatched_NK.nonzero().tolist()
        if not places:
            return None, None
        flows: Flows = {}  # filled by the merge
        senders = tables.index_NK[unmatched_NK].tolist()
        self._open |= {(i, j): (flows, k) for (i, k), j in zip(places, senders, strict=True)}
        return flows, unmatched_NK

    def compensation(self, channels: Collection[str], merges_N: Tensor) -> dict[str, Tensor]:
        """Take what rows add to their next merge for what was rolled back, (N, ...) by channel; rows that do not merge add theirs later."""
        due: dict[str, Tensor] = {}
        for name in self._compensation.keys() & channels:
            amount = self._compensation.pop(name)
            merges = merges_N.reshape(-1, *[1] * (amount.dim() - 1))
            due[name] = amount.where(merges, 0)
            later = amount.where(~merges, 0)  # a row that is paused does so when it goes on, one that has stopped at the end
            if bool(later.any()):
                self._compensation[name] = later
        return due

    def close(self) -> dict[str, Tensor]:
        """Let every node tell its neighbours what it merged; returns what is still to be added, (N, ...) by channel."""
        for i, j in sorted(self._open):
            self._roll_back(i, j)
        return self._compensation

    def _roll_back(self, i: int, j: int) -> None:
        """Add the negative of the open flow from j to what row i adds to its next merge."""
        flows, k = self._open.pop((i, j))
        for name, amount in flows.get((i, k), {}).items():
            if name not in self._compensation:
                self._compensation[name] = amount.new_zeros((self._num_nodes, *amount.shape))
            self._compensation[name][i] -= amount

    def note(self, exchange: int, phase: int, tables: Tables, present_NK: Tensor, merges_N: Tensor) -> list[tuple[int, int]]:
        """Note an exchange of encoded updates; returns receivers and senders where the values before it were not held."""
        found = []
        for i, k, j in tables.edges():
            if present_NK[i, k]:
                if self._held.get((phase, i, j), -1) != self._led_to.get((phase, j), -1):
                    found.append((i, j))
                self._held[phase, i, j] = exchange
        for j in merges_N.nonzero().flatten().tolist():
            self._led_to[phase, j] = exchange
        return found

    def metadata(self) -> dict[str, Any]:
        """Metadata of a checkpoint."""
        return {
            "open": sorted(self._open),
            "led_to": [[*key, exchange] for key, exchange in self._led_to.items()],
            "held": [[*key, exchange] for key, exchange in self._held.items()],
        }

    def tensors(self) -> dict[str, Tensor]:
        """Flows for a checkpoint."""
        found = {f"returns/{name}": amount for name, amount in self._compensation.items()}
        for (i, j), (flows, k) in self._open.items():
            found |= {f"open/{i}-{j}/{name}": amount for name, amount in flows.get((i, k), {}).items()}
        return found

    def restore(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Take up the flows and the metadata of a checkpoint."""
        self._compensation, self._open = {}, {(i, j): ({(i, 0): {}}, 0) for i, j in metadata["open"]}
        self._led_to = {(phase, row): exchange for phase, row, exchange in metadata["led_to"]}
        self._held = {(phase, receiver, sender): exchange for phase, receiver, sender, exchange in metadata["held"]}
        for key, tensor in tensors.items():
            kind, *edge, name = key.split("/", 2)
            if kind == "returns":
                self._compensation[name] = tensor.to(self._device)
            else:
                i, j = map(int, edge[0].split("-"))
                self._open[i, j][0][i, 0][name] = tensor.to(self._device)
