"""The bound on the norm of an update: a floor that no update may break through, whatever its sender is.

An update is refused whose norm, as a model, exceeds TOO_LARGE times the largest of the own norm, the norm of the first parameters that all
have agreed on, and 1. An honest update is that far away only where the sender's training has left the others' within one round.
A model that is suddenly much further away than it was lately is reported, and nothing is refused for that.

Shapes: N rows, P parameters.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from types import MappingProxyType

import torch
from torch import Tensor

from p2pfl.algorithms.base import Algorithm, Context, Sender, State
from p2pfl.errors import BadMessage
from p2pfl.params import Layout

TOO_LARGE = 100.0
"""How many times the largest of the own norm, the first parameters' norm and 1 an update's norm may be."""

FAR = 10.0
"""A model is reported that is so many times as far away as the median of its recent distances."""

LEAST_OF_OWN = 0.1
"""A distance below this fraction of the own norm is none to report: models that agree differ by chance."""

QUIET = 10
"""Exchanges without a report after a link was down, a jump or a restart, when models have moved apart without anybody's fault."""

_RECENT = 20
_SINGLE_BYTES = 4


def norm_of(vector: Tensor) -> float:
    """Euclidean norm of all numbers: infinite only where one is infinite or none, or the norm is beyond float64."""
    wide = vector.float() if vector.dtype.itemsize < _SINGLE_BYTES else vector
    found = float(torch.linalg.vector_norm(wide))
    if math.isfinite(found):
        return found
    # squares of numbers beyond 1e19 are beyond float32, so all are scaled by the largest one
    largest = wide.abs().max()
    scaled = float(largest) * float(torch.linalg.vector_norm(wide / largest))
    return math.inf if math.isnan(scaled) else scaled


def bound(own_norm: float, first_norm: float, noise_norm: float = 0.0) -> float:
    """The largest norm that an update may have.

    Args:
        own_norm: of the receiver's own model, or of its own message where that is larger.
        first_norm: of the first parameters that all have agreed on.
        noise_norm: of the noise that the sender adds, where it adds some.
    """
    return TOO_LARGE * max(own_norm, first_norm, 1.0) + noise_norm


def refusal_of(norm: float, most: float) -> BadMessage | None:
    """Why an update of this norm is refused; None: it is not."""
    if norm <= most:
        return None
    what = f"an update of norm {norm:.3g}, and {most:.3g} is the most: {TOO_LARGE:g} times the largest of the own norm, the start's and 1"
    return BadMessage(what, reason="too_large")


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """Figures by which one node judges the norms of its neighbours' updates."""

    algorithm: Algorithm
    layout: Layout
    first_norm: float
    """Norm of the first parameters that all have agreed on, as far as they travel."""

    num_nodes: int
    """Number of members in the network."""

    noise_norm: float = 0.0
    """Norm of the noise that each sender adds."""

    @classmethod
    def of(cls, algorithm: Algorithm, layout: Layout, parameters: Iterable[Tensor], num_nodes: int) -> Guard:
        """A guard for models that begin at some parameters, which lie in the layout's order."""
        first_P = torch.cat([parameter.detach().flatten().cpu() for parameter in parameters])
        return cls(algorithm=algorithm, layout=layout, first_norm=norm_of(layout.shared_of(first_P)), num_nodes=num_nodes)

    def bound(self, state: State, phase: int, sent: Mapping[str, Tensor], ctx: Context, *, diverged: bool = False) -> float:
        """The largest norm that an update may have at one node.

        Args:
            state: of the node, as its training of this round has left it, (1, ...).
            phase: of the round.
            sent: what it sends itself in this exchange, (1, ...).
            ctx: of the round.
            diverged: its training of this round became non-finite and was rolled back, so its own norm is beyond any other.
        """
        if diverged:
            return sys.float_info.max
        channels = self.algorithm.channels
        own = {name: tensor for name, tensor in sent.items() if channels[name].encodes is None and not channels[name].per_edge}
        vectors = [self.layout.shared_of(self.algorithm.estimate(state)), *self.algorithm.as_models(state, phase, own, None, ctx)]
        return bound(max(norm_of(vector) for vector in _different(vectors)), self.first_norm, self.noise_norm)

    def refusal(
        self, norm: float, state: State, phase: int, sent: Mapping[str, Tensor], ctx: Context, *, diverged: bool = False
    ) -> BadMessage | None:
        """Why an update of some norm is refused, see `bound`; the own norm is looked at only where it decides."""
        if norm <= bound(0.0, self.first_norm):
            return None
        return refusal_of(norm, self.bound(state, phase, sent, ctx, diverged=diverged))

    def norm(
        self,
        state: State,
        phase: int,
        message: Mapping[str, Tensor],
        ctx: Context,
        *,
        slot: int,
        num_exchanges: int = 1,
        norms: Mapping[str, float] = MappingProxyType({}),
    ) -> float:
        """Norm of a neighbour's decoded message as a model, the largest of its channels.

        Args:
            state: of the receiver, before the merge, (1, ...).
            phase: of the round.
            message: by channel, without the row's axis.
            ctx: of the round.
            slot: the sender's place among the neighbours.
            num_exchanges: how many exchanges the message is about.
            norms: Euclidean norms of channels, as far as they are known: they are not computed again where all carry models.
        """
        channels = self.algorithm.channels
        if all(channels[name].model and name in norms for name in message):
            return max((norms[name] for name in message), default=0.0)
        sender = Sender(slot=slot, num_nodes=self.num_nodes, num_exchanges=num_exchanges)
        rows = {name: tensor[None] for name, tensor in message.items()}
        return max((norm_of(vector) for vector in self.algorithm.as_models(state, phase, rows, sender, ctx)), default=0.0)


def _different(vectors: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor once: the model is often what is sent."""
    return list({id(vector): vector for vector in vectors}.values())


@dataclass(slots=True)
class DistanceWatch:
    """How far one neighbour's models were from the own ones in the last exchanges."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    quiet: int = QUIET
    """Exchanges for which it still says nothing."""
    reports: int = 0
    """How often its model was far away."""
    _handshakes: int = 0

    def interrupt(self) -> None:
        """Say nothing for some exchanges: one was missed, or somebody jumped or started again."""
        self.quiet = QUIET

    def look(self, distance: float, own_norm: float, handshakes: int) -> str | None:
        """Take in the distance ||x_j - x_i|| and the norm ||x_i|| of an exchange; returns what is to be reported, None where nothing is.

        *handshakes*: changes where the link was made anew.
        """
        if handshakes != self._handshakes:
            self._handshakes = handshakes
            self.interrupt()
        is_looked_at = not self.quiet and distance > LEAST_OF_OWN * own_norm
        usual = median(self.recent) if is_looked_at and self.recent else distance
        self.recent.append(distance)
        self.quiet = max(0, self.quiet - 1)
        if not is_looked_at or distance <= FAR * usual:
            return None
        self.reports += 1
        if self.reports & (self.reports - 1):  # whoever is far away again and again must not fill the disk
            return None
        return f"its model is {distance:.3g} away, and was {usual:.3g} away in most of the last exchanges; its norm here is {own_norm:.3g}"
