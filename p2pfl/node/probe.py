"""Probe of a running node: greet it as a member, send one message of each kind, and note what it takes and what it refuses.

The node says little of what it refuses: only a Hello is answered by Goodbye with the reason. So each message is followed by a question
that every node answers over an open link; and where the node's own state folder can be read, its counters tell the reason. A heartbeat
that comes by itself looks like that answer. So a numbered question follows, where the node knows it: its answer ends the wait.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from p2pfl.errors import PeerError, TransportError
from p2pfl.node.probe_messages import FARTHEST, Attempt, Standing, faulty_attempts, harmless_attempts
from p2pfl.transports import Transport
from p2pfl.wire.codec import decode, encode
from p2pfl.wire.link import LinkSession
from p2pfl.wire.messages import DoctorAnswer, DoctorQuestion, Goodbye, Hello, Message, News, Ready, Records, Remembered, ResendRequest
from p2pfl.wire.negotiation import announcing

LINK_S = 20.0
"""How long the link may take to come up."""
HANDSHAKE_S = 10.0
ANSWER_S = 3.0
"""How long the answer to one message may take."""
HELLO_EVERY_S = 0.5

_LIFE = frozenset({"Heartbeat", "Closing", "Goodbye"})
"""Kinds of messages of which a node sends one in answer to a request for an update that is over."""

Counts = Callable[[], Mapping[str, int]]
"""Reads how often the node has refused messages of this member, by reason."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One message of a probe, and what became of it."""

    message: str
    outcome: str
    """ "taken": nothing speaks against it; "refused"; "left alone": dropped for a reason without fault; "not sent"; "no answer"."""
    reason: str | None = None
    """As the node gave or counted it; None: it did not say."""
    answers: tuple[str, ...] = ()
    detail: str = ""
    as_expected: bool = True

    def as_row(self) -> dict[str, Any]:
        """The finding for JSON."""
        return {**asdict(self), "answers": list(self.answers)}


@dataclass(kw_only=True)
class NodeStatements:
    """Everything that a node has said to a probe."""

    exchange: int = 0
    records: list[bytes] = field(default_factory=list)
    ready: list[bytes] = field(default_factory=list)
    goodbye: str | None = None
    """Reason of its last Goodbye since the last Hello."""
    hello: Hello | None = None
    fault: str | None = None
    """Reason why its own Hello is refused here."""

    def forget_refusals(self) -> None:
        """Look only at what comes from now on."""
        self.goodbye = self.fault = None


