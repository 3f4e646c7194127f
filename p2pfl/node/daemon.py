"""The loops of a node at work: rounds of training and exchange, and what comes in and goes out over its links in the meantime."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import p2pfl
from p2pfl.errors import ConfigError, MembersMissing, P2PFLError
from p2pfl.experiment.plan import Plan
from p2pfl.governance.result_contract import Difference
from p2pfl.node.checkpoint import CHECKPOINT, NodeCheckpoint
from p2pfl.node.clock import LoopClock
from p2pfl.node.closing import close
from p2pfl.node.conclusion import NodeConclusion
from p2pfl.node.evidence import EvidenceFile, UpdateWitness
from p2pfl.node.link_reports import LinkReports
from p2pfl.node.memory import NodeMemory, forecast_node
from p2pfl.node.mixing import Mixing, update_formats
from p2pfl.node.own_edges import own_edges
from p2pfl.node.pairwise import PairwiseRounds
from p2pfl.node.pairwise_mixing import PairwiseMixing
from p2pfl.node.round_log import RoundLog
from p2pfl.node.round_steps import RoundSteps
from p2pfl.node.run_log import RunLog
from p2pfl.node.seconds import RunSeconds
from p2pfl.node.sending import Sending
from p2pfl.node.starting import Starting
from p2pfl.node.status import LOOPBACK, Asked, serve_status
from p2pfl.node.stopping import Stopping, left_out
from p2pfl.node.timeouts import Timeouts
from p2pfl.protocol.agreed_start import AgreedStart, Signing
from p2pfl.protocol.network_view import NetworkViewAdapter, ViewTerms
from p2pfl.protocol.state_check import STATE_LOST, WITHOUT_ITS_STATE
from p2pfl.runs.events import EventKind
from p2pfl.transports import Transport
from p2pfl.wire.link import Terms

SAY_AWAITED_S = 10.0
"""A round that waits says for whom after so long, then after twice as long, and so on."""
TICK_S = 0.1


class Daemon:
    """The node of one institution, at work over its links.

    Args:
        transport: not yet entered; the daemon opens and closes it.
        study_digest: 64 hexadecimal digits.
        state: the folder for checkpoint, records and result.
        incarnation: a random number in [1, 2**63), another one at each start.
        signing: what this node agrees on the start with.
        status_port: of the status page at *status_host*; 0: chosen by the system, None: no page.
        view: what it needs to know the whole network; None: it takes no part in that.
        start_anew: its state was lost, and whoever is responsible for it agrees to go on without: the folder must be empty.
        accepted_differences: from the study's result contract, as this site has accepted them; they go on record.
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
        status_port: int | None = 0,
        status_host: str = LOOPBACK,
        view: ViewTerms | None = None,
        start_anew: bool = False,
        accepted_differences: Sequence[Difference] = (),
    ) -> None:
        seconds, self._linger_s = RunSeconds(), timeouts.linger_s
        self.plan, self.me, self.state, self._transport, self._status_at = plan, me, state, transport, (status_host, status_port)
        if start_anew and (state / CHECKPOINT).exists():
            raise ConfigError("holds a checkpoint: a node is started anew in an empty folder", str(state))
        self._population = population = plan.population([me])
        if plan.recipe.compiled:
            population.compile()  # a second, or ten the first time on a machine, that no round should wait for
        self._formats = formats = update_formats(plan.recipe.algorithm, population)
        self._terms = terms = Terms(study=study_digest, layout=plan.layout.digest, start=plan.start_digest)
        self.clock = clock = LoopClock()
        self._log = log = RunLog(me, clock, lambda: self._steps.place.round)
        network_view = NetworkViewAdapter(plan, me, view, study_digest) if view is not None else None
        began_ms, within_s = int(1000 * time.time()), timeouts.start_within_s
        self._agreed_start = agreed = AgreedStart(plan, me, signing, study_digest=study_digest, within_s=within_s, began_ms=began_ms)
        self.protocol = protocol = own_edges(
            plan, me, terms, incarnation, formats, timeouts, agreed, network_view, start_anew=start_anew, on_event=log.event
        )
        self._mixing = mixing = Mixing(plan, population, protocol, formats, clock)
        self._witness = UpdateWitness(plan.recipe.algorithm, protocol, network_view, EvidenceFile(state, study_digest))
        self._sending = sending = Sending(protocol, transport, agreed.agreement, clock)
        self._links = LinkReports(protocol, transport, log, clock)
        self._rounds_log = rounds = RoundLog(plan, protocol, network_view, self._witness, log, clock)
        pairwise = PairwiseMixing(plan, population, protocol, formats[0]) if plan.experiment.pace.name == "pairwise" else None
        self._checkpoint = NodeCheckpoint(
            state / CHECKPOINT, terms, formats, population, protocol, mixing, pairwise, agreed, sending, rounds, seconds, clock
        )
        saved, at_least_s = self._checkpoint, timeouts.round_at_least_s
        self._steps = steps = RoundSteps(plan, population, protocol, saved, rounds, log, sending, seconds, clock, at_least_s)
        self._pairwise = PairwiseRounds(plan, protocol, pairwise, steps, sending, clock) if pairwise is not None else None
        self._starting = Starting(agreed, protocol, self._links, steps, sending, seconds, clock)
        self._stopping = Stopping(plan, protocol)
        self._conclusion = NodeConclusion(
            plan, me, population, protocol, mixing, agreed, network_view, log, sending, seconds, accepted_differences
        )

    # ---- running

    async def run(self) -> str:
        """Take part until the network stops.

        Returns:
            The stop reason: "converged", "rounds", "diverged" where the last training here became non-finite, "paused" where it was
            asked to leave, "state_lost" where a neighbour remembers more of this node than it knows itself.

        Raises:
            StoreError: the disk failed, or the checkpoint cannot be read.
            MembersMissing: too few members were there in time; this node has not trained.
        """
        self._open_folder()
        self._conclusion.note_differences()
        if self._steps.place.finished and self.protocol.edges.closing is not None:
            self._log.leave()
            return self._conclusion.outcome(self.protocol.edges.closing)
        try:
            return await self._run()
        except BaseExceptionGroup as group:  # one failure of one task: say that, and not that it was in a group
            first = group
            while isinstance(first, BaseExceptionGroup) and len(first.exceptions) == 1:
                first = first.exceptions[0]
            if isinstance(first, P2PFLError):
                raise first from group
            raise

    def stop(self, why: str = "") -> None:
        """Leave after what is in hand; the state is on disk and a later start goes on from it.

        Args:
            why: for the record, such as "by SIGTERM".
        """
        self.clock.stop(why)

    def _open_folder(self) -> None:
        """Open the node's own run folder, and go where it was when it last wrote a checkpoint."""
        self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self._checkpoint.read()
        self._rounds_log.start(again=self._log.open(self.state / "run", self.plan))
        self._checkpoint.truncate(self._log.folder, found)
        if found is None:
            self._log.event(EventKind.STARTED, "")
            return
        self._steps.restore(found)
        self._log.event(EventKind.RESUMED, f"from the checkpoint before round {self._steps.place.round}")

    async def _run(self) -> str:
        if self.protocol.edges.anew and not (self.state / CHECKPOINT).exists():
            self._log.event(EventKind.STARTED_ANEW, f"{self.me}: {WITHOUT_ITS_STATE}, as somebody here has agreed to")
            await self._steps.keep()  # what has been agreed to is not asked for again
        if self.protocol.edges.closing is None:
            self._steps.begin_exchange()  # what comes while the links are made must find its place
        async with self._transport, asyncio.TaskGroup() as group:
            background = [group.create_task(self._receive(), name="receive"), group.create_task(self._tick(), name="tick")]
            background += [group.create_task(self._sending.run(n), name=f"send to {n.name}") for n in self.protocol.neighbours.values()]
            host, port = self._status_at
            if port is not None:
                asked = Asked(status=self.status, records=self._rounds_log.gather, is_ready=self.is_ready)
                page = serve_status(asked, self.state, host=host, port=port)
                background.append(group.create_task(page, name="status"))
            reason = await self._take_part()
            for task in background:
                task.cancel()
        self._log.leave()
        return reason

    async def _take_part(self) -> str:
        reason = self.protocol.edges.closing
        if reason is None:
            try:
                has_started = self._agreed_start.company is not None or await self._starting.wait()
            except MembersMissing as error:
                self._conclusion.write_without_start(str(error))
                await self._sending.say_goodbye("pausing")
                raise
            reason = await self._rounds() if has_started else "paused"
        if reason != "paused":
            rounds, sending = self._rounds_log, self._sending
            await close(reason, self.protocol, self._mixing, self._steps, rounds, self._conclusion, sending, self.clock, self._linger_s)
        if self._steps.place.finished:
            await self._sending.say_goodbye("finished")
            return self._conclusion.outcome(reason)
        self._log.event(EventKind.PAUSED, "for a decision: its state went back" if self.protocol.states.own else self.clock.stopped_why)
        await self._sending.say_goodbye("pausing")
        if not self.protocol.states.own:
            return "paused"
        self._conclusion.write_without_result(STATE_LOST, self._steps.place.round)
        return STATE_LOST

    # ---- rounds

    async def _rounds(self) -> str:
        if self._pairwise is not None:
            return await self._pairwise.run()
        experiment, protocol, steps = self.plan.experiment, self.protocol, self._steps
        while steps.place.round < experiment.last_possible_round and not self.clock.is_stopping:
            if self._stopping.is_over(steps.place.round):
                break
            if not protocol.pace.balances and all(n.left for n in protocol.neighbours.values()):
                self._log.event(EventKind.ALONE, f"every neighbour has finished: this node stops after {steps.place.round} rounds")
                return "rounds"
            steps.begin_exchange()
            if joined := steps.place.joined:
                await steps.keep()  # what is sent now must be what a restart would send again
            steps.move(joined=False)  # before the round's checkpoint: the round after this one is trained, also after a restart
            await self._one_round(0 if joined else experiment.local_steps_at(steps.place.round))
        return self._stopping.reason(steps.place.round)

    async def _one_round(self, local_steps: int) -> None:
        """Train, exchange, merge, agree, record, keep; or jump, where the neighbours are too far ahead."""
        protocol, steps, mixing, number = self.protocol, self._steps, self._mixing, self._steps.place.round
        steps.begin_round()
        if steps.place.phase == 0:
            await steps.train(local_steps)
            mixing.begin_round()
        while True:
            phase, began_s = steps.place.phase, self.clock.now_s()
            outgoing = await asyncio.to_thread(self._population.outgoing, number, phase, local_steps=local_steps)
            if not await self._exchange(outgoing):
                return
            steps.spend("wait", began_s)
            began_s = self.clock.now_s()
            heard = [held.update.stop.agreed_for for held in protocol.admitted().values()]
            self._witness.note_received(protocol.came())
            await mixing.merge(outgoing, number, phase, local_steps=local_steps)
            steps.spend("mix", began_s)
            if phase == protocol.edges.phases - 1:
                break
            steps.move(phase=phase + 1)
            await steps.keep()
            steps.begin_exchange()
        self._stopping.agree(number, mixing.statistics, heard)
        steps.move(round=number + 1, phase=0)
        await steps.end_round(mixing.statistics, mixing.merged())

    async def _exchange(self, outgoing: Mapping[str, Tensor]) -> bool:
        """Send, and wait for the neighbours. False: there is nothing to merge, because this node has jumped or is to stop."""
        protocol, clock, place = self.protocol, self.clock, self._steps.place
        if not protocol.claims.is_behind():
            updates, full, digest = await asyncio.to_thread(self._mixing.pack, outgoing, place.phase)
            protocol.send(updates, clock.now_s(), full=full, state_digest=digest)
            self._witness.note_sent(updates)
            self._sending.wake()
        began_s, say_after_s = clock.now_s(), SAY_AWAITED_S
        while not protocol.claims.is_behind():
            if protocol.pace.is_over(clock.now_s()):
                return True
            if clock.is_stopping or self._stopping.is_over(place.round):
                return False
            if clock.now_s() - began_s >= say_after_s:
                self._links.log_awaited(place.round, clock.now_s() - began_s)
                say_after_s *= 2
            await clock.wait(protocol.deadlines.look_again_s(clock.now_s(), TICK_S, protocol.pace.awaited()))
        self._jump()
        return False

    def _jump(self) -> None:
        """Take the round number from what was heard; the missed rounds are not trained."""
        protocol, experiment, number = self.protocol, self.plan.experiment, self._steps.place.round
        # rounds are begun at their beginning
        target = min(-(-protocol.claims.furthest() // protocol.edges.phases), experiment.last_possible_round)
        protocol.jump(target * protocol.edges.phases, self.clock.now_s(), left_out(number, target, experiment.rounds))
        self._stopping.note_jump()
        self._mixing.interrupt()
        self._steps.move(round=target, phase=0, joined=True)

    # ---- background

    async def _receive(self) -> None:
        while True:
            received = await self._transport.receive()
            decides = self.protocol.hear(received.peer, received.frames, self.clock.now_s())
            self._links.exclude(received.peer)
            if not decides:
                continue
            if self.protocol.states.own and not self.clock.is_stopping:
                self.stop()
            self._sending.wake()
            self.clock.wake()

    async def _tick(self) -> None:
        while True:
            if self._steps.place.round == 0 and self.protocol.edges.closing is None:
                self._starting.note_links()
            self.protocol.tick(self.clock.now_s())
            self._sending.wake()
            self._links.count_unreadable()
            self._log.say_due()
            self._links.look()
            self._rounds_log.look()
            await asyncio.sleep(TICK_S)

    # ---- status

    def memory(self) -> NodeMemory:
        """Foretell the memory that this node will need at most."""
        return forecast_node(self.plan, self._population, len(self.protocol.neighbours))

    def is_ready(self) -> bool:
        """Whether it takes part: it waits for members, trains, or answers them; not once it is leaving, or its state went back."""
        return not (self.clock.is_stopping or self.protocol.states.own)

    def status(self) -> dict[str, Any]:
        """State of the node for the status page."""
        protocol, rounds = self.protocol, self._rounds_log
        return {
            **rounds.status(),
            "version": p2pfl.__version__,
            "member": self.me,
            "members": len(self.plan.names),
            **self._starting.status(),
            "round": self._steps.place.round,
            "rounds": self.plan.experiment.rounds,
            "exchange": protocol.edges.exchange,
            "stop_round": protocol.stopping.stop_round,
            "agreed_for": protocol.stopping.consensus_counter,
            "closing": protocol.edges.closing,
            "disk_full": self._log.disk_full,
            "state_lost": "; ".join(protocol.states.own.values()) or None,
            "disagreement": rounds.last and rounds.last.disagreement,
            "loss": rounds.last and rounds.last.loss,
            "metrics": rounds.metrics,
            "bytes_sent": self._sending.bytes_sent,
            "last_round_time": rounds.last_time,
            "refused": dict(protocol.edges.refused),
            "evidence": self._witness.evidence.rounds(),
            "resynchronised": protocol.values.resynchronised,
            "links": dict(self._transport.counters),
            "neighbours": self._links.status(),
        }
