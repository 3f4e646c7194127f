"""Arrays on the way tell nothing: uniform in both limbs, and the same to look at for any two inputs; and limbs carry."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from scipy import stats
from secure_members import STATISTICS, Network, terms_of

from p2pfl.privacy.fixed_point import FixedPoint
from p2pfl.privacy.masks import SessionMasks
from p2pfl.wire.secure_messages import MaskedSubtotal

DRAWS = 100_000
LEAST_P = 1e-9


def frames(graph, values, *, shape, **more):
    """Arrays that go up the tree, by their senders, when each member gives these numbers."""
    terms = terms_of(len(graph), num_sums=1, shape=shape, **more)
    found = Network(graph, terms, [[np.broadcast_to(each, shape) for each in values]])
    found.open()
    found.run(until=lambda network: network.members[0]._sum is not None and network.members[0]._sum.total is not None)
    return {sender: message.limbs for sender, _, message in found.arrived if isinstance(message, MaskedSubtotal)}


def least_p(limbs):
    """The least p-value of chi-square tests on the lowest and the highest byte of every limb."""
    columns = [
        (limbs[..., limb] >> np.uint64(shift)).astype(np.int64).ravel() & 255 for limb in range(limbs.shape[-1]) for shift in (0, 56)
    ]
    return min(stats.chisquare(np.bincount(each, minlength=256)).pvalue for each in columns)


def test_what_an_inner_node_gets_and_what_it_passes_on_are_uniform():
    found = frames(nx.path_graph(3), [1.0, 2.0, 3.0], shape=(DRAWS,))

    assert set(found) == {1, 2}
    assert min(least_p(each) for each in found.values()) > LEAST_P


def test_models_of_one_limb_are_hidden_as_well():
    found = frames(
        nx.path_graph(3), [1.0, 2.0, 3.0], shape=(DRAWS // 10, 3), number_format=FixedPoint(bits=64, fraction_bits=40), bound=100.0
    )

    assert min(least_p(each) for each in found.values()) > LEAST_P


def can_tell_apart():
    """Whether an inner node can tell two inputs of a leaf apart by the distribution of a byte."""
    arrays = [frames(nx.path_graph(3), [1.0, 2.0, value], shape=(DRAWS // 5,))[2] for value in (0.0, 1e5 / 3)]
    counts = [np.bincount((each[:, 0] >> np.uint64(56)).astype(np.int64), minlength=256) for each in arrays]
    return stats.chi2_contingency(np.array(counts) + 1).pvalue < LEAST_P


def test_an_inner_node_cannot_tell_two_inputs_apart():
    assert not can_tell_apart()


def test_that_test_goes_red_where_masks_are_broken(monkeypatch):
    monkeypatch.setattr(SessionMasks, "mask", lambda _, position, shape, context: np.zeros(shape, dtype=np.uint64))
    found = frames(nx.path_graph(3), [1.0, 2.0, 1e5], shape=(1000,))

    assert least_p(found[2]) < LEAST_P
    assert can_tell_apart()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("check", [False, True])
def test_limbs_carry(sign, check):
    unit = 2.0**-60
    edges = [[8.0 - unit * 2**12, 8.0, -8.0, 2.0**65 * (1 - 2**-53)], [unit, 8.0, 8.0, 2.0**64], [unit * 2**12, -8.0, -unit, 2.0**64]]
    terms = terms_of(3, num_sums=1, shape=(4,), bound=2.0**65, check=check)
    found = Network(nx.path_graph(3), terms, [[sign * np.array(each) for each in edges]])
    found.open()
    found.run()

    found.assert_exact()
    exact = [sum(int(each[place] * 2**60) for each in edges) for place in range(4)]
    held = found.totals_of(0)[2]
    assert [low | high << 64 for low, high in held.tolist()] == [int(sign) * each % 2**128 for each in exact]
    assert exact[3] > 2**126 - 2**80


def test_a_thousand_numbers_in_any_shape_are_the_plain_sum():
    values = np.random.default_rng(1).normal(scale=1e4, size=(4, 10, 25, 4))
    terms = terms_of(4, num_sums=1, shape=(10, 25, 4), check=True)
    found = Network(nx.star_graph(3), terms, [list(values)])
    found.open()
    found.run()

    found.assert_exact()
    assert STATISTICS.decode(found.totals_of(0)[0]) == pytest.approx(values.sum(axis=0), abs=1e-9)