class Probe:
    """One conversation with one node in a member's name.

    Args:
        session: this end of the link; its incarnation is new.
        standing: the member's state, before anything was heard of the node.
        remembered: what the member remembers of the node.
        counts: reads the node's own counters; None: they cannot be read.
        without_link: what to check where no link comes up.
    """

    def __init__(
        self,
        transport: Transport,
        session: LinkSession,
        standing: Standing,
        *,
        anew: int,
        remembered: Remembered,
        counts: Counts | None = None,
        without_link: str = "",
    ) -> None:
        self._transport, self._session, self._standing, self._peer = transport, session, standing, session.peer
        self._anew, self._remembered, self._counts = anew, remembered, counts
        self._without_link = without_link
        self.heard = NodeStatements()
        self._came: asyncio.Queue[Message] = asyncio.Queue()
        self._has_left = False
        self._asked = 1_000_000
        """Number of the last question; far from those of the attempts."""

    async def run(self, *, faulty: bool) -> list[Finding]:
        """Greet the node, try all messages, and say Goodbye as a member that pauses.

        Raises:
            TransportError: there was no link in time.
        """
        async with self._transport, asyncio.TaskGroup() as group:
            reading = group.create_task(self._read(), name="reads what the node says")
            try:
                await self._connect()
                findings = [await self._handshake()]
                if self._session.is_open:
                    findings += [await self._try(attempt) for attempt in harmless_attempts(self._now)]
                    if faulty:
                        findings += [await self._try(attempt) for attempt in faulty_attempts(self._now(), self._hello())]
                    findings.append(await self._leave())
            finally:
                reading.cancel()
        return findings

    def _now(self) -> Standing:
        return Standing(
            **{name: getattr(self._standing, name) for name in ("ledger", "exchange", "stop", "formats", "sent")},
            their_exchange=self.heard.exchange,
            records=self.heard.records,
            ready=self.heard.ready,
        )

    def _hello(self) -> Hello:
        of = self._standing
        return self._session.hello(
            exchange=of.exchange, report=of.ledger.report(), stop=of.stop, anew=self._anew, remembered=self._remembered
        )

    # ---- what the node says

    async def _read(self) -> None:
        while True:
            received = await self._transport.receive()
            try:
                message = decode(received.frames)[0]
                if isinstance(message, Goodbye):
                    self.heard.goodbye = message.reason
                if isinstance(message, Hello):
                    self.heard.hello = message
                heard = self._session.receive(received.frames, exchange=FARTHEST)  # no update of it is kept here
                if heard.needs_answer and not self._has_left:
                    await self._send(encode(self._hello()))
            except PeerError as error:
                self.heard.fault = str(error)
                continue
            if isinstance(message, News):
                self.heard.exchange = max(self.heard.exchange, message.exchange)
            if isinstance(message, Records):
                self.heard.records += [sealed for sealed in message.sealed if sealed not in self.heard.records]
            if isinstance(message, Ready):
                self.heard.ready += [sealed for sealed in message.sealed if sealed not in self.heard.ready]
            self._came.put_nowait(message)

    async def _send(self, frames: Any) -> None:
        await self._transport.send(self._peer, frames, ANSWER_S)

    # ---- the steps

    async def _connect(self) -> None:
        until_s = time.monotonic() + LINK_S
        while not self._transport.link(self._peer).is_up:
            if time.monotonic() > until_s:
                link = self._transport.link(self._peer)
                why = f"{link.state}: {link.detail}" if link.detail else str(link.state)
                if strangers := self._transport.counters["unauthorized"]:
                    why += f"; {strangers} connections with a key that is no neighbour's were refused"
                raise TransportError("; ".join(filter(None, (f"no link to {self._peer} within {LINK_S:g} s: {why}", self._without_link))))
            await asyncio.sleep(0.02)

    async def _handshake(self) -> Finding:
        before = self._refusals()
        until_s = time.monotonic() + HANDSHAKE_S
        self.heard.forget_refusals()
        while not self._session.is_open and self.heard.goodbye is None and time.monotonic() < until_s:
            await self._send(encode(self._hello()))
            await self._until(lambda: self._session.is_open or self.heard.goodbye, HELLO_EVERY_S)
        if self._session.is_open:
            theirs = f"{self._peer} is at exchange {self.heard.exchange}"
            return Finding(message="Hello", outcome="taken", answers=("Hello",), detail=theirs)
        if self.heard.goodbye is not None:
            await self._until(lambda: self.heard.fault, HELLO_EVERY_S)  # its own Hello shows what it holds
            return Finding(
                message="Hello",
                outcome="refused",
                reason=self.heard.goodbye,
                answers=("Goodbye",),
                detail=self._differs(),
                as_expected=False,
            )
        if self.heard.fault is not None:
            return Finding(message="Hello", outcome="no answer", detail=f"its own Hello: {self.heard.fault}", as_expected=False)
        counted = self._new_refusals(before)
        return Finding(
            message="Hello", outcome="no answer", reason=counted, detail=f"nothing came within {HANDSHAKE_S:g} s", as_expected=False
        )

    def _differs(self) -> str:
        """Compare what this member holds with what the node holds, by their Hellos."""
        if self.heard.hello is None:
            return "the node has not said what it holds"
        mine, theirs = self._hello(), self.heard.hello
        found = [
            f"{name}: {getattr(mine, name).hex()[:16]}… here, {getattr(theirs, name).hex()[:16]}… there"
            for name in ("study", "layout", "start")
            if getattr(mine, name) != getattr(theirs, name)
        ]
        if self.heard.goodbye == "state_lost":
            found.append(f"the node remembers this member at {theirs.remembered}")
        return "; ".join(found)

    async def _try(self, attempt: Attempt) -> Finding:
        """Send one message, ask whether the link is still open, and conclude."""
        if not attempt.frames:
            return Finding(message=attempt.name, outcome="not sent", detail=attempt.why_not)
        before = self._refusals()
        self._drain()
        self.heard.forget_refusals()
        await self._send(attempt.frames)
        await self._send(encode(ResendRequest(exchange=FARTHEST, whole=False, lost=False, offset=0, digest=None)))
        if self._session.understands(DoctorQuestion):
            self._asked += 1
            await self._send(encode(DoctorQuestion(number=self._asked, pad=b"")))
        answers = await self._answers()
        if attempt.refused_as and self._counts is not None and not self._session.understands(DoctorQuestion):
            # an older node may have spoken before it read the message
            await self._until(lambda: self.heard.goodbye or self._new_refusals(before, attempt.refused_as) in attempt.refused_as, ANSWER_S)
        reason = self.heard.goodbye or self._new_refusals(before, attempt.refused_as)
        found = self._finding(attempt, answers, reason)
        if attempt.ends_link:
            self._session.refuse()
            await self._handshake()
        return found

    def _finding(self, attempt: Attempt, answers: tuple[str, ...], reason: str | None) -> Finding:
        shown = tuple(dict.fromkeys(name for name in answers if name in attempt.answered_by or name == "Goodbye"))
        is_answered = bool(_LIFE & set(answers))
        knows = self._counts is not None or self.heard.goodbye is not None
        if reason is not None:
            outcome = "left alone" if reason in attempt.may_be else "refused"
            is_right = reason in attempt.may_be or reason in attempt.refused_as
            return Finding(message=attempt.name, outcome=outcome, reason=reason, answers=shown, as_expected=is_right)
        if not is_answered:
            detail = "the question after it was not answered: the link is not open any more"
            return Finding(message=attempt.name, outcome="no answer", detail=detail, answers=shown, as_expected=False)
        if attempt.refused_as:
            named = " or ".join(sorted(attempt.refused_as))
            if knows:
                detail = f"expected {named}, and nothing was counted"
                return Finding(message=attempt.name, outcome="taken", detail=detail, answers=shown, as_expected=False)
            return Finding(
                message=attempt.name, outcome="unknown", detail=f"to be refused as {named}; the node does not say", answers=shown
            )
        return Finding(message=attempt.name, outcome="taken", answers=shown)

    async def _leave(self) -> Finding:
        self._has_left = True  # a Hello after it would take it back
        await self._send(encode(Goodbye(reason="pausing")))
        await asyncio.sleep(HELLO_EVERY_S)  # a connection that ends at once may lose it
        return Finding(message="Goodbye", outcome="taken", detail="pausing: the node waits for the member as for one that is restarted")

    # ---- waiting

    async def _answers(self) -> tuple[str, ...]:
        """Kinds of messages that come until the questions are answered."""
        found: list[str] = []
        until_s = time.monotonic() + ANSWER_S
        is_last = not self._session.understands(DoctorQuestion)
        while not (is_last and _LIFE & set(found)):
            try:
                async with asyncio.timeout(max(0.0, until_s - time.monotonic())):
                    message = await self._came.get()
            except TimeoutError:
                break
            found.append(type(message).__name__)
            is_last = is_last or (isinstance(message, DoctorAnswer) and message.number == self._asked)
        return tuple(found)

    def _drain(self) -> None:
        while not self._came.empty():
            self._came.get_nowait()

    async def _until(self, condition: Callable[[], object], within_s: float) -> None:
        until_s = time.monotonic() + within_s
        while not condition() and time.monotonic() < until_s:  # noqa: ASYNC110  # what the reader notes, not an event
            await asyncio.sleep(0.02)

    def _refusals(self) -> Counter[str]:
        return Counter(self._counts()) if self._counts is not None else Counter()

    def _new_refusals(self, before: Counter[str], expected: Collection[str] = ()) -> str | None:
        """The reason that the node has counted since, an expected one first; not that for messages of the process before."""
        new = self._refusals() - before
        new.pop("not_greeted", None)
        return min(new, key=lambda reason: (reason not in expected, reason), default=None)


def new_incarnation() -> int:
    """Draw a number for a process, as a Hello bears it; it announces the newest schema."""
    return announcing(secrets.randbits(64))
