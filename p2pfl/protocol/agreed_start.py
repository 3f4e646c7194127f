"""The agreed start in names and words: when this node may train, whom it waits for and why."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from p2pfl.experiment.graph import diameter_bound
from p2pfl.experiment.plan import Plan
from p2pfl.protocol.link_watch import LinkReport
from p2pfl.protocol.start_agreement import RESEND_S, StartAgreement
from p2pfl.topology import is_spectrum_quick
from p2pfl.wire.round_record import Sign

GRACE_S = 1.0
"""Time that news may need beside one repetition on each link of their way."""

_LONG_WAY = 50  # links, where the diameter is not known
_MOST_NAMED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Signing:
    """A node's own key to sign with, and the others' to check by."""

    keys: Mapping[str, bytes]
    """Every member's Ed25519 public key, 32 bytes."""

    sign: Sign


class AgreedStart:
    """One node's start, which it agrees on with the others.

    Args:
        within_s: how long it waits for all members; None: as long as the experiment says.
    """

    def __init__(self, plan: Plan, me: str, signing: Signing, *, study_digest: str, within_s: float | None, began_ms: int) -> None:
        self.members, self._me = plan.names, me
        places = {name: place for place, name in enumerate(plan.names)}
        graph = plan.undirected
        require = plan.experiment.require
        self.within_s = require.within_s if within_s is None else within_s
        self.way = diameter_bound(plan.topology) if is_spectrum_quick(plan.topology) else _LONG_WAY
        """The most links that news cross."""
        self.agreement = StartAgreement(
            me=places[me],
            neighbours=[graph.neighbours(place).tolist() for place in range(len(plan.names))],
            names={name: places[name] for name in plan.neighbours(me)},
            keys=[signing.keys[name] for name in plan.names],
            sign=signing.sign,
            study=bytes.fromhex(study_digest),
            needed=require.at_least(len(plan.names)),
            within_s=self.within_s,
            grace_s=GRACE_S + RESEND_S * self.way,
            began_ms=began_ms,
        )
        self._said: list[str] | None = None
        self._verdict = ""

    @property
    def company(self) -> list[str] | None:
        """Members that were ready when this node started, in the roster's order; None: it has not."""
        started = self.agreement.started
        return None if started is None else [self.members[place] for place in sorted(started)]

    @property
    def missing(self) -> list[str]:
        """Members without whom this node started."""
        company = self.company
        return [] if company is None else [name for name in self.members if name not in company]

    def decide(self, now_s: float) -> list[str] | None:
        """Names of the members to start with now; None: the start has to wait."""
        places = self.agreement.decide(now_s)
        return None if places is None else [self.members[place] for place in sorted(places)]

    def start(self, company: Collection[str], now_s: float) -> None:
        """This node starts, in the company of some members."""
        self.agreement.start([place for place, name in enumerate(self.members) if name in company], now_s)

    def waiting_for(self, reports: Mapping[str, LinkReport]) -> dict[str, str]:
        """Why this node does not start yet, by the member that it waits for.

        Args:
            reports: how the links to this node's own neighbours are.
        """
        if self.agreement.started is not None:
            return {}
        agreement, awaited = self.agreement, self.agreement.awaited()
        reasons = {place: f"no neighbour has a link with it: {self._list(agreement.neighbours_of(place))}" for place in awaited.absent}
        reasons |= dict.fromkeys(awaited.gone, "it was heard of, and no way of links to it is known now")
        for place in awaited.behind:
            reasons[place] = f"nobody here has heard of it: it can only be heard through {self._list(sorted(awaited.absent))}"
        for one, other in sorted(awaited.broken):
            for place, end in ((one, other), (other, one)):
                if self.members[place] != self._me:
                    reasons[place] = f"it has no link with {self.members[end]}"
        words = {self.members[place]: reasons[place] for place in sorted(reasons)}
        never = {self.members[place] for place in awaited.absent}
        return words | {name: _state_of(now) for name, now in reports.items() if name in words and (name in never or not now.is_good)}

    def news(self, waiting_for: Mapping[str, str]) -> str | None:
        """One line about whom this node waits for, where that has changed since the last call."""
        if list(waiting_for) == self._said:  # reasons change with every attempt to connect
            return None
        self._said = list(waiting_for)
        named = [f"{name} ({why})" for name, why in list(waiting_for.items())[:_MOST_NAMED]]
        more = [f"{len(waiting_for) - len(named)} more"] if len(waiting_for) > len(named) else []
        num_members = len(self.members)
        there = f"{num_members - len(waiting_for)} of {num_members} members are ready"
        return f"{there}; waiting for {', '.join([*named, *more]) or 'news of the start'}"

    def verdict(self, reports: Mapping[str, LinkReport], now_s: float) -> str | None:
        """One sentence about who was missing when time was up, as it was at the first call after that; None: it is not up yet."""
        if not self._verdict and now_s >= self.agreement.deadline_s:  # not later: who gives up is missing for the others
            self._verdict = self._verdict_now(reports)
        return self._verdict or None

    def _verdict_now(self, reports: Mapping[str, LinkReport]) -> str:
        agreement, awaited = self.agreement, self.agreement.awaited()
        total = len(self.members)
        needed = f"all {total} members" if agreement.needed == total else f"{agreement.needed} of {total} members"
        parts = []
        if awaited.absent:
            own = [
                f"{name} ({_state_of(reports[name])})" if name in reports else name
                for name in (self.members[place] for place in sorted(awaited.absent))
            ]
            parts.append(f"missing: {', '.join(own[:_MOST_NAMED])}")
        if awaited.gone:
            parts.append(f"no link leads now to {self._list(sorted(awaited.gone))}")
        if awaited.behind:
            parts.append(f"not heard of, as they are behind those: {self._list(sorted(awaited.behind))}")
        if awaited.broken:
            pairs = [f"{self.members[one]} and {self.members[other]}" for one, other in sorted(awaited.broken)]
            parts.append(f"no link between {', '.join(pairs[:_MOST_NAMED])}")
        return f"this node has not trained: {needed} must be ready within {self.within_s:g} s; {'; '.join(parts) or 'time was up'}"

    def _list(self, places: Sequence[int]) -> str:
        names = [self.members[place] for place in places]
        return ", ".join(names[:_MOST_NAMED]) + (f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else "")


def _state_of(report: LinkReport) -> str:
    """How the link to a neighbour is that is not ready."""
    if report.is_good:
        return "connected, and it has not told that it is ready"
    return f"{report.state}: {report.detail}" if report.detail else report.state
