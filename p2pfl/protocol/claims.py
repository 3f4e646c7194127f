"""Claims to be far ahead, and the proof of them that is asked for and given: one member's word is not enough to make this node jump."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from p2pfl.protocol.deadlines import Deadlines, is_power_of_two
from p2pfl.protocol.edges import Edges
from p2pfl.protocol.neighbour import Neighbour, Others
from p2pfl.protocol.transfers import Transfers
from p2pfl.runs.events import EventKind
from p2pfl.wire.messages import ProofRequest, Records

PLAUSIBLE_SPEED = 8.0
"""Where no records of the others are heard, a neighbour is believed to be at most so many times as fast as this node's rounds."""

PROOF_EVERY_S = 0.5
"""How often a neighbour is asked for proof, at most."""

PROOF_AFTER_S = 0.2
"""A neighbour that asks for proof more often than this gets one answer."""

PROOF_FOR_S = 2.0
"""For so long a neighbour that asked for proof is told what others answer."""

_NEVER_S = float("-inf")


@dataclass(slots=True)
class _Claim:
    """One neighbour's claim to be far ahead, and the proof that it and this node have asked for."""

    unconfirmed_s: float | None = None
    """Since when it says that it is further than anybody confirms; None: it does not."""
    hurried: int = 0
    """How often such a claim lasted longer than an exchange may take."""
    asked_s: float = _NEVER_S
    """When this node last asked it for proof of where the others are."""
    relayed_s: float = _NEVER_S
    """When it was last asked for proof for somebody else."""
    given_s: float = _NEVER_S
    """When it last got proof from this node."""
    wanted_until_s: float = _NEVER_S
    """Until then it is told of what others answer."""


