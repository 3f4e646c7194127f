"""A node that makes secure sums with its neighbours: `SecureMember` with links, a clock and a disk around it.

One loop does all that decides, one piece after the other: what comes in, ticks of the clock, and the numbers of this site. Long pieces run
in a thread meanwhile: masks of large arrays, and the disk. Each neighbour has a loop that sends, so that a slow one keeps nobody waiting.

Shapes: L limbs of a number, 1 or 2.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Generator, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from p2pfl.errors import BadMessage, ConfigError, P2PFLError, some
from p2pfl.node.sum_done import DoneMembers
from p2pfl.node.sum_outbox import FLUSH_S, SumOutbox
from p2pfl.node.sum_store import SumFolder
from p2pfl.node.workplace import Workplace
from p2pfl.privacy.fixed_point import Limbs
from p2pfl.protocol.led_sums import LedAnalysis
from p2pfl.protocol.secure_member import Outgoing, SecureMember
from p2pfl.protocol.set_consent import SetConsent
from p2pfl.protocol.sum_terms import SumTerms
from p2pfl.statistics.sums import Numbers, Result, Rows, SumRequest
from p2pfl.transports.base import Received, Transport
from p2pfl.wire.secure_messages import LastSignedRequest, Message, Opening, SessionEnd, Total
from p2pfl.wire.sum_link import SumLink, as_bits, from_bits

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_S: Final = 60.0
PRESENCE_S: Final = 1.0
LINGER_S: Final = 60.0
NO_NUMBERS: Final = "gives no numbers to"
OTHER_PLAN: Final = "has another plan of sums"
"""Why a session has ended, after a member's name."""
MOST_SESSIONS_AHEAD: Final = 2**20
"""An opening of a session further ahead than this is no honest one; taking it would use up the numbers."""
REPEAT_AFTER: Final = 3
"""A neighbour is sent all again after so many presences at the earliest, whatever it says to have lost."""
_MOST_WAITING = 64
_WORD_BYTES = 8


class SumSessionEnded(P2PFLError):
    """A session of secure sums has ended before its plan: see to the members that are named, then start again; totals are kept."""

    def __init__(self, reason: str, names: Sequence[str]) -> None:
        self.reason, self.names = reason, tuple(names)
        super().__init__(reason)


