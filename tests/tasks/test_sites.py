"""Very many sites in one table are the same sites."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from p2pfl.algorithms import DPSGD
from p2pfl.errors import DataError
from p2pfl.tasks import Site, SiteTable, Split, Task, accuracy
from p2pfl.training import OptimizerSpec, Population, Recipe

NAMES = ["a", "b", "c"]
STARTS = torch.tensor([0, 4, 9, 12])
DRAWN = torch.tensor([3, 3, 7, 1, 0, 11, 2, 2, 5, 8, 9, 10], dtype=torch.int32)


def tables():
    torch.manual_seed(0)
    return torch.randn(12, 5), torch.randint(0, 3, (12,))


def task_of(sites):
    return Task(name="t", model=lambda: nn.Linear(5, 3), loss=F.cross_entropy, metrics={"accuracy": accuracy}, sites=sites)


def trained(sites, rounds=3):
    torch.manual_seed(1)
    model = nn.Linear(5, 3)
    recipe = Recipe(algorithm=DPSGD(), optimizer=OptimizerSpec(lr=0.1), batch_size=2, rounds=rounds, local_steps=3, seed=7)
    population = Population(task_of(sites), sites, range(3), model, recipe)
    for number in range(rounds):
        population.train(number)
    return population


@pytest.mark.parametrize("rows", [None, DRAWN])
def test_they_train_and_are_measured_as_sites_of_their_own(rows):
    inputs, targets = tables()
    split = Split(starts=STARTS, rows=rows)
    table = SiteTable(names=NAMES, inputs=inputs, targets=targets, train=split, test=split)
    copied = [Site(name=site.name, train=site.train, test=site.test) for site in table]
    together, apart = trained(table), trained(copied)

    assert torch.equal(together.estimate(), apart.estimate())
    assert together.evaluate() == apart.evaluate()
    assert together.evaluate([1]) == apart.evaluate()[1:2]
    assert [site.name for site in table[1:]] == ["b", "c"]
    assert table.by_name()["b"].train[0].tolist() == copied[1].train[0].tolist()


def test_the_data_are_not_copied():
    inputs, targets = tables()
    table = SiteTable(names=NAMES, inputs=inputs, targets=targets, train=Split(starts=STARTS))

    assert trained(table)._data.inputs.data_ptr() == inputs.data_ptr()
    assert table[0].train[0].data_ptr() == inputs.data_ptr()


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"names": ["a", "c", "b"]}, "names are not sorted, or one is there twice"),
        ({"names": ["a", "b"]}, "train: starts are int64[4]: expected int64[3]"),
        ({"train": Split(starts=torch.tensor([0, 4, 4, 12]))}, "site 'b' has no rows to train on"),
        ({"train": Split(starts=torch.tensor([0, 4, 9, 13]))}, "train: starts run from 0 to 13: expected rising numbers up to 12"),
        ({"train": Split(starts=STARTS, rows=DRAWN + 1)}, "train: rows run from 1 to 12: expected 0 to 11"),
        ({"targets": torch.zeros(11)}, "12 rows of inputs and 11 of targets: expected as many"),
        ({"inputs": torch.full((12, 5), torch.nan)}, "inputs: row 0 has a value that is not finite"),
        ({"inputs": torch.zeros(12, 5).index_fill(0, torch.tensor(7), torch.inf)}, "inputs: row 7 has a value that is not finite"),
        ({"targets": torch.zeros(12).index_fill(0, torch.tensor(11), torch.nan)}, "targets: row 11 has a value that is not finite"),
    ],
)
def test_what_does_not_fit_together_is_said(changes, finding):
    inputs, targets = tables()
    with pytest.raises(DataError) as caught:
        SiteTable(**{"names": NAMES, "inputs": inputs, "targets": targets, "train": Split(starts=STARTS), **changes})

    assert list(caught.value.findings) == [finding]


def test_a_name_that_is_no_members_is_refused_when_the_task_is_made():
    inputs, targets = tables()

    with pytest.raises(DataError, match="site '!': name = '!'"):
        task_of(SiteTable(names=["!", *NAMES[1:]], inputs=inputs, targets=targets, train=Split(starts=STARTS)))
