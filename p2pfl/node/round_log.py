"""Records of a node's rounds: into its folder and log, and signed to the whole network, whose records are held against its updates."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from p2pfl.experiment.plan import Plan
from p2pfl.node.clock import LoopClock
from p2pfl.node.evidence import EVIDENCE, keep_evidence
from p2pfl.node.run_log import RunLog
from p2pfl.protocol.network_view import NetworkViewAdapter
from p2pfl.protocol.protocol import Protocol
from p2pfl.protocol.state_check import WITHOUT_ITS_STATE
from p2pfl.runs.events import EventKind
from p2pfl.runs.rows import NodeRow, row_of_nodes
from p2pfl.wire.update import EncodedUpdate, ReceivedUpdate

log = logging.getLogger(__name__)


class RoundLog:
    """Records of one node's rounds.

    Args:
        view: the whole network's; None: nobody is told, and nobody's records are looked at.
        state: the node's folder, for evidence.
        study: digest of the study, 64 hexadecimal digits.
    """

    def __init__(
        self, plan: Plan, protocol: Protocol, view: NetworkViewAdapter | None, run_log: RunLog, clock: LoopClock, state: Path, study: str
    ) -> None:
        self._protocol, self._view, self._log, self._clock, self._state, self._study = protocol, view, run_log, clock, state, study
        algorithm = plan.recipe.algorithm
        self._says_models = algorithm.model_channel is not None
        self._is_broadcast = not any(channel.per_edge for channel in algorithm.channels.values())
        """Whether all neighbours are sent the same: only that is signed."""
        self._sent: list[bytes] = []
        self._received: dict[str, list[bytes]] = {}
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
        self._take_note(self._view)
        for name in self._view.begun_again() - self._protocol.neighbours.keys():  # a neighbour says more itself
            self._log.event(EventKind.STARTED_ANEW, f"{name}: {WITHOUT_ITS_STATE}, as its records say", name)

    def gather(self) -> Callable[[], dict[str, Any]] | None:
        """Take what the node knows of the run now; the function returned gathers it by the names of `RunRecords`, in any thread."""
        if self._view is None:
            return None
        return self._view.document(self._log.folder, self._clock.now_s(), self._paused())

    def status(self) -> dict[str, Any]:
        """State of the network, for the status page."""
        return {"network": self._view.status(self._clock.now_s(), self._paused())} if self._view is not None else {}

    def _tell(self) -> None:
        if self._view is not None:
            self._take_note(self._view)
            self._protocol.spread(self._clock.now_s())

    def _take_note(self, view: NetworkViewAdapter) -> None:
        self._report_conflicts(view)
        view.take_note(self._log.folder)

    def _paused(self) -> list[str]:
        """Neighbours that have said that they pause, and are not back."""
        return [name for name, neighbour in self._protocol.neighbours.items() if neighbour.is_paused]

    # ---- updates and the records that their senders sign

    def note_sent(self, updates: Mapping[str, EncodedUpdate]) -> None:
        """Let this round's record say what goes to all neighbours alike."""
        number, phase = divmod(self._protocol.edges.exchange, self._protocol.edges.phases)
        if phase == 0:
            self._sent = []
        if self._view is None or not self._is_broadcast or not updates:
            return
        self._sent.append(next(iter(updates.values())).digest)
        if len(self._sent) == self._protocol.edges.phases:
            self._view.note_sent(number, tuple(self._sent))

    def note_received(self, received: Mapping[str, ReceivedUpdate]) -> None:
        """Take up the digests of updates that neighbours have sent."""
        if self._view is None or not self._is_broadcast:
            return
        for name, update in received.items():
            number, phase = divmod(update.exchange, self._protocol.edges.phases)
            digests = self._received.setdefault(name, [])
            if phase == 0:
                digests.clear()
            is_full = update.state_digests is not None and update.state_digests[0] is None
            if not update.digest or is_full or len(digests) != phase:
                continue  # it is not what all others got, or not known
            digests.append(update.digest)
            if phase == self._protocol.edges.phases - 1:
                self._view.note_came(name, number, tuple(digests))

    def _report_conflicts(self, view: NetworkViewAdapter) -> None:
        """Keep what proves that a member says different things to different neighbours, and report it."""
        for name, found in view.equivocations():
            if keep_evidence(self._state, self._study, name, found):
                detail = f"{name} has signed two different updates of round {found.round}; both records are kept in {EVIDENCE}"
                self._log.event(EventKind.EQUIVOCATION, detail, name)
        for name, number in view.differing():
            detail = f"{name}: what it sent here in round {number} is not the update that it has signed"
            self._log.event(EventKind.UPDATE_DIFFERS, detail, name)
