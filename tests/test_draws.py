"""Randomness without a history: known answers, permutations, and the same batch whoever computes it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl import draws
from p2pfl.draws import LastEpoch, Purpose, batch_positions, batch_sizes, epoch_orders, philox, sort_keys, torch_seed

ALL_ONES = 0xFFFFFFFF


def words(*numbers: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(number) for number in numbers)


def scalar(value: int) -> torch.Tensor:
    return torch.tensor(value)


# kat_vectors of Random123, philox4x32 with 10 rounds
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected):
    drawn = philox(words(*counter), key)

    assert expected == tuple(int(word) for word in drawn)


def test_philox_broadcasts_its_counters():
    drawn = philox((torch.arange(5), scalar(0), torch.arange(3)[:, None], scalar(7)), (1, 2))

    assert [tuple(word.shape) for word in drawn] == [(3, 5)] * 4
    for i, j in itertools.product(range(3), range(5)):
        assert [int(word) for word in philox(words(j, 0, i, 7), (1, 2))] == [int(word[i, j]) for word in drawn]


def test_sort_keys_are_the_first_63_bits_and_never_negative():
    keys = sort_keys(0, Purpose.BATCH, node=scalar(0), round=scalar(0), step=scalar(0), index=torch.arange(10_000))
    first, second, _, _ = philox(words(17, 0, 0, 0), (0, int(Purpose.BATCH)))

    assert (int(first) << 31) | (int(second) >> 1) == int(keys[17])
    assert int(keys.min()) >= 0
    assert len(keys.unique()) == 10_000
    # the mean of 10,000 uniform numbers is within five standard errors of 1/2
    assert abs(float(keys.double().mean()) / 2**63 - 0.5) < 5 * (1 / 12 / 10_000) ** 0.5


def test_every_part_of_the_key_changes_the_draw():
    base = {"node": 0, "round": 0, "step": 0}
    seeds = {torch_seed(0, Purpose.START, **base), torch_seed(1, Purpose.START, **base), torch_seed(0, Purpose.MODEL, **base)}
    seeds |= {torch_seed(0, Purpose.START, **{**base, part: 1}) for part in base}

    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_run_is_still_drawn_as_it_was_when_it_was_recorded():
    """These bits are part of every run that was ever made: to change them is to break resuming and comparing."""
    orders = epoch_orders(7, torch.tensor([3]), torch.tensor([6]), torch.tensor([[0, 1]]))

    assert {purpose.name: int(purpose) for purpose in Purpose} == {
        "START": 1,
        "BATCH": 2,
        "MODEL": 3,
        "COMPRESSION": 4,
        "PARTNER": 5,
        "STRAGGLER": 6,
        "LOSS": 7,
        "CHURN": 8,
        "RESAMPLE": 9,
        "NOISE": 10,
    }
    assert orders.tolist() == [[[2, 1, 5, 4, 3, 0], [5, 3, 4, 2, 1, 0]]]


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    first=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_each_epoch_is_a_permutation_of_a_nodes_rows(seed, sizes, first):
    nodes = torch.arange(len(sizes)) * 3
    epochs = torch.arange(first, first + 3).expand(len(sizes), 3)
    orders = epoch_orders(seed, nodes, torch.tensor(sizes), epochs)

    assert (len(sizes), 3, max(sizes)) == tuple(orders.shape)
    for row, size in enumerate(sizes):
        for epoch in range(3):
            assert list(range(size)) == sorted(orders[row, epoch, :size].tolist())


def test_epochs_and_nodes_have_orders_of_their_own():
    orders = epoch_orders(0, torch.arange(4), torch.full((4,), 20), torch.arange(5).expand(4, 5))

    assert len({tuple(order) for order in orders.flatten(0, 1).tolist()}) == 20


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    first_step=st.integers(0, 1000),
    num_steps=st.integers(1, 7),
    batch_size=st.integers(1, 17),
)
@settings(max_examples=60, deadline=None)
def test_a_rows_batches_are_the_same_whoever_computes_them(seed, sizes, first_step, num_steps, batch_size):
    nodes, sizes_N = torch.arange(len(sizes)) + 5, torch.tensor(sizes)
    together = batch_positions(seed, nodes, sizes_N, first_step, num_steps, batch_size, repeating=True)

    assert (len(sizes), num_steps, batch_size) == tuple(together.shape)
    for row in range(len(sizes)):
        alone = batch_positions(seed, nodes[row : row + 1], sizes_N[row : row + 1], first_step, num_steps, batch_size, repeating=True)
        assert alone[0].tolist() == together[row].tolist()
    # and in whatever portions the steps are asked for
    one_by_one = [batch_positions(seed, nodes, sizes_N, first_step + k, 1, batch_size, repeating=True) for k in range(num_steps)]
    assert torch.cat(one_by_one, dim=1).tolist() == together.tolist()


@given(size=st.integers(1, 20), batch_size=st.integers(1, 50), num_epochs=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_a_stream_is_whole_permutations_one_after_the_other(size, batch_size, num_epochs):
    """Also at a site with fewer rows than a batch, where one batch runs over several epochs."""
    num_steps = -(-size * num_epochs // batch_size)
    drawn = batch_positions(1, torch.tensor([2]), torch.tensor([size]), 0, num_steps, batch_size, repeating=True)
    stream = drawn.flatten().tolist()

    for epoch in range(num_epochs):
        assert list(range(size)) == sorted(stream[epoch * size : (epoch + 1) * size])


def test_no_batch_has_more_rows_than_its_site():
    sizes_N = torch.tensor([3, 8, 20])

    assert batch_sizes(sizes_N, 8).tolist() == [3, 8, 8]
    assert batch_sizes(sizes_N, "full").tolist() == [3, 8, 20]
    assert batch_sizes(sizes_N, 8, repeating=True).tolist() == [8, 8, 8]  # files of schema 1
    with pytest.raises(ValueError, match="a node has 3 rows"):
        batch_positions(0, torch.arange(3), sizes_N, 0, 1, 8)


@given(sizes=st.lists(st.integers(4, 9), min_size=1, max_size=5), first_step=st.integers(0, 50), num_steps=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_a_batch_of_all_rows_has_each_once_in_order_and_smaller_ones_are_drawn_as_ever(sizes, first_step, num_steps):
    nodes, sizes_N, last = torch.arange(len(sizes)), torch.tensor(sizes), LastEpoch()
    found = batch_positions(3, nodes, sizes_N, first_step, num_steps, 4, last)

    expected = batch_positions(3, nodes, sizes_N, first_step, num_steps, 4, repeating=True)
    for row, size in enumerate(sizes):
        whole = [[0, 1, 2, 3]] * num_steps
        assert found[row].tolist() == (whole if size == 4 else expected[row].tolist())
    following = batch_positions(3, nodes, sizes_N, first_step + num_steps, 1, 4, last)
    assert torch.equal(following, batch_positions(3, nodes, sizes_N, first_step + num_steps, 1, 4))


def test_a_site_of_three_rows_gave_batches_of_eight_in_files_of_schema_1():
    batches = batch_positions(0, torch.tensor([0]), torch.tensor([3]), 0, 3, 8, repeating=True)[0]

    assert tuple(batches.shape) == (3, 8)
    # 24 draws of 3 rows in 8 whole epochs
    assert torch.bincount(batches.flatten(), minlength=3).tolist() == [8, 8, 8]
    # two epochs lie whole in each batch, and a row may come once more at either end
    assert all({2, 3, 4} >= set(torch.bincount(batch, minlength=3).tolist()) for batch in batches)


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 60), epoch=st.integers(0, 10**6), node=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_the_quick_way_on_the_cpu_draws_the_same_bits(seed, size, epoch, node):
    keys = sort_keys(seed, Purpose.BATCH, node=scalar(node), round=scalar(epoch), step=scalar(0), index=torch.arange(size))
    orders = epoch_orders(seed, torch.tensor([node]), torch.tensor([size]), torch.tensor([[epoch]]))

    assert orders[0, 0].tolist() == keys.argsort(stable=True).tolist()


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    first_step=st.integers(0, 50),
    portions=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    batch_size=st.integers(1, 17),
)
@settings(max_examples=60, deadline=None)
def test_what_was_drawn_last_is_not_drawn_again_and_changes_nothing(sizes, first_step, portions, batch_size):
    nodes, sizes_N, last = torch.arange(len(sizes)), torch.tensor(sizes), LastEpoch()
    for num_steps in portions:
        continued = batch_positions(3, nodes, sizes_N, first_step, num_steps, batch_size, last, repeating=True)

        assert torch.equal(continued, batch_positions(3, nodes, sizes_N, first_step, num_steps, batch_size, repeating=True))
        first_step += num_steps


@pytest.mark.parametrize("shapes", [((), (), (), ()), ((5, 1), (1, 7), (), (5, 7)), ((0,), (1,), (), ())], ids=str)
def test_few_words_have_the_bits_of_many(shapes, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    counter = tuple(torch.randint(0, 2**32, shape, generator=generator) for shape in shapes)
    few = philox(counter, (2**32 - 1, 5))
    monkeypatch.setattr(draws, "_SMALL", -1)
    many = philox(counter, (2**32 - 1, 5))

    for one, other in zip(few, many, strict=True):
        assert (one.dtype, one.shape) == (torch.int64, other.shape)
        assert torch.equal(one, other)
