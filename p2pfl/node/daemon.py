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
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

import p2pfl
from p2pfl.algorithms import SlotInbox, over_an_edge
from p2pfl.algorithms.guard import norm_of, refusal_of
from p2pfl.checkpoints import changes_told, read_checkpoint, write_checkpoint
from p2pfl.cross_site import at_one_site, measures_neighbours
from p2pfl.departures import Departure, departure_rows, departures_of_events
from p2pfl.errors import BadMessage, ConfigError, DiskFull, MembersMissing, P2PFLError, QueueFull, StoreError, TransportError
from p2pfl.node.agreed_start import AgreedStart, Signing
from p2pfl.node.allowance import NeighbourAllowance
from p2pfl.node.distance_watch import FAR_UPDATE, DistanceWatch
from p2pfl.node.event_throttle import EXCLUDED, EventThrottle
from p2pfl.node.evidence import EVIDENCE, EvidenceFile
from p2pfl.node.link_watch import LinkReport, LinkWatch, report
from p2pfl.node.memory import NodeMemory, forecast_node
from p2pfl.node.neighbour import Neighbour, SendReady, SendRecords, SendUpdate
from p2pfl.node.network_view import Outlook, ViewTerms
from p2pfl.node.pairwise import PairwiseRounds, Surroundings
from p2pfl.node.protocol import STARTED_ANEW, STATE_LOST, WITHOUT_ITS_STATE, Flow, Protocol
from p2pfl.node.status import LOOPBACK, Asked, serve_status
from p2pfl.node.store import CHECKPOINT, edge_tensors, restore_edges, tensor_over
from p2pfl.params import frozen_of
from p2pfl.plan import Plan
from p2pfl.records import Row, RunFolder, read_run, read_summary, utc_now
from p2pfl.result_contract import Difference
from p2pfl.results import write_models
from p2pfl.stopping import NEVER
from p2pfl.stopwatch import with_rest
from p2pfl.subgroups import subgroups
from p2pfl.summary import baselines_summary, by_metric, disagreement_row, finish_summary, non_finite_models, peak_rss_bytes, test_figures
from p2pfl.topology.links import links_of
from p2pfl.training import Population, trained_alone
from p2pfl.training.freed_memory import return_freed_memory
from p2pfl.transports import UNREADABLE, Transport
from p2pfl.wire.codec import encode
from p2pfl.wire.link import LinkSession, Terms
from p2pfl.wire.messages import NOTHING_SAID, Goodbye, Message, Records
from p2pfl.wire.newest import NewestUpdates
from p2pfl.wire.pace import WINDOW, RoundPace
from p2pfl.wire.update import Arrays, Arrived, Parcel, UpdateFormat, Whole, next_mark
from p2pfl.worth import worth

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

EQUIVOCATION = "equivocation"
"""A member has signed two different updates of one round."""

UPDATE_DIFFERS = "update_differs"
"""A neighbour has sent another update here than it has signed."""

_ALARMING = frozenset({STATE_LOST, STARTED_ANEW, EXCLUDED, FAR_UPDATE, EQUIVOCATION, UPDATE_DIFFERS, "refused", "disk_full"})
"""Kinds of events that somebody should look at."""

DIFFERENCE_ACCEPTED = "difference_accepted"
"""The event that this site differs from the study's result contract and has accepted that."""

T = TypeVar("T")

AHEAD = 8
"""Exchanges that are kept where the graph is directed or changes: a node may be as far ahead of one that it does not wait for as news need
from that one to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How patient a node is."""

    greet_timeout_s: float | None = None
    """How long this node waits for all members before it starts; None: as the experiment's `require.within_s` says."""
    deadline_floor_s: float = 30.0
    """The least time that a neighbour has for a round, counted from when this node has sent its own model."""
    deadline_factor: float = 5.0
    """Or so many times what recent rounds took, where that is more."""
    linger_s: float = 30.0
    """How long a stopped node stays for neighbours that have not settled with it."""
    round_at_least_s: float = 0.0
    """A round's training takes at least so long, for rehearsals with slow nodes."""


@dataclass(slots=True)
class Seen:
    """What the exchanges of one round have shown so far."""

    squared: float | None = None
    """sum_j ||x_i - x_j||**2 over the neighbours that came, of the model's channel; None where no models were compared."""

    met: float = 0.0
    """What the stop rule makes of it."""

    norm: float | None = None
    """||x_i||; None where no model was sent."""

    skipped: set[str] = field(default_factory=set)


