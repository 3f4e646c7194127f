"""Families of generalised linear models: how the mean of an outcome depends on the predictor, and how it scatters around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import expit, gammaln, xlogy

from p2pfl.statistics.sums import Numbers

# M rows


class Family(Protocol):
    """One family with its canonical link."""

    @property
    def name(self) -> str:
        """Name of the family in a study."""
        ...

    @property
    def has_dispersion(self) -> bool:
        """Whether the scatter around the mean is estimated; otherwise it follows from the mean."""
        ...

    @property
    def expected(self) -> str:
        """Outcomes that it accepts, as a sentence."""
        ...

    def start(self, y: Numbers, weights: Numbers) -> Numbers:
        """Means to begin with, from the outcomes, as R chooses them; (M,)."""
        ...

    def link(self, mu: Numbers) -> Numbers:
        """Predictor of a mean, (M,)."""
        ...

    def mean(self, eta: Numbers) -> Numbers:
        """Mean of a predictor, (M,)."""
        ...

    def slope(self, eta: Numbers) -> Numbers:
        """Derivative of the mean by the predictor, which is the variance of one outcome but for the dispersion; (M,)."""
        ...

    def deviances(self, y: Numbers, mu: Numbers) -> Numbers:
        """Deviance of each outcome, (M,)."""
        ...

    def saturated(self, y: Numbers) -> Numbers:
        """Log-likelihood of each outcome under the model that fits it exactly, (M,); 0 where the dispersion is estimated."""
        ...

    def accepts(self, y: Numbers) -> bool:
        """Whether the outcomes can be of this family."""
        ...


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Normal outcomes, whose mean is the predictor."""

    name: str = "gaussian"
    has_dispersion: bool = True
    expected: str = "finite numbers are expected"

    def start(self, y: Numbers, weights: Numbers) -> Numbers:  # noqa: ARG002
        """Means to begin with: the outcomes."""
        return y

    def link(self, mu: Numbers) -> Numbers:
        """Predictor of a mean: itself."""
        return mu

    def mean(self, eta: Numbers) -> Numbers:
        """Mean of a predictor: itself."""
        return eta

    def slope(self, eta: Numbers) -> Numbers:
        """Derivative of the mean by the predictor: 1."""
        return np.ones_like(eta)

    def deviances(self, y: Numbers, mu: Numbers) -> Numbers:
        """Deviance of each outcome: its squared residual."""
        return np.asarray((y - mu) ** 2)

    def saturated(self, y: Numbers) -> Numbers:
        """Zeros: the log-likelihood follows from the deviance alone."""
        return np.zeros_like(y)

    def accepts(self, y: Numbers) -> bool:
        """Whether all outcomes are finite."""
        return bool(np.isfinite(y).all())


@dataclass(frozen=True, slots=True)
class Binomial:
    """Outcomes of 0 or 1, whose log-odds are the predictor."""

    name: str = "binomial"
    has_dispersion: bool = False
    expected: str = "0 and 1 are expected"

    def start(self, y: Numbers, weights: Numbers) -> Numbers:
        """Means to begin with: the outcomes, drawn a little to the middle."""
        return (weights * y + 0.5) / (weights + 1)

    def link(self, mu: Numbers) -> Numbers:
        """Predictor of a mean: its log-odds."""
        return np.log(mu) - np.log1p(-mu)

    def mean(self, eta: Numbers) -> Numbers:
        """Mean of a predictor: the logistic function."""
        return np.asarray(expit(eta))

    def slope(self, eta: Numbers) -> Numbers:
        """Derivative of the mean by the predictor; from both tails, so that no digits cancel."""
        return np.asarray(expit(eta) * expit(-eta))

    def deviances(self, y: Numbers, mu: Numbers) -> Numbers:
        """Twice the log-likelihood that each outcome lacks."""
        return np.asarray(2 * (xlogy(y, y) - xlogy(y, mu) + xlogy(1 - y, 1 - y) - xlogy(1 - y, 1 - mu)))

    def saturated(self, y: Numbers) -> Numbers:
        """Log-likelihood of outcomes that are their own mean."""
        return np.asarray(xlogy(y, y) + xlogy(1 - y, 1 - y))

    def accepts(self, y: Numbers) -> bool:
        """Whether all outcomes are 0 or 1."""
        return bool(((y == 0) | (y == 1)).all())


@dataclass(frozen=True, slots=True)
class Poisson:
    """Counts, the logarithm of whose mean is the predictor."""

    name: str = "poisson"
    has_dispersion: bool = False
    expected: str = "finite numbers from 0 on are expected"

    def start(self, y: Numbers, weights: Numbers) -> Numbers:  # noqa: ARG002
        """Means to begin with: the counts and a little more, so that they have a logarithm."""
        return y + 0.1

    def link(self, mu: Numbers) -> Numbers:
        """Predictor of a mean: its logarithm."""
        return np.log(mu)

    def mean(self, eta: Numbers) -> Numbers:
        """Mean of a predictor: the exponential function."""
        return np.exp(eta)

    def slope(self, eta: Numbers) -> Numbers:
        """Derivative of the mean by the predictor: the mean."""
        return np.exp(eta)

    def deviances(self, y: Numbers, mu: Numbers) -> Numbers:
        """Twice the log-likelihood that each count lacks."""
        return np.asarray(2 * (xlogy(y, y) - xlogy(y, mu) - (y - mu)))

    def saturated(self, y: Numbers) -> Numbers:
        """Log-likelihood of counts that are their own mean."""
        return np.asarray(xlogy(y, y) - y - gammaln(y + 1))

    def accepts(self, y: Numbers) -> bool:
        """Whether no outcome is negative or infinite."""
        return bool(((y >= 0) & np.isfinite(y)).all())


FAMILIES: dict[str, Family] = {"gaussian": Gaussian(), "binomial": Binomial(), "poisson": Poisson()}
