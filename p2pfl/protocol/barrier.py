"""Waiting for the neighbours' updates of one exchange."""

from __future__ import annotations

from dataclasses import dataclass, field

from p2pfl.errors import StaleRound
from p2pfl.wire.update import ReceivedUpdate


@dataclass(slots=True, kw_only=True)
class ExchangeBarrier:
    """Which neighbours' updates of one exchange are here, and which of later ones came early."""

    exchange: int
    expected: frozenset[str]
    """Those waited for. Others may come and count too: a neighbour that returns is welcome."""

    deadline_s: float
    """On the caller's clock."""

    received: dict[str, ReceivedUpdate] = field(default_factory=dict)
    ahead: int = 1
    """How many later exchanges are kept."""

    early: dict[int, dict[str, ReceivedUpdate]] = field(default_factory=dict)
    """Of later exchanges, by exchange."""

    def receive(self, peer: str, received: ReceivedUpdate) -> None:
        """A complete update came.

        Raises:
            StaleRound: it is neither of this exchange nor of one of the next that are kept.
        """
        if received.exchange == self.exchange:
            self.received.setdefault(peer, received)
        elif self.exchange < received.exchange <= self.exchange + self.ahead:
            self.early.setdefault(received.exchange, {}).setdefault(peer, received)
        else:
            reason = "stale_round" if received.exchange < self.exchange else "far_round"
            raise StaleRound(
                f"an update of exchange {received.exchange}: expected {self.exchange} to {self.exchange + self.ahead}", reason=reason
            )

    def give_up(self, peer: str) -> None:
        """Wait no longer for a neighbour that is known not to come."""
        self.expected -= {peer}

    def forget(self, peer: str) -> None:
        """Drop what a neighbour has sent."""
        for received in (self.received, *self.early.values()):
            received.pop(peer, None)

    def missing(self) -> frozenset[str]:
        """Who is waited for and not here."""
        return self.expected - self.received.keys()

    def is_complete(self) -> bool:
        """Whether all who are waited for are here."""
        return not self.missing()

    def is_over(self, now_s: float) -> bool:
        """Whether waiting is over, because all are here or it is time."""
        return self.is_complete() or now_s >= self.deadline_s

    def next(self, *, exchange: int, expected: frozenset[str], deadline_s: float) -> ExchangeBarrier:
        """The barrier of a later exchange, with what came early for it."""
        if exchange <= self.exchange:
            raise ValueError(f"exchange {exchange} after {self.exchange}: expected a later one")
        return ExchangeBarrier(
            exchange=exchange,
            expected=expected,
            deadline_s=deadline_s,
            ahead=self.ahead,
            received=self.early.get(exchange, {}),
            early={later: received for later, received in self.early.items() if later > exchange},
        )
