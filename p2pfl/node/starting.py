"""The wait for enough members, and the start in their company."""

from __future__ import annotations

import logging
from typing import Any

from p2pfl.errors import MembersMissing
from p2pfl.node.clock import LoopClock
from p2pfl.node.link_reports import LinkReports
from p2pfl.node.round_steps import RoundSteps
from p2pfl.node.seconds import RunSeconds
from p2pfl.node.sending import Sending
from p2pfl.protocol.agreed_start import AgreedStart
from p2pfl.protocol.protocol import Protocol
from p2pfl.runs.events import EventKind

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.1


class Starting:
    """One node's way to the agreed start."""

    def __init__(
        self,
        agreed: AgreedStart,
        protocol: Protocol,
        links: LinkReports,
        steps: RoundSteps,
        sending: Sending,
        seconds: RunSeconds,
        clock: LoopClock,
    ) -> None:
        self._agreed, self._protocol, self._links, self._steps = agreed, protocol, links, steps
        self._sending, self._seconds, self._clock = sending, seconds, clock

    def status(self) -> dict[str, Any]:
        """State of the start, for the status page."""
        waiting_for = self._agreed.waiting_for(self._links.now())
        return {"waiting_for": waiting_for, "started_with": self._agreed.company, "started_without": self._agreed.missing}

    def note_links(self) -> None:
        """Tell the agreement which links are up."""
        self._agreed.agreement.note_links(self._links.good(), self._clock.now_s())

    async def wait(self) -> bool:
        """Wait until enough members are there, and start with them; False: the node is to stop first.

        Raises:
            MembersMissing: too few were there in time.
        """
        agreed, clock = self._agreed, self._clock
        self._seconds.begin_waiting(clock.now_s())
        agreed.agreement.begin(clock.now_s())
        while not clock.is_stopping:
            self.note_links()
            if (company := agreed.decide(clock.now_s())) is not None:
                self._start(company)
                await self._steps.keep()  # before anything is sent, so that a restarted node does not wait
                self._sending.wake()
                return True
            reports = self._links.now()
            verdict = agreed.verdict(reports, clock.now_s())
            if verdict is not None and agreed.agreement.is_hopeless(clock.now_s()):
                self._seconds.note_start(clock.now_s())
                raise MembersMissing(verdict)
            if (news := agreed.news(agreed.waiting_for(reports))) is not None:
                log.info("%s", news)
            self._sending.wake()
            await clock.wait(clock.now_s() + _LOOK_EVERY_S)
        return False

    def _start(self, company: list[str]) -> None:
        agreed, now_s, on_event = self._agreed, self._clock.now_s(), self._protocol.edges.on_event
        agreed.start(company, now_s)
        self._protocol.deadlines.wait_at_start(now_s, agreed.within_s, agreed.agreement.grace_s)
        self._protocol.start_with(company, now_s)
        self._seconds.note_start(now_s)
        missing, total = agreed.missing, len(company) + len(agreed.missing)
        if missing:
            log.warning("%s of %d members are missing at the start: %s", len(missing), total, ", ".join(missing))
            on_event(EventKind.STARTED_WITHOUT, f"{', '.join(missing)}: {len(company)} of {total} members were ready")
        else:
            on_event(EventKind.START_AGREED, f"all {len(company)} members are ready")
