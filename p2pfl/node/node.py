"""One node: everything that it owns while it runs, and its place in the run."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from p2pfl.experiment.plan import Plan
from p2pfl.governance.result_contract import Difference
from p2pfl.node.clock import LoopClock, RunSeconds, Timeouts
from p2pfl.node.edge_probing import EdgeProbing
from p2pfl.node.link_reports import LinkReports
from p2pfl.node.mixing import Mixing, update_formats
from p2pfl.node.own_edges import own_edges
from p2pfl.node.own_probes import own_probes
from p2pfl.node.pairwise_mixing import PairwiseMixing
from p2pfl.node.round_log import RoundLog
from p2pfl.node.run_log import RunLog
from p2pfl.node.sending import Sending
from p2pfl.node.spill import UpdateRoom, is_spilled
from p2pfl.node.workplace import Workplace
from p2pfl.protocol.agreed_start import AgreedStart, Signing
from p2pfl.protocol.network_view import NetworkViewAdapter, ViewPolicy
from p2pfl.runs.checkpoint import NODE_CHECKPOINT, CheckpointFile
from p2pfl.runs.events import EventKind
from p2pfl.transports import Transport
from p2pfl.wire.link import Terms
from p2pfl.wire.update import largest_update_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a node has come in the run."""

    round: int = 0
    phase: int = 0
    loss: float | None = None
    """Loss of the round's local steps; None before them, and where there are none."""
    joined: bool = False
    """Whether the node has just jumped: it mixes at once, and trains again from the next round on."""
    finished: bool = False


class Node:
    """The node of one institution, on which its loops work.

    Args:
        transport: not yet entered.
        study_digest: 64 hexadecimal digits.
        state: the folder for checkpoint, records and result.
        incarnation: a random number in [1, 2**63), another one at each start.
        signing: what this node agrees on the start with.
        view: what it says of itself to the whole network; None: it takes no part in that.
        start_anew: its state was lost, and whoever is responsible for it agrees to go on without.
        accepted_differences: from the study's result contract, as this site has accepted them; they go on record.
        spill_mb: memory that neighbours' updates may take; beyond it all of them lie in files. None: they always lie in memory.
        send_mbit_s: megabits of updates that are sent in a second, to all neighbours together; None: as many as the links take.
        beginning: for the record of its first start: how it begins, in a study that continues another one.
    """

    def __init__(
        self,
        plan: Plan,
        me: str,
        transport: Transport,
        *,
        study_digest: str,
        state: Path,
        timeouts: Timeouts,
        incarnation: int,
        signing: Signing,
        view: ViewPolicy | None = None,
        start_anew: bool = False,
        accepted_differences: Sequence[Difference] = (),
        spill_mb: float | None = None,
        send_mbit_s: float | None = None,
        beginning: tuple[EventKind, str] | None = None,
    ) -> None:
        self.seconds, self.clock, self.place = RunSeconds(), LoopClock(), Progress()
        self.plan, self.me, self.transport, self.state, self.timeouts = plan, me, transport, state, timeouts
        self.accepted_differences = [f"{found.kind}: {found.detail}" for found in accepted_differences]
        self.beginning = beginning
        self.population = plan.population([me])
        if plan.recipe.compiled:
            self.population.compile()  # a second, or ten the first time on a machine, that no round should wait for
        self.formats = update_formats(plan.recipe.algorithm, self.population)
        self.work = Workplace()
        self.file = CheckpointFile(state / NODE_CHECKPOINT)
        """The one checkpoint on the disk, written after every exchange."""
        self.terms = Terms(study=study_digest, layout=plan.layout.digest, start=plan.start_digest)
        self.saved_terms = asdict(self.terms)
        """The terms as its checkpoints have them."""
        self.log = RunLog(me, self.clock, lambda: self.place.round)
        self.view = NetworkViewAdapter(plan, me, signing, view, study_digest) if view is not None else None
        began_ms, within_s = int(1000 * time.time()), timeouts.start_within_s
        self.agreed = agreed = AgreedStart(plan, me, signing, study_digest=study_digest, within_s=within_s, began_ms=began_ms)
        self.spill_mb = spill_mb
        num_neighbours, balances = len(plan.neighbours(me)), plan.experiment.pace.kind.balances
        spills = is_spilled(largest_update_bytes(self.formats), num_neighbours, spill_mb)
        # only where flows take the places of updates, so that a node holds one of each neighbour at any time
        num_reused = num_neighbours if plan.recipe.algorithm.reads_once and balances else 0
        self.room = UpdateRoom(state, spills=spills, num_neighbours=num_neighbours, num_reused=num_reused, on_event=self.log.event)
        self.probing = EdgeProbing()
        self.protocol = protocol = own_edges(
            plan,
            me,
            self.terms,
            incarnation,
            self.formats,
            timeouts,
            agreed,
            self.view,
            start_anew=start_anew,
            make_room=self.room.make,
            make_early_room=self.room.make_early,
            on_event=self.log.event,
            probes=own_probes(plan, me, study_digest, self.probing.take),
        )
        self.mixing = Mixing(plan, self.population, protocol, self.formats, self.clock, self.work, self.room)
        is_pairwise = plan.experiment.pace.kind.counts_edges
        self.pairwise = PairwiseMixing(plan, self.population, protocol, self.formats[0]) if is_pairwise else None
        self.sending = Sending(protocol, transport, agreed.agreement, self.clock, send_mbit_s=send_mbit_s)
        self.links = LinkReports(protocol, transport, self.log, self.clock)
        self.rounds = RoundLog(plan, protocol, self.view, self.log, self.clock, state, study_digest)

    @property
    def exchange(self) -> int:
        """The exchange that the node is in."""
        return self.place.round * self.protocol.edges.phases + self.place.phase

    def move(self, **changes: Any) -> None:
        """Change the node's place in the run."""
        self.place = replace(self.place, **changes)

    def begin_exchange(self) -> None:
        """Tell the edges which exchange the node is in."""
        self.protocol.begin(self.exchange, self.clock.now_s())

    def spend(self, part: str, since_s: float) -> None:
        """Add the time since a moment to a part of the round."""
        self.seconds.spend(part, self.clock.now_s() - since_s)

    def start_with(self, company: Collection[str]) -> None:
        """Begin in the company of some members, and wait for news of the start as long as they may take."""
        now_s = self.clock.now_s()
        self.agreed.start(company, now_s)
        self.protocol.deadlines.wait_at_start(now_s, self.agreed.within_s, self.agreed.agreement.grace_s)
