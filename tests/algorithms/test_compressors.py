"""Each compressor against its definition as a loop, its bytes, its omega, and the same bits for one row as for many.

Shapes: N rows, P parameters.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from p2pfl.algorithms import COMPRESSORS, Compressor, Context
from p2pfl.algorithms.quantizers import PART_NAMES, QSGD, BFloat16, Float16, Identity, Int8, Sign
from p2pfl.algorithms.sparsifiers import LowRank, RandomK, TopK
from p2pfl.params import Layout, TensorSpec
from rows import PARTS, size_bytes

TRAVELS = {torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32}
EVERY = [
    Identity(),
    Float16(),
    BFloat16(),
    Int8(),
    QSGD(levels=1),
    QSGD(levels=5),
    QSGD(levels=127),
    Sign(),
    Sign(scale="vector"),
    TopK(share=0.1),
    TopK(share=0.01),
    RandomK(share=0.1),
    LowRank(rank=1),
    LowRank(rank=3),
]
LAYOUT = Layout(
    tensors=(
        TensorSpec("a.weight", (20, 15), "float64"),
        TensorSpec("a.bias", (20,), "float64"),
        TensorSpec("b.weight", (4, 3, 7), "float64"),
        TensorSpec("b.bias", (4,), "float64"),
    )
)
P = LAYOUT.size  # 408: two chunks, and no multiple of 8 bits' worth


def vector_layout(size, dtype="float64"):
    return Layout(tensors=(TensorSpec("x", (size,), dtype),))


def context(layout=LAYOUT, num_rows=1, first=0, round=3, seed=5):
    nodes = torch.arange(first, first + num_rows)
    return Context(round=round, local_steps=1, lr=0.1, seed=seed, nodes_N=nodes, layout=layout)


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def applied(compressor, v, ctx):
    return compressor.decompress(compressor.compress(v, ctx), ctx, v.dtype)


def kept_share(compressor, v, ctx):
    """1 - ||C(v) - v||**2 / ||v||**2 over all rows."""
    return 1 - float((applied(compressor, v, ctx) - v).square().sum() / v.square().sum())


# ---- what every compressor promises


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compressor", EVERY, ids=str)
def test_one_row_alone_is_compressed_as_among_many_bit_for_bit(compressor, dtype):
    v_NP = gaussian(5, P, dtype=dtype)
    together, ctx = compressor.compress(v_NP, context(num_rows=5)), context(num_rows=5)
    whole = compressor.decompress(together, ctx, dtype)
    for i in range(5):
        alone = compressor.compress(v_NP[i : i + 1], context(first=i))
        assert alone.keys() == together.keys()
        for name, part in alone.items():
            assert torch.equal(part[0], together[name][i]), name
        assert torch.equal(compressor.decompress(alone, context(first=i), dtype)[0], whole[i])


@pytest.mark.parametrize("compressor", EVERY, ids=str)
def test_messages_stacked_by_neighbour_are_what_each_of_them_is(compressor):
    ctx = context(num_rows=6)
    parts = compressor.compress(gaussian(6, P), ctx)
    flat = compressor.decompress(parts, ctx, torch.float64)
    stacked = compressor.decompress({name: part.reshape(2, 3, *part.shape[1:]) for name, part in parts.items()}, ctx, torch.float64)

    assert torch.equal(stacked.reshape(6, P), flat)


@pytest.mark.parametrize("compressor", EVERY, ids=str)
def test_a_row_may_be_several_vectors_or_stand_without_an_axis(compressor):
    ctx = context(num_rows=2)
    v = gaussian(2, 3, P)
    one = Context(round=3, local_steps=1, lr=0.1, seed=5, nodes_N=torch.tensor(0), layout=LAYOUT)

    assert applied(compressor, v, ctx).shape == (2, 3, P)
    assert torch.equal(applied(compressor, v[0, 0], one), applied(compressor, v[:1, 0], context())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compressor", EVERY, ids=str)
def test_shapes_and_dtypes_do_not_depend_on_the_vector_and_may_all_travel(compressor, dtype):
    ctx = context(num_rows=3)
    vectors = [gaussian(3, P, dtype=dtype), torch.zeros(3, P, dtype=dtype), torch.ones(3, P, dtype=dtype) * 1e-3]
    parts = [compressor.compress(v, ctx) for v in vectors]
    formats = [{name: (tuple(part.shape), part.dtype) for name, part in each.items()} for each in parts]

    assert formats[0] == formats[1] == formats[2]
    assert set(formats[0]) == set(PARTS[type(compressor).__name__]) <= set(PART_NAMES)
    assert {dtype for _, dtype in formats[0].values()} <= TRAVELS
    assert all(shape[0] == 3 and math.prod(shape) > 0 for shape, _ in formats[0].values())
    assert compressor.decompress(parts[0], ctx, dtype).dtype == dtype


@pytest.mark.parametrize("compressor", EVERY, ids=str)
def test_zero_stays_zero(compressor):
    assert not applied(compressor, torch.zeros(2, P, dtype=torch.float64), context(num_rows=2)).any()


@pytest.mark.parametrize("compressor", EVERY, ids=str)
def test_what_is_given_is_not_changed(compressor):
    v_NP = gaussian(2, P)
    before = v_NP.clone()
    parts = compressor.compress(v_NP, context(num_rows=2))
    kept = {name: part.clone() for name, part in parts.items()}
    compressor.decompress(parts, context(num_rows=2), torch.float64)

    assert torch.equal(v_NP, before)
    assert all(torch.equal(part, kept[name]) for name, part in parts.items())


@pytest.mark.parametrize("compressor", EVERY, ids=str)
def test_it_keeps_the_share_that_it_says(compressor):
    """The mean over 200 Gaussian rows; its standard error is below .4 % of what is lost for each of them."""
    v_NP = gaussian(200, P)
    omega = compressor.omega(LAYOUT)
    kept = kept_share(compressor, v_NP, context(num_rows=200))

    assert 0 < omega <= 1
    assert kept >= omega - 0.004 * (1 - omega) - 1e-9


def spikes(num_rows, size=P):
    """The worst for what looks at the largest: one large coordinate, all others the same."""
    v_NP = torch.full((num_rows, size), 0.5 / 127, dtype=torch.float64)
    v_NP[:, 0] = 1.0
    return v_NP


@pytest.mark.parametrize("compressor", [Identity(), Int8(), QSGD(levels=1), QSGD(levels=16), TopK(share=0.1)], ids=str)
@pytest.mark.parametrize(
    "vectors", [spikes, lambda n: torch.ones(n, P).double(), lambda n: gaussian(n, P).pow(5)], ids=["spikes", "ones", "tails"]
)
def test_guaranteed_shares_hold_for_any_vector(compressor, vectors):
    omega = compressor.omega(LAYOUT)

    assert kept_share(compressor, vectors(200), context(num_rows=200)) >= omega - 0.01 * (1 - omega) - 1e-9


@pytest.mark.parametrize("compressor", [Int8(), QSGD(levels=4)], ids=str)
def test_stochastic_rounding_is_right_on_average(compressor):
    num_rows = 20_000
    v_P = gaussian(20)
    ctx = context(vector_layout(20), num_rows)
    rounded_NP = applied(compressor, v_P.expand(num_rows, 20), ctx)
    scale = compressor.omega(ctx.layout) if isinstance(compressor, QSGD) else 1.0
    standard_error_P = rounded_NP.std(dim=0) / math.sqrt(num_rows)

    assert bool(((rounded_NP.mean(dim=0) - scale * v_P).abs() <= 5 * standard_error_P + 1e-7).all())


@pytest.mark.parametrize("compressor", [Int8(), QSGD(levels=4), RandomK(share=0.2), LowRank(rank=1)], ids=str)
def test_draws_are_of_their_seed_and_round(compressor):
    v_NP = gaussian(2, P)
    first = applied(compressor, v_NP, context(num_rows=2))
    torch.manual_seed(3)

    assert torch.equal(applied(compressor, v_NP, context(num_rows=2)), first)
    assert not torch.equal(applied(compressor, v_NP, context(num_rows=2, round=4)), first)
    assert not torch.equal(applied(compressor, v_NP, context(num_rows=2, seed=6)), first)


@pytest.mark.parametrize("compressor", [Int8(), QSGD(levels=4)], ids=str)
def test_nodes_round_independently(compressor):
    codes = compressor.compress(gaussian(1, P).expand(2, P), context(num_rows=2))["codes"]

    assert not torch.equal(codes[0], codes[1])


@pytest.mark.parametrize("compressor", EVERY, ids=str)
def test_any_bits_are_decompressed_to_finite_numbers(compressor):
    """A neighbour may send what it wants in fields of integers; its floats are checked where they come in."""
    rng = np.random.default_rng(1)
    ctx = context(num_rows=4)
    for _ in range(20):
        parts = {}
        for name, part in compressor.compress(gaussian(4, P), ctx).items():
            raw = rng.integers(0, 256, (*part.shape[:-1], part.shape[-1] * part.dtype.itemsize), dtype=np.uint8)
            parts[name] = part if part.dtype.is_floating_point else torch.from_numpy(raw).view(part.dtype)
        there = compressor.decompress(parts, ctx, torch.float64)

        assert there.shape == (4, P)
        assert bool(there.isfinite().all())
        if isinstance(compressor, QSGD):
            assert bool((there.abs() <= parts["norm"].double() * compressor.omega(LAYOUT) * (1 + 1e-12)).all())


@pytest.mark.parametrize("compressor", EVERY, ids=str)
def test_a_diverged_model_has_a_message_of_the_same_shapes(compressor):
    ctx = context(num_rows=2)
    v_NP = gaussian(2, P)
    usual = compressor.compress(v_NP, ctx)
    v_NP[0, 3], v_NP[1, 5] = math.nan, math.inf
    strange = compressor.compress(v_NP, ctx)

    assert {n: (p.shape, p.dtype) for n, p in strange.items()} == {n: (p.shape, p.dtype) for n, p in usual.items()}


def test_every_one_is_registered_with_defaults():
    assert set(COMPRESSORS) == {"none", "fp16", "bf16", "int8", "qsgd", "sign", "top-k", "random-k", "low-rank"}
    assert all(isinstance(make(), Compressor) for make in COMPRESSORS.values())


# ---- bytes


@pytest.mark.parametrize(
    ("compressor", "size", "expected_bytes", "ratio"),
    [
        (Identity(), 10**6, 4 * 10**6, 1.0),
        (Float16(), 10**6, 2 * 10**6, 2.0),
        (BFloat16(), 10**6, 2 * 10**6, 2.0),
        (Int8(), 256 * 1000, 256_000 + 4_000, 3.94),
        (Int8(), 1000, 1000 + 4 * 4, 3.94),
        (Int8(), 257, 257 + 2 * 4, 3.88),
        (QSGD(levels=1), 10**6, 250_000 + 4, 16.0),
        (QSGD(levels=16), 1000, 750 + 4, 5.31),  # 33 codes: 6 bits
        (QSGD(levels=127), 1000, 1000 + 4, 3.98),
        (Sign(), 10**6, 125_000 + 4, 32.0),
        (Sign(), 13, 2 + 4, 8.67),
        (TopK(share=0.01), 10**6, 80_000, 50.0),
        (TopK(share=0.001), 10**6, 8_000, 500.0),
        (TopK(share=0.1), 10**6, 400_000 + 125_000, 7.62),  # by indices it would be 5.0
        (TopK(share=0.01), 65_536, 655 * 6, 66.7),  # indices of 16 bits
        (TopK(share=0.01), 65_537, 655 * 8, 50.03),
        (TopK(share=1 / 16), 3200, 200 * 6, 10.67),  # both are 400 bytes: indices
        (TopK(share=201 / 3200), 3200, 201 * 4 + 400, 10.63),
        (TopK(share=1 / 32), 320_000, 10_000 * 8, 16.0),
        (TopK(share=10_001 / 320_000), 320_000, 10_001 * 4 + 40_000, 16.0),
        (RandomK(share=0.01), 10**6, 40_000, 100.0),
    ],
    ids=str,
)
def test_bytes_of_a_float32_vector(compressor, size, expected_bytes, ratio):
    v = gaussian(1, size, dtype=torch.float32)
    sent = size_bytes(compressor.compress(v, context(vector_layout(size, "float32"))))

    assert sent == expected_bytes
    assert round(4 * size / sent, 2) == ratio


def test_low_rank_sends_r_times_m_plus_n_of_each_matrix_and_the_rest_whole():
    parts = LowRank(rank=2).compress(gaussian(1, P, dtype=torch.float32), context())

    assert size_bytes(parts) == 4 * (2 * (20 + 15) + 20 + 2 * (4 + 21) + 4)


def test_a_matrix_that_factors_would_lengthen_goes_whole():
    v_NP = gaussian(2, P)
    compressor = LowRank(rank=4)  # of 4 x 21: 4 (4 + 21) > 84
    here = applied(compressor, v_NP, context(num_rows=2))

    assert compressor.compress(v_NP, context(num_rows=2))["factors"].shape == (2, 4 * (20 + 15) + 20 + 84 + 4)
    assert torch.equal(here[:, 320:], v_NP[:, 320:])
    assert not torch.equal(here[:, :300], v_NP[:, :300])


# ---- definitions, as loops


def uniforms(num_rows, ctx):
    """What stochastic rounding draws."""
    from p2pfl.algorithms.quantizers import _uniform

    return _uniform(torch.zeros(num_rows, ctx.layout.size, dtype=torch.float64), ctx).numpy()


def test_draws_are_uniform():
    draws = uniforms(50, context(num_rows=50)).ravel()
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    expected = len(draws) / 20

    assert draws.min() >= 0
    assert draws.max() < 1
    assert len(np.unique(draws)) > 0.99 * len(draws)
    assert ((counts - expected) ** 2 / expected).sum() < 50  # chi squared with 19 degrees of freedom: 1 in 10**4


def test_fp16_rounds_and_saturates():
    v = torch.tensor([[1.0, 1 + 2.0**-11 + 2.0**-20, 1e9, -1e9, 65504.0, 1e-9]]).double()
    there = applied(Float16(), v, context(vector_layout(6)))

    assert there.tolist() == [[1.0, 1 + 2.0**-10, 65504.0, -65504.0, 65504.0, 0.0]]
    assert Float16().compress(v, context(vector_layout(6)))["values"].dtype == torch.float16


def test_bf16_is_the_first_half_of_a_float32():
    v = gaussian(1, 100, dtype=torch.float32)
    ctx = context(vector_layout(100))
    bits = v.numpy().view(np.uint32)
    expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    parts = BFloat16().compress(v, ctx)

    assert parts["codes"].dtype == torch.int16
    assert np.array_equal(parts["codes"].numpy().view(np.uint16), expected)
    assert np.array_equal(BFloat16().decompress(parts, ctx, torch.float32).numpy().view(np.uint32), expected.astype(np.uint32) << 16)
    assert (
        applied(BFloat16(), torch.full((1, 1), 1e300, dtype=torch.float64), context(vector_layout(1))).item()
        == torch.finfo(torch.bfloat16).max
    )


def test_int8_is_its_definition():
    ctx = context(num_rows=3)
    v_NP, draws = gaussian(3, P), uniforms(3, ctx)
    parts = Int8().compress(v_NP, ctx)
    expected = np.zeros((3, P))
    for i in range(3):
        for start in range(0, P, 256):
            chunk = v_NP[i, start : start + 256].numpy()
            scale = np.float32(np.abs(chunk).max() / 127)
            for j, value in enumerate(chunk):
                expected[i, start + j] = np.clip(np.floor(value / float(scale) + draws[i, start + j]), -127, 127) * float(scale)

    assert parts["codes"].dtype == torch.int8
    assert parts["scales"].shape == (3, 2)
    assert np.array_equal(Int8().decompress(parts, ctx, torch.float64).numpy(), expected)


def test_int8_is_off_by_less_than_a_step_and_exact_at_the_largest():
    v_NP = gaussian(50, P)
    ctx = context(num_rows=50)
    parts = Int8().compress(v_NP, ctx)
    steps = parts["scales"].double().repeat_interleave(256, dim=-1)[:, :P]
    off = (Int8().decompress(parts, ctx, torch.float64) - v_NP).abs()

    assert bool((off <= steps * (1 + 1e-5)).all())
    assert int(parts["codes"][:, :256].abs().max(dim=-1).values.min()) == 127


@pytest.mark.parametrize("levels", [1, 5, 16, 127])
def test_qsgd_is_its_definition(levels):
    ctx = context(num_rows=3)
    v_NP, draws = gaussian(3, P), uniforms(3, ctx)
    expected = np.zeros((3, P))
    for i in range(3):
        norm = float(np.float32(np.linalg.norm(v_NP[i].numpy())))
        for j, value in enumerate(v_NP[i].tolist()):
            xi = min(math.floor(levels * (abs(value) / norm) + draws[i, j]), levels)
            expected[i, j] = norm * math.copysign(xi, value) / (levels * (1 + min(P / levels**2, math.sqrt(P) / levels)))

    np.testing.assert_allclose(applied(QSGD(levels=levels), v_NP, ctx).numpy(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("levels", "variance"), [(1, 32), (4, 8), (16, 2), (127, 0.0635)])
def test_qsgd_omega_is_of_the_relative_variance(levels, variance):
    assert 1 / QSGD(levels=levels).omega(vector_layout(1024)) - 1 == pytest.approx(variance, rel=1e-3)


def test_sign_is_its_definition_for_each_tensor_and_for_the_vector():
    v_NP = gaussian(2, P)
    v_NP[0, 7] = 0.0
    for scale, places in (("tensor", [place for _, place in LAYOUT.slices()]), ("vector", [slice(0, P)])):
        expected = np.zeros((2, P))
        for i in range(2):
            for place in places:
                piece = v_NP[i, place].numpy()
                size = np.float32(np.float32(np.abs(piece).sum()) / np.float32(len(piece)))
                expected[i, place] = np.where(piece >= 0, size, -size)

        np.testing.assert_allclose(applied(Sign(scale=scale), v_NP, context(num_rows=2)).numpy(), expected, rtol=1e-7, atol=0)


def test_sign_keeps_what_its_definition_says_of_any_vector():
    v = gaussian(1, P).pow(3)
    expected = float(v.abs().sum() ** 2 / (P * v.square().sum()))

    assert kept_share(Sign(scale="vector"), v, context()) == pytest.approx(expected, abs=1e-7)
    assert kept_share(Sign(scale="vector"), gaussian(1, 10**5), context(vector_layout(10**5))) == pytest.approx(2 / math.pi, abs=0.01)


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.5, 1.0])
def test_top_k_is_its_definition_with_the_first_of_equals(share):
    v_NP = gaussian(4, P).mul(4).round()  # many equals
    kept = max(round(share * P), 1)
    expected = np.zeros((4, P))
    for i in range(4):
        order = sorted(range(P), key=lambda j: (-abs(float(v_NP[i, j])), j))[:kept]
        expected[i, order] = v_NP[i, order].numpy()

    assert np.array_equal(applied(TopK(share=share), v_NP, context(num_rows=4)).numpy(), expected)


@pytest.mark.parametrize(("size", "most", "dtype"), [(65_536, 4096, torch.int16), (65_568, 2049, torch.int32)])
def test_places_travel_as_indices_as_long_as_these_are_no_larger_than_a_bitmap(size, most, dtype):
    v = gaussian(1, size, dtype=torch.float32)
    places = [TopK(share=kept / size).compress(v, context(vector_layout(size)))["places"] for kept in (most, most + 1)]

    assert [part.dtype for part in places] == [dtype, torch.uint8]


@pytest.mark.parametrize("place", [0, 32_767, 32_768, 65_535])
def test_indices_of_16_bits_name_every_place(place):
    v = torch.zeros(2, 65_536)
    v[1, place] = -3.0
    compressor, ctx = TopK(share=1e-5), context(vector_layout(65_536), num_rows=2)

    assert compressor.compress(v, ctx)["places"].dtype == torch.int16
    assert torch.equal(applied(compressor, v, ctx), v)


def test_an_index_of_16_bits_beyond_the_vector_is_left_out():
    parts = {"places": torch.tensor([[2, -1]], dtype=torch.int16), "values": torch.tensor([[4.0, 5.0]])}

    assert TopK(share=0.01).decompress(parts, context(vector_layout(200)), torch.float32).nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize(("share", "energy"), [(0.01, 0.0845), (0.1, 0.4396)])
def test_top_k_keeps_of_gaussian_vectors_what_is_known(share, energy):
    size = 10**6

    assert kept_share(TopK(share=share), gaussian(1, size), context(vector_layout(size))) == pytest.approx(energy, abs=5e-4)


def test_random_k_takes_the_same_new_places_everywhere_in_each_round():
    compressor = RandomK(share=0.1)
    ctx = context(num_rows=3)
    v_NP = gaussian(3, P)
    places = compressor.places(ctx)
    expected = torch.zeros_like(v_NP)
    for place in places.tolist():
        expected[:, place] = v_NP[:, place]
    counts = torch.zeros(P)
    for number in range(2000):
        counts[compressor.places(context(round=number))] += 1

    assert torch.equal(applied(compressor, v_NP, ctx), expected)
    assert len(places.unique()) == len(places) == 41
    assert torch.equal(places, compressor.places(context(first=7)))
    deviation = (counts - 2000 * 41 / P) / math.sqrt(2000 * (41 / P) * (1 - 41 / P))
    assert float(deviation.abs().max()) < 5


def test_low_rank_is_the_projection_onto_what_a_matrix_makes_of_random_columns():
    from p2pfl.algorithms.sparsifiers import gaussian_columns

    ctx = context(num_rows=2)
    v_NP, rank = gaussian(2, P), 2
    there = applied(LowRank(rank=rank), v_NP, ctx)
    for number, (spec, place) in enumerate(LAYOUT.slices()):
        if len(spec.shape) == 1:
            assert torch.equal(there[:, place], v_NP[:, place])
            continue
        m, n = spec.shape[0], spec.size // spec.shape[0]
        start = gaussian_columns(n * rank, number, ctx).numpy().reshape(n, rank)
        for i in range(2):
            matrix = v_NP[i, place].numpy().reshape(m, n)
            image = matrix @ start
            expected = image @ np.linalg.pinv(image) @ matrix

            np.testing.assert_allclose(there[i, place].numpy().reshape(m, n), expected, atol=1e-12)


def test_random_columns_are_gaussian():
    from p2pfl.algorithms.sparsifiers import gaussian_columns

    draws = gaussian_columns(40_000, 0, context())

    assert abs(float(draws.mean())) < 5 / 200
    assert abs(float(draws.square().mean()) - 1) < 5 * (2**0.5) / 200
    assert abs(float(draws.pow(4).mean()) - 3) < 5 * 96**0.5 / 200
    assert abs(float(draws.pow(3).mean())) < 5 * 15**0.5 / 200


def test_low_rank_gives_back_a_matrix_of_its_rank():
    matrix = gaussian(20, 2) @ gaussian(2, 15, seed=1)
    layout = Layout(tensors=(TensorSpec("w", (20, 15), "float64"),))
    v = matrix.reshape(1, -1)

    torch.testing.assert_close(applied(LowRank(rank=2), v, context(layout)), v, rtol=0, atol=1e-12)
