import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from p2pfl.errors import ConfigError, DataError
from p2pfl.tasks import Site, SiteTable, Split, Task, hold_out, hold_out_everywhere, partition
from p2pfl.tasks.partition import MIN_OF_CLASS, MIN_ROWS, classes_of, missing_classes, node_names, split_rows

RULES = [{"name": "iid"}, {"name": "dirichlet", "alpha": 0.3}, {"name": "unequal", "ratio": 0.7}, {"name": "unequal", "sizes": "linear"}]


def numbered_task(num_train=60, num_test=40, prepares=(None, None), **fields):
    """Two sites whose inputs are the rows' numbers; every fourth row is of class 1."""
    numbers = torch.arange(2 * (num_train + num_test), dtype=torch.float32)[:, None]
    targets = (numbers % 4 == 0).float()
    ends = [0, num_train, num_train + num_test, 2 * num_train + num_test, len(numbers)]
    parts = [(numbers[a:b], targets[a:b]) for a, b in pairwise(ends)]
    sites = [
        Site(name=name, train=parts[2 * i], test=parts[2 * i + 1] if num_test else None, prepare=prepares[i], groups={})
        for i, name in enumerate("ab")
    ]
    return Task(
        **{"name": "numbers", "model": lambda: nn.Linear(1, 1), "loss": nn.functional.mse_loss, "metrics": {}, "sites": sites, **fields}
    )


@pytest.mark.parametrize("rule", RULES)
def test_every_row_is_used_once(rule):
    task = partition(numbered_task(), 7, rule, seed=1)
    rows = torch.cat([torch.cat([site.train[0], site.test[0]]) for site in task.sites]).flatten().sort().values

    assert [site.name for site in task.sites] == [f"hospital-{i}" for i in range(7)]
    assert rows.tolist() == list(range(200))


