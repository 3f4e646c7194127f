import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from scipy.stats import rankdata
from torch.nn import functional as F

from p2pfl.errors import TaskError
from p2pfl.tasks import accuracy, auroc, balanced_accuracy, log_loss
from p2pfl.tasks.metrics import CLASSIFICATION, fault_of_classes

# probabilities above 0.5 for rows 1, 2, 4; right are rows 0, 1, 4
LOGITS = torch.tensor([-2.0, 1.0, 0.5, -1.0, 3.0])
TARGETS = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_two_classes_of_one_logit_a_row(shape):
    outputs, targets = LOGITS.reshape(shape), TARGETS.reshape(shape)

    assert accuracy(outputs, targets) == 3 / 5
    assert balanced_accuracy(outputs, targets) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert auroc(outputs, targets) == pytest.approx(5 / 6, rel=1e-14)
    assert log_loss(outputs, targets) == pytest.approx(
        F.binary_cross_entropy_with_logits(LOGITS.double(), TARGETS.double()).item(), rel=1e-14
    )


def test_a_probability_of_exactly_one_half_is_the_first_class():
    assert accuracy(torch.zeros(1, 1), torch.zeros(1, 1)) == 1.0


def test_several_classes_of_one_logit_each():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 0.0]])
    targets = torch.tensor([0, 1, 2, 2])

    assert accuracy(logits, targets) == 1 / 2
    assert balanced_accuracy(logits, targets) == pytest.approx(2 / 3)
    # the definition: the share of (inside, outside) pairs that are in order, ties counting half
    scores = logits.double().softmax(-1)
    pairs = [
        sum(float(scores[i, c] > scores[j, c]) + 0.5 * float(scores[i, c] == scores[j, c]) for i in inside for j in outside)
        / (len(inside) * len(outside))
        for c in range(3)
        for inside, outside in [([i for i in range(4) if targets[i] == c], [j for j in range(4) if targets[j] != c])]
    ]
    assert auroc(logits, targets) == pytest.approx(sum(pairs) / 3)
    assert log_loss(logits, targets) == pytest.approx(F.cross_entropy(logits.double(), targets).item(), rel=1e-14)


