"""Reports on the links to a node's neighbours, and what follows from them."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from p2pfl.node.clock import LoopClock
from p2pfl.node.run_log import RunLog
from p2pfl.protocol.link_watch import LinkReport, LinkWatch, report
from p2pfl.protocol.protocol import Protocol
from p2pfl.transports import UNREADABLE, Transport

log = logging.getLogger(__name__)


def good_links(reports: Mapping[str, LinkReport]) -> list[str]:
    """Neighbours whose links are up."""
    return [name for name, now in reports.items() if now.is_good]


class LinkReports:
    """Watches the links of one node."""

    def __init__(self, protocol: Protocol, transport: Transport, run_log: RunLog, clock: LoopClock) -> None:
        self._protocol, self._transport, self._log, self._clock = protocol, transport, run_log, clock
        self._watch = LinkWatch(protocol.neighbours)
        self._unreadable: Counter[tuple[str, str]] = Counter()

    def now(self) -> dict[str, LinkReport]:
        """State of each link, and why it is not up."""
        unknown = self._transport.counters["unauthorized"]
        return {
            name: report(neighbour, self._transport.link(name), num_unknown_keys=unknown)
            for name, neighbour in self._protocol.neighbours.items()
        }

    def look(self, reports: Mapping[str, LinkReport]) -> None:
        """Say what has changed about a link, or has not for long."""
        is_closing = self._protocol.edges.closing is not None or self._clock.is_stopping
        for now in reports.values():
            saying = self._watch.look(now, self._clock.now_s(), is_closing=is_closing)
            if saying is None:
                continue
            level, text, event = saying
            log.log(level, "%s", text)
            if event is not None:
                self._log.write_settled(*event, now.name)

    def count_unreadable(self) -> None:
        """Hold against neighbours what their links did not deliver because it was no message."""
        for name, neighbour in self._protocol.neighbours.items():
            for reason in UNREADABLE:
                count = self._transport.link_counters[name][reason]
                if new := count - self._unreadable[name, reason]:
                    self._unreadable[name, reason] = count
                    neighbour.allowance.refused(reason, self._clock.now_s(), times=new)
                    self.exclude(name)

    def exclude(self, name: str) -> None:
        """Disconnect a neighbour that sends too much."""
        is_due = self._protocol.neighbours[name].allowance.broken
        if is_due and (found := self._protocol.edges.exclusion(name, self._clock.now_s())) is not None:
            self._transport.disconnect(name, *found)

    def log_awaited(self, number: int, waited_s: float) -> None:
        """Log one line that says whom a round waits for, and what is known of them."""
        reports = self.now()
        said = []
        for name in self._protocol.pace.awaited():
            heard_s = self._last_heard_s_ago(name)
            last = "never heard" if heard_s is None else f"last heard {heard_s:.0f} s ago"
            said.append(f"{name} ({reports[name].detail or last})")
        if said:
            log.info("round %d: waiting for %.0f s for %s", number, waited_s, ", ".join(said))

    def status(self) -> dict[str, Any]:
        """State of each neighbour and its link, for the status page."""
        reports = self.now()
        return {
            name: {
                "link": reports[name].state,
                "link_detail": reports[name].detail,
                "link_for_s": round(time.monotonic() - reports[name].since_s, 3),
                "link_events": dict(self._transport.link_counters[name]),
                "greeted": n.session.is_open and self._transport.link(name).is_up,
                "schema": n.session.schema if n.incarnation else None,
                "last_seen_s_ago": self._last_heard_s_ago(name),
                "exchange": None if n.heard_exchange < 0 else n.heard_exchange,
                "skipped": n.missed,
                "patience": self._protocol.deadlines.patience[name].fraction,
                "held": self._protocol.deadlines.patience[name].held,
                "unconfirmed": self._protocol.claims.is_unconfirmed(name),
                "left": n.left,
                "paused": n.is_paused,
                "state_lost": n.state_lost or None,
                "dropped": n.allowance.num_dropped,
                "events_held_back": self._log.num_held_back(name),
                "refused": dict(n.session.counters),
            }
            for name, n in self._protocol.neighbours.items()
        }

    def _last_heard_s_ago(self, name: str) -> float | None:
        """Seconds since anything came from a neighbour, a sign of life included."""
        times_s = (self._protocol.neighbours[name].last_seen_s, self._transport.link(name).heard_s)
        known_s = [then_s for then_s in times_s if then_s is not None]
        return round(max(0.0, self._clock.now_s() - max(known_s)), 3) if known_s else None