@given(
    classes=st.lists(st.integers(0, 3), min_size=2, max_size=120),
    nodes=st.integers(1, 60),
    rule=st.sampled_from(RULES),
    seed=st.integers(0, 2**63),
    test_share=st.floats(0.01, 0.99),
)
def test_shares_are_an_exact_cover_with_rows_for_every_part(classes, nodes, rule, seed, test_share):
    nodes = min(nodes, len(classes) // 2)
    parts = split_rows(np.array(classes), nodes, rule, seed, test_share=test_share)

    assert sorted(np.concatenate([np.concatenate(part) for part in parts]).tolist()) == list(range(len(classes)))
    assert all(len(train) and len(test) for train, test in parts)
    assert min(len(train) + len(test) for train, test in parts) >= min(MIN_ROWS, len(classes) // nodes)
    for train, test in parts:
        in_train, in_test = ({classes[row] for row in rows} for rows in (train, test))
        seen = [classes[row] for row in (*train, *test)]
        assert {label for label in seen if seen.count(label) > 1} <= in_train & in_test


@pytest.mark.parametrize("rule", RULES)
def test_a_partition_follows_from_its_seed(rule):
    def rows(seed):
        return [site.train[0].flatten().tolist() for site in partition(numbered_task(), 5, rule, seed).sites]

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)


def test_iid_deals_out_sizes_that_differ_by_one_at_most():
    parts = split_rows(np.zeros(100), 7, {"name": "iid"}, 0, test_share=0.25)

    assert sorted(len(train) + len(test) for train, test in parts) == [14] * 5 + [15] * 2


def test_unequal_follows_the_named_rule_above_the_minimum():
    def sizes(**options):
        parts = split_rows(np.zeros(1000), 3, {"name": "unequal", **options}, 0, test_share=0.25)
        return [len(train) + len(test) for train, test in parts]

    assert sizes(ratio=0.5) == [10 + 554, 10 + 277, 10 + 139]
    assert sizes(sizes="linear") == [10 + 485, 10 + 323, 10 + 162]
    assert sizes(sizes=[1, 1, 2]) == [10 + 242, 10 + 243, 10 + 485]


def test_dirichlet_is_less_alike_the_smaller_alpha():
    classes = np.arange(2000) % 2

    def spread(alpha):
        parts = split_rows(classes, 5, {"name": "dirichlet", "alpha": alpha}, 0, test_share=0.25)
        return np.std([classes[np.concatenate(part)].mean() for part in parts])

    # a share of Dirichlet(alpha) of 5 has variance 4 / (25 (5 alpha + 1)): 0.0028 of a mean of 0.2 at alpha 10000
    assert spread(10_000) < 0.01
    assert spread(0.5) > 0.15


@pytest.mark.parametrize("seed", range(20))
def test_dirichlet_leaves_enough_of_both_classes_everywhere_where_it_can(seed):
    classes = (np.arange(569) < 212).astype(int)
    for train, test in split_rows(classes, 5, {"name": "dirichlet", "alpha": 0.5}, seed, test_share=0.3):
        assert np.bincount(classes[np.concatenate([train, test])], minlength=2).min() >= MIN_OF_CLASS


def test_a_very_small_alpha_still_gives_every_node_rows_and_says_who_lacks_a_class(caplog):
    with caplog.at_level(logging.WARNING):
        task = partition(numbered_task(), 8, {"name": "dirichlet", "alpha": 0.001}, seed=0)
    lacking = [site.name for site in task.sites if len(site.test[1].unique()) == 1]

    assert min(len(site.train[0]) + len(site.test[0]) for site in task.sites) == MIN_ROWS
    assert len(lacking) >= 5
    assert [note.split("'")[1] for note in task.notes] == lacking
    assert lacking[0] in caplog.text


def test_a_missing_class_is_told_with_what_it_means():
    rows = (torch.zeros(2, 1), torch.tensor([[0.0], [1.0]]))
    ones = (torch.zeros(2, 1), torch.ones(2, 1))

    assert missing_classes([Site(name="a", train=rows, test=rows), Site(name="b", train=rows, test=ones)]) == (
        "site 'b' has no test row of class 0: AUROC and balanced accuracy there are undefined",
    )
    assert missing_classes([Site(name="a", train=rows, test=None)]) == ()


def test_test_rows_keep_their_share_and_are_stratified():
    for site in partition(numbered_task(), 2, {"name": "iid"}, seed=0).sites:
        ones = int(site.train[1].sum() + site.test[1].sum())

        assert int(site.test[1].sum()) == round(0.4 * ones)
        assert len(site.test[1]) - int(site.test[1].sum()) == round(0.4 * (100 - ones))


def test_a_task_without_test_rows_is_partitioned_without():
    task = partition(numbered_task(num_test=0), 3, {"name": "iid"}, seed=0)

    assert [site.test for site in task.sites] == [None] * 3


def test_prepare_is_kept_only_where_it_is_everybodys():
    one = torch.from_numpy
    same = partition(numbered_task(prepares=(one, one)), 3, {"name": "iid"}, seed=0)
    own = partition(numbered_task(prepares=(one, torch.as_tensor)), 3, {"name": "iid"}, seed=0)

    assert [site.prepare for site in same.sites] == [one] * 3
    assert [site.prepare for site in own.sites] == [None] * 3


def test_names_are_padded_so_that_sorting_keeps_their_order():
    names = node_names("hospital", 101)

    assert (names[0], names[7], names[100]) == ("hospital-000", "hospital-007", "hospital-100")
    assert sorted(names) == names
    assert node_names("hospital", 1) == ["hospital-0"]


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        ({"name": "dirichelet"}, r"partition\.name = 'dirichelet': one of iid, dirichlet, unequal"),
        ({}, r"partition\.name = None"),
        ({"name": "iid", "alpha": 1}, r"partition\.alpha = 1: iid takes no options"),
        ({"name": "dirichlet", "alpah": 1}, r"partition\.alpah = 1: dirichlet takes alpha"),
        ({"name": "dirichlet", "alpha": 0}, r"partition\.alpha = 0: expected a number above 0"),
        ({"name": "dirichlet", "alpha": float("nan")}, r"partition\.alpha = nan"),
        ({"name": "unequal", "ratio": "half"}, r"partition\.ratio = 'half'"),
        ({"name": "unequal", "sizes": "cubic"}, r"partition\.sizes = 'cubic': one of geometric, linear, or a list of 3 numbers"),
        ({"name": "unequal", "ratio": 1e9}, r"partition\.ratio = 1000000000\.0: expected a number above 0, at most 1"),
        ({"name": "unequal", "sizes": 3}, r"partition\.sizes = 3: expected 3 numbers above 0"),
        ({"name": "unequal", "sizes": ["a"]}, r"partition\.sizes = \['a'\]: expected 3 numbers above 0"),
        ({"name": "unequal", "sizes": [1, 2]}, r"partition\.sizes = \[1, 2\]: expected 3 numbers above 0"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_by_key(rule, fault):
    with pytest.raises(ConfigError, match=fault):
        partition(numbered_task(), 3, rule, seed=0)


def test_too_many_nodes_are_refused_with_the_number_that_fits():
    with pytest.raises(ConfigError, match="nodes = 101: expected 1 to 100, two of the 200 rows for each"):
        partition(numbered_task(), 101, {"name": "iid"}, seed=0)


def test_dirichlet_needs_classes():
    rows = (torch.zeros(50, 1), torch.linspace(0, 1, 50)[:, None])
    task = numbered_task(sites=[Site(name="a", train=rows, test=None)])

    with pytest.raises(ConfigError, match="the targets of task 'numbers' are not classes; one of iid, unequal"):
        partition(task, 3, {"name": "dirichlet"}, seed=0)
    assert len(partition(task, 3, {"name": "unequal"}, seed=0).sites) == 3


def test_a_task_without_rows_is_not_partitioned():
    task = numbered_task(loss=None, sites=[Site(name="a", train=None, test=None, start=torch.zeros(2))])

    with pytest.raises(ConfigError, match="nodes = 3: task 'numbers' has no rows that could be shared out"):
        partition(task, 3, {"name": "iid"}, seed=0)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (torch.tensor([[1.0], [0.0]]), [1, 0]),
        (torch.tensor([3, 1]), [3, 1]),
        (torch.tensor([[0.5], [1.0]]), None),
        (torch.zeros(3, 2), None),
        (torch.arange(101), None),
    ],
)
def test_targets_are_classes_where_they_look_like_them(targets, expected):
    classes = classes_of(targets)

    assert (classes if classes is None else classes.tolist()) == expected