def test_classes_that_the_rows_lack_are_left_out_of_the_means():
    logits = torch.tensor([[2.0, 0.0, 5.0], [2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    targets = torch.tensor([0, 0, 1])

    assert balanced_accuracy(logits, targets) == (1 / 2 + 1) / 2
    assert auroc(logits, targets) == (1 / 2 + 1) / 2
    assert accuracy(logits, targets) == pytest.approx(2 / 3)


def test_one_class_leaves_ranking_and_balance_undefined():
    outputs, targets = torch.tensor([[1.0], [-1.0]]), torch.ones(2, 1)

    assert math.isnan(auroc(outputs, targets))
    assert math.isnan(balanced_accuracy(outputs, targets))
    assert accuracy(outputs, targets) == 0.5
    assert log_loss(outputs, targets) == pytest.approx(F.binary_cross_entropy_with_logits(outputs, targets).item(), rel=1e-6)


@pytest.mark.parametrize("metric", CLASSIFICATION.values())
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_have_no_figure(metric, value):
    assert math.isnan(metric(torch.tensor([[0.0], [value]]), torch.tensor([[0.0], [1.0]])))


@pytest.mark.parametrize("metric", CLASSIFICATION.values())
def test_no_rows_have_no_figure(metric):
    assert math.isnan(metric(torch.zeros(0, 1), torch.zeros(0, 1)))


@pytest.mark.parametrize("metric", CLASSIFICATION.values())
def test_figures_are_plain_floats_also_for_saturated_outputs(metric):
    assert type(metric(torch.tensor([[1e30], [-1e30]]), torch.tensor([[1.0], [0.0]]))) is float
    assert type(metric(torch.tensor([[1e30], [-1e30]]), torch.tensor([[0.0], [1.0]]))) is float


def test_outputs_and_targets_of_different_lengths_are_a_callers_fault():
    with pytest.raises(ValueError, match="2 rows of outputs, 1 targets"):
        accuracy(torch.zeros(2, 1), torch.zeros(1, 1))


@pytest.mark.parametrize("metric", CLASSIFICATION.values())
@pytest.mark.parametrize(
    ("targets", "fault"),
    [
        ([2.0, 1, 2, 1], "targets 1 and 2: expected 0 and 1"),
        ([1.0, -1, 1, -1], "targets -1 and 1: expected 0 and 1"),
        ([255.0, 0, 255, 0], "targets 0 and 255: expected 0 and 1"),
        ([0.9, 0, 0.9, 0], "targets 0 and 0.9: expected 0 and 1"),
        ([2.0, 2, 2, 2], "target 2: expected 0 and 1"),
    ],
    ids=["one and two", "minus one and one", "of an image", "soft", "one class"],
)
def test_targets_of_another_coding_are_refused_with_the_classes_found(metric, targets, fault):
    with pytest.raises(TaskError) as caught:
        metric(torch.tensor([[2.0], [-2.0], [1.0], [-1.0]]), torch.tensor(targets)[:, None])

    assert str(caught.value) == fault


@pytest.mark.parametrize("targets", [[1, 2, 3], [-1, 0, 1], [0, 1, 3]])
def test_classes_beyond_the_outputs_are_refused(targets):
    with pytest.raises(TaskError, match="expected whole numbers from 0 to 2"):
        accuracy(torch.zeros(3, 3), torch.tensor(targets))


def test_many_different_targets_are_counted_and_not_listed():
    assert fault_of_classes(np.arange(20), 10) == "targets of 20 different whole numbers from 0 to 19: expected whole numbers from 0 to 9"
    assert fault_of_classes(np.arange(20) / 7, 2) == "targets of 20 different values that are not all whole numbers: expected 0 and 1"


def test_truth_values_are_classes():
    assert accuracy(torch.tensor([1.0, -1.0]), torch.tensor([True, False])) == 1.0


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_figures_are_scikit_learns(classes, seed):
    draw = torch.Generator().manual_seed(seed)
    number = int(torch.randint(classes + 3, 60, (), generator=draw))
    targets = torch.cat([torch.arange(classes), torch.randint(0, classes, (number,), generator=draw)])
    logits = torch.randn(len(targets), 1 if classes == 2 else classes, generator=draw).mul(3).round(decimals=1).double()  # with ties
    of_two = torch.cat([torch.zeros_like(logits), logits], dim=1) if classes == 2 else logits
    probabilities, chosen = of_two.softmax(dim=1).numpy(), of_two.argmax(dim=1).numpy()
    rest = [sklearn.metrics.roc_auc_score(targets == label, probabilities[:, label]) for label in range(classes)]

    assert accuracy(logits, targets) == pytest.approx(sklearn.metrics.accuracy_score(targets, chosen), rel=1e-14)
    assert balanced_accuracy(logits, targets) == pytest.approx(sklearn.metrics.balanced_accuracy_score(targets, chosen), rel=1e-14)
    assert auroc(logits, targets) == pytest.approx(sum(rest) / classes, rel=1e-13)
    assert log_loss(logits, targets) == pytest.approx(sklearn.metrics.log_loss(targets, probabilities), rel=1e-13)


def test_a_row_that_is_wrong_beyond_doubt_counts_as_scikit_learn_counts_it():
    logits, targets = torch.tensor([[1e3], [0.5]]), torch.tensor([0, 1])
    probabilities = torch.sigmoid(logits[:, 0].double()).numpy()

    assert log_loss(logits, targets) == pytest.approx(sklearn.metrics.log_loss(targets, probabilities), rel=1e-14)


def test_log_loss_in_blocks_is_that_of_all_rows_to_the_last_bit(monkeypatch):
    logits, targets = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)), torch.arange(1000) % 3
    at_once = log_loss(logits, targets)
    monkeypatch.setattr("p2pfl.tasks.metrics._AT_ONCE", 7)

    assert log_loss(logits, targets) == at_once


@pytest.mark.parametrize("rows", [2, 9, 20_000])
def test_auroc_is_what_ranks_give_to_the_last_bit(rows):
    draw = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, 1, generator=draw).mul(3).round(decimals=2)  # with ties
    targets = torch.arange(rows)[torch.randperm(rows, generator=draw)] % 2
    positive, ranks = targets.numpy() == 1, rankdata(logits.double().numpy()[:, 0])
    number = positive.sum()

    assert auroc(logits, targets) == (ranks[positive].sum() - number * (number + 1) / 2) / (number * (rows - number))
