"""The wait for enough members, and the start in their company."""

from __future__ import annotations

import logging

from p2pfl.errors import MembersMissing
from p2pfl.node.checkpoint import keep
from p2pfl.node.link_reports import good_links
from p2pfl.node.node import Node
from p2pfl.runs.events import EventKind

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.25
"""News wakes the loop at once; this is for what time alone decides."""


async def start_with_enough(node: Node) -> bool:
    """Wait until enough members are there, and start with them; False: the node is to stop first.

    Raises:
        MembersMissing: too few were there in time.
    """
    agreed, clock = node.agreed, node.clock
    node.seconds.begin_waiting(clock.now_s())
    agreed.agreement.begin(clock.now_s())
    while not clock.is_stopping:
        reports = node.links.now()
        agreed.agreement.note_links(good_links(reports), clock.now_s())
        if (company := agreed.decide(clock.now_s())) is not None:
            _start(node, company)
            await keep(node)  # before anything is sent, so that a restarted node does not wait
            node.sending.wake()
            return True
        verdict = agreed.verdict(reports, clock.now_s())
        if verdict is not None and agreed.agreement.is_hopeless(clock.now_s()):
            node.seconds.note_start(clock.now_s())
            raise MembersMissing(verdict)
        if (news := agreed.news(agreed.waiting_for(reports))) is not None:
            log.info("%s", news)
        node.sending.wake()
        await clock.wait(clock.now_s() + _LOOK_EVERY_S)
    return False


def _start(node: Node, company: list[str]) -> None:
    node.start_with(company)
    node.protocol.start_with(company, node.clock.now_s())
    node.seconds.note_start(node.clock.now_s())
    missing, total = node.agreed.missing, len(node.plan.names)
    if missing:
        log.warning("%s of %d members are missing at the start: %s", len(missing), total, ", ".join(missing))
        node.log.event(EventKind.STARTED_WITHOUT, f"{', '.join(missing)}: {len(company)} of {total} members were ready")
    else:
        node.log.event(EventKind.START_AGREED, f"all {len(company)} members are ready")
