"""Paired intervals cover the true difference as often as they say, and are what others compute by another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from sklearn.metrics import roc_auc_score

from p2pfl.tasks import Metric
from p2pfl.tasks.intervals import interval_of_difference, left_out_interval
from p2pfl.tasks.metrics import accuracy, auroc, balanced_accuracy, log_loss

DRAWS = 1000
FEWEST = binom.ppf(0.001, DRAWS, 0.95) / DRAWS  # of intervals that cover 95 times in 100, in one of a thousand trials: .928
MOST = 0.985  # intervals from few rows are cautious, as they should be; how far is what this holds


def drawn(generator, rows, apart, other_apart, common):
    """Scores of two models whose errors go together, of two normal classes with means so far apart."""
    positive = generator.random(rows) < 0.4
    positive[:4] = [True, True, False, False]
    noise = generator.normal(size=(2, rows))
    scores = noise[0] + apart * positive
    others = common * noise[0] + math.sqrt(1 - common**2) * noise[1] + other_apart * positive
    return torch.from_numpy(scores), torch.from_numpy(others), torch.from_numpy(positive.astype(np.float32))


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("rows", "apart", "other_apart", "common"),
    [(40, 0.8, 0.8, 0.5), (150, 0.8, 1.0, 0.5), (60, 1.5, 1.8, 0.5), (150, 2.0, 2.0, 0.9), (114, 3.0, 3.3, 0.9)],
)
def test_aurocs_paired_interval_covers_the_true_difference(rows, apart, other_apart, common):
    generator = np.random.default_rng(0)
    truth = norm.cdf(apart / math.sqrt(2)) - norm.cdf(other_apart / math.sqrt(2))
    found = [interval_of_difference(auroc, *drawn(generator, rows, apart, other_apart, common)) for _ in range(DRAWS)]
    covered = np.mean([interval.low <= truth <= interval.high for interval in found])

    assert FEWEST <= covered <= MOST


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("rows", "both", "one", "other"), [(30, 0.7, 0.1, 0.05), (100, 0.85, 0.06, 0.02), (200, 0.6, 0.1, 0.1), (400, 0.6, 0.2, 0.1)]
)
def test_accuracys_paired_interval_covers_the_true_difference(rows, both, one, other):
    generator, covered = np.random.default_rng(1), 0
    targets = torch.ones(rows)
    for _ in range(DRAWS):
        case = generator.choice(4, size=rows, p=[both, one, other, 1 - both - one - other])
        first, second = (torch.from_numpy(np.where(np.isin(case, right), 1.0, -1.0)) for right in ((0, 1), (0, 2)))
        interval = interval_of_difference(accuracy, first, second, targets)
        covered += interval.low <= one - other <= interval.high

    assert FEWEST <= covered / DRAWS <= 0.99  # of 30 rows with few that differ


@pytest.mark.no_cover
def test_a_gain_by_leaving_out_rows_covers_the_true_one():
    generator, covered, trials = np.random.default_rng(2), 0, 300
    for trial in range(trials):
        targets = generator.normal(size=80)
        first, second = (targets + spread * generator.normal(size=80) for spread in (0.8, 1.0))
        squares = (first - targets) ** 2 - (second - targets) ** 2
        interval = left_out_interval(lambda rows, s=squares: s[rows].mean(), 80, np.random.default_rng(trial), squares.mean())
        covered += interval.low <= 0.64 - 1 <= interval.high

    # an interval of a mean of 80 skewed values covers some 94 times in 100
    assert binom.ppf(0.001, trials, 0.94) / trials <= covered / trials <= MOST


@pytest.mark.no_cover
@pytest.mark.parametrize("metric", [balanced_accuracy, log_loss])
def test_other_paired_intervals_cover_the_true_difference(metric):
    generator, trials = np.random.default_rng(12), 300
    many = drawn(generator, 200_000, 1.0, 1.4, 0.5)
    truth, covered = metric(many[0], many[2]) - metric(many[1], many[2]), 0
    for _ in range(trials):
        interval = interval_of_difference(metric, *drawn(generator, 100, 1.0, 1.4, 0.5))
        covered += interval.low <= truth <= interval.high

    assert binom.ppf(0.001, trials, 0.94) / trials <= covered / trials <= 0.99


def test_the_kind_decides_and_not_who_wrote_the_function():
    first, second, targets = drawn(np.random.default_rng(13), 60, 1.0, 1.2, 0.5)
    metric = Metric(lambda outputs, targets: roc_auc_score(targets.numpy(), outputs.numpy()), kind="auroc")
    values = tuple(metric(outputs, targets) for outputs in (first, second))

    assert interval_of_difference(metric, first, second, targets, values=values) == interval_of_difference(auroc, first, second, targets)
    assert interval_of_difference(metric, first, second, targets, values=(0.5, values[1])) is None


def test_aurocs_is_put_together_from_all_pairs():
    """DeLong's covariance from the matrix of pairs, and Zou and Yue's formula written out."""
    first, second, targets = drawn(np.random.default_rng(3), 50, 1.0, 1.4, 0.6)
    first = first.round(decimals=1)  # ties
    positive, z = targets.numpy() > 0, norm.ppf(0.975)
    pairs = [np.sign(s[positive][:, None] - s[~positive][None]) / 2 + 0.5 for s in (first.numpy(), second.numpy())]
    areas = [roc_auc_score(positive, s) for s in (first, second)]
    rows, columns = np.cov([p.mean(axis=1) for p in pairs]), np.cov([p.mean(axis=0) for p in pairs])
    shared = rows / positive.sum() + columns / (~positive).sum()
    ends = []
    for number, area in enumerate(areas):
        reach = z * math.sqrt(shared[number, number]) / (area * (1 - area))
        ends.append([1 / (1 + math.exp(-(math.log(area / (1 - area)) + sign * reach))) for sign in (-1, 1)])
    common = shared[0, 1] / math.sqrt(shared[0, 0] * shared[1, 1])
    (low, high), (other_low, other_high) = ends
    down = [areas[0] - low, other_high - areas[1]]
    up = [high - areas[0], areas[1] - other_low]
    interval = interval_of_difference(auroc, first, second, targets)

    gain = areas[0] - areas[1]
    assert 0.3 < common < 0.9
    assert interval.method == "Zou and Yue, DeLong's covariance"
    assert interval.low == pytest.approx(gain - math.sqrt(down[0] ** 2 + down[1] ** 2 - 2 * common * down[0] * down[1]), abs=1e-12)
    assert interval.high == pytest.approx(gain + math.sqrt(up[0] ** 2 + up[1] ** 2 - 2 * common * up[0] * up[1]), abs=1e-12)


def test_of_many_rows_aurocs_is_delongs_own():
    first, second, targets = drawn(np.random.default_rng(4), 20_000, 1.0, 1.2, 0.5)
    positive = targets.numpy() > 0
    parts = []
    for scores in (first.numpy(), second.numpy()):
        above = np.searchsorted(np.sort(scores[~positive]), scores[positive]) / (~positive).sum()
        below = 1 - np.searchsorted(np.sort(scores[positive]), scores[~positive]) / positive.sum()
        parts.append((above, below))
    apart = [one - other for one, other in zip(*parts, strict=True)]
    error = math.sqrt(sum(part.var(ddof=1) / len(part) for part in apart))
    interval = interval_of_difference(auroc, first, second, targets)

    assert interval.low == pytest.approx(apart[0].mean() - norm.ppf(0.975) * error, abs=0.02 * error)
    assert interval.high == pytest.approx(apart[0].mean() + norm.ppf(0.975) * error, abs=0.02 * error)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [((36, 12, 2, 0), 0.0569, 0.3404), ((54, 0, 0, 0), -0.0664, 0.0664), ((0, 54, 0, 0), 0.9061, 1.0)],
)
def test_accuracys_is_newcombes_table(counts, low, high):
    """Method 10 for some of the paper's own examples: 36, 12, 2, 0 of 50; all alike; all different."""
    case = np.repeat(np.arange(4), counts)
    first, second = (torch.from_numpy(np.where(np.isin(case, right), 1.0, -1.0)) for right in ((0, 1), (0, 2)))
    interval = interval_of_difference(accuracy, first, second, torch.ones(len(case)))

    assert (interval.low, interval.high, interval.method) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5), "Newcombe")


