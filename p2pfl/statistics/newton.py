"""Newton's method on sums over institutions: when a step can be taken, when coefficients stand, and when they have no end.

Shapes: P columns, scaled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from p2pfl.errors import ConfigError
from p2pfl.statistics.scale import involved_in
from p2pfl.statistics.sums import Numbers

STOP_BELOW = 1e-10
"""Relative change between two iterations at which coefficients are taken to stand."""

LAST_STEP = 3e-9
"""Length of a step in standard errors at which it is the last one."""

MOST_ITERATIONS = 25
MOST_CONDITION = 1e10
"""Condition number of the scaled information above which columns are taken to depend on each other."""

FLAT = 1e-8
"""Information that a direction keeps of what it had at the start; below it the outcome is separated."""


def stands(now: float, before: float) -> bool:
    """Whether a deviance or log-likelihood has changed so little that the coefficients stand."""
    return abs(now - before) / (abs(now) + 0.1) < STOP_BELOW


def is_last(step_P: Numbers, information_PP: Numbers, dispersion: float = 1.0) -> bool:
    """Whether a step is so short, in standard errors, that coefficients stand after it; for iterations that end at a linear pace."""
    return float(step_P @ information_PP @ step_P) < LAST_STEP**2 * dispersion


def solved(information_PP: Numbers, right_P: Numbers, names: Sequence[str]) -> Numbers:
    """Solve an information matrix for a right side, (P,).

    Raises:
        ConfigError: columns depend on each other; it names them.
    """
    values, vectors = np.linalg.eigh(information_PP)
    if not values[0] > values[-1] / MOST_CONDITION:
        involved = involved_in(vectors[:, 0], names)
        raise ConfigError(f"{involved} depend on each other, or one is the same in all rows that count: leave one out")
    return np.asarray(np.linalg.solve(information_PP, right_P))


def check_separation(first_PP: Numbers, now_PP: Numbers, names: Sequence[str], *, outcome: str) -> None:
    """Refuse an outcome that the columns foretell without an error: its coefficients have no end.

    Args:
        first_PP: information at the start.
        now_PP: information now.
        names: of the columns.
        outcome: with its verb, for the message, as "the outcome is".

    Raises:
        ConfigError: a direction has lost its information, or numbers are no longer finite.
    """
    if not np.isfinite(now_PP).all():
        raise ConfigError(f"the coefficients grew beyond all numbers: a column is far too large, or {outcome} separated")
    values, vectors = np.linalg.eigh(now_PP)
    if values[0] < FLAT * np.linalg.eigvalsh(first_PP)[0]:
        raise ConfigError(f"{outcome} separated by {involved_in(vectors[:, 0], names)}: their coefficients have no end")
