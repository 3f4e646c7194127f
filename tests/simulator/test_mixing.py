"""Rows that are averaged in place are averaged as messages would do it."""

from __future__ import annotations

import pytest
import torch

from p2pfl.algorithms import DPSGD, Inbox
from p2pfl.evaluation.mean_model import consensus_distance
from p2pfl.simulator import mixing
from p2pfl.simulator.mixing import block_columns, mix_in_place
from p2pfl.topology import make, weighted


def tables(name, n, **options):
    index, weights, linked = weighted(make(name, n, 0, **options)).padded()
    return torch.from_numpy(index), torch.from_numpy(weights).float(), torch.from_numpy(linked)


def by_messages(x_NP, index_NK, weights_NK, present_NK):
    def slot(channel, k, rows):
        return x_NP[index_NK[:, k] if rows is None else index_NK[rows, k]]

    inbox = Inbox(channels=DPSGD.channels, sent={"x": x_NP}, weights_NK=weights_NK, present_NK=present_NK, slot=slot)
    return inbox.mix("x"), inbox.squared_distances("x")


@pytest.fixture(params=[False, True], ids=["torch", "compiled"])
def compiled(request):
    if request.param:
        request.getfixturevalue("numba")
        assert mixing.load_compiled(torch.float32)
    return request.param


@pytest.mark.no_cover
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("name", "options"), [("random-regular", {"degree": 4}), ("star", {}), ("erdos-renyi", {"p": 0.3})])
def test_the_bits_are_those_of_messages(name, options, threads, compiled, monkeypatch):
    monkeypatch.setattr(mixing, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(mixing, "_NARROWEST", 7)
    monkeypatch.setattr(mixing, "_PART_BYTES", 4 * 7 * 3)
    torch.manual_seed(0)
    x_NP = torch.randn(20, 40)
    index, weights, linked = tables(name, 20, **options)
    expected, squared = by_messages(x_NP, index, weights, linked)
    mixed_NP = x_NP.clone()
    mixed = mix_in_place(mixed_NP, index, weights, linked, threads=threads, compiled=compiled)

    assert torch.equal(mixed_NP, expected)
    torch.testing.assert_close(mixed.squared_N, squared, rtol=1e-6, atol=0)
    torch.testing.assert_close(mixed.squared_norms_N, x_NP.double().square().sum(dim=1), rtol=1e-6, atol=0)
    assert mixed.distance == pytest.approx(consensus_distance(x_NP), rel=1e-6)


def test_rows_that_have_stopped_neither_give_nor_take(compiled):
    torch.manual_seed(0)
    x_NP = torch.randn(12, 30)
    index, weights, linked = tables("random-regular", 12, degree=4)
    running = torch.arange(12) % 3 > 0
    present = linked & running[:, None] & running[index]
    expected, squared = by_messages(x_NP, index, weights, present)
    mixed_NP = x_NP.clone()
    mixed = mix_in_place(mixed_NP, index, weights, present, active_N=running, compiled=compiled)

    assert torch.equal(mixed_NP[running], expected[running])
    assert torch.equal(mixed_NP[~running], x_NP[~running])
    torch.testing.assert_close(mixed.squared_N, squared, rtol=1e-6, atol=0)


def test_numbers_that_are_not_compiled_for_are_mixed_all_the_same():
    assert not mixing.load_compiled(torch.bfloat16)
    x_NP = torch.randn(6, 5).bfloat16()
    index, weights, linked = tables("ring", 6)
    expected, _ = by_messages(x_NP, index, weights.bfloat16(), linked)
    mix_in_place(x_NP, index, weights.bfloat16(), linked, compiled=True)

    assert torch.equal(x_NP, expected)


def test_a_block_of_columns_fits_the_cache():
    assert block_columns(10, 5000, 4) == 5000
    assert block_columns(4096, 50_890, 4) == 1024
    assert block_columns(10**6, 14, 4) == 14
    assert block_columns(10**6, 5000, 4) == 512


class OtherHalf:
    """Rows of another process that are here all the same."""

    def __init__(self, x_GP, wanted, num_inner):
        self.num_rows, self.num_inner = len(wanted), num_inner
        self._x_GP, self._wanted, self._column, self.waiting = x_GP, wanted, 0, []

    def post(self, block_NW, into_GW):
        columns = slice(self._column, self._column + block_NW.shape[1])
        self._column = columns.stop
        into_GW.fill_(torch.nan)
        self.waiting.append((into_GW, self._x_GP[self._wanted, columns]))

    def arrived(self):
        into_GW, values = self.waiting.pop(0)
        into_GW.copy_(values)


@pytest.mark.parametrize("threads", [1, 3])
def test_half_of_the_rows_with_the_other_half_elsewhere_are_mixed_to_the_same_bits(threads, compiled, monkeypatch):
    monkeypatch.setattr(mixing, "_PART_BYTES", 4 * 7 * 3)
    torch.manual_seed(0)
    x_NP = torch.randn(24, 40)
    index, weights, linked = tables("path", 24)
    whole = x_NP.clone()
    everything = mix_in_place(whole, index, weights, linked)
    half = x_NP[:12].clone()
    far = OtherHalf(x_NP[12:], [0], 11)  # the last of the first half hears the first of the second
    mixed = mix_in_place(half, index[:12], weights[:12], linked[:12], threads=threads, halo=far, width=7, compiled=compiled)

    assert torch.equal(half, whole[:12])
    torch.testing.assert_close(mixed.squared_N, everything.squared_N[:12], rtol=1e-6, atol=0)
    torch.testing.assert_close(mixed.mean_P, x_NP[:12].mean(dim=0), rtol=1e-5, atol=1e-7)
    assert not far.waiting
