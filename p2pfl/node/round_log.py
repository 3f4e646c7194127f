"""Rows of a node's rounds: into its folder, into the log, and to the whole network."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from p2pfl.experiment.plan import Plan
from p2pfl.node.clock import LoopClock
from p2pfl.node.evidence import UpdateWitness
from p2pfl.node.run_log import RunLog
from p2pfl.protocol.network_view import NetworkViewAdapter
from p2pfl.protocol.protocol import Protocol
from p2pfl.protocol.state_check import WITHOUT_ITS_STATE
from p2pfl.runs.events import EventKind
from p2pfl.runs.rows import NodeRow, row_of_nodes

log = logging.getLogger(__name__)


class RoundLog:
    """Records of one node's rounds."""

    def __init__(
        self,
        plan: Plan,
        protocol: Protocol,
        view: NetworkViewAdapter | None,
        witness: UpdateWitness,
        run_log: RunLog,
        clock: LoopClock,
    ) -> None:
        self._protocol, self._view, self._witness, self._log, self._clock = protocol, view, witness, run_log, clock
        self._says_models = plan.recipe.algorithm.model_channel is not None
        self.last: NodeRow | None = None
        """The last row of this process; None before its first round."""
        self.last_time: float | None = None
        """When a round was last over, in seconds since 1970."""
        self.metrics: Mapping[str, float] = {}
        """The newest metrics on the node's own test rows."""

    def start(self, *, again: bool) -> None:
        """Begin the node's part in the network's view, before its first round."""
        if self._view is not None:
            self._view.start(self._log.folder.began_ms(), again=again or bool(self._protocol.edges.anew))

    def restore(self, last_time: float | None) -> None:
        """Go on where an earlier process was."""
        self.last_time = last_time

    def record(self, row: NodeRow) -> None:
        """Write down a round, and tell of it."""
        self.last, self.last_time = row, time.time()
        self.metrics = self.metrics if row.metrics is None else row.metrics
        self._log.folder.append_node(row)
        # this node's own edges bound nothing for the network
        self._log.folder.append_round(row_of_nodes(None, [row], row.round, row.kind, seconds=row.seconds))
        if self._view is not None:
            self._view.end_round(row, self._clock.now_s(), agreed=self._says_models)
        self._tell()
        log.info(
            "round %d: loss %s, disagreement %s, skipped %s",
            row.round,
            "-" if row.loss is None or math.isnan(row.loss) else f"{row.loss:.4f}",
            "unknown" if row.disagreement is None else f"{row.disagreement:.3g}",
            ", ".join(row.skipped) or "nobody",
        )

    def tell_last(self) -> None:
        """Tell the network that the last round was the last."""
        if self._view is not None and self.last is not None:
            self._view.say(self.last, self._clock.now_s(), closing=True)
            self._tell()

    def look(self) -> None:
        """Write down what has become known of the network."""
        if self._view is None:
            return
        self._witness.look()
        self._view.take_note(self._log.folder)
        for name in self._view.begun_again() - self._protocol.neighbours.keys():  # a neighbour says more itself
            self._log.event(EventKind.STARTED_ANEW, f"{name}: {WITHOUT_ITS_STATE}, as its records say", name)

    def gather(self) -> Callable[[], dict[str, Any]] | None:
        """Take what the node knows of the run now; the function returned gathers it by the names of `RunRecords`, in any thread."""
        if self._view is None or not self._log.is_open:
            return None
        return self._view.document(self._log.folder, self._clock.now_s(), self._paused())

    def status(self) -> dict[str, Any]:
        """State of the network, for the status page."""
        return {"network": self._view.status(self._clock.now_s(), self._paused())} if self._view is not None else {}

    def _tell(self) -> None:
        if self._view is not None:
            self._witness.look()
            self._view.take_note(self._log.folder)
            self._protocol.spread(self._clock.now_s())

    def _paused(self) -> list[str]:
        """Neighbours that have said that they pause, and are not back."""
        return [name for name, neighbour in self._protocol.neighbours.items() if neighbour.is_paused]