class SumNode:
    """One node's sums with the members of a study. A participant that comes back goes on at the first sum without a total.

    Args:
        terms: the plan and who takes part.
        neighbours: of each member in the study's graph, by places in the roster.
        me: place of this node.
        signing: its identity.
        folder: the site's memory of sums, open.
        transport: its links to its neighbours, by their names, closed.
        patience_s: after this time without a word a member is away, and the session ends.
        wait_s: how long this node waits for another session after one has ended, before it gives up.
        linger_s: how long it answers others, at most, when it has all totals itself.
        presence_s: time between two signs of life to each neighbour.
        consents: of members that may be in a smaller atom.
    """

    def __init__(
        self,
        terms: SumTerms,
        neighbours: Sequence[Collection[int]],
        me: int,
        signing: Ed25519PrivateKey,
        folder: SumFolder,
        transport: Transport,
        *,
        patience_s: float = PATIENCE_S,
        wait_s: float = 0.0,
        linger_s: float = LINGER_S,
        presence_s: float = PRESENCE_S,
        consents: Collection[SetConsent] = (),
    ) -> None:
        self.terms, self._me, self._folder, self._transport = terms, me, folder, transport
        self._wait_s, self._linger_s, self._presence_s = wait_s, linger_s, presence_s
        of_others = {each.sum_id for each in folder.sent() if each.plan != terms.plan}  # totals of other plans are not taken for this one's
        kept = {sum_id: total for sum_id, total in folder.totals(terms.study).items() if sum_id not in of_others}
        self.member = SecureMember(terms, neighbours, me, signing, folder, patience_s=patience_s, totals=kept, consents=consents)
        self._kept, self._kept_signed = set(kept), folder.signed(terms.study)
        self._take_up_signed()
        most_bytes = max((math.prod(each.shape) * each.number_format.num_limbs * _WORD_BYTES for each in terms.sums), default=0)
        incarnation = 1 + secrets.randbelow(2**63 - 1)
        self._places = {terms.names[each]: each for each in neighbours[me]}
        self._links = {each: SumLink(incarnation, most_bytes) for each in neighbours[me]}
        self._outbox = SumOutbox(
            transport,
            self._links,
            {place: name for name, place in self._places.items()},
            done=lambda: as_bits(self._done, len(terms.names)),
            repeat_after_s=REPEAT_AFTER * presence_s,
        )
        self._turns: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue(_MOST_WAITING)
        self._news = asyncio.Event()
        self._workplace = Workplace()
        self._done = DoneMembers(neighbours, terms.participants, me, lambda place: transport.link(terms.names[place]).is_up)
        self._know_all: set[int] = set()
        """Neighbours that have said of all members that they need nothing more."""
        self._given: tuple[int, int] | None = None
        """Session and position of the last sum to which this node has given its numbers."""
        self._ended_s: float | None = None
        self._patience_s = patience_s
        self._heard_since_end: set[int] = set()
        self._first_heard_s: dict[int, float] = {}
        """When neighbours were heard for the first time, by their places."""
        self.counters: Counter[str] = Counter()
        """Numbers of messages refused, by reason."""

    @property
    def bytes_sent(self) -> int:
        """Size of all that was handed to links so far."""
        return self._outbox.counters["bytes_sent"]

    # ---- running

    async def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Open the links and the next session, do some work with sums, and stay until all members have what they need.

        Raises:
            SumSessionEnded: the session ended and no other one was opened in time.
            ConfigError: this site may not give its numbers; nothing of them has left.
            StoreError: the disk failed.
        """
        try:
            async with self._transport, asyncio.TaskGroup() as group:
                loops = {f"send to {self.terms.names[each]}": self._outbox.send_to(each) for each in self._links}
                loops |= {"receive": self._receive(), "turns": self._take_turns(), "tick": self._tick()}
                tasks = [group.create_task(loop, name=name) for name, loop in loops.items()]
                try:
                    await self._turn("open", lambda now_s: [*self.member.ask_neighbours(), *self.member.open(now_s)])
                    result = await self._result_of(work)
                except P2PFLError:
                    await self._tell_end()
                    await self._outbox.flush()
                    raise
                await self._outbox.flush()
                for task in tasks:
                    task.cancel()
        except BaseExceptionGroup as found:  # one failure of one task: say that, and not that it was in a group
            first: BaseException = found
            while isinstance(first, BaseExceptionGroup) and first.exceptions:
                first = first.exceptions[0]
            if isinstance(first, P2PFLError):
                raise first from found
            raise
        return result

    async def _result_of(self, work: Callable[[], Awaitable[T]]) -> T:
        try:
            result = await work()
        except ConfigError:
            if self.member.ended is None:  # totals say it, and so all members come to it
                await self._stay()
            raise
        await self._stay()
        return result

    async def analyse(self, analysis: Generator[SumRequest[Rows], Numbers, Result], rows: Rows, *, first: int = 0) -> Result:
        """Run and lead one analysis to its result; every participant does so with its own rows. Raises what `run` raises."""
        return await self.run(lambda: self.lead(analysis, rows, first=first))

    async def relay(self) -> None:
        """Run for others only, as a member that takes no part, until all participants have what they need."""
        if self._me in self.terms.participants:
            raise ValueError("a participant leads an analysis")
        await self.run(self._nothing)

    # ---- what a participant does

    async def lead(self, analysis: Generator[SumRequest[Rows], Numbers, Result], rows: Rows, *, first: int = 0) -> Result:
        """Lead an analysis to its result, inside `run`: sum after sum, from a position of the plan on.

        Raises:
            ConfigError: the analysis asks for what is not planned, or a number is beyond its bound.
            SumSessionEnded: as `run`.
        """
        led = LedAnalysis(analysis, self.terms.sums, first)
        while led.request is not None:
            led.take(await self._total(led.position, led.parameters, partial(led.numbers, rows)))
        (result,) = led.results
        return result

    async def total(self, position: int, parameters: Any, values: NDArray[Any]) -> NDArray[np.float64]:
        """Add numbers over all participants, inside `run`.

        Args:
            position: of the sum in the plan; it only grows.
            parameters: on which the statistic depends beside the rows, the same at all members.
            values: of this site, of the planned shape.

        Returns:
            The total, in the planned shape.
        """
        return self.terms.sums[position].number_format.decode(await self._total(position, parameters, lambda: values))

    async def _total(self, position: int, parameters: Any, values: Callable[[], NDArray[Any]]) -> Limbs:
        sum_id = self.terms.sum_id(position, parameters)
        while sum_id not in self.member.totals:
            self._check_goes_on()
            session = self.member.session
            if session is not None and self.member.is_ready and self._given != (session.number, position):
                own = await self._given_or_left(position, parameters, values)
                values = partial(np.asarray, own)  # they are not computed again
                continue
            await self._wait()
        return self.member.totals[sum_id]

    async def _given_or_left(self, position: int, parameters: Any, values: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Give this site's numbers to a sum, and return them; where that cannot be the session ends."""

        def contribute(now_s: float) -> Outgoing:
            session = self.member.session
            if session is None or not self.member.is_ready:  # it has ended since
                return []
            self._given = session.number, position
            return self.member.contribute(position, parameters, own, now_s)

        try:
            own = await self._workplace.do("numbers", values)
            await self._turn("contribute", contribute)
        except ConfigError:
            name, statistic = self.terms.names[self._me], self.terms.sums[position].statistic
            # why is not said: it could tell something of the numbers
            await self._turn("leave", lambda _: self.member.leave(f"{name}: {NO_NUMBERS} {statistic}"))
            raise
        return own

    def _check_goes_on(self) -> None:
        """Raise a SumSessionEnded where the session has ended and this node has waited long enough for the next one."""
        ended = self.member.ended
        if ended is not None and self._ended_s is not None and self._now_s() - self._ended_s >= self._wait_s:
            names = self.terms.names
            raise SumSessionEnded(ended.reason, [names[each] for each in ended.names if each < len(names)])

    async def _tell_end(self) -> None:
        """Stay for as long as neighbours may not have heard of the end of the session; they would wait for this node."""
        ended, until_s = self.member.ended, self._now_s() + self._patience_s
        while ended is not None and not ended.reason.endswith(": away") and self._now_s() < until_s and self._may_be_news(ended):
            await self._wait()
            if self.member.ended is None:  # somebody has opened another session, into which this node gives nothing
                await self._turn("leave", lambda _: self.member.leave(ended.reason, ended.names))

    def _may_be_news(self, ended: SessionEnd) -> bool:
        """Whether the end may have been lost on the way, or neighbours that have another plan, or have not come, wait for a beginning."""
        now_s, since_s = self._now_s(), [self._ended_s or 0.0]
        if ended.reason.endswith(f": {OTHER_PLAN}"):
            since_s += [self._first_heard_s.get(place, now_s) for place in self._links]
        return now_s - max(since_s) <= (REPEAT_AFTER + 1) * self._presence_s

    async def _stay(self) -> None:
        """Answer others until all members have said that they need nothing more, or this node has stayed long enough."""
        self._done.add_me()
        is_relay, until_s = self._me not in self.terms.participants, self._now_s() + self._linger_s
        self._say_presence()
        if len(self._done) < len(self.terms.names):
            log.info("this node needs nothing more; it stays for %s", self._named_not_done())
        while len(self._done) < len(self.terms.names):
            if is_relay:
                self._check_goes_on()
                if self.member.session is None and self._now_s() >= until_s + max(self._patience_s, self._wait_s):
                    raise SumSessionEnded("no session of sums has been opened; they may be over", ())
            elif self._now_s() >= until_s:
                log.info("%s may still need totals; this node has waited for %g s", self._named_not_done(), self._linger_s)
                return
            await self._wait()
        self._say_presence()
        until_s = self._now_s() + FLUSH_S  # whoever leaves has heard from its neighbours that they know it all as well
        while self._now_s() < until_s and any(self._may_wait_for(place) for place in self._links):
            await self._wait()

    def _may_wait_for(self, place: int) -> bool:
        return place not in self._know_all and self._transport.link(self.terms.names[place]).is_up

    def _named_not_done(self) -> str:
        return some([name for place, name in enumerate(self.terms.names) if place not in self._done])

    async def _nothing(self) -> None:
        pass

    async def _wait(self) -> None:
        """Wait until something has happened, but no longer than between two ticks."""
        self._news.clear()
        try:
            async with asyncio.timeout(self._presence_s):
                await self._news.wait()
        except TimeoutError:
            pass

    # ---- one thing after the other

    async def _turn(self, kind: str, step: Callable[[float], Outgoing]) -> None:
        """Have a step of the member done in its turn, and return, or raise what it raised, when it is done."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def turn() -> None:
            try:
                await self._step(kind, step)
            except ConfigError as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        await self._turns.put(turn)
        await done

    async def _step(self, kind: str, step: Callable[[float], Outgoing]) -> None:
        """Let the member do something, post what it says, and keep what it has learned."""
        for neighbour, message in await self._workplace.do(kind, step, self._now_s()):
            self._outbox.post(neighbour, message)
        for sum_id in [each for each in self.member.totals if each not in self._kept]:
            await self._workplace.do("keep", self._folder.keep_total, self.terms.study, sum_id, self.member.totals[sum_id])
            self._kept.add(sum_id)
        if self.member.ended is None:
            self._ended_s = None
        elif self._ended_s is None:
            log.warning("the session of sums has ended: %s", self.member.ended.reason)
            self._ended_s = self._now_s()
            self._heard_since_end.clear()
        self._news.set()

    async def _take_turns(self) -> None:
        while True:
            await (await self._turns.get())()

    # ---- what comes in

    async def _receive(self) -> None:
        while True:
            received = await self._transport.receive()
            await self._turns.put(partial(self._take, received))

    async def _take(self, received: Received) -> None:
        place = self._places[received.peer]
        link = self._links[place]
        try:
            heard = link.receive(received.frames)
        except BadMessage as error:
            self._refuse(received.peer, error)
            return
        if heard.done is not None:
            self._take_presence(place, heard.done)
        if heard.is_new:
            self._outbox.say_presence(place)  # first of all that is counted for it
            self._outbox.post(place, LastSignedRequest(member=self._me))
        if heard.is_new or heard.has_lost:
            self._outbox.want_repeat(place)
            self._outbox.repeat(self.member.outstanding, self._now_s())
        if heard.message is None:
            return
        message = heard.message
        try:
            self._check_session(message)
            await self._step(type(message).__name__, lambda now_s: self.member.receive(place, message, now_s))
        except BadMessage as error:
            if error.reason == "too_early" or (isinstance(message, Total) and error.reason == "wrong_place"):
                link.note_lost()  # it may be right later: a member that was restarted has not added its children's parts yet
            self._refuse(received.peer, error)
            if error.reason == "wrong_plan" and isinstance(message, Opening):
                await self._end_over_plan(message.member)

    async def _end_over_plan(self, place: int) -> None:
        """End a session that has not begun, since a member has signed another plan: it would wait in vain."""
        session = self.member.session
        if session is not None and session.transcript is None and self._me in self.terms.participants:
            await self._step("leave", lambda _: self.member.leave(f"{self.terms.names[place]}: {OTHER_PLAN}", (place,)))

    def _check_session(self, message: Message) -> None:
        if isinstance(message, Opening) and message.session > self.member.history.last_session() + MOST_SESSIONS_AHEAD:
            raise BadMessage(f"session {message.session}, which is too far ahead", reason="wrong_session")

    def _refuse(self, peer: str, error: BadMessage) -> None:
        self.counters[error.reason] += 1
        times = self.counters[error.reason]
        if times & (times - 1) == 0:  # the first one, the second, the fourth, and so on
            log.warning("a message of %s is refused, the %d. of its kind: %s", peer, times, error)

    def _take_presence(self, place: int, done: bytes) -> None:
        self.member.note_heard(place, self._now_s())
        self._heard_since_end.add(place)
        self._first_heard_s.setdefault(place, self._now_s())
        num, num_before = len(self.terms.names), len(self._done)
        there = from_bits(done, num)
        self._done.hear(place, there)
        if len(there) == num:
            self._know_all.add(place)
        if len(self._done) > num_before:
            self._say_presence()  # so that nobody stays longer than needed
        self._news.set()

    # ---- the clock

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def _tick(self) -> None:
        while True:
            self._say_presence()
            await self._turns.put(self._look)
            await asyncio.sleep(self._presence_s)

    async def _look(self) -> None:
        await self._step("look", self.member.look)
        self._outbox.repeat(self.member.outstanding, self._now_s())
        signed = self.member.history.messages()
        if signed != self._kept_signed:
            await self._workplace.do("keep signed", self._folder.keep_signed, self.terms.study, signed)
            self._kept_signed = signed
        ended = self.member.ended
        if ended is not None and self._is_back(ended):
            await self._step("open", self.member.open)

    def _is_back(self, ended: SessionEnd) -> bool:
        """Whether this node has ended the session because neighbours were away, and all of them have been heard since."""
        is_mine = ended.member == self._me and ended.names and self._me not in ended.names
        return bool(is_mine) and {*ended.names} <= self._heard_since_end and ended.reason.endswith(": away")

    def _take_up_signed(self) -> None:
        history = self.member.history
        for message in self._kept_signed:
            if message.member == self._me and isinstance(message, Opening):
                history.take_own_opening(message, None)
            history.note(message)

    def _say_presence(self) -> None:
        for place in self._links:
            self._outbox.say_presence(place)
