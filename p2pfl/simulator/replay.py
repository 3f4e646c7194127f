"""What real nodes did at their own pace, computed again from their records of who merged what, in which order."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from p2pfl.errors import ConfigError, StoreError
from p2pfl.plan import Plan
from p2pfl.records import RunFolder, read_run
from p2pfl.simulator.asynchronous import merge_newest
from p2pfl.simulator.conclusion import Stopwatch
from p2pfl.simulator.paced import Delays, Message, PacedNode, PacedRecords, message_of
from p2pfl.wire.newest import Held

Row = Mapping[str, Any]


def recorded_rows(place: Path, plan: Plan) -> dict[str, deque[Row]]:
    """Each node's rows in the order of its rounds.

    Raises:
        ConfigError: no such run, one whose nodes waited for each other, or one that has not ended.
    """
    records = read_run(place)
    if records.summary is None:
        raise ConfigError("the run has not ended: replay it afterwards", str(place))
    rows: dict[str, deque[Row]] = {name: deque() for name in plan.names}
    for row in sorted(records.nodes, key=lambda row: int(row["round"])):
        if "merged" not in row:
            raise ConfigError("its nodes went round by round, together: simulate its experiment instead", str(place))
        rows[row["node"]].append(row)
    return rows


class AsynchronousReplay:
    """A run of asynchronous nodes once more.

    The order between nodes is what their records imply: a message must have been sent before it is merged.

    Args:
        plan: of the run; all sites' data are here.
        folder: where this one writes.
        recorded: from `recorded_rows`.
        progress: as the engine's.
    """

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        recorded: Mapping[str, deque[Row]],
        progress: Callable[[int, int, Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._stopwatch = Stopwatch()
        self._plan, self._rows = plan, recorded
        self._nodes = [PacedNode(plan, name) for name in plan.names]
        self._records = PacedRecords(plan=plan, folder=folder, stopwatch=self._stopwatch, nodes=self._nodes, progress=progress)
        self._delays = Delays(plan)
        self._sent: dict[str, dict[str, Tensor]] = {}
        """By node, what it has sent in the round that it has not merged yet."""
        self._messages: dict[tuple[str, int], Message] = {}
        self._wanted = Counter((peer, number) for rows in recorded.values() for row in rows for peer, number, _ in row["merged"])
        self._stopwatch.lap("setup")

    def run(self) -> None:
        """Every recorded round.

        Raises:
            StoreError: the records name a message that nobody sent.
        """
        while any(self._rows.values()):
            if not any(self._advance(node) for node in self._nodes):
                stuck = next(name for name, rows in self._rows.items() if rows)
                raise StoreError(f"{stuck}, round {self._rows[stuck][0]['round']}: merged a message that no record says was sent")
            self._records.close(lambda node: not self._rows[node.name])
        self._records.conclude(None)

    def _advance(self, node: PacedNode) -> bool:
        """As many rounds of a node as the messages that are there allow; whether there was one."""
        rows, advanced = self._rows[node.name], False
        while rows:
            if node.name not in self._sent:
                node.train()
                self._sent[node.name] = node.outgoing()
                self._messages[node.name, node.round] = message_of(self._sent[node.name])
                advanced = True
            merged = rows[0]["merged"]
            if any((peer, number) not in self._messages for peer, number, _ in merged):
                break
            sent = self._sent.pop(node.name)
            taken = {peer: Held(number=number, payload=self._messages[peer, number], age=age) for peer, number, age in merged}
            merge_newest(self._plan, node, sent, taken)
            self._release(merged)
            row = rows.popleft()
            self._records.add(node, skipped=list(row["skipped"]), bytes_sent=int(row["bytes_sent"]), time_s=None)
            advanced = True
        return advanced

    def _release(self, merged: list[list[Any]]) -> None:
        """Forget messages that nobody merges any more."""
        for peer, number, _ in merged:
            self._wanted[peer, number] -= 1
        for key in [key for key in self._messages if not self._wanted[key]]:
            del self._messages[key]
