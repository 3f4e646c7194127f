"""A node at work: rounds of training and exchange over real links, until the network agrees to stop or the cap is reached.

Shapes: one row, K neighbour slots, P parameters.
"""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from torch import Tensor

import p2pfl
from p2pfl.algorithms.stopping import NEVER
from p2pfl.errors import ConfigError, DiskFull, MembersMissing, P2PFLError, QueueFull, TransportError
from p2pfl.evaluation.baselines import trained_alone
from p2pfl.evaluation.cross_site import at_one_site
from p2pfl.evaluation.gain_over_local import worth
from p2pfl.evaluation.results import write_models
from p2pfl.evaluation.subgroups import subgroups
from p2pfl.evaluation.summary import (
    baselines_summary,
    by_metric,
    finish_summary,
    non_finite_models,
    peak_rss_bytes,
    test_figures,
)
from p2pfl.experiment.plan import Plan
from p2pfl.governance.result_contract import Difference
from p2pfl.node.evidence import EvidenceFile, UpdateWitness
from p2pfl.node.memory import NodeMemory, forecast_node
from p2pfl.node.mixing import Mixing, RoundStatistics, update_formats
from p2pfl.node.pairwise import PairwiseRounds, Surroundings
from p2pfl.node.status import LOOPBACK, Asked, serve_status
from p2pfl.node.store import CHECKPOINT, edge_tensors, restore_edges
from p2pfl.node.timeouts import Timeouts
from p2pfl.params import frozen_of
from p2pfl.protocol.agreed_start import AgreedStart, Signing
from p2pfl.protocol.allowance import NeighbourAllowance
from p2pfl.protocol.asynchronous import Asynchronous
from p2pfl.protocol.event_throttle import EventThrottle
from p2pfl.protocol.link_watch import LinkReport, LinkWatch, report
from p2pfl.protocol.neighbour import Neighbour, SendReady, SendRecords, SendUpdate
from p2pfl.protocol.network_view import NetworkViewAdapter, ViewTerms
from p2pfl.protocol.protocol import STATE_LOST, WITHOUT_ITS_STATE, Protocol
from p2pfl.protocol.round_pace import WINDOW, RoundPace
from p2pfl.runs.checkpoint import changes_told, read_checkpoint, write_checkpoint
from p2pfl.runs.departures import Departure, departure_rows, departures_of_events
from p2pfl.runs.events import EventKind, event_row, kind_of
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run, read_summary
from p2pfl.runs.rows import NodeRow, Row, kind_of_round, row_of_nodes
from p2pfl.runs.stopwatch import with_rest
from p2pfl.runs.text import utc_now
from p2pfl.topology import steps_from
from p2pfl.topology.links import links_of
from p2pfl.training import Population
from p2pfl.training.freed_memory import return_freed_memory
from p2pfl.transports import UNREADABLE, Transport
from p2pfl.wire.codec import encode
from p2pfl.wire.link import LinkSession, Terms
from p2pfl.wire.messages import Goodbye, Message, Records

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0
"""How long a message waits for room in its link before it is asked whether it is still of use. A link that is down says so at once."""
SAY_AWAITED_S = 10.0
"""A round that waits says for whom after so long, then after twice as long, and so on."""
TICK_S = 0.1
ROOM_AFTER_S = 1.0
"""A full disk is tried again after so long, then after twice as long, and so on."""
ROOM_AT_MOST_S = 30.0
TRIM_FROM_BYTES = 8 * 2**20
"""Size of a model from which on freed memory is given back after training; it takes less than a millisecond."""
FLUSH_S = 0.3
LAST_RECORDS_S = 5.0

_SPANS = 5
"""Of rounds without any neighbour so many spans are named."""

T = TypeVar("T")

AHEAD = 8
"""Exchanges that are kept where the graph is directed or changes: a node may be as far ahead of one that it does not wait for as news need
from that one to it."""


