"""Families of generalised linear models: how the mean of an outcome depends on the predictor, and how it scatters around it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import expit, gammaln, xlogy

from p2pfl.statistics.sums import Numbers

# M rows


class Family(Protocol):
    """One family with its link, which is the canonical one but for gamma and negative binomial."""

    @property
    def name(self) -> str:
        """Name of the family in a study."""
        ...

    @property
    def has_dispersion(self) -> bool:
        """Whether the scatter around the mean is estimated; otherwise it follows from the mean."""
        ...

    @property
    def is_canonical(self) -> bool:
        """Whether its link is the canonical one, so that iterations end at a quadratic pace."""
        ...

    @property
    def has_pearson(self) -> bool:
        """Whether the dispersion needs a sum of its own beside the deviance, of the squared scores."""
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

    def information(self, eta: Numbers) -> Numbers:
        """Information of one outcome about its predictor, but for the dispersion; (M,). With a canonical link it is the variance."""
        ...

    def score(self, y: Numbers, mu: Numbers) -> Numbers:
        """Derivative of each outcome's log-likelihood by its predictor, but for the dispersion; (M,)."""
        ...

    def deviances(self, y: Numbers, mu: Numbers) -> Numbers:
        """Deviance of each outcome, (M,)."""
        ...

    def saturated(self, y: Numbers) -> Numbers:
        """Part of each outcome's log-likelihood that depends on the outcome alone, (M,); without a dispersion, that of the exact fit."""
        ...

    def log_likelihood(self, saturated: float, deviance: float, num_rows: int) -> float:
        """Log-likelihood of a fit from totals over all rows; an estimated dispersion is the deviance for each row."""
        ...

    def accepts(self, y: Numbers) -> bool:
        """Whether the outcomes can be of this family."""
        ...


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Normal outcomes, whose mean is the predictor."""

    name: str = "gaussian"
    has_dispersion: bool = True
    is_canonical: bool = True
    has_pearson: bool = False
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

    def information(self, eta: Numbers) -> Numbers:
        """Information of one outcome: 1."""
        return np.ones_like(eta)

    def score(self, y: Numbers, mu: Numbers) -> Numbers:
        """Residual of each outcome."""
        return y - mu

    def deviances(self, y: Numbers, mu: Numbers) -> Numbers:
        """Deviance of each outcome: its squared residual."""
        return np.asarray((y - mu) ** 2)

    def saturated(self, y: Numbers) -> Numbers:
        """Zeros: the log-likelihood follows from the deviance alone."""
        return np.zeros_like(y)

    def log_likelihood(self, saturated: float, deviance: float, num_rows: int) -> float:  # noqa: ARG002
        """Log-likelihood of normal outcomes around the fit."""
        return -num_rows / 2 * (math.log(2 * math.pi * deviance / num_rows) + 1)

    def accepts(self, y: Numbers) -> bool:
        """Whether all outcomes are finite."""
        return bool(np.isfinite(y).all())


@dataclass(frozen=True, slots=True)
class Binomial:
    """Outcomes of 0 or 1, whose log-odds are the predictor."""

    name: str = "binomial"
    has_dispersion: bool = False
    is_canonical: bool = True
    has_pearson: bool = False
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

    def information(self, eta: Numbers) -> Numbers:
        """Variance of one outcome; from both tails, so that no digits cancel."""
        return np.asarray(expit(eta) * expit(-eta))

    def score(self, y: Numbers, mu: Numbers) -> Numbers:
        """Residual of each outcome."""
        return y - mu

    def deviances(self, y: Numbers, mu: Numbers) -> Numbers:
        """Twice the log-likelihood that each outcome lacks."""
        return np.asarray(2 * (xlogy(y, y) - xlogy(y, mu) + xlogy(1 - y, 1 - y) - xlogy(1 - y, 1 - mu)))

    def saturated(self, y: Numbers) -> Numbers:
        """Log-likelihood of outcomes that are their own mean."""
        return np.asarray(xlogy(y, y) + xlogy(1 - y, 1 - y))

    def log_likelihood(self, saturated: float, deviance: float, num_rows: int) -> float:  # noqa: ARG002
        """Log-likelihood of the exact fit less half the deviance."""
        return saturated - deviance / 2

    def accepts(self, y: Numbers) -> bool:
        """Whether all outcomes are 0 or 1."""
        return bool(((y == 0) | (y == 1)).all())


@dataclass(frozen=True, slots=True)
class Poisson:
    """Counts, the logarithm of whose mean is the predictor."""

    name: str = "poisson"
    has_dispersion: bool = False
    is_canonical: bool = True
    has_pearson: bool = False
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

    def information(self, eta: Numbers) -> Numbers:
        """Variance of one outcome: the mean."""
        return np.exp(eta)

    def score(self, y: Numbers, mu: Numbers) -> Numbers:
        """Residual of each outcome."""
        return y - mu

    def deviances(self, y: Numbers, mu: Numbers) -> Numbers:
        """Twice the log-likelihood that each count lacks."""
        return np.asarray(2 * (xlogy(y, y) - xlogy(y, mu) - (y - mu)))

    def saturated(self, y: Numbers) -> Numbers:
        """Log-likelihood of counts that are their own mean."""
        return np.asarray(xlogy(y, y) - y - gammaln(y + 1))

    def log_likelihood(self, saturated: float, deviance: float, num_rows: int) -> float:  # noqa: ARG002
        """Log-likelihood of the exact fit less half the deviance."""
        return saturated - deviance / 2

    def accepts(self, y: Numbers) -> bool:
        """Whether no outcome is negative or infinite."""
        return bool(((y >= 0) & np.isfinite(y)).all())


@dataclass(frozen=True, slots=True)
class Gamma:
    """Outcomes above 0 whose spread grows with their mean; the logarithm of the mean is the predictor."""

    name: str = "gamma"
    has_dispersion: bool = True
    is_canonical: bool = False
    has_pearson: bool = True
    expected: str = "finite numbers above 0 are expected"

    def start(self, y: Numbers, weights: Numbers) -> Numbers:  # noqa: ARG002
        """Means to begin with: the outcomes."""
        return y

    def link(self, mu: Numbers) -> Numbers:
        """Predictor of a mean: its logarithm."""
        return np.log(mu)

    def mean(self, eta: Numbers) -> Numbers:
        """Mean of a predictor: the exponential function."""
        return np.exp(eta)

    def information(self, eta: Numbers) -> Numbers:
        """Information of one outcome: 1."""
        return np.ones_like(eta)

    def score(self, y: Numbers, mu: Numbers) -> Numbers:
        """Residual of each outcome, as a part of its mean."""
        return np.asarray((y - mu) / mu)

    def deviances(self, y: Numbers, mu: Numbers) -> Numbers:
        """Deviance of each outcome."""
        return np.asarray(2 * ((y - mu) / mu - np.log(y / mu)))

    def saturated(self, y: Numbers) -> Numbers:
        """Minus the logarithm of each outcome."""
        return -np.log(y)

    def log_likelihood(self, saturated: float, deviance: float, num_rows: int) -> float:
        """Log-likelihood with the shape that the deviance gives, as R counts it."""
        shape = num_rows / deviance
        return saturated + num_rows * (shape * math.log(shape) - shape - math.lgamma(shape)) - shape * deviance / 2

    def accepts(self, y: Numbers) -> bool:
        """Whether all outcomes are above 0 and finite."""
        return bool(((y > 0) & np.isfinite(y)).all())


@dataclass(frozen=True, slots=True)
class NegativeBinomial:
    """Counts of variance mean + mean^2 / theta, which is more than a Poisson model says; the logarithm of the mean is the predictor."""

    theta: float
    name: str = "negative-binomial"
    has_dispersion: bool = False
    is_canonical: bool = False
    has_pearson: bool = False
    expected: str = "finite numbers from 0 on are expected"

    def start(self, y: Numbers, weights: Numbers) -> Numbers:  # noqa: ARG002
        """Means to begin with: the counts, and a little more where they have no logarithm."""
        return np.where(y == 0, 1 / 6, y)

    def link(self, mu: Numbers) -> Numbers:
        """Predictor of a mean: its logarithm."""
        return np.log(mu)

    def mean(self, eta: Numbers) -> Numbers:
        """Mean of a predictor: the exponential function."""
        return np.exp(eta)

    def information(self, eta: Numbers) -> Numbers:
        """Information of one count about its predictor."""
        mu = np.exp(eta)
        return np.asarray(mu * (self.theta / (self.theta + mu)))

    def score(self, y: Numbers, mu: Numbers) -> Numbers:
        """Residual of each count, less where counts of this mean scatter more."""
        return np.asarray((y - mu) * (self.theta / (self.theta + mu)))

    def deviances(self, y: Numbers, mu: Numbers) -> Numbers:
        """Twice the log-likelihood that each count lacks."""
        return np.asarray(2 * (xlogy(y, y) - xlogy(y, mu) - (y + self.theta) * np.log((y + self.theta) / (mu + self.theta))))

    def saturated(self, y: Numbers) -> Numbers:
        """Log-likelihood of counts that are their own mean."""
        theta = self.theta
        known = gammaln(y + theta) - gammaln(theta) - gammaln(y + 1)
        return np.asarray(known + xlogy(y, y) - xlogy(y, y + theta) - theta * np.log1p(y / theta))

    def log_likelihood(self, saturated: float, deviance: float, num_rows: int) -> float:  # noqa: ARG002
        """Log-likelihood of the exact fit less half the deviance."""
        return saturated - deviance / 2

    def accepts(self, y: Numbers) -> bool:
        """Whether no outcome is negative or infinite."""
        return bool(((y >= 0) & np.isfinite(y)).all())


NEGATIVE_BINOMIAL = "negative-binomial"

FAMILIES: dict[str, Family] = {"gaussian": Gaussian(), "binomial": Binomial(), "poisson": Poisson(), "gamma": Gamma()}
"""Families that have no parameter of their own."""