class Daemon:
    """One institution's node.

    Args:
        plan: of the study; this node's site is in it.
        me: the member that this node is.
        transport: not yet entered; the daemon opens and closes it.
        study_digest: 64 hexadecimal digits.
        state: the folder for checkpoint, records and result.
        limits: its patience.
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
        limits: Limits,
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
        self._transport, self._limits, self._status_host, self._status_port = transport, limits, status_host, status_port
        self._accepted = accepted_differences
        if start_anew and self._checkpoint.exists():
            raise ConfigError("holds a checkpoint: a node is started anew in an empty folder", str(state))
        self._row, self._population = plan.names.index(me), plan.population([me])
        if plan.recipe.compiled:
            self._population.compile()  # a second, or ten the first time on a machine, that no round should wait for
        self._algorithm = algorithm = plan.recipe.algorithm
        self._encoded = {channel.encodes for channel in algorithm.channels.values() if channel.encodes is not None}
        self._formats = [self._format_of(phase) for phase in range(algorithm.phases)]
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
        self._outlook = Outlook(plan, me, view, study_digest) if view is not None else None
        self._agreed_start = AgreedStart(
            plan, me, signing, study_digest=study_digest, within_s=limits.greet_timeout_s, began_ms=int(1000 * time.time())
        )
        self._model_channel = next((name for name, channel in algorithm.channels.items() if channel.model), None)
        self._taken_in: dict[str, int] = {}
        """By neighbour, the last exchange that was merged since this process began."""
        self._is_broadcast = pace.name != "pairwise" and not any(channel.per_edge for channel in algorithm.channels.values())
        self._sent_digests: list[bytes] = []
        self._came_digests: dict[str, list[bytes]] = {}
        self._evidence = EvidenceFile(state, study_digest)
        self._distances = {name: DistanceWatch() for name in neighbours}
        self.protocol = Protocol(
            me=me,
            neighbours=neighbours,
            links=links_of(plan.schedule, self._row, splits_mass="column stochastic" in algorithm.requires, in_step=in_step),
            newest=NewestUpdates(max_age=pace.max_age) if pace.name == "asynchronous" else None,
            meetings=deque() if pace.name == "pairwise" else None,
            phases=algorithm.phases,
            ahead=ahead,
            num_exchanges=plan.experiment.last_possible_round * algorithm.phases,
            anew=int(1000 * time.time()) if start_anew else 0,
            pace=RoundPace(factor=limits.deadline_factor, floor_s=limits.deadline_floor_s, window=WINDOW),
            event=self._event,
            train_exchanges=plan.experiment.rounds * algorithm.phases,
            earliest_stop=plan.stop_rule.earliest(plan.experiment.rounds) if plan.stop_rule else None,
            view=self._outlook.view if self._outlook is not None else None,
            shared=self._outlook.shared if self._outlook is not None else None,
            start=self._agreed_start.agreement,
            starting_exchanges=algorithm.phases * (self._agreed_start.way + 1),
            num_others=len(plan.names) - 1,
            places={name: plan.names.index(name) for name in neighbours},
            stop_rule=plan.stop_rule if in_step else None,
        )
        if self._outlook is not None:
            self.protocol.prove, self.protocol.waits_for_others = self._outlook.proof, self._outlook.waits_for_others
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
        self._last_row: dict[str, Any] = {}
        self._last_heard: dict[str, Tensor] = {}
        """The neighbours' models of the last round."""
        self._metrics: dict[str, float] = {}
        self._meetings = plan.meetings([me])
        self._sent_P: Tensor | None = None  # the model of the last round, where the graph changes
        self._loss: float | None = None
        self._seen = Seen()
        self._folder: RunFolder | None = None
        self._finished = False
        self._own_test_holds = True
        """Whether the models of the neighbours that came to the last round were as close as the stop rule asks."""
        self._joined = False
        """Whether this node has just jumped: it mixes at once, and trains again from the next round on."""
        self._exact = True
        """Whether every message came; where not, and the algorithm needs them all, it has been said."""
        self._metrics_now: dict[str, float] | None = None
        self._pair_seconds = dict.fromkeys(("train", "wait", "mix", "evaluate"), 0.0)
        self._checkpoint_s = 0.0
        """Seconds spent on checkpoints since the last recorded round: the next row says them."""
        self._to_return: list[tuple[Neighbour, Flow]] = []
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
            self._event(STARTED_ANEW, f"{self.me}: {WITHOUT_ITS_STATE}, as somebody here has agreed to")
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
        self._event("paused", "for a decision: its state went back" if self.protocol.lost else self._stopped_why)
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
            self._event("started_without", f"{', '.join(agreed.missing)}: {len(company)} of {len(self.plan.names)} members were ready")
        else:
            self._event("start_agreed", f"all {len(company)} members are ready")
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
        self._folder.append_event(
            {"round": self._round, "node": self.me, "event": "not_started", "detail": why}
        )  # whoever catches it logs it
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
                self._event("alone", f"every neighbour has finished: this node stops after {self._round} rounds")
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
                self._event("stopped_late", f"the network stopped after round {stop_round}, this node after {self._round - 1}")
            if self._own_test_holds:
                return "converged"
            self._event(
                "hurried", f"{self.me}: the network stopped after round {stop_round}, and its own test did not pass in its last round"
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
            self._seen = Seen(squared=squared, norm=norm, skipped=set(skipped))
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
            self._seen = Seen()
        while True:
            began_s = self._now()
            outgoing = await asyncio.to_thread(self._population.outgoing, number, self._phase, local_steps=local_steps)
            if not await self._exchange(outgoing):
                return
            seconds["wait"] += self._now() - began_s
            began_s = self._now()
            heard = [arrived.stop.agreed_for for arrived in protocol.arrivals().values()]
            await self._merge(outgoing, local_steps)
            seconds["mix"] += self._now() - began_s
            if self._phase == self._algorithm.phases - 1:
                break
            self._phase += 1
            await self._keep()
            protocol.begin(self._exchange_now, self._now())
        seen = self._seen
        self._agree(seen.met, seen.norm or 0.0, heard, skipped=bool(seen.skipped))
        self._round, self._phase = number + 1, 0
        await self._evaluate(number, seconds)
        self._record(self._row_of(number, self._loss, seen.squared, seen.norm, sorted(seen.skipped), seconds))
        await self._keep()

    @property
    def _exchange_now(self) -> int:
        return self._round * self._algorithm.phases + self._phase

    def _format_of(self, phase: int) -> UpdateFormat:
        """Of the updates of a phase; the population is at the start."""
        channels, sent = self._algorithm.channels, self._population.outgoing(0, phase, local_steps=0)
        return UpdateFormat.of(over_an_edge(channels, sent), over_an_edge(channels, sent, whole=True))

    async def _train(self, local_steps: int, seconds: dict[str, float]) -> float | None:
        """The round's local steps; their mean loss, None where there are none."""
        if not local_steps or not self._population.trains:
            return None
        began_s = self._now()
        loss = float((await asyncio.to_thread(self._population.train, self._round))[0])
        if self.plan.layout.size_bytes >= TRIM_FROM_BYTES:
            return_freed_memory()  # of gradients, before anything else comes in
        while self._now() < (until_s := began_s + self._limits.round_at_least_s) and not self._stopping:
            await self._wait(until_s)
        seconds["train"] = self._now() - began_s
        if self._population.diverged:
            detail = f"round {self._round}: training left the finite numbers and was taken back; lower optimizer.lr or set clip_norm"
            self._event("diverged", detail)
        if self._population.without_loss:
            self._event("no_loss", f"round {self._round}")
        return loss

    async def _exchange(self, outgoing: Mapping[str, Tensor]) -> bool:
        """Send, and wait for the neighbours. False: there is nothing to merge, because this node has jumped or is to stop."""
        protocol = self.protocol
        if not protocol.is_behind():
            updates, wholes, mark = await asyncio.to_thread(self._updates, outgoing)
            protocol.post(updates, self._now(), wholes=wholes, mark=mark)
            self._note_sent(updates)
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

    def _note_sent(self, updates: Mapping[str, Parcel]) -> None:
        """Let this round's record say what went to all neighbours alike."""
        if self._phase == 0:
            self._sent_digests = []
        if not self._is_broadcast or self._outlook is None or not updates:
            return
        self._sent_digests.append(next(iter(updates.values())).digest)
        if len(self._sent_digests) == self._algorithm.phases:
            self._outlook.note_sent(self._round, self._sent_digests)

    def _note_came(self, came: Mapping[str, Arrived]) -> None:
        """Hold what came from neighbours against what they sign of it."""
        if not self._is_broadcast or self._outlook is None:
            return
        for name, arrived in came.items():
            number, phase = divmod(arrived.exchange, self._algorithm.phases)
            digests = self._came_digests.setdefault(name, [])
            if phase == 0:
                digests.clear()
            stands_alone = arrived.marks is not None and arrived.marks[0] is None
            if not arrived.digest or stands_alone or len(digests) != phase:
                continue  # it is not what all others got, or not known
            digests.append(arrived.digest)
            if phase == self._algorithm.phases - 1:
                self._outlook.note_came(name, number, digests)

    def _look_for_lies(self) -> None:
        """Keep what proves that a member says different things to different neighbours, and say so."""
        if self._outlook is None:
            return
        for name, found in self._outlook.contradictions():
            if self._evidence.keep(name, found):
                detail = f"{name} has signed two different updates of round {found.round}; both records are kept in {EVIDENCE}"
                self._event(EQUIVOCATION, detail, name)
        for name, number in self._outlook.differing():
            self._event(UPDATE_DIFFERS, f"{name}: what it sent here in round {number} is not the update that it has signed", name)

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

    def _updates(self, outgoing: Mapping[str, Tensor]) -> tuple[dict[str, Parcel], dict[str, Whole], bytes | None]:
        """What goes out now, by receiver; where it continues what was sent before also what it leads to, and the mark of that."""
        protocol, update_format = self.protocol, self._formats[self._phase]
        whole_format = update_format.whole
        parcels = self._to_receivers(outgoing, lambda arrays: update_format.pack(protocol.exchange, arrays))
        if whole_format is None:
            return parcels, {}, None
        after, different = protocol.marks.get(self._phase, NOTHING_SAID), {id(parcel): parcel for parcel in parcels.values()}
        mark = next_mark(after, different.values())
        marked = {key: replace(parcel, marks=(after, mark)) for key, parcel in different.items()}
        wholes = self._to_receivers(outgoing, lambda arrays: Whole(whole_format, protocol.exchange, arrays, mark), whole=True)
        return {to: marked[id(parcel)] for to, parcel in parcels.items()}, wholes, mark

    def _to_receivers(self, outgoing: Mapping[str, Tensor], make: Callable[[Arrays], T], *, whole: bool = False) -> dict[str, T]:
        """Something made of what each receiver is sent; the same for all of them where no channel is per edge."""
        protocol, channels = self.protocol, self._algorithm.channels
        receivers = protocol.now_linked.receivers

        def made(slot: int) -> T:
            return make({name: _array(m) for name, m in over_an_edge(channels, outgoing, whole=whole, slot=slot).items()})

        if any(channels[name].per_edge for name in outgoing):
            return {to: made(k) for k, to in enumerate(protocol.neighbours) if to in receivers}
        return dict.fromkeys(sorted(receivers), made(0))

    async def _merge(self, outgoing: Mapping[str, Tensor], local_steps: int) -> None:
        """Take in what came, and note who was skipped and, of the model's channel, sum_j ||x_i - x_j||**2 over the others."""
        protocol = self.protocol
        admitted, came = protocol.arrivals(), protocol.came()
        self._note_came(came)
        messages = await asyncio.to_thread(self._messages, came, outgoing, local_steps)
        for name, arrived in came.items():
            message = messages[name]
            protocol.hold(
                name, arrived, message if isinstance(message, BadMessage) else {c: message[c] for c in self._encoded & message.keys()}
            )
        taken = {name: message for name, message in messages.items() if not isinstance(message, BadMessage)}
        if self._model_channel is not None and self._is_last_round() and measures_neighbours(self.plan, self._population):
            self._last_heard = {name: m[self._model_channel] for name, m in taken.items() if self._model_channel in m}
        inbox = self._inbox(outgoing, {name: message for name, message in taken.items() if name in admitted})
        before, to_return = self._population.state, list(self._to_return)
        notices = await asyncio.to_thread(self._population.merge, self._round, self._phase, inbox, local_steps=local_steps)
        merged = self._flows(inbox)
        if all(_is_finite(tensor) for tensor in self._population.state.values()):
            protocol.advance()
            self._look_at_distances(inbox, outgoing, came)
            self._taken_in |= {name: came[name].exchange for name in merged}
            for notice in notices:
                log.warning("round %d: %s", self._round, notice.detail)
                self._event(notice.event, f"round {self._round}: {notice.detail}")
        else:
            self._event("overflow", f"round {self._round}: the sum of what came is not finite; nothing of it was taken in")
            self._population.state, protocol.taken_back, merged = before, to_return + protocol.taken_back, {}
        if self._model_channel is not None and self._model_channel in outgoing:
            squared = float(inbox.squared_distances(self._model_channel)[0])
            self._seen.squared = squared if inbox.present_NK.any() else None
            self._seen.norm = float(torch.linalg.vector_norm(outgoing[self._model_channel][0]).double())
            self._seen.met = self._met(squared, outgoing[self._model_channel][0])
        self._seen.skipped.update(protocol.close(merged, self._now()))
        if self._exact and self._seen.skipped and "reliable" in self._algorithm.requires:
            self._exact = False
            rule = f"algorithm {self.plan.experiment.algorithm.name} is exact where every message comes, and is not from here on"
            self._event("inexact", f"round {self._round}: without {', '.join(sorted(self._seen.skipped))}; {rule}")

    def _look_at_distances(self, inbox: SlotInbox, outgoing: Mapping[str, Tensor], came: Mapping[str, Arrived]) -> None:
        """Report models that are suddenly far away, where models can be compared one by one."""
        channel = self._model_channel or next(iter(self._encoded), None)
        if channel is None or channel not in outgoing:
            return
        distances, own_norm = inbox.distances(channel), None
        for slot, name in enumerate(self.protocol.neighbours):
            watch = self._distances[name]
            if slot in distances:
                if self._taken_in.get(name) == came[name].exchange:
                    continue  # the newest one, merged again
                own_norm = norm_of(outgoing[channel]) if own_norm is None else own_norm
                report = watch.look(distances[slot], own_norm, self.protocol.neighbours[name].greetings)
                if report is not None:
                    self._event(FAR_UPDATE, f"{name}: {report}", name)
            elif name in self.protocol.now_linked.weights and name not in came:
                watch.interrupt()

    def _is_last_round(self) -> bool:
        return self._round in (self.protocol.stop_round, self.plan.experiment.last_possible_round - 1)

    def _met(self, squared: float, sent_P: Tensor) -> float:
        """What the stop rule is given: the distances themselves, or where the graph changes what the last rounds say of them."""
        if self._meetings is None:
            return squared
        moved = float(torch.linalg.vector_norm(sent_P - self._sent_P).double()) if self._sent_P is not None else 0.0
        self._sent_P = sent_P.clone()
        return float(self._meetings.bound(np.array([squared]), np.array([moved]))[0])

    def _jump(self) -> None:
        """Take the round number from what was heard; the missed rounds are not trained."""
        protocol = self.protocol
        phases = self._algorithm.phases
        target = min(-(-protocol.furthest() // phases), self.plan.experiment.last_possible_round)  # rounds are begun at their beginning
        protocol.jump(target * phases, self._now(), self._left_out(target))
        protocol.agreed_for = 0
        self._own_test_holds = False
        if self._meetings is not None:
            self._meetings.forget()
        for watch in self._distances.values():
            watch.interrupt()
        self._round, self._phase, self._joined = target, 0, True

    def _left_out(self, target: int) -> str:
        """Which rounds a jump to another leaves untrained: that one only mixes."""
        first, last = self._round + 1, min(target, self.plan.experiment.rounds - 1)
        where = f"from round {self._round} to round {target}"
        if first > last:
            return f"{where}; all that were left out only mix"
        return f"{where}; " + (f"round {first} was not trained" if first == last else f"rounds {first} to {last} were not trained")

    def _messages(
        self, came: Mapping[str, Arrived], outgoing: Mapping[str, Tensor], local_steps: int
    ) -> dict[str, dict[str, Tensor] | BadMessage]:
        """What came as the algorithm sees it: values in place of what encodes them; or why it is refused."""
        channels, ctx = self._algorithm.channels, self._population.context(self._round, local_steps=local_steps)
        values = over_an_edge(channels, outgoing, whole=True)
        messages: dict[str, dict[str, Tensor] | BadMessage] = {}
        if not came:
            return messages
        slots = list(self.protocol.neighbours)
        state, most = self._population.state, self.plan.guard.bound(self._population.state, self._phase, outgoing, ctx)
        for name, arrived in came.items():
            message = {channel: tensor_over(array) for channel, array in arrived.arrays.items()}
            for of in (self._encoded & values.keys()) - message.keys():
                parts = {channel: message.pop(channel)[None] for channel in list(message) if channels[channel].encodes == of}
                before = self.protocol.neighbours[name].values.get(of, torch.zeros_like(values[of]))
                message[of] = self._algorithm.decode(of, before[None], parts, ctx)[0]
            if not all(_is_finite(message[of]) for of in self._encoded & message.keys()):
                messages[name] = BadMessage("an update that leads to NaN or an infinity", reason="not_finite")
                continue
            num_exchanges = max(1, arrived.exchange - self._taken_in.get(name, -1))
            norm = self.plan.guard.norm(state, self._phase, message, ctx, slot=slots.index(name), num_exchanges=num_exchanges)
            messages[name] = refusal_of(norm, most) or message
        return messages

    def _inbox(self, outgoing: Mapping[str, Tensor], messages: Mapping[str, Mapping[str, Tensor]]) -> SlotInbox:
        """What this exchange takes in, in the roster's order."""
        protocol = self.protocol
        links = protocol.now_linked
        return SlotInbox.of_one_row(
            self._algorithm.channels,
            outgoing,
            list(protocol.neighbours),
            messages,
            links.weights if protocol.newest is None else self.plan.weights_by_age(links.weights, protocol.ages()),
            self_weight=links.self_weight,
            dtype=self.plan.layout.dtype,
            returns=self._returns(outgoing),
            flows={},
            # what came is this exchange's alone, but for the newest updates, which are merged again, and for the models of the last round
            writes_over=self._algorithm.reads_once and protocol.newest is None and not self._last_heard,
        )

    def _flows(self, inbox: SlotInbox) -> dict[str, Flow]:
        """What came in over each edge."""
        assert inbox.flows is not None
        present = [(k, name) for k, name in enumerate(self.protocol.neighbours) if inbox.present_NK[0, k]]
        return {name: Flow(exchange=self.protocol.exchange, amounts=inbox.flows.get((0, k), {})) for k, name in present}

    def _returns(self, outgoing: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The negatives of the flows that were not matched, once, each in the phase whose channels it is of."""
        taken_back = self.protocol.taken_back
        self._to_return = [(n, unmatched) for n, unmatched in taken_back if unmatched.amounts.keys() & outgoing.keys()]
        self.protocol.taken_back = [(n, unmatched) for n, unmatched in taken_back if not unmatched.amounts.keys() & outgoing.keys()]
        returns: dict[str, Tensor] = {}
        for _, unmatched in self._to_return:
            for name, amount in unmatched.amounts.items():
                returns[name] = returns[name] - amount[None] if name in returns else -amount[None]
        return returns

    def _agree(self, squared: float, norm: float, heard: list[int], *, skipped: bool) -> None:
        rule, protocol = self.plan.stop_rule, self.protocol
        if rule is None or self._round < self.plan.experiment.rounds:
            return
        passed_N = rule.passes(np.array([squared]), np.array([norm**2]))
        if self._seen.squared is not None and math.isfinite(squared):  # it is not known yet where nobody came or the graph changes
            self._own_test_holds = bool(passed_N[0])
        passed_N &= not skipped
        agreed_NK = np.array([heard], dtype=np.int64).reshape(1, -1)
        stops_NK = np.full_like(agreed_NK, NEVER)  # the protocol has looked at what was said of stopping
        agreed_N = rule.agreed_for(passed_N, np.array([protocol.agreed_for]), agreed_NK)
        own = NEVER if protocol.stop_round is None else protocol.stop_round
        stop = int(rule.stop_round(self._round, agreed_N, np.array([own]), stops_NK)[0])
        protocol.agree(self._round, int(agreed_N[0]))
        if stop not in (NEVER, protocol.stop_round):
            self._event("agreed", f"to stop after round {stop}")
            protocol.stop_round = stop

    # ---- closing

    async def _close(self, reason: str) -> None:
        """Settle what is open with the neighbours, then say how it went."""
        protocol = self.protocol
        protocol.closing = reason
        protocol.exchange = self._exchange_now
        await self._keep()
        if "round" in self._last_row:
            self._tell(self._last_row, closing=True)
        deadline_s = self._now() + self._limits.linger_s
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
        for phase in range(self._algorithm.phases if protocol.taken_back else 0):
            sent = self._population.outgoing(self._round, phase, local_steps=0)
            inbox = SlotInbox(
                channels=self.plan.recipe.algorithm.channels,
                sent=sent,
                weights_NK=torch.zeros(1, len(protocol.neighbours), dtype=self.plan.layout.dtype),
                present_NK=torch.zeros(1, len(protocol.neighbours), dtype=torch.bool),
                slot=_no_message,
                returns=self._returns(sent),
            )
            self._population.merge(self._round, phase, inbox, local_steps=0)
        await self._keep()
        if unsettled := protocol.unsettled():
            waited = f"for which it waited {self._limits.linger_s:g} s"
            self._event("unsettled", f"ended without the last word of {', '.join(unsettled)}, {waited}")
        if alone := await asyncio.to_thread(self._rounds_alone):
            spans = ", ".join(f"{first} to {last}" for first, last in alone[:_SPANS]) + (", and others" if len(alone) > _SPANS else "")
            self._event("rounds_alone", f"rounds {spans} were made without any neighbour")
        await asyncio.to_thread(self._finish, reason)
        self._finished = True
        await self._keep()
        await self._see_the_end()

    async def _see_the_end(self) -> None:
        """Stay until everybody's last record is here and passed on, for a moment: a member that has gone for good will not send one."""
        deadline_s = self._now() + min(self._limits.linger_s, LAST_RECORDS_S)
        while self.protocol.is_spreading() and self._now() < deadline_s and not self._stopping:
            await self._wait(deadline_s)
        if self._outlook is None or self._folder is None:
            return
        self._outlook.take_note(self._folder)
        company = self._agreed_start.company or list(self.plan.names)
        if unended := self._outlook.unended(self._round, company, self.protocol.ahead):
            sees_most = self._outlook.sees_most_end(company)
            for name, number in unended.items():
                last = "no round of it was heard of" if number is None else f"last heard of in round {number} of {self._round}"
                if sees_most:
                    self._event("gone", f"{name}: {last}")
                else:  # the others may have ended while this node was away
                    self._event("end_unknown", f"how {name} ended is not known here: {last}")
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
        self._folder.write_cross_site(at_one_site(plan, population, self.me, self._last_heard, self._event))
        self._last_heard = {}  # models: the baseline needs the room
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
        noted = [str(event["detail"]) for event in self._folder.events() if event["event"] == DIFFERENCE_ACCEPTED]
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
            if self._outlook is not None and self._folder is not None:
                self._look_for_lies()
                self._outlook.take_note(self._folder)
                for name in self._outlook.begun_again() - self.protocol.neighbours.keys():  # a neighbour says more itself
                    self._event(STARTED_ANEW, f"{name}: {WITHOUT_ITS_STATE}, as its records say", name)
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
                row: Row = {"time": utc_now(), "round": self._round, "node": self.me, "event": kind, "detail": detail}
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
    ) -> dict[str, Any]:
        seconds["checkpoint"], self._checkpoint_s = self._checkpoint_s, 0.0
        for name, spent in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + spent
        row = {
            "round": number,
            "node": self.me,
            "kind": "train" if number < self.plan.experiment.rounds else "settle",
            "loss": loss,
            "disagreement": None if squared is None else squared / 2,
            "norm": norm,
            "skipped": sorted(skipped),
            "agreed_for": self.protocol.agreed_for,
            "stop_round": self.protocol.stop_round,
            "bytes_sent": self._bytes_sent,
            "seconds": seconds,
        }
        if self.protocol.meetings is not None:
            row["merged"] = self._pairwise.merged
        if self.protocol.newest is not None:
            ages, arrivals = self.protocol.ages(), self.protocol.arrivals()
            row["merged"] = [[name, arrived.exchange, ages[name]] for name, arrived in arrivals.items()]
        if self._metrics_now is not None:
            row["metrics"] = self._metrics_now
        return row

    def _record(self, row: dict[str, Any]) -> None:
        assert self._folder is not None
        before = self._last_row.get("total_bytes", 0)
        alone = {**row, "bytes_sent": row["bytes_sent"] - before}
        self._last_row = {**alone, "total_bytes": row["bytes_sent"]}
        self._last_round_time = time.time()
        self._folder.append_node(alone)
        self._folder.append_round(self._own_view(alone))
        self._tell(alone)
        log.info(
            "round %d: loss %s, disagreement %s, skipped %s",
            row["round"],
            "-" if row["loss"] is None or math.isnan(row["loss"]) else f"{row['loss']:.4f}",
            "unknown" if row["disagreement"] is None else f"{row['disagreement']:.3g}",
            ", ".join(row["skipped"]) or "nobody",
        )

    def _tell(self, row: Mapping[str, Any], *, closing: bool = False) -> None:
        """Tell the network of a round, and write down what has become known of it."""
        if self._outlook is None or self._folder is None:
            return
        if closing:
            self._outlook.say(row, self._now(), closing=True)
        else:
            self._outlook.end_round(row, self._now(), agreed=self._model_channel is not None)
        self._look_for_lies()
        self._outlook.take_note(self._folder)
        self.protocol.spread(self._now())
        self._wake_senders()

    def _own_view(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The round as far as this node sees it: its own edges, which bound nothing for the network."""
        squared_norm = None if row["norm"] is None else row["norm"] ** 2
        seen = disagreement_row(self.plan, row["round"], row["kind"], [row["loss"]], row["disagreement"], squared_norm, exact=None)
        seen |= {"bound_low": None, "bound_high": None, "nodes": 1, "bytes_sent": row["bytes_sent"]}
        return seen | {"skipped": len(row["skipped"]), "seconds": row["seconds"]}

    async def _keep(self) -> None:
        """Write a checkpoint; only then may it be told what it contains.

        It is written after every exchange, whatever `checkpoint_every` says: the next update tells of this one, and what has been told must
        be there after a crash.
        """
        began_s = self._now()
        ledgers = self.protocol.ledgers()
        tensors = self._population.tensors() if self.protocol.meetings is None else self._pairwise.tensors()
        tensors |= edge_tensors(self.protocol)
        if self._sent_P is not None:
            tensors["last_sent"] = self._sent_P
        story = {
            "round": self._round,
            "phase": self._phase,
            "loss": self._loss,
            "meetings": self._meetings.story() if self._meetings else None,
            "seen": {
                "squared": self._seen.squared,
                "met": self._seen.met,
                "norm": self._seen.norm,
                "skipped": sorted(self._seen.skipped),
            },
            "finished": self._finished,
            "started": self._agreed_start.company,
            "joined": self._joined,
            "bytes_sent": self._bytes_sent,
            "seconds": self._seconds,
            "diverged": list(self._population.diverged),
            "protocol": self.protocol.story(),
            "merged": self._pairwise.merged,
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
                    self._event("disk_full", f"this node waits until there is room: {error}")
                    pause_s = ROOM_AFTER_S
            else:
                break
            until_s = self._now() + pause_s
            while self._now() < until_s and not self._stopping:
                await self._wait(until_s)
            pause_s = min(2 * pause_s, ROOM_AT_MOST_S)
        if self._disk_full is not None:
            self._disk_full = None
            self._event("disk_free", "there is room again, and this node goes on")

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
        noted = {event["detail"] for event in self._folder.events() if event["event"] == DIFFERENCE_ACCEPTED}
        for difference in self._accepted:
            if (detail := f"{difference.kind}: {difference.detail}") not in noted:
                self._event(DIFFERENCE_ACCEPTED, detail)

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
        if self._outlook is not None:
            self._outlook.start(self._folder.began(), again=again or bool(self.protocol.anew))
        with changes_told(self._checkpoint):
            if found is None or not found[1]["finished"]:
                self._folder.truncate(found[1]["round"] if found is not None else 0)
        if found is None:
            self._event("started", "")
            return
        with changes_told(self._checkpoint):
            self._restore(*found)
        self._event("resumed", f"from the checkpoint before round {self._round}")

    def _restore(self, tensors: Mapping[str, Tensor], story: Mapping[str, Any]) -> None:
        """Take up where a checkpoint was written."""
        self._population.restore(tensors)
        self._finished, self._joined = story["finished"], story["joined"]
        # before there was an agreed start a checkpoint was written after the first exchange
        company = story.get("started", list(self.plan.names))
        if company is not None:
            self._agreed_start.start(company, self._now())
            self._may_wait_at_start()
        if self._meetings is not None:
            self._meetings.restore(story["meetings"])
            self._sent_P = tensors.get("last_sent")
        self._population.diverged = tuple(story["diverged"])
        self._round, self._phase = story["round"], story["phase"]
        self._loss, self._seen = story["loss"], Seen(**{**story["seen"], "skipped": set(story["seen"]["skipped"])})
        self._bytes_sent, self._seconds = story["bytes_sent"], dict(story["seconds"])
        self._earlier_s = math.fsum(self._seconds.values())
        self._last_row = {"total_bytes": self._bytes_sent}
        self._last_round_time = story["written"] if self._round else None
        restore_edges(self.protocol, self._formats, tensors, story["protocol"], self._checkpoint)
        self.protocol.exchange = self._exchange_now
        if self.protocol.meetings is not None:
            self._pairwise.restore(story["merged"])
        saved = story["protocol"]
        self.protocol.restore_pace(saved["in_step"], saved["recent_s"], self._now() - max(0.0, time.time() - story["written"]))

    def _event(self, kind: str, detail: str, about: str = "") -> None:
        """Log an event and write it down; of one about a neighbour only when its time has come."""
        row: Row = {"time": utc_now(), "round": self._round, "node": self.me, "event": kind, "detail": detail}
        written = self._throttle.offer(kind, about, row, self._now()) if about else row
        if written is not None:
            self._say(written)

    def _say(self, *rows: Row) -> None:
        for row in rows:
            log.log(logging.WARNING if row["event"] in _ALARMING else logging.INFO, "%s %s", row["event"], row["detail"])
            if self._folder is not None:
                self._folder.append_event(row)

    # ---- status

    def records(self) -> Callable[[], dict[str, Any]] | None:
        """What gathers all that this node knows of the run now, by the names of `RunRecords`; None where it takes no part in the view."""
        if self._outlook is None or self._folder is None:
            return None
        return self._outlook.document(self._folder, self._now(), self._paused())

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
        network = {"network": self._outlook.status(now_s, self._paused())} if self._outlook is not None else {}
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
            "disagreement": self._last_row.get("disagreement"),
            "loss": self._last_row.get("loss"),
            "metrics": self._metrics,
            "bytes_sent": self._bytes_sent,
            "last_round_time": self._last_round_time,
            "refused": dict(protocol.refused),
            "evidence": self._evidence.rounds(),
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


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy()


def _is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite; they are not looked at one by one where their sum says so."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _no_message(channel: str, k: int, rows: Tensor | None) -> Tensor:
    raise StoreError(f"no message of channel {channel} in slot {k} for rows {rows}")