class Daemon:
    """One institution's node.

    Args:
        plan: of the study; this node's site is in it.
        me: the member that this node is.
        transport: not yet entered; the daemon opens and closes it.
        study_digest: 64 hexadecimal digits.
        state: the folder for checkpoint, records and result.
        timeouts: its patience.
        incarnation: a random number in [1, 2**63), another one at each start.
        signing: what this node agrees on the start with.
        status_port: for the status endpoint; 0: chosen by the system, None: no endpoint.
        status_host: the address that it listens at.
        view: what it needs to know the whole network; None: it takes no part in that.
        start_anew: its state was lost, and whoever is responsible for it agrees to go on without: the folder must be empty.
        accepted_differences: from the study's result contract, as this site has accepted them; they go on record.
    """

    def __init__(  # noqa: PLR0915  # one line for each thing that it keeps
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
        self._made_s = self._await_from_s = time.monotonic()
        self.plan, self.me, self.state = plan, me, state
        self._transport, self._timeouts, self._status_host, self._status_port = transport, timeouts, status_host, status_port
        self._accepted = accepted_differences
        if start_anew and self._checkpoint.exists():
            raise ConfigError("holds a checkpoint: a node is started anew in an empty folder", str(state))
        self._row, self._population = plan.names.index(me), plan.population([me])
        if plan.recipe.compiled:
            self._population.compile()  # a second, or ten the first time on a machine, that no round should wait for
        self._algorithm = algorithm = plan.recipe.algorithm
        self._formats = update_formats(algorithm, self._population)
        terms = Terms(study=study_digest, layout=plan.layout.digest, start=plan.start_digest)
        pace = plan.experiment.pace
        in_step = pace.name == "synchronous"
        ahead = 1 if plan.schedule.period == 1 and not plan.schedule.directed else AHEAD
        if not in_step:
            ahead = plan.experiment.last_possible_round
        session_with = partial(LinkSession, member=me, terms=terms, incarnation=incarnation, formats=self._formats, ahead=ahead)
        update_bytes = max((whole or travels).size_bytes for travels in self._formats for whole in (None, travels.whole))
        neighbours = {
            name: Neighbour(name=name, session=session_with(peer=name), allowance=NeighbourAllowance(update_bytes=update_bytes))
            for name in plan.neighbours(me)
        }
        self._network_view = NetworkViewAdapter(plan, me, view, study_digest) if view is not None else None
        self._agreed_start = AgreedStart(
            plan, me, signing, study_digest=study_digest, within_s=timeouts.greet_timeout_s, began_ms=int(1000 * time.time())
        )
        self.protocol = Protocol(
            me=me,
            neighbours=neighbours,
            links=links_of(plan.schedule, self._row, splits_mass=algorithm.splits_mass, in_step=in_step),
            newest=Asynchronous(max_age=pace.max_age) if pace.name == "asynchronous" else None,
            meetings=deque() if pace.name == "pairwise" else None,
            phases=algorithm.phases,
            ahead=ahead,
            num_exchanges=plan.experiment.last_possible_round * algorithm.phases,
            anew=int(1000 * time.time()) if start_anew else 0,
            pace=RoundPace(factor=timeouts.deadline_factor, floor_s=timeouts.deadline_floor_s, window=WINDOW),
            on_event=self._event,
            train_exchanges=plan.experiment.rounds * algorithm.phases,
            earliest_stop=plan.stop_rule.earliest(plan.experiment.rounds) if plan.stop_rule else None,
            view=self._network_view.view if self._network_view is not None else None,
            push_sum=self._network_view.push_sum if self._network_view is not None else None,
            start=self._agreed_start.agreement,
            starting_exchanges=algorithm.phases * (self._agreed_start.way + 1),
            num_others=len(plan.names) - 1,
            places={name: plan.names.index(name) for name in neighbours},
            steps_to=dict(enumerate(steps_from(plan.topology, self._row).tolist())) if in_step else {},
            stop_rule=plan.stop_rule if in_step else None,
        )
        if self._network_view is not None:
            self.protocol.prove, self.protocol.waits_for_others = self._network_view.proof, self._network_view.waits_for_others
        now_s = lambda: self._now()  # noqa: E731, PLW0108  # a test may stop this clock
        self._mixing = Mixing(plan, self._population, self.protocol, self._formats, now_s)
        self._witness = UpdateWitness(
            self.protocol,
            self._network_view,
            EvidenceFile(state, study_digest),
            is_broadcast=pace.name != "pairwise" and not any(channel.per_edge for channel in algorithm.channels.values()),
        )
        self._link_watch = LinkWatch(neighbours)
        self._throttle = EventThrottle()
        self._disk_full: str | None = None
        """Why nothing can be written; None where it can."""
        self._unreadable: Counter[tuple[str, str]] = Counter()
        self._last_round_time: float | None = None  # seconds since 1970
        self._wake = asyncio.Event()
        self._outgoing = {name: asyncio.Event() for name in neighbours}
        self._round = self._phase = self._bytes_sent = 0
        self._stopping, self._stopped_why = False, ""
        self._seconds: dict[str, float] = {}
        self._earlier_s = 0.0  # of the process that wrote the checkpoint
        self._last_row: NodeRow | None = None
        self._recorded_bytes = 0
        """Bytes sent until the last recorded round."""
        self._metrics: dict[str, float] = {}
        self._loss: float | None = None
        self._folder: RunFolder | None = None
        self._finished = False
        self._own_test_holds = True
        """Whether the models of the neighbours that came to the last round were as close as the stop rule asks."""
        self._joined = False
        """Whether this node has just jumped: it mixes at once, and trains again from the next round on."""
        self._metrics_now: dict[str, float] | None = None
        self._pair_seconds = dict.fromkeys(("train", "wait", "mix", "evaluate"), 0.0)
        self._checkpoint_s = 0.0
        """Seconds spent on checkpoints since the last recorded round: the next row says them."""
        self._terms = terms
        self._pairwise = PairwiseRounds(plan, me, self._population, self.protocol, self._formats[0], self._surroundings())

    # ---- running

    async def run(self) -> str:
        """Take part until the network stops.

        Returns:
            The stop reason: "converged", "rounds", "diverged" where the last training here left the finite numbers, "paused" where it was
            asked to leave, "state_lost" where a neighbour remembers more of this node than it knows itself.

        Raises:
            StoreError: the disk failed, or the checkpoint cannot be read.
            MembersMissing: too few members were there in time; this node has not trained.
        """
        self._open_folder()
        self._note_differences()
        if self._finished and self.protocol.closing is not None:
            self._leave_folder()
            return self._outcome(self.protocol.closing)
        try:
            return await self._run()
        except BaseExceptionGroup as group:  # one failure of one task: say that, and not that it was in a group
            first = group
            while isinstance(first, BaseExceptionGroup) and len(first.exceptions) == 1:
                first = first.exceptions[0]
            if isinstance(first, P2PFLError):
                raise first from group
            raise

    async def _run(self) -> str:
        if self.protocol.anew and not self._checkpoint.exists():
            self._event(EventKind.STARTED_ANEW, f"{self.me}: {WITHOUT_ITS_STATE}, as somebody here has agreed to")
            await self._keep()  # what has been agreed to is not asked for again
        if self.protocol.closing is None:
            self.protocol.begin(self._exchange_now, self._now())  # what comes while the links are made must find its place
        async with self._transport, asyncio.TaskGroup() as group:
            background = [group.create_task(self._receive(), name="receive"), group.create_task(self._tick(), name="tick")]
            background += [group.create_task(self._send_to(n), name=f"send to {n.name}") for n in self.protocol.neighbours.values()]
            if self._status_port is not None:
                asked = Asked(status=self.status, records=self.records, is_ready=self.is_ready)
                page = serve_status(asked, self.state, host=self._status_host, port=self._status_port)
                background.append(group.create_task(page, name="status"))
            reason = await self._take_part()
            for task in background:
                task.cancel()
        self._say(*self._throttle.rest(self._now()))
        self._leave_folder()
        return reason

    def _leave_folder(self) -> None:
        """Say that this process came to a clean end."""
        assert self._folder is not None
        self._folder.leave()

    def stop(self, why: str = "") -> None:
        """Leave after what is in hand; the state is on disk and a later start goes on from it.

        Args:
            why: for the record, such as "by SIGTERM".
        """
        self._stopping, self._stopped_why = True, why
        self._wake.set()

    async def _take_part(self) -> str:
        if self.protocol.closing is None:
            if self._agreed_start.company is None:
                await self._await_start()
            reason = await self._rounds() if self._agreed_start.company is not None else "paused"
        else:
            reason = self.protocol.closing
        if reason != "paused":
            await self._close(reason)
        if self._finished:
            await self._say_goodbye("finished")
            return self._outcome(reason)
        self._event(EventKind.PAUSED, "for a decision: its state went back" if self.protocol.lost else self._stopped_why)
        await self._say_goodbye("pausing")
        if not self.protocol.lost:
            return "paused"
        self._finish_without_result(STATE_LOST)
        return STATE_LOST

    def _outcome(self, reason: str) -> str:
        """What the end is called here, where the network stopped for a reason."""
        return "diverged" if self._population.all_diverged else reason

    async def _await_start(self) -> None:
        """Wait until enough members are there; returns without a start where this node is to stop.

        Raises:
            MembersMissing: too few were there in time.
        """
        agreed = self._agreed_start
        self._await_from_s = self._now()
        agreed.agreement.begin(self._now())
        while not self._stopping:
            self._note_links()
            if (company := agreed.decide(self._now())) is not None:
                await self._start(company)
                return
            reports = self.link_reports()
            verdict = agreed.verdict(reports, self._now())
            if verdict is not None and agreed.agreement.is_hopeless(self._now()):
                await self._give_up(verdict)
            if (news := agreed.news(agreed.waiting_for(reports))) is not None:
                log.info("%s", news)
            self._wake_senders()
            await self._wait(self._now() + TICK_S)

    async def _start(self, company: list[str]) -> None:
        """Begin in the company of some members; that is on the disk before anything is sent, so that a restarted node does not wait."""
        agreed = self._agreed_start
        agreed.start(company, self._now())
        self._may_wait_at_start()
        if self.me in company and not self.protocol.anew:
            self.protocol.start_in_company(self._now())
        for name, neighbour in self.protocol.neighbours.items():
            neighbour.missed = name not in company and not neighbour.session.is_open
        self._book_the_start()
        if agreed.missing:
            log.warning(
                "%s of %d members are missing at the start: %s", len(agreed.missing), len(self.plan.names), ", ".join(agreed.missing)
            )
            self._event(
                EventKind.STARTED_WITHOUT, f"{', '.join(agreed.missing)}: {len(company)} of {len(self.plan.names)} members were ready"
            )
        else:
            self._event(EventKind.START_AGREED, f"all {len(company)} members are ready")
        await self._keep()
        self._wake_senders()

    def _book_the_start(self) -> None:
        """Tell the seconds until everything was set up from those spent waiting for the other members."""
        self._seconds["setup"] = self._await_from_s - self._made_s
        self._seconds["waiting"] = self._now() - self._await_from_s

    def _may_wait_at_start(self) -> None:
        """The first exchanges wait longer for neighbours that are alive: news of the start may still be on their way to them."""
        longest_s = self._agreed_start.agreement.grace_s + self.protocol.allowance_s()
        self.protocol.start_by_s = self._now() + min(self._agreed_start.within_s, longest_s)

    async def _give_up(self, why: str) -> NoReturn:
        """End without having trained, and say who was missing."""
        assert self._folder is not None
        self._folder.append_event(event_row(EventKind.NOT_STARTED, self._round, self.me, why))  # whoever catches it logs it
        self._book_the_start()
        summary = finish_summary(
            self.plan,
            engine="daemons",
            rounds=0,
            stop_reason="members_missing",
            x_NP=None,
            metrics={self.me: {}},
            mean_model=None,
            baselines={},
            bytes_sent=0,
            seconds=self._seconds,
            row_by_row=self._population.row_by_row,
            peak_rss_bytes=peak_rss_bytes(),
            departures=[Departure(kind="members_missing", detail=f"{self.me}: {why}")],  # of this start only: a later one waits anew
        )
        self._folder.write_summary(summary)
        await self._say_goodbye("pausing")  # a later start waits anew
        raise MembersMissing(why)

    def _note_links(self) -> None:
        """Tell the agreement on the start which links are up."""
        up = [name for name, now in self.link_reports().items() if now.is_good]
        self._agreed_start.agreement.note_links(up, self._now())

    async def _rounds(self) -> str:
        experiment, protocol = self.plan.experiment, self.protocol
        if protocol.meetings is not None:
            return await self._pairwise.run(self._round)
        while self._round < experiment.last_possible_round and not self._stopping:
            stop_round = protocol.stop_round
            if stop_round is not None and self._round > stop_round:
                break
            if protocol.newest is not None and all(n.left for n in protocol.neighbours.values()):
                self._event(EventKind.ALONE, f"every neighbour has finished: this node stops after {self._round} rounds")
                return "rounds"
            protocol.begin(self._exchange_now, self._now())
            if self._joined:
                await self._keep()  # what is sent now must be what a restart would send again
            local_steps = 0 if self._joined else experiment.local_steps_at(self._round)
            self._joined = False  # before the round's checkpoint: the round after this one is trained, also after a restart
            await self._one_round(local_steps)
        stop_round = protocol.stop_round
        if stop_round is not None and self._round > stop_round:
            if self._round > stop_round + 1:
                self._event(EventKind.STOPPED_LATE, f"the network stopped after round {stop_round}, this node after {self._round - 1}")
            if self._own_test_holds:
                return "converged"
            self._event(
                EventKind.HURRIED,
                f"{self.me}: the network stopped after round {stop_round}, and its own test did not pass in its last round",
            )
            return "rounds"
        return "paused" if self._round < experiment.last_possible_round else "rounds"

    def _surroundings(self) -> Surroundings:
        """What the rounds of nodes that meet in pairs need of this one."""

        def wake() -> None:
            self._wake_senders()
            self._wake.set()

        async def train() -> None:
            self._loss = await self._train(self.plan.experiment.local_steps_at(self._round), self._pair_seconds)

        async def end_round(squared: float | None, norm: float | None, skipped: list[str]) -> None:
            number, self._round = self._round, self._round + 1
            self.protocol.begin(self._exchange_now, self._now())
            await self._evaluate(number, self._pair_seconds)
            self._record(self._row_of(number, self._loss, squared, norm, skipped, self._pair_seconds))
            self._pair_seconds = dict.fromkeys(self._pair_seconds, 0.0)
            self._pairwise.merged = []
            await self._keep()

        return Surroundings(
            now_s=lambda: self._now(),  # noqa: PLW0108  # a test may stop this clock
            is_stopping=lambda: self._stopping,
            event=self._event,
            wait=self._wait,
            wake=wake,
            keep=self._keep,
            train=train,
            end_round=end_round,
        )

    async def _one_round(self, local_steps: int) -> None:
        """Train, exchange, merge, agree, record, keep; or jump, where the neighbours are too far ahead."""
        protocol, number = self.protocol, self._round
        seconds = dict.fromkeys(("train", "wait", "mix", "evaluate"), 0.0)
        if self._phase == 0:
            self._loss = await self._train(local_steps, seconds)
            self._mixing.begin_round()
        while True:
            began_s = self._now()
            outgoing = await asyncio.to_thread(self._population.outgoing, number, self._phase, local_steps=local_steps)
            if not await self._exchange(outgoing):
                return
            seconds["wait"] += self._now() - began_s
            began_s = self._now()
            heard = [received.stop.agreed_for for received in protocol.arrivals().values()]
            self._witness.note_received(protocol.came())
            await self._mixing.merge(outgoing, number, self._phase, local_steps=local_steps)
            seconds["mix"] += self._now() - began_s
            if self._phase == self._algorithm.phases - 1:
                break
            self._phase += 1
            await self._keep()
            protocol.begin(self._exchange_now, self._now())
        seen = self._mixing.statistics
        self._agree(seen, heard)
        self._round, self._phase = number + 1, 0
        await self._evaluate(number, seconds)
        self._record(self._row_of(number, self._loss, seen.squared, seen.norm, sorted(seen.skipped), seconds))
        await self._keep()

    @property
    def _exchange_now(self) -> int:
        return self._round * self._algorithm.phases + self._phase

    async def _train(self, local_steps: int, seconds: dict[str, float]) -> float | None:
        """The round's local steps; their mean loss, None where there are none."""
        if not local_steps or not self._population.trains:
            return None
        began_s = self._now()
        loss = float((await asyncio.to_thread(self._population.train, self._round))[0])
        if self.plan.layout.size_bytes >= TRIM_FROM_BYTES:
            return_freed_memory()  # of gradients, before anything else comes in
        while self._now() < (until_s := began_s + self._timeouts.round_at_least_s) and not self._stopping:
            await self._wait(until_s)
        seconds["train"] = self._now() - began_s
        if self._population.diverged:
            detail = f"round {self._round}: training left the finite numbers and was taken back; lower optimizer.lr or set clip_norm"
            self._event(EventKind.DIVERGED, detail)
        if self._population.without_loss:
            self._event(EventKind.NO_LOSS, f"round {self._round}")
        return loss

    async def _exchange(self, outgoing: Mapping[str, Tensor]) -> bool:
        """Send, and wait for the neighbours. False: there is nothing to merge, because this node has jumped or is to stop."""
        protocol = self.protocol
        if not protocol.is_behind():
            updates, wholes, mark = await asyncio.to_thread(self._mixing.pack, outgoing, self._phase)
            protocol.post(updates, self._now(), wholes=wholes, mark=mark)
            self._witness.note_sent(updates)
            self._wake_senders()
        began_s, say_after_s = self._now(), SAY_AWAITED_S
        while not protocol.is_behind():
            if protocol.is_over(self._now()):
                return True
            if self._stopping or (protocol.stop_round is not None and self._round > protocol.stop_round):
                return False
            if self._now() - began_s >= say_after_s:
                self._say_awaited(self._now() - began_s)
                say_after_s *= 2
            await self._wait(protocol.look_again_s(self._now(), TICK_S))
        self._jump()
        return False

    def _say_awaited(self, seconds: float) -> None:
        """One line that says whom this round waits for, and what is known of them."""
        reports, awaited = self.link_reports(), self.protocol.awaited()
        if not awaited:
            return
        said = []
        for name in awaited:
            heard_s = _seconds_since(self._now(), self.protocol.neighbours[name].last_seen_s, self._transport.link(name).heard_s)
            last = "never heard" if heard_s is None else f"last heard {heard_s:.0f} s ago"
            said.append(f"{name} ({reports[name].detail or last})")
        log.info("round %d: waiting for %.0f s for %s", self._round, seconds, ", ".join(said))

    def _jump(self) -> None:
        """Take the round number from what was heard; the missed rounds are not trained."""
        protocol = self.protocol
        phases = self._algorithm.phases
        target = min(-(-protocol.furthest() // phases), self.plan.experiment.last_possible_round)  # rounds are begun at their beginning
        protocol.jump(target * phases, self._now(), self._left_out(target))
        protocol.agreed_for = 0
        self._own_test_holds = False
        self._mixing.interrupt()
        self._round, self._phase, self._joined = target, 0, True

    def _left_out(self, target: int) -> str:
        """Which rounds a jump to another leaves untrained: that one only mixes."""
        first, last = self._round + 1, min(target, self.plan.experiment.rounds - 1)
        where = f"from round {self._round} to round {target}"
        if first > last:
            return f"{where}; all that were left out only mix"
        return f"{where}; " + (f"round {first} was not trained" if first == last else f"rounds {first} to {last} were not trained")

    def _agree(self, seen: RoundStatistics, heard: list[int]) -> None:
        rule, protocol, squared = self.plan.stop_rule, self.protocol, seen.met
        if rule is None or self._round < self.plan.experiment.rounds:
            return
        passed_N = rule.passes(np.array([squared]), np.array([(seen.norm or 0.0) ** 2]))
        if seen.squared is not None and math.isfinite(squared):  # it is not known yet where nobody came or the graph changes
            self._own_test_holds = bool(passed_N[0])
        passed_N &= not seen.skipped
        agreed_NK = np.array([heard], dtype=np.int64).reshape(1, -1)
        stops_NK = np.full_like(agreed_NK, NEVER)  # the protocol has looked at what was said of stopping
        agreed_N = rule.agreed_for(passed_N, np.array([protocol.agreed_for]), agreed_NK)
        own = NEVER if protocol.stop_round is None else protocol.stop_round
        stop = int(rule.stop_round(self._round, agreed_N, np.array([own]), stops_NK)[0])
        protocol.agree(self._round, int(agreed_N[0]))
        if stop not in (NEVER, protocol.stop_round):
            self._event(EventKind.AGREED, f"to stop after round {stop}")
            protocol.stop_round = stop

    # ---- closing

    async def _close(self, reason: str) -> None:
        """Settle what is open with the neighbours, then say how it went."""
        protocol = self.protocol
        protocol.closing = reason
        protocol.exchange = self._exchange_now
        await self._keep()
        if self._last_row is not None:
            self._tell(self._last_row, closing=True)
        deadline_s = self._now() + self._timeouts.linger_s
        while not protocol.is_settled() and self._now() < deadline_s and not self._stopping:
            unsaid = {name: n.ledger.report() for name, n in protocol.neighbours.items()}
            await self._keep()
            for name, neighbour in protocol.neighbours.items():
                if neighbour.ledger.report() != unsaid[name]:
                    neighbour.queue(protocol.closing_message(neighbour))
            self._wake_senders()
            await self._wait(deadline_s)
        if protocol.lost:
            return  # somebody has to decide first
        self._mixing.compensate(self._round)
        await self._keep()
        if unsettled := protocol.unsettled():
            waited = f"for which it waited {self._timeouts.linger_s:g} s"
            self._event(EventKind.UNACKNOWLEDGED, f"ended without the last word of {', '.join(unsettled)}, {waited}")
        if alone := await asyncio.to_thread(self._rounds_alone):
            spans = ", ".join(f"{first} to {last}" for first, last in alone[:_SPANS]) + (", and others" if len(alone) > _SPANS else "")
            self._event(EventKind.ROUNDS_ALONE, f"rounds {spans} were made without any neighbour")
        await asyncio.to_thread(self._finish, reason)
        self._finished = True
        await self._keep()
        await self._see_the_end()

    async def _see_the_end(self) -> None:
        """Stay until everybody's last record is here and passed on, for a moment: a member that has gone for good will not send one."""
        deadline_s = self._now() + min(self._timeouts.linger_s, LAST_RECORDS_S)
        while self.protocol.is_spreading() and self._now() < deadline_s and not self._stopping:
            await self._wait(deadline_s)
        if self._network_view is None or self._folder is None:
            return
        self._network_view.take_note(self._folder)
        company = self._agreed_start.company or list(self.plan.names)
        if unended := self._network_view.unended(self._round, company, self.protocol.ahead):
            sees_most = self._network_view.sees_most_end(company)
            for name, number in unended.items():
                last = "no round of it was heard of" if number is None else f"last heard of in round {number} of {self._round}"
                if sees_most:
                    self._event(EventKind.GONE, f"{name}: {last}")
                else:  # the others may have ended while this node was away
                    self._event(EventKind.END_UNKNOWN, f"how {name} ended is not known here: {last}")
            self._folder.write_summary({**(read_summary(self._folder.path) or {}), "departures": self._departures()})

    def _rounds_alone(self) -> list[tuple[int, int]]:
        """First and last of training rounds in a row in which no neighbour came, of those that had started; where everybody waits for all.

        One round by itself is no such span: messages are late now and then, and some nodes have one neighbour only.
        """
        schedule, company = self.plan.schedule, self._agreed_start.company
        if not self.protocol.in_step or schedule.period != 1 or schedule.directed or self._folder is None:
            return []
        expected = {name for name in self.protocol.neighbours if company is None or name in company}
        rows = read_run(self._folder.path, experiment=self.plan.experiment.as_dict()).nodes if expected else []
        spans: list[tuple[int, int]] = []
        for number in sorted({row["round"] for row in rows if row["kind"] == "train" and expected <= set(row["skipped"])}):
            if spans and number == spans[-1][1] + 1:
                spans[-1] = (spans[-1][0], number)
            else:
                spans.append((number, number))
        return [(first, last) for first, last in spans if first < last]

    def _departures(self) -> list[dict[str, str]]:
        """As summary.json lists them."""
        assert self._folder is not None
        self._say(*self._throttle.rest(self._now()))
        agreed = self.protocol.closing == "converged"
        found = departures_of_events(self._folder.events(), agreed_from=self.plan.experiment.rounds if agreed else None)
        return departure_rows([*found, *non_finite_models([self.me], self._population.estimate())])

    def _alone(self) -> Population | None:
        """What this site would get without the network."""
        plan = self.plan
        if "local" not in plan.experiment.baselines or not self._population.trains or not plan.experiment.rounds:
            return None
        return trained_alone(plan.task, [plan.sites[self.me]], [self._row], plan.model, plan.recipe)

    def _finish(self, reason: str) -> None:
        assert self._folder is not None
        self._seconds["checkpoint"] = self._seconds.get("checkpoint", 0.0) + self._checkpoint_s
        self._checkpoint_s = 0.0
        population, plan = self._population, self.plan
        self._folder.write_cross_site(at_one_site(plan, population, self.me, self._mixing.release_last_heard(), self._event))
        alone = self._alone()
        write_models(self._folder.path, (self.me,), population.estimate(), plan.layout, population.buffers, frozen=frozen_of(plan.model))
        here = {self.me: alone.evaluate()[0]} if alone is not None else {}
        baselines: dict[str, Any] = baselines_summary(plan, here)[0] if set(plan.sites) != set(plan.names) else {}
        if alone is not None:
            baselines["local"] = by_metric(plan, here)
        self._folder.write_subgroups(subgroups(plan, population, population.estimate(), [self.me]))
        self._folder.write_worth(worth(plan, population, population.estimate(), [self.me], alone))
        self._folder.write_summary(
            finish_summary(
                plan,
                engine="daemons",
                rounds=self._round,
                stop_reason=self._outcome(reason),
                x_NP=None,
                metrics={self.me: population.evaluate()[0]},
                mean_model=None,
                test=test_figures(plan, population, population.estimate(), population.buffers, {self.me: 0}, "this node has one model"),
                baselines=baselines,
                bytes_sent=self._bytes_sent,
                seconds=with_rest(self._seconds, self._earlier_s + time.monotonic() - self._made_s),
                row_by_row=population.row_by_row,
                peak_rss_bytes=peak_rss_bytes(),
                started_without=self._agreed_start.missing,
            )
            | {"departures": self._departures()}
            | self._accepted_rows()
        )

    def _accepted_rows(self) -> dict[str, Any]:
        """The summary's part on differences from the result contract, of all starts."""
        assert self._folder is not None
        noted = [str(event["detail"]) for event in self._folder.events() if event["event"] == EventKind.DIFFERENCE_ACCEPTED]
        noted += [f"{found.kind}: {found.detail}" for found in self._accepted]
        split = (text.partition(": ") for text in dict.fromkeys(noted))
        rows = [{"node": self.me, "kind": kind, "detail": detail} for kind, _, detail in split]
        return {"accepted_differences": rows} if rows else {}

    def _finish_without_result(self, reason: str) -> None:
        """A summary of a run that somebody has to decide on: the models here are not its result."""
        assert self._folder is not None
        summary = finish_summary(
            self.plan,
            engine="daemons",
            rounds=self._round,
            stop_reason=reason,
            x_NP=None,
            metrics={self.me: {}},
            mean_model=None,
            baselines={},
            bytes_sent=self._bytes_sent,
            seconds=self._seconds,
            row_by_row=self._population.row_by_row,
            peak_rss_bytes=peak_rss_bytes(),
            departures=departures_of_events(self._folder.events()),
        )
        self._folder.write_summary(summary | self._accepted_rows())

    async def _say_goodbye(self, reason: str) -> None:
        for neighbour in self.protocol.neighbours.values():
            if neighbour.session.is_open and not neighbour.left:
                neighbour.queue(Goodbye(reason=reason))
        self._wake_senders()
        deadline_s = self._now() + FLUSH_S
        while any(n.outbox for n in self.protocol.neighbours.values()) and self._now() < deadline_s:
            await self._wait(deadline_s)

    # ---- loops

    async def _receive(self) -> None:
        while True:
            received = await self._transport.receive()
            decides = self.protocol.hear(received.peer, received.frames, self._now())
            self._exclude(received.peer)
            if not decides:
                continue
            if self.protocol.lost and not self._stopping:
                self.stop()
            self._wake_senders()
            self._wake.set()

    async def _tick(self) -> None:
        while True:
            if self._round == 0 and self.protocol.closing is None:
                self._note_links()
            self.protocol.tick(self._now())
            self._wake_senders()
            self._count_unreadable()
            self._say(*self._throttle.due(self._now()))
            self._watch_links()
            if self._network_view is not None and self._folder is not None:
                self._witness.look()
                self._network_view.take_note(self._folder)
                for name in self._network_view.begun_again() - self.protocol.neighbours.keys():  # a neighbour says more itself
                    self._event(EventKind.STARTED_ANEW, f"{name}: {WITHOUT_ITS_STATE}, as its records say", name)
            await asyncio.sleep(TICK_S)

    def _count_unreadable(self) -> None:
        """Hold against neighbours what their links did not deliver because it was no message."""
        for name, neighbour in self.protocol.neighbours.items():
            for reason in UNREADABLE:
                count = self._transport.link_counters[name][reason]
                if new := count - self._unreadable[name, reason]:
                    self._unreadable[name, reason] = count
                    neighbour.allowance.refused(reason, self._now(), times=new)
                    self._exclude(name)

    def _exclude(self, name: str) -> None:
        """Disconnect a neighbour that sends too much."""
        if (found := self.protocol.exclusion(name, self._now())) is not None:
            self._transport.disconnect(name, *found)

    def link_reports(self) -> dict[str, LinkReport]:
        """How the link to each neighbour is, and why it is not up."""
        unknown = self._transport.counters["unauthorized"]
        return {
            name: report(neighbour, self._transport.link(name), num_unknown_keys=unknown)
            for name, neighbour in self.protocol.neighbours.items()
        }

    def _watch_links(self) -> None:
        """Say what has changed about a link, or has not for long."""
        for now in self.link_reports().values():
            saying = self._link_watch.look(now, self._now(), is_closing=self.protocol.closing is not None or self._stopping)
            if saying is None:
                continue
            log.log(saying.level, "%s", saying.text)
            if saying.event is not None and self._folder is not None:
                kind, detail = saying.event
                row = {"time": utc_now(), **event_row(kind, self._round, self.me, detail)}
                if (written := self._throttle.offer(kind, now.name, row, self._now(), is_settled=True)) is not None:
                    self._folder.append_event(written)

    async def _send_to(self, neighbour: Neighbour) -> None:
        """Send what lies in one neighbour's outbox. What cannot be sent is dropped: whoever misses it asks for it."""
        while True:
            while neighbour.outbox:
                item = neighbour.outbox.popleft()
                try:
                    if isinstance(item, SendUpdate):
                        await self._send_update(neighbour, item)
                    else:
                        await self._send_short(neighbour, item)
                except TransportError as error:
                    log.debug("to %s: %s", neighbour.name, error)
                neighbour.sending = None
            self._wake.set()
            self._outgoing[neighbour.name].clear()
            if not neighbour.outbox:
                await self._outgoing[neighbour.name].wait()

    async def _send_update(self, neighbour: Neighbour, item: SendUpdate) -> None:
        neighbour.sending = (item.exchange, item.whole)
        if item.whole:
            await asyncio.to_thread(self.protocol.prepare, neighbour.name, item.exchange)

        def is_wanted() -> bool:  # not if the exchange is past, or the neighbour has asked to begin elsewhere
            replaced = neighbour.waiting_update(item.exchange, whole=item.whole) is not None
            # the news in the first message are of use to a neighbour that has gone on without this update, too
            return not replaced and (not begun or self.protocol.is_of_use(item.exchange, neighbour))

        begun = False
        for number, frames in enumerate(self.protocol.frames_of(neighbour, item)):
            while number and (short := neighbour.next_short()) is not None:
                await self._send_short(neighbour, short)
            if not await self._send_patiently(neighbour, frames, is_wanted):
                return
            begun = True
            if not item.again:
                self._bytes_sent += sum(memoryview(frame).nbytes for frame in frames)
        self.protocol.handed_over(neighbour, item)

    async def _send_short(self, neighbour: Neighbour, item: Message | SendRecords | SendReady) -> None:
        if isinstance(item, SendRecords):
            await self._send_records(neighbour)
        elif isinstance(item, SendReady):
            while (ready := self._agreed_start.agreement.take(neighbour.name, self._now())) is not None:
                await self._send_patiently(neighbour, encode(ready), lambda: True)
        else:
            await self._send_patiently(neighbour, encode(item), lambda: True)

    async def _send_patiently(self, neighbour: Neighbour, frames: Sequence[bytes | memoryview], is_wanted: Callable[[], bool]) -> bool:
        """Send one message however slow the link is; False: nobody wants it any more. A link that is down raises TransportError."""
        while is_wanted():
            try:
                await self._transport.send(neighbour.name, frames, LOOK_AGAIN_S)
            except QueueFull:
                continue
            return True
        return False

    async def _send_records(self, neighbour: Neighbour) -> None:
        """All that is new of the network. What is lost with a link is said again when the neighbour's process greets anew."""
        view = self.protocol.view
        while view is not None and (sealed := view.take(neighbour.name, self._now())):
            await self._send_patiently(neighbour, encode(Records(sealed=tuple(sealed))), lambda: True)

    async def _wait(self, deadline_s: float) -> None:
        """Until something was heard or sent, at most until the deadline and never long."""
        self._wake.clear()
        try:
            async with asyncio.timeout(max(0.0, min(deadline_s - self._now(), 1.0))):
                await self._wake.wait()
        except TimeoutError:
            return

    def _wake_senders(self) -> None:
        for name, neighbour in self.protocol.neighbours.items():
            if neighbour.outbox:
                self._outgoing[name].set()

    # ---- records and checkpoints

    async def _evaluate(self, number: int, seconds: dict[str, float]) -> None:
        experiment = self.plan.experiment
        began_s = self._now()
        last = self._round >= experiment.last_possible_round or self.protocol.stop_round == number
        self._metrics_now = None
        if (number + 1) % experiment.evaluate_every == 0 or last:
            self._metrics_now = self._metrics = (await asyncio.to_thread(self._population.evaluate))[0]
        if experiment.save_models_every and (number + 1) % experiment.save_models_every == 0:
            assert self._folder is not None
            await self._written(
                write_models, self._folder.path, (self.me,), self._population.estimate(), self.plan.layout, self._population.buffers, number
            )
        seconds["evaluate"] = self._now() - began_s

    def _row_of(
        self,
        number: int,
        loss: float | None,
        squared: float | None,
        norm: float | None,
        skipped: Sequence[str],
        seconds: dict[str, float],
    ) -> NodeRow:
        seconds["checkpoint"], self._checkpoint_s = self._checkpoint_s, 0.0
        for name, spent in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + spent
        merged = self._pairwise.merged if self.protocol.meetings is not None else None
        if self.protocol.newest is not None:
            ages, arrivals = self.protocol.ages(), self.protocol.arrivals()
            merged = [[name, received.exchange, ages[name]] for name, received in arrivals.items()]
        before, self._recorded_bytes = self._recorded_bytes, self._bytes_sent
        return NodeRow(
            round=number,
            node=self.me,
            kind=kind_of_round(number, self.plan.experiment.rounds),
            loss=loss,
            disagreement=None if squared is None else squared / 2,
            norm=norm,
            skipped=sorted(skipped),
            agreed_for=self.protocol.agreed_for,
            stop_round=self.protocol.stop_round,
            bytes_sent=self._bytes_sent - before,
            seconds=seconds,
            merged=merged,
            metrics=self._metrics_now,
        )

    def _record(self, row: NodeRow) -> None:
        assert self._folder is not None
        self._last_row, self._last_round_time = row, time.time()
        self._folder.append_node(row)
        # this node's own edges bound nothing for the network
        self._folder.append_round(row_of_nodes(None, [row], row.round, row.kind, seconds=row.seconds))
        self._tell(row)
        log.info(
            "round %d: loss %s, disagreement %s, skipped %s",
            row.round,
            "-" if row.loss is None or math.isnan(row.loss) else f"{row.loss:.4f}",
            "unknown" if row.disagreement is None else f"{row.disagreement:.3g}",
            ", ".join(row.skipped) or "nobody",
        )

    def _tell(self, row: NodeRow, *, closing: bool = False) -> None:
        """Tell the network of a round, and write down what has become known of it."""
        if self._network_view is None or self._folder is None:
            return
        if closing:
            self._network_view.say(row, self._now(), closing=True)
        else:
            self._network_view.end_round(row, self._now(), agreed=self._mixing.model_channel is not None)
        self._witness.look()
        self._network_view.take_note(self._folder)
        self.protocol.spread(self._now())
        self._wake_senders()

    async def _keep(self) -> None:
        """Write a checkpoint; only then may it be told what it contains.

        It is written after every exchange, whatever `checkpoint_every` says: the next update tells of this one, and what has been told must
        be there after a crash.
        """
        began_s = self._now()
        ledgers = self.protocol.ledgers()
        tensors = self._population.tensors() if self.protocol.meetings is None else self._pairwise.tensors()
        tensors |= edge_tensors(self.protocol) | self._mixing.tensors()
        story = {
            "round": self._round,
            "phase": self._phase,
            "loss": self._loss,
            "finished": self._finished,
            "started": self._agreed_start.company,
            "joined": self._joined,
            "bytes_sent": self._bytes_sent,
            "seconds": self._seconds,
            "diverged": list(self._population.diverged),
            "protocol": self.protocol.story(),
            "merged": self._pairwise.merged,
            **self._mixing.metadata(),
            "terms": asdict(self._terms),
            "written": time.time(),
        }
        await self._written(write_checkpoint, self._checkpoint, tensors, story)
        self.protocol.checkpointed(ledgers)
        self._checkpoint_s += self._now() - began_s

    async def _written(self, write: Callable[..., object], *arguments: Any) -> None:
        """Write a file; where the disk is full, wait for room. What is not on the disk is not acknowledged, and no further round begins.

        Raises:
            StoreError: the disk failed, or it is full and the node is to stop.
        """
        pause_s = ROOM_AFTER_S
        while True:
            try:
                await asyncio.to_thread(write, *arguments)
                self._flush_rows()
            except DiskFull as error:
                if self._stopping:
                    raise
                if self._disk_full is None:
                    self._disk_full = str(error)
                    self._event(EventKind.DISK_FULL, f"this node waits until there is room: {error}")
                    pause_s = ROOM_AFTER_S
            else:
                break
            until_s = self._now() + pause_s
            while self._now() < until_s and not self._stopping:
                await self._wait(until_s)
            pause_s = min(2 * pause_s, ROOM_AT_MOST_S)
        if self._disk_full is not None:
            self._disk_full = None
            self._event(EventKind.DISK_FREE, "there is room again, and this node goes on")

    def _flush_rows(self) -> None:
        """Write rows that were kept while the disk was full.

        Raises:
            DiskFull: it still is.
        """
        if self._folder is not None:
            self._folder.write_waiting()
            if self._folder.num_waiting:
                raise DiskFull(f"{self._folder.path}: {self._folder.num_waiting} rows wait for room")

    @property
    def _checkpoint(self) -> Path:
        return self.state / CHECKPOINT

    def _note_differences(self) -> None:
        """Put on record what this site has accepted, once."""
        assert self._folder is not None
        noted = {event["detail"] for event in self._folder.events() if event["event"] == EventKind.DIFFERENCE_ACCEPTED}
        for difference in self._accepted:
            if (detail := f"{difference.kind}: {difference.detail}") not in noted:
                self._event(EventKind.DIFFERENCE_ACCEPTED, detail)

    def _open_folder(self) -> None:
        """The node's own run folder, and where it was when it last wrote a checkpoint."""
        self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        place = self.state / "run"
        found = read_checkpoint(self._checkpoint)
        if found is not None and found[1].get("terms") != asdict(self._terms):
            raise ConfigError("holds the checkpoint of another study or model: choose another state folder for this one", str(self.state))
        if found is None and place.exists() and not (place / "experiment.yaml").exists():
            shutil.rmtree(place)  # a start that was killed while it made the folder
        again = place.exists()
        if again:
            self._folder = RunFolder.open(place)
        else:
            experiment, topology = self.plan.experiment.as_dict(), self.plan.graph_record()
            self._folder = RunFolder.create(place, experiment, topology=topology, engine="daemons", member=self.me)
        self._folder.waits_for_room = True
        if self._network_view is not None:
            self._network_view.start(self._folder.began_ms(), again=again or bool(self.protocol.anew))
        with changes_told(self._checkpoint):
            if found is None or not found[1]["finished"]:
                self._folder.truncate(found[1]["round"] if found is not None else 0)
        if found is None:
            self._event(EventKind.STARTED, "")
            return
        with changes_told(self._checkpoint):
            self._restore(*found)
        self._event(EventKind.RESUMED, f"from the checkpoint before round {self._round}")

    def _restore(self, tensors: Mapping[str, Tensor], story: Mapping[str, Any]) -> None:
        """Take up where a checkpoint was written."""
        self._population.restore(tensors)
        self._finished, self._joined = story["finished"], story["joined"]
        # before there was an agreed start a checkpoint was written after the first exchange
        company = story.get("started", list(self.plan.names))
        if company is not None:
            self._agreed_start.start(company, self._now())
            self._may_wait_at_start()
        self._mixing.restore(tensors, story)
        self._population.diverged = tuple(story["diverged"])
        self._round, self._phase = story["round"], story["phase"]
        self._loss = story["loss"]
        self._bytes_sent, self._seconds = story["bytes_sent"], dict(story["seconds"])
        self._earlier_s = math.fsum(self._seconds.values())
        self._recorded_bytes = self._bytes_sent
        self._last_round_time = story["written"] if self._round else None
        restore_edges(self.protocol, self._formats, tensors, story["protocol"], self._checkpoint)
        self.protocol.exchange = self._exchange_now
        if self.protocol.meetings is not None:
            self._pairwise.restore(story["merged"])
        saved = story["protocol"]
        self.protocol.restore_pace(saved["in_step"], saved["recent_s"], self._now() - max(0.0, time.time() - story["written"]))

    def _event(self, kind: str, detail: str, about: str = "") -> None:
        """Log an event and write it down; of one about a neighbour only when its time has come."""
        row = {"time": utc_now(), **event_row(kind, self._round, self.me, detail)}
        written = self._throttle.offer(kind, about, row, self._now()) if about else row
        if written is not None:
            self._say(written)

    def _say(self, *rows: Row) -> None:
        for row in rows:
            kind = kind_of(row)
            level = logging.WARNING if kind is not None and kind.is_alarming else logging.INFO
            log.log(level, "%s %s", row["event"], row["detail"])
            if self._folder is not None:
                self._folder.append_event(row)

    # ---- status

    def records(self) -> Callable[[], dict[str, Any]] | None:
        """What gathers all that this node knows of the run now, by the names of `RunRecords`; None where it takes no part in the view."""
        if self._network_view is None or self._folder is None:
            return None
        return self._network_view.document(self._folder, self._now(), self._paused())

    def _paused(self) -> list[str]:
        """Neighbours that have said that they pause, and are not back."""
        return [name for name, neighbour in self.protocol.neighbours.items() if neighbour.is_paused]

    def memory(self) -> NodeMemory:
        """What this node will need at most."""
        return forecast_node(self.plan, self._population, len(self.protocol.neighbours))

    def is_ready(self) -> bool:
        """Whether it takes part: it waits for members, trains, or answers them; not once it is leaving, or its state went back."""
        return not (self._stopping or self.protocol.lost)

    def status(self) -> dict[str, Any]:
        """What the status endpoint says."""
        protocol, now_s, reports = self.protocol, self._now(), self.link_reports()
        network = {"network": self._network_view.status(now_s, self._paused())} if self._network_view is not None else {}
        return network | {
            "version": p2pfl.__version__,
            "member": self.me,
            "members": len(self.plan.names),
            "waiting_for": self._agreed_start.waiting_for(reports),
            "started_with": self._agreed_start.company,
            "started_without": self._agreed_start.missing,
            "round": self._round,
            "rounds": self.plan.experiment.rounds,
            "exchange": protocol.exchange,
            "stop_round": protocol.stop_round,
            "agreed_for": protocol.agreed_for,
            "closing": protocol.closing,
            "disk_full": self._disk_full,
            "state_lost": "; ".join(protocol.lost.values()) or None,
            "disagreement": self._last_row and self._last_row.disagreement,
            "loss": self._last_row and self._last_row.loss,
            "metrics": self._metrics,
            "bytes_sent": self._bytes_sent,
            "last_round_time": self._last_round_time,
            "refused": dict(protocol.refused),
            "evidence": self._witness.evidence.rounds(),
            "resynchronised": protocol.resynchronised,
            "links": dict(self._transport.counters),
            "neighbours": {
                name: {
                    "link": reports[name].state,
                    "link_detail": reports[name].detail,
                    "link_for_s": round(time.monotonic() - reports[name].since_s, 3),
                    "link_events": dict(self._transport.link_counters[name]),
                    "greeted": n.session.is_open and self._transport.link(name).is_up,
                    "last_seen_s_ago": _seconds_since(now_s, n.last_seen_s, self._transport.link(name).heard_s),
                    "exchange": None if n.heard_exchange < 0 else n.heard_exchange,
                    "skipped": n.missed,
                    "patience": n.patience,
                    "held": n.held,
                    "unconfirmed": n.unconfirmed_s is not None,
                    "left": n.left,
                    "paused": n.is_paused,
                    "state_lost": n.state_lost or None,
                    "dropped": n.allowance.num_dropped,
                    "events_held_back": self._throttle.num_held_back(name),
                    "refused": dict(n.session.counters),
                }
                for name, n in protocol.neighbours.items()
            },
        }

    def _now(self) -> float:
        return time.monotonic()


def _seconds_since(now_s: float, *times_s: float | None) -> float | None:
    """Seconds since the latest of some times, where any is known."""
    known = [then_s for then_s in times_s if then_s is not None]
    return round(max(0.0, now_s - max(known)), 3) if known else None
