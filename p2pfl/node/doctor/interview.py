"""Questions to a neighbour over one edge, and what their answers show: round trip, clock, capacity, and what it holds."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from p2pfl.errors import TransportError
from p2pfl.transports import LinkCondition
from p2pfl.wire.messages import MAX_LARGE_BYTES, DoctorAnswer, DoctorQuestion, Hello

PINGS, PING_WITHIN_S = 5, 3.0
UNANSWERED = 2
"""So many first questions go without an answer before a neighbour counts as one that gives none."""
LARGE_WITHIN_S = 6.0
LATE_PINGS, LATE_PING_EVERY_S = 10, 0.1
"""Further questions to a neighbour that has not yet computed its forward pass."""
AT_ONCE, MOST_LARGE, LONG_ENOUGH_S = 16, 48, 0.3
"""Large questions on their way at once, and in all; fewer where they take so long."""

_MEASURED = ("schema", "round_trip_s", "clock_ahead_s", "mbit_s", "loses_large")
_DIGESTS = ("study", "layout", "start", "forward")


@dataclass(kw_only=True)
class EdgeMeasurement:
    """Findings on one edge as this end sees it; None where something is unknown."""

    peer: str
    is_dialled: bool
    """Whether this site dials; else the neighbour does."""
    condition: LinkCondition = LinkCondition.CLOSED
    detail: str = ""
    hello: Hello | None = None
    """The greeting of the neighbour's node."""
    schema: int | None = None
    """The newest that both ends speak."""
    answer: DoctorAnswer | None = None
    round_trip_s: float | None = None
    clock_ahead_s: float | None = None
    """How far the neighbour's clock is ahead of this one, to half a round trip."""
    mbit_s: float | None = None
    """Capacity with both directions in use at once."""
    loses_large: bool = False
    """Whether messages stop coming through as soon as one is large."""
    loss: float | None = None
    """Fraction of this end's segments that the kernel had to send again."""

    @property
    def was_heard(self) -> bool:
        """Whether the neighbour has said anything."""
        return self.hello is not None or self.answer is not None

    def note(self, answer: DoctorAnswer) -> None:
        """Keep what a neighbour holds: a later answer may have the forward pass that an earlier one had not."""
        if self.answer is None or (self.answer.forward is None and answer.forward is not None):
            self.answer = answer

    def as_dict(self) -> dict[str, Any]:
        """Give all that the questions have shown, as JSON holds it."""
        answer = None if self.answer is None else {name: _plain(value) for name, value in asdict(self.answer).items() if name != "pad"}
        return {"answer": answer} | {name: getattr(self, name) for name in _MEASURED}

    def take_up(self, told: Mapping[str, Any]) -> None:
        """Take up what `as_dict` gave in another process."""
        for name in _MEASURED:
            setattr(self, name, told[name])
        if (answer := told["answer"]) is not None:
            digests = {name: answer[name] and bytes.fromhex(answer[name]) for name in _DIGESTS}
            self.answer = DoctorAnswer(**{**answer, **digests, "outputs": tuple(answer["outputs"]), "pad": b""})


Ask = Callable[[str, DoctorQuestion], Awaitable[None]]
"""Sends a question to a neighbour; TransportError where there is no link."""


@dataclass
class Interview:
    """Questions to neighbours on their way, and the answers that come."""

    ask: Ask
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _awaited: dict[int, asyncio.Future[DoctorAnswer]] = field(default_factory=dict)

    def take(self, answer: DoctorAnswer) -> None:
        """Take an answer that has come."""
        future = self._awaited.pop(answer.number, None)
        if future is not None and not future.done():
            future.set_result(answer)

    async def question(self, peer: str, size_bytes: int, within_s: float) -> tuple[DoctorAnswer, float]:
        """Ask one question, and wait for its answer; also returns the seconds that it took.

        Raises:
            TimeoutError: no answer came in time.
            TransportError: there is no link.
        """
        number = next(self._numbers)
        self._awaited[number] = future = asyncio.get_running_loop().create_future()
        began_s = time.perf_counter()
        try:
            async with asyncio.timeout(within_s):
                await self.ask(peer, DoctorQuestion(number=number, pad=bytes(size_bytes)))
                answer = await future
        finally:
            self._awaited.pop(number, None)
        return answer, time.perf_counter() - began_s

    async def examine(self, edge: EdgeMeasurement) -> None:
        """Measure round trip, clock and capacity of an edge whose neighbour answers."""
        for asked in range(1, PINGS + 1):
            with suppress(TimeoutError, TransportError):
                answer, took_s = await self.question(edge.peer, 0, PING_WITHIN_S)
                edge.note(answer)
                if edge.round_trip_s is None or took_s < edge.round_trip_s:
                    edge.round_trip_s = took_s
                    edge.clock_ahead_s = answer.clock / 1000 + took_s / 2 - time.time()
            if edge.answer is None and asked == UNANSWERED:
                return  # nobody here who answers
        try:
            _, took_s = await self.question(edge.peer, MAX_LARGE_BYTES, LARGE_WITHIN_S)
        except TimeoutError:
            edge.loses_large = not await self._is_heard_still(edge)
            return
        except TransportError:
            return
        edge.mbit_s = _mbit_s(1, took_s - (edge.round_trip_s or 0))
        if took_s < LONG_ENOUGH_S:
            with suppress(TimeoutError, TransportError):
                edge.mbit_s = await self._capacity(edge)
        await self._wait_for_forward(edge)

    async def _is_heard_still(self, edge: EdgeMeasurement) -> bool:
        """Ask a small question after a large one that was not answered: the neighbour may send slowly, by its cap or its line."""
        try:
            await self.question(edge.peer, 0, PING_WITHIN_S)
        except (TimeoutError, TransportError):
            return False
        return True

    async def _wait_for_forward(self, edge: EdgeMeasurement) -> None:
        """Ask on for a moment where the forward pass is still being computed; some neighbours have none."""
        for _ in range(LATE_PINGS):
            if edge.answer is None or edge.answer.forward is not None:
                return
            await asyncio.sleep(LATE_PING_EVERY_S)
            with suppress(TimeoutError, TransportError):
                edge.note((await self.question(edge.peer, 0, PING_WITHIN_S))[0])

    async def _capacity(self, edge: EdgeMeasurement) -> float:
        """Megabits a second that go each way while the link is kept full."""
        began_s, left = time.perf_counter(), iter(range(MOST_LARGE))

        async def keep_asking() -> int:
            asked = 0
            for _ in left:
                await self.question(edge.peer, MAX_LARGE_BYTES, LARGE_WITHIN_S)
                asked += 1
                if time.perf_counter() - began_s > LONG_ENOUGH_S:
                    break
            return asked

        asked = sum(await asyncio.gather(*(keep_asking() for _ in range(AT_ONCE))))
        return _mbit_s(asked, time.perf_counter() - began_s - (edge.round_trip_s or 0))


def _plain(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else value


def _mbit_s(count: int, seconds: float) -> float:
    return 8 * count * MAX_LARGE_BYTES / 1e6 / max(seconds, 1e-6)
