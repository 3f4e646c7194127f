"""Coefficients of a fitted model with standard errors, and what Wald's test says of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from p2pfl.statistics.sums import Numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class WaldFit:
    """Fitted coefficients with their covariance; arrays are (P,) in the order of the names."""

    names: tuple[str, ...]
    params: Numbers
    covariance_PP: Numbers

    @property
    def t_df(self) -> int | None:
        """Degrees of freedom of t tests; None: the normal distribution is used."""
        return None

    @property
    def bse(self) -> Numbers:
        """Standard errors of the coefficients, (P,)."""
        return np.sqrt(np.diag(self.covariance_PP))

    @property
    def pvalues(self) -> Numbers:
        """Two-sided p-values of Wald's test, (P,)."""
        statistic = -np.abs(self.params / self.bse)
        return np.asarray(2 * (ndtr(statistic) if self.t_df is None else stdtr(self.t_df, statistic)))

    def conf_int(self, level: float = 0.95) -> Numbers:
        """Wald's confidence intervals, (P, 2)."""
        tail = (1 + level) / 2
        width = (ndtri(tail) if self.t_df is None else stdtrit(self.t_df, tail)) * self.bse
        return np.stack([self.params - width, self.params + width], axis=-1)