def test_accuracys_takes_half_a_row_from_what_goes_together():
    """Newcombe's formula for 20 rows that both have right, 5 and 3 that one has, 12 that neither has."""
    case = np.repeat(np.arange(4), (20, 5, 3, 12))
    first, second = (torch.from_numpy(np.where(np.isin(case, right), 1.0, -1.0)) for right in ((0, 1), (0, 2)))
    (low, high), (other_low, other_high) = (proportion_confint(number) for number in (25, 23))
    common = (20 * 12 - 5 * 3 - 40 / 2) / math.sqrt(25 * 15 * 23 * 17)
    down, up = (25 / 40 - low, other_high - 23 / 40), (high - 25 / 40, 23 / 40 - other_low)
    below, above = (math.sqrt(a * a - 2 * common * a * b + b * b) for a, b in (down, up))
    interval = interval_of_difference(accuracy, first, second, torch.ones(40))

    assert (interval.low, interval.high) == pytest.approx((2 / 40 - below, 2 / 40 + above), abs=1e-12)


def proportion_confint(number, rows=40):
    """Wilson's, as the roots of (share - p)**2 = z**2 p (1 - p) / rows."""
    share, square = number / rows, norm.ppf(0.975) ** 2
    return sorted(np.roots([1 + square / rows, -2 * share - square / rows, share**2]))


def test_two_perfect_models_on_few_rows_are_not_surely_alike():
    outputs, targets = torch.tensor([-2.0, -1.0, 1.0, 2.0, 3.0]), torch.tensor([0.0, 0, 1, 1, 1])
    interval = interval_of_difference(auroc, outputs, outputs * 2, targets)

    assert interval.method == "Zou and Yue, Wilson on the rarer class"
    assert interval.low == pytest.approx(-interval.high)
    assert interval.high == pytest.approx(1 - 2 / (2 + norm.ppf(0.975) ** 2))  # Wilson's of 2 in 2


def test_where_there_is_none_none_is_given():
    outputs, targets = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0])

    assert interval_of_difference(lambda outputs, targets: 0.5, outputs, outputs, targets) is None
    assert interval_of_difference(auroc, outputs, outputs, torch.ones(2)) is None
    assert interval_of_difference(auroc, outputs, torch.full((2,), math.nan), targets) is None
    assert interval_of_difference(accuracy, torch.full((2,), math.nan), outputs, targets) is None
