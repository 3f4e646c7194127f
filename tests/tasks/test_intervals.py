"""Intervals cover the truth as often as they say."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, t
from sklearn.metrics import roc_auc_score

from p2pfl.errors import TaskError
from p2pfl.tasks import Metric
from p2pfl.tasks.intervals import Interval, area_of, clipped, covariance, interval_of, left_out_interval
from p2pfl.tasks.metrics import accuracy, auroc, balanced_accuracy, log_loss, logits_and_classes
from thorough import first_fast


def drawn(generator, rows, apart):
    """Logits of two normal classes whose means are so far apart."""
    classes = generator.random(rows) < 0.4
    classes[:2] = [True, False]
    return torch.from_numpy(generator.normal(size=rows) + apart * classes), torch.from_numpy(classes.astype(np.float32))


@pytest.mark.parametrize(("rows", "apart"), [(40, 0.8), (150, 0.8), (150, 2.0), (60, 1.5)])
def test_aurocs_interval_covers_the_true_area(rows, apart):
    generator, truth = np.random.default_rng(0), norm.cdf(apart / math.sqrt(2))
    found = [interval_of(auroc, *drawn(generator, rows, apart)) for _ in range(1000)]
    covered = np.mean([interval.low <= truth <= interval.high for interval in found])

    assert 0.93 <= covered <= 0.98  # three standard errors of 1000 draws are .02


@pytest.mark.parametrize(("rows", "share"), [(30, 0.8), (100, 0.95), (200, 0.6)])
def test_accuracys_interval_covers_the_true_share(rows, share):
    generator = np.random.default_rng(1)
    targets, covered = torch.ones(rows), 0
    for _ in range(2000):
        right = torch.from_numpy(generator.random(rows) < share)
        interval = interval_of(accuracy, torch.where(right, 1.0, -1.0), targets)
        covered += interval.low <= share <= interval.high

    assert 0.93 <= covered / 2000 <= 0.98


def test_delongs_variance_is_that_of_all_pairs():
    outputs, targets = drawn(np.random.default_rng(2), 50, 1.0)
    outputs = outputs.round(decimals=1)  # ties
    scores, positive = outputs.numpy(), targets.numpy() > 0
    pairs = np.sign(scores[positive][:, None] - scores[~positive][None]) / 2 + 0.5
    area = pairs.mean()
    variance = pairs.mean(axis=1).var(ddof=1) / positive.sum() + pairs.mean(axis=0).var(ddof=1) / (~positive).sum()
    reach = norm.ppf(0.975) * math.sqrt(variance) / (area * (1 - area))
    interval = interval_of(auroc, outputs, targets)

    assert area == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    assert interval.method == "DeLong"
    assert math.log(interval.high / (1 - interval.high)) == pytest.approx(math.log(area / (1 - area)) + reach, abs=1e-9)
    assert math.log(interval.low / (1 - interval.low)) == pytest.approx(math.log(area / (1 - area)) - reach, abs=1e-9)


def drawn_of_many(generator, rows, apart, classes=4):
    """Logits of some classes, each higher by so much for its own rows; every class has two or more."""
    labels = generator.integers(classes, size=rows)
    labels[: 2 * classes] = np.tile(np.arange(classes), 2)
    logits = generator.normal(size=(rows, classes))
    logits[np.arange(rows), labels] += apart
    return torch.from_numpy(logits), torch.from_numpy(labels)


@pytest.mark.parametrize(("rows", "apart"), first_fast([(60, 1.0), (200, 1.0), (200, 2.0)]))
def test_the_interval_of_a_mean_of_areas_covers_the_true_one(rows, apart):
    truth = auroc(*drawn_of_many(np.random.default_rng(3), 200_000, apart))
    generator = np.random.default_rng(4)
    found = [interval_of(auroc, *drawn_of_many(generator, rows, apart)) for _ in range(500)]
    covered = np.mean([interval.low <= truth <= interval.high for interval in found])

    assert 0.92 <= covered <= 0.98  # three standard errors of 500 draws are .03


def test_a_mean_of_areas_varies_as_leaving_out_one_row_after_the_other_says():
    outputs, targets = drawn_of_many(np.random.default_rng(5), 120, 1.0)
    logits, classes = logits_and_classes(outputs, targets)
    area, rows = area_of(logits, classes), np.arange(120)
    without = np.array([auroc(outputs[rows != row], targets[rows != row]) for row in rows])
    jackknife = (119 / 120) * ((without - without.mean()) ** 2).sum()

    assert area.value == pytest.approx(auroc(outputs, targets), abs=1e-12)
    assert area.value == pytest.approx(roc_auc_score(classes, torch.softmax(outputs, 1), multi_class="ovr"), abs=1e-12)
    assert covariance(area, area) == pytest.approx(jackknife, rel=0.05)


def test_a_perfect_figure_on_few_rows_is_not_certain():
    outputs, targets = torch.tensor([-2.0, -1.0, 1.0, 2.0, 3.0]), torch.tensor([0.0, 0, 1, 1, 1])
    interval = interval_of(auroc, outputs, targets)

    assert interval.high == pytest.approx(1.0)
    assert interval.low == pytest.approx(2 / (2 + norm.ppf(0.975) ** 2), abs=1e-9)  # Wilson's of 2 in 2


@pytest.mark.parametrize(
    ("metric", "outputs", "targets"),
    [
        (lambda outputs, targets: 0.5, torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0])),
        (Metric(lambda outputs, targets: 0.5), torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0])),
        (auroc, torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0])),
        (auroc, torch.tensor([math.nan, -1.0]), torch.tensor([1.0, 0.0])),
        (accuracy, torch.zeros(0), torch.zeros(0)),
    ],
    ids=["nobody knows what", "nobody says what", "one class", "not finite", "no rows"],
)
def test_where_there_is_none_none_is_given(metric, outputs, targets):
    assert interval_of(metric, outputs, targets) is None


@pytest.mark.parametrize(("rows", "share"), first_fast([(60, 0.8), (200, 0.9)]))
def test_balanced_accuracys_interval_covers_the_true_one(rows, share):
    generator, covered = np.random.default_rng(6), 0
    for _ in range(500):
        classes = generator.random(rows) < 0.3
        classes[:2] = [True, False]
        right = generator.random(rows) < np.where(classes, share - 0.2, share)
        outputs = torch.from_numpy(np.where(right == classes, 1.0, -1.0))
        interval = interval_of(balanced_accuracy, outputs, torch.from_numpy(classes))
        covered += interval.low <= share - 0.1 <= interval.high

    assert 0.92 <= covered / 500 <= 0.985


def test_log_losss_interval_is_students_of_the_rows():
    outputs, targets = drawn(np.random.default_rng(7), 60, 1.0)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets.double(), reduction="none").numpy()
    ends = t.interval(0.95, 59, losses.mean(), losses.std(ddof=1) / math.sqrt(60))
    interval = interval_of(log_loss, outputs, targets)

    assert (interval.low, interval.high, interval.method) == (pytest.approx(ends[0]), pytest.approx(ends[1]), "Student's t")


def own_auroc(outputs, targets):
    return roc_auc_score(targets.numpy(), outputs.sigmoid().numpy())


@functools.wraps(auroc)
def wrapped_auroc(outputs, targets):
    return auroc(outputs, targets)


@pytest.mark.parametrize(
    "metric",
    [Metric(own_auroc, kind="auroc"), Metric(auroc), functools.partial(auroc), wrapped_auroc, Metric(functools.partial(wrapped_auroc))],
)
def test_the_kind_decides_and_not_who_wrote_the_function(metric):
    outputs, targets = drawn(np.random.default_rng(8), 80, 1.0)

    assert interval_of(metric, outputs, targets, value=metric(outputs, targets)) == interval_of(auroc, outputs, targets)


def test_a_figure_that_is_not_its_kinds_has_not_its_kinds_interval():
    outputs, targets = drawn(np.random.default_rng(9), 80, 1.0)

    assert interval_of(Metric(accuracy, kind="auroc"), outputs, targets, value=accuracy(outputs, targets)) is None


def test_a_kind_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="kind = 'auc': expected one of auroc, accuracy, balanced_accuracy, concordance, mean, other"):
        Metric(auroc, kind="auc")
    with pytest.raises(ValueError, match="function is float: expected a function"):
        Metric(0.5)


@pytest.mark.parametrize(("rows", "apart"), first_fast([(150, 0.8), (60, 0.8), (150, 1.5)]))
def test_leaving_out_rows_covers_the_true_area(rows, apart):
    generator, truth, covered = np.random.default_rng(10), norm.cdf(apart / math.sqrt(2)), 0
    for _ in range(400):
        outputs, targets = drawn(generator, rows, apart)
        found = left_out_interval(lambda kept, o=outputs, t=targets: auroc(o[kept], t[kept]), rows, generator, auroc(outputs, targets))
        interval = clipped(found, "auroc")
        covered += interval.low <= truth <= interval.high

    assert 0.91 <= covered / 400 <= 0.985  # three standard errors of 400 draws are .033


def test_leaving_out_rows_is_the_same_again_and_students_of_a_mean():
    values = np.random.default_rng(11).normal(size=40)
    found = [left_out_interval(lambda kept: values[kept].mean(), 40, np.random.default_rng(12), values.mean()) for _ in range(2)]
    group = np.arange(40) % 20
    np.random.default_rng(12).shuffle(group)
    means = np.array([values[group == number].mean() for number in range(20)])
    ends = t.interval(0.95, 19, values.mean(), means.std(ddof=1) / math.sqrt(20))

    assert found[0] == found[1]
    assert (found[0].low, found[0].high) == pytest.approx(ends)
    assert found[0].method == "jackknife of 20 groups of rows"


def test_where_leaving_out_rows_gives_none_the_reason_is_said():
    def broken(rows):
        raise TaskError("no", task="a", function="metric 'b'")

    def none(statistic, rows=30):
        return left_out_interval(statistic, rows, np.random.default_rng(0), 1.0)

    assert none(lambda rows: 1.0, 9) == "of fewer than 10 test rows none is given"
    assert none(lambda rows: float("nan") if 0 not in rows else 1.0) == "the metric is undefined where some rows are left out"
    assert none(broken) == "the metric fails where some rows are left out"
    assert none(lambda rows: 1.0) == "the metric stays as it is where rows are left out"


def test_what_ends_at_one_is_cut_there():
    assert clipped(Interval(0.9, 1.1, "m"), "auroc") == Interval(0.9, 1.0, "m")
    assert clipped(Interval(0.9, 1.1, "m"), "other") == Interval(0.9, 1.1, "m")
