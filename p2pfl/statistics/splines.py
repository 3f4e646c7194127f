"""Natural cubic splines with agreed knots: curves that are straight lines beyond their first and last knot.

Shapes: M values, K knots. Source: Harrell, Regression Modeling Strategies, 2015, section 2.4.5 (restricted cubic splines).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from p2pfl.statistics.sums import Numbers


def natural_spline(values_M: Numbers, knots: Sequence[float]) -> Numbers:
    """Columns whose combinations with an intercept are all natural cubic splines with these knots; (M, K - 1), NaN where a value is.

    The first column is the value itself. The others are cubic between the knots, and have the values' unit: they are divided by the squared
    distance of the first knot from the last.
    """
    *inner, before_last, last = knots
    span = last - knots[0]

    def cubed(knot: float) -> Numbers:
        return np.asarray(np.maximum(values_M - knot, 0.0) ** 3)

    bent = [
        (
            cubed(knot)
            - cubed(before_last) * (last - knot) / (last - before_last)
            + cubed(last) * (before_last - knot) / (last - before_last)
        )
        / span**2
        for knot in inner
    ]
    return np.stack([values_M, *bent], axis=-1)