def test_held_out_rows_are_a_stratified_share_of_the_training_rows():
    site = numbered_task().sites[0]
    held = hold_out(site, 0.2, seed=0)
    rows = torch.cat([held.train[0], held.test[0]]).flatten().sort().values

    assert rows.tolist() == site.train[0].flatten().tolist()
    assert (len(held.test[1]), int(held.test[1].sum())) == (12, 3)
    assert torch.equal(held.test[0], hold_out(site, 0.2, seed=0).test[0])
    assert not torch.equal(held.test[0], hold_out(site, 0.2, seed=1).test[0])


def test_held_out_rows_do_not_have_the_test_rows_groups():
    rows = (torch.zeros(4, 1), torch.zeros(4, 1))
    site = Site(name="a", train=rows, test=rows, groups={"sex": list("fmfm")})

    assert hold_out(site, 0.5, seed=0).groups == {}


def test_test_rows_are_set_aside_and_never_take_the_place_of_validation_rows():
    train, test = (torch.arange(10.0)[:, None], torch.zeros(10, 1)), (torch.full((3, 1), -1.0), torch.zeros(3, 1))
    trained, measured_only = (hold_out(Site(name="a", train=rows, test=test), 0.2, seed=0) for rows in (train, None))

    assert torch.equal(trained.set_aside[0], test[0])
    assert (trained.test[0] >= 0).all()
    assert (measured_only.test, torch.equal(measured_only.set_aside[0], test[0])) == (None, True)


def test_sites_of_different_names_hold_out_different_rows():
    rows = (torch.arange(100.0)[:, None], torch.zeros(100, 1))
    one, other = (hold_out(Site(name=name, train=rows, test=None), 0.2, seed=0) for name in "ab")

    assert not torch.equal(one.test[0], other.test[0])


@pytest.mark.parametrize("targets_of", [lambda rows: (rows % 3 == 0).float()[:, None], lambda rows: rows.sqrt()])
@pytest.mark.parametrize("rows", [None, torch.arange(40, 0, -1, dtype=torch.int32)])
def test_rows_are_held_out_of_a_table_as_of_its_sites_one_by_one(targets_of, rows):
    numbers = torch.arange(50.0)
    split = Split(starts=torch.tensor([2, 10, 12, 40]), rows=rows)
    table = SiteTable(names=["a", "b", "c"], inputs=numbers[:, None], targets=targets_of(numbers), train=split, test=split)
    together, apart = hold_out_everywhere(table, 0.3, 5), [hold_out(site, 0.3, 5) for site in table]

    assert isinstance(together, SiteTable)
    for one, other in zip(together, apart, strict=True):
        assert all(torch.equal(*pair) for pair in zip((*one.train, *one.test), (*other.train, *other.test), strict=True))


def test_a_site_of_a_table_with_one_row_is_named_where_rows_are_held_out():
    table = SiteTable(names=["a", "b"], inputs=torch.zeros(3, 1), targets=torch.zeros(3), train=Split(starts=torch.tensor([0, 2, 3])))

    with pytest.raises(DataError, match=r"site 'b': one training row: validation = 0\.5 needs at least two"):
        hold_out_everywhere(table, 0.5, 0)


@pytest.mark.parametrize("targets", [torch.tensor([0.0, 1, 1, 1, 0, 2, 1, 1]), torch.arange(8) / 2, torch.arange(8) * 100])
def test_missing_classes_are_told_of_a_table_as_of_its_sites(targets):
    train, test = Split(starts=torch.tensor([0, 2, 4, 6])), Split(starts=torch.tensor([2, 4, 4, 8]))
    table = SiteTable(names=["a", "b", "c"], inputs=torch.zeros(8, 1), targets=targets, train=train, test=test)

    assert missing_classes(table) == missing_classes(list(table))
    assert bool(missing_classes(table)) == bool((targets == targets.round()).all())


def test_nothing_is_held_out_of_nothing():
    site = Site(name="a", train=None, test=None, start=torch.zeros(2))

    assert hold_out(site, 0.2, seed=0) is site


def test_a_share_or_a_site_that_cannot_be_held_out_is_refused():
    site = numbered_task().sites[0]
    for share in (0, 1, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="validation = "):
            hold_out(site, share, seed=0)
    with pytest.raises(DataError, match="one training row"):
        hold_out(Site(name="a", train=(torch.zeros(1, 1), torch.zeros(1, 1)), test=None), 0.2, seed=0)
