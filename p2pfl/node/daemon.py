"""The loops of a node at work: rounds of training and exchange, and what comes in and goes out over its links in the meantime."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

import p2pfl
from p2pfl.errors import ConfigError, MembersMissing, P2PFLError
from p2pfl.node.checkpoint import CHECKPOINT, keep, read, take_up
from p2pfl.node.conclusion import close, note_differences, outcome_of, part, relay_on, write_without_result, write_without_start
from p2pfl.node.evidence import evidence_rounds
from p2pfl.node.link_reports import good_links
from p2pfl.node.memory import NodeMemory, forecast_node
from p2pfl.node.node import Node
from p2pfl.node.pairwise import PairwiseRounds
from p2pfl.node.round_steps import end_round, train
from p2pfl.node.starting import start_with_enough
from p2pfl.node.status import LOOPBACK, serve_status
from p2pfl.node.stopping import agree, is_over, left_out, stop_reason
from p2pfl.protocol.edges import DueMerge
from p2pfl.protocol.protocol import RETURN_REACH
from p2pfl.protocol.state_check import STATE_LOST, WITHOUT_ITS_STATE
from p2pfl.runs.events import EventKind

SAY_AWAITED_S = 10.0
"""A round that waits says for whom after so long, then after twice as long, and so on."""
TICK_S = 0.1
BACKLOG_LOOK_S, BACKLOG_LOOKS = 0.005, 4
"""Pauses of so long each, in which hardly any further exchange is heard of, show that all have been heard: one for each second for which
the process stood still, so many at most."""
BACKLOG_TURNS = 50
"""After each pause the loop turns so often at least: on a busy machine the time alone passes without a message being read."""


class Daemon:
    """The loops of one node; they open and close its transport.

    Args:
        node: with an empty folder where it is started anew.
        status_port: of the status page at *status_host*; 0: chosen by the system, None: no page.
    """

    def __init__(self, node: Node, *, status_port: int | None = 0, status_host: str = LOOPBACK) -> None:
        self.node, self.protocol, self.clock, self._status_at = node, node.protocol, node.clock, (status_host, status_port)
        if self.protocol.edges.anew and (node.state / CHECKPOINT).exists():
            raise ConfigError("holds a checkpoint: a node is started anew in an empty folder", str(node.state))
        self._pairwise = PairwiseRounds(node, node.pairwise) if node.pairwise is not None else None

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
        note_differences(self.node)
        if self.node.place.finished and self.protocol.edges.closing is not None:
            self.node.log.leave()
            return outcome_of(self.node, self.protocol.edges.closing)
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
        node = self.node
        node.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = read(node)
        node.rounds.start(again=node.log.open(node.state / "run", node.plan))
        take_up(node, found)
        if found is None:
            node.log.event(EventKind.STARTED, "")
            if node.beginning is not None:
                node.log.event(*node.beginning)
        else:
            node.log.event(EventKind.RESUMED, f"from the checkpoint before round {node.place.round}")

    async def _run(self) -> str:
        node, protocol = self.node, self.protocol
        if protocol.edges.anew and not (node.state / CHECKPOINT).exists():
            node.log.event(EventKind.STARTED_ANEW, f"{node.me}: {WITHOUT_ITS_STATE}, as somebody here has agreed to")
            await keep(node)  # what has been agreed to is not asked for again
        if protocol.edges.closing is None:
            node.begin_exchange()  # what comes while the links are made must find its place
        async with node.transport, asyncio.TaskGroup() as group:
            background = [group.create_task(self._receive(), name="receive"), group.create_task(self._tick(), name="tick")]
            background += [group.create_task(node.sending.run(n), name=f"send to {n.name}") for n in protocol.neighbours.values()]
            host, port = self._status_at
            if port is not None:
                page = serve_status(
                    self.status,
                    node.state,
                    records=node.rounds.gather,
                    is_ready=self.is_ready,
                    edges=self.measure_edges,
                    host=host,
                    port=port,
                )
                background.append(group.create_task(page, name="status"))
            reason = await self._take_part()
            for task in background:
                task.cancel()
        node.log.leave()
        return reason

    async def _take_part(self) -> str:
        node, reason = self.node, self.protocol.edges.closing
        if reason is None:
            try:
                has_started = node.agreed.company is not None or await start_with_enough(node)
            except MembersMissing as error:
                write_without_start(node, str(error))
                await node.sending.say_goodbye("pausing")
                raise
            reason = await self._rounds() if has_started else "paused"
        if reason != "paused":
            await close(node, reason)
        if node.place.finished:
            await node.sending.say_goodbye("finished")
            await part(node)
            await relay_on(node)
            return outcome_of(node, reason)
        why = "for a decision: its state went back" if self.protocol.states.own else self.clock.stopped_why
        node.log.event(EventKind.PAUSED, why or "")
        await node.sending.say_goodbye("pausing")
        if not self.protocol.states.own:
            return "paused"
        write_without_result(node, STATE_LOST)
        return STATE_LOST

    # ---- rounds

    async def _rounds(self) -> str:
        if self._pairwise is not None:
            return await self._pairwise.run()
        node, experiment, protocol = self.node, self.node.plan.experiment, self.protocol
        while node.place.round < experiment.last_possible_round and not self.clock.is_stopping:
            if is_over(node):
                break
            if not protocol.pace.balances and all(n.left for n in protocol.neighbours.values()):
                node.log.event(EventKind.ALONE, f"every neighbour has finished: this node stops after {node.place.round} rounds")
                return "rounds"
            node.begin_exchange()
            if joined := node.place.joined:
                await keep(node)  # what is sent now must be what a restart would send again
            node.move(joined=False)  # before the round's checkpoint: the round after this one is trained, also after a restart
            await self._one_round(0 if joined else experiment.local_steps_at(node.place.round))
        return stop_reason(node)

    async def _one_round(self, local_steps: int) -> None:
        """Train, exchange, merge, agree, record, keep; or jump, where the neighbours are too far ahead."""
        node, protocol, mixing, number = self.node, self.protocol, self.node.mixing, self.node.place.round
        node.seconds.begin_round()
        if node.place.phase == 0:
            await train(node, local_steps)
            mixing.begin_round()
        while True:
            phase, began_s = node.place.phase, self.clock.now_s()
            outgoing = await node.work.do("outgoing", node.population.outgoing, number, phase, local_steps=local_steps)
            due = await self._exchange(outgoing)
            if due is None:
                return
            node.spend("wait", began_s)
            if protocol.pace.in_step:
                mixing.statistics.note_lateness(phase, protocol.arrivals.lateness(protocol.edges.exchange, set(due.came)))
            began_s = self.clock.now_s()
            heard = [held.update.stop.agreed_for for held in due.admitted.values()]
            await mixing.merge(due, outgoing, number, phase, local_steps=local_steps)
            node.rounds.note_received(due.came)
            del due  # it holds what came
            node.spend("mix", began_s)
            if phase == protocol.edges.phases - 1:
                break
            node.move(phase=phase + 1)
            await keep(node)
            node.begin_exchange()
        agree(node, heard)
        node.move(round=number + 1, phase=0)
        await end_round(node, mixing.statistics, mixing.merged)

    async def _exchange(self, outgoing: Mapping[str, Tensor]) -> DueMerge | None:
        """Send, and wait for what is to be merged. None: there is nothing, because this node has jumped or is to stop."""
        node, protocol, clock = self.node, self.protocol, self.clock
        if not protocol.claims.is_behind():
            updates, full, digest = await node.work.do("pack", node.mixing.pack, outgoing, node.place.phase)
            protocol.send(updates, clock.now_s(), full=full, state_digest=digest)
            node.rounds.note_sent(updates)
            node.sending.begin()
            node.sending.wake()
        began_s, say_after_s = clock.now_s(), SAY_AWAITED_S
        while not protocol.claims.is_behind():
            if (due := protocol.due(clock.now_s(), outgoing.keys())) is not None:
                return due
            if clock.is_stopping or is_over(node):
                return None
            if clock.now_s() - began_s >= say_after_s:
                node.links.log_awaited(node.place.round, clock.now_s() - began_s)
                say_after_s *= 2
            await clock.wait(protocol.deadlines.look_again_s(clock.now_s(), TICK_S, protocol.pace.awaited()))
        await self._hear_backlog()
        self._jump()
        return None

    async def _hear_backlog(self) -> None:
        """Hear what came while this process stood still, before a jump.

        Each of these messages tells of another exchange in which the others were then, and a jump to each would only chase them.
        """
        claims, deadlines, quiet = self.protocol.claims, self.protocol.deadlines, 0
        still_s = deadlines.backlog_s(began_s := self.clock.now_s())
        num_looks, until_s = min(BACKLOG_LOOKS, math.ceil(still_s)), began_s + still_s  # where the others are fast it never becomes quiet
        while quiet < num_looks and self.clock.now_s() < until_s and deadlines.backlog_s(self.clock.now_s()):
            before = claims.furthest()
            await asyncio.sleep(BACKLOG_LOOK_S)
            for _ in range(BACKLOG_TURNS):
                await asyncio.sleep(0)
            quiet = quiet + 1 if claims.furthest() - before <= RETURN_REACH else 0
        deadlines.note_backlog_heard()  # once: each further pause would make it late for the others again

    def _jump(self) -> None:
        """Take the round number from what was heard; the missed rounds are not trained."""
        node, protocol, experiment, number = self.node, self.protocol, self.node.plan.experiment, self.node.place.round
        # rounds are begun at their beginning
        target = min(-(-protocol.claims.furthest() // protocol.edges.phases), experiment.last_possible_round)
        protocol.jump(target * protocol.edges.phases, self.clock.now_s(), left_out(number, target, experiment.rounds))
        node.mixing.interrupt()
        node.move(round=target, phase=0, joined=True)

    # ---- background

    async def _receive(self) -> None:
        node = self.node
        while True:
            received = await node.transport.receive()
            decides = self.protocol.hear(received.peer, received.frames, self.clock.now_s())
            node.links.exclude(received.peer)
            if not decides:
                continue
            if self.protocol.states.own and not self.clock.is_stopping:
                self.stop()
            node.sending.wake()
            self.clock.wake()

    async def _tick(self) -> None:
        node = self.node
        while True:
            links = node.links.now()
            if node.place.round == 0 and self.protocol.edges.closing is None:
                node.agreed.agreement.note_links(good_links(links), self.clock.now_s())
            self.protocol.tick(self.clock.now_s())
            node.sending.wake()
            node.links.count_unreadable()
            node.log.say_due()
            node.links.look(links)
            node.rounds.look()
            await asyncio.sleep(TICK_S)

    # ---- status

    def memory(self) -> NodeMemory:
        """Foretell the memory that this node will need at most."""
        return forecast_node(self.node.plan, self.node.population, len(self.protocol.neighbours), spill_mb=self.node.spill_mb)

    def is_ready(self) -> bool:
        """Whether it takes part: it waits for members, trains, or answers them; not once it is leaving, or its state went back."""
        return not (self.clock.is_stopping or self.protocol.states.own)

    async def measure_edges(self) -> dict[str, Any]:
        """Measure the edges to neighbours that are there, for a doctor at this site."""
        return await self.node.probing.measure(self.protocol, self.node.sending)

    def status(self) -> dict[str, Any]:
        """State of the node for the status page."""
        node, protocol, rounds, agreed = self.node, self.protocol, self.node.rounds, self.node.agreed
        return {
            **rounds.status(),
            "version": p2pfl.__version__,
            "member": node.me,
            "members": len(node.plan.names),
            "waiting_for": agreed.waiting_for(node.links.now()),
            "started_with": agreed.company,
            "started_without": agreed.missing,
            "round": node.place.round,
            "rounds": node.plan.experiment.rounds,
            "exchange": protocol.edges.exchange,
            "stop_round": protocol.stopping.stop_round,
            "agreed_for": protocol.stopping.consensus_counter,
            "closing": protocol.edges.closing,
            "disk_full": node.log.disk_full,
            "state_lost": "; ".join(protocol.states.own.values()) or None,
            "disagreement": rounds.last and rounds.last.disagreement,
            "loss": rounds.last and rounds.last.loss,
            "metrics": rounds.metrics,
            "bytes_sent": node.sending.bytes_sent,
            "last_round_time": rounds.last_time,
            "refused": dict(protocol.edges.refused),
            "evidence": evidence_rounds(node.state),
            "resynchronised": protocol.values.resynchronised,
            "links": dict(node.transport.counters),
            "neighbours": node.links.status(),
        }