class Claims:
    """The exchanges that neighbours say they are in, as far as this node believes them; where nodes are not in step nobody can be ahead."""

    def __init__(self, edges: Edges, deadlines: Deadlines, others: Others, transfers: Transfers, *, in_step: bool) -> None:
        self._edges, self._deadlines, self._others, self._transfers, self._in_step = edges, deadlines, others, transfers, in_step
        self._claims = {name: _Claim() for name in edges.neighbours}
        self._company: tuple[int, float] = (0, 0.0)
        """The exchange, and when, at which this node last began in company."""
        self._was_in_company = False

    def note_company(self, exchange: int, now_s: float) -> None:
        """Begin an exchange in company: nobody can be further than that in no time, whatever they say."""
        self._company, self._was_in_company = (exchange, now_s), True

    def note_jump(self, exchange: int, now_s: float) -> None:
        """Begin an exchange that this node has jumped to."""
        self._company = exchange, now_s

    def believed(self) -> float:
        """The furthest exchange to which this node lets itself be taken.

        A second member has to be there, by what it says itself over its own link or by its signed record of the round before. Where there
        is no second one, because all others are silent, the two have been alone, and then each waits for its deadline in each exchange, so
        the other one cannot be further than the time allows. No jump gives any of that time back.
        """
        if not self._was_in_company and (self._others.view is None or self._others.is_one):
            return float("inf")
        edges, (exchange, since_s), now_s = self._edges, self._company, self._deadlines.clock_s
        second = self._others.second_furthest(edges.exchange, phases=edges.phases, ahead=edges.ahead)
        if self._others.view is None:  # nothing signed can be heard
            usual_s = self._deadlines.usual_s()
            usual_s = self._deadlines.allowance_s() if usual_s is None else usual_s
            by_time = exchange + PLAUSIBLE_SPEED * (now_s - since_s) / usual_s if usual_s else float("inf")
            return max(by_time, second)
        # how long this node itself trains tells how long others may be silent, also while it does
        allowance_s = self._deadlines.allowance_s(is_training=edges.exchange not in self._transfers.sent)
        there = sum(n.session.is_open and n.was_seen(now_s, 2 * allowance_s) for n in edges.neighbours.values())
        is_left_with_one = self._others.are_neighbours and there <= 1
        by_time = exchange + (now_s - since_s) / allowance_s if is_left_with_one else 0.0  # both have been alone, or one was away
        return max(by_time, edges.exchange + self._deadlines.away_exchanges, second)

    def is_plausible(self, neighbour: Neighbour) -> bool:
        """Whether a neighbour's exchange may be taken up now; where records can be heard, proof may still come."""
        return not (self._in_step and self._others.view is None and self._is_too_far(neighbour))

    def furthest(self) -> int:
        """The furthest exchange that neighbours of this round have spoken of, as far as it is believed."""
        if not self._in_step:
            return -1
        mixing_row = self._edges.neighbourhood
        near = [each for name, each in self._edges.neighbours.items() if name in mixing_row.weights or name in mixing_row.receivers]
        heard = [neighbour.heard_exchange for neighbour in near if neighbour.session.is_open]
        knows_others = self._deadlines.usual_s() is not None or self._was_in_company  # until then: what all of them have reached
        return self._as_believed((max if knows_others else min)(heard, default=-1))

    def is_behind(self) -> bool:
        """Whether a neighbour is so far ahead that this exchange cannot be made up for."""
        near = self._edges.exchange + self._edges.ahead
        if all(neighbour.heard_exchange <= near for neighbour in self._edges.neighbours.values()):
            return False  # as nearly always, and asked several times a round
        return self.furthest() > near

    def furthest_round(self) -> int | None:
        """A round that no member can have passed: nodes in step are apart by no more than there are links between them."""
        if not self._in_step or self._others.view is None:
            return None
        heard = max((neighbour.heard_exchange for neighbour in self._edges.neighbours.values()), default=0)
        exchange = max(self._edges.exchange, self._as_believed(heard), 0)
        return exchange // self._edges.phases + self._others.view.news_rounds * self._edges.ahead

    def is_unconfirmed(self, name: str) -> bool:
        """Whether a neighbour says that it is further than anybody confirms."""
        return self._claims[name].unconfirmed_s is not None

    # ---- proof

    def look(self, now_s: float) -> None:
        """Ask for proof of what neighbours claim, and say so where none comes."""
        for neighbour in self._edges.neighbours.values():
            self.look_at(neighbour, now_s)

    def look_at(self, neighbour: Neighbour, now_s: float) -> None:
        """Ask for proof of what one neighbour claims, and say so where none comes."""
        claim, name = self._claims[neighbour.name], neighbour.name
        if not self._is_too_far(neighbour) or self._others.view is None or not neighbour.session.is_open:
            claim.unconfirmed_s = None
            return
        if claim.unconfirmed_s is None:
            claim.unconfirmed_s = now_s
        if now_s - claim.asked_s >= PROOF_EVERY_S:
            self._ask_everybody(now_s)
        if now_s - claim.unconfirmed_s > self._deadlines.allowance_s():
            claim.unconfirmed_s = now_s
            claim.hurried += 1
            if is_power_of_two(claim.hurried):
                where = f"it is at exchange {neighbour.heard_exchange} while this node is at {self._edges.exchange}"
                times = "" if claim.hurried == 1 else f" ({claim.hurried} times)"
                self._edges.on_event(EventKind.HURRIED, f"{name} says that {where}, and no other member confirms it{times}", name)

    def answer(self, neighbour: Neighbour, request: ProofRequest, now_s: float) -> None:
        """Say where the furthest members are, and ask the other neighbours, which may be further by now."""
        claim = self._claims[neighbour.name]
        if self._others.view is None or now_s - claim.given_s < PROOF_AFTER_S:
            return
        claim.given_s = now_s
        self._give_proof(neighbour)
        if request.relayed:
            return
        claim.wanted_until_s = now_s + PROOF_FOR_S
        for name, other in self._edges.neighbours.items():
            if other is not neighbour and other.session.is_open and now_s - self._claims[name].relayed_s >= PROOF_AFTER_S:
                self._claims[name].relayed_s = now_s
                other.queue(ProofRequest(relayed=True))

    def pass_on(self, peer: str, now_s: float) -> None:
        """Tell neighbours that want proof what has come from another one."""
        for name, claim in self._claims.items():
            if name != peer and now_s < claim.wanted_until_s:
                self._give_proof(self._edges.neighbours[name])

    def _ask_everybody(self, now_s: float) -> None:
        """Ask whoever is there: each may know."""
        for name, other in self._edges.neighbours.items():
            if other.session.is_open and now_s - self._claims[name].asked_s >= PROOF_EVERY_S:
                self._claims[name].asked_s = now_s
                other.queue(ProofRequest(relayed=False))

    def _give_proof(self, neighbour: Neighbour) -> None:
        sealed = self._others.proof_for(neighbour.name)
        if sealed:
            neighbour.queue(Records(sealed=tuple(sealed)))

    def _is_too_far(self, neighbour: Neighbour) -> bool:
        """Whether a neighbour says that it is so far ahead that this node has to jump, and nobody confirms it."""
        heard, edges = neighbour.heard_exchange, self._edges
        if heard <= edges.exchange + edges.ahead or not self._in_step or edges.closing is not None:
            return False
        return heard > self.believed()

    def _as_believed(self, exchange: int) -> int:
        """An exchange that somebody has spoken of, or the furthest that is believed; what this node can make up for needs no proof."""
        return exchange if exchange <= self._edges.exchange + self._edges.ahead else int(min(exchange, self.believed()))

    # ---- checkpoints

    def snapshot(self) -> dict[str, Any]:
        """Metadata for a checkpoint."""
        return {"in_step": self._company[0]}

    def restore(self, in_step: int, since_s: float) -> None:
        """Take up what `snapshot` gave at a moment of this process's clock."""
        self._company, self._was_in_company = (in_step, since_s), in_step > 0
