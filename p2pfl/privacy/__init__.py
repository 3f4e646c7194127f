"""Mechanisms that protect single patients while a node trains: the registry, and what a mechanism is asked.

Shapes: C rows, B examples in a batch, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # sums in fixed point do without torch
    from torch import Tensor


class Mechanism(Protocol):
    """A rule that makes one gradient of the gradients of single examples. Implementations are frozen dataclasses of their options."""

    def gradient(self, gradients_CBP: Tensor, normal: Callable[[], Tensor]) -> Tensor:
        """Make the gradient of each row's step, (C, P).

        Args:
            gradients_CBP: one of each example.
            normal: draws standard normal numbers (C, P), others at each call.
        """
        ...


MECHANISMS: dict[str, type[Mechanism]] = {}
"""Mechanisms by the name that an experiment's `privacy` gives."""
