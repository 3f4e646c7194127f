"""A model as one flat vector and back."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest
import torch
from torch import nn

from p2pfl.params import Layout, digest_of, load_parameters, parameters_of, tensor_over


class Scaled(nn.Module):
    """A parameter of every kind: a matrix, a vector, a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.linear = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)


def test_a_layout_lists_parameters_in_order_and_no_buffers():
    layout = Layout.of(Scaled())

    assert [(spec.name, spec.shape, spec.dtype) for spec in layout.tensors] == [
        ("scale", (), "float32"),
        ("linear.weight", (3, 2), "float32"),
        ("linear.bias", (3,), "float32"),
        ("norm.weight", (3,), "float32"),
        ("norm.bias", (3,), "float32"),
    ]
    assert layout.size == 16
    assert layout.size_bytes == 64
    assert torch.float32 == layout.dtype
    assert [(place.start, place.stop) for _, place in layout.slices()] == [(0, 1), (1, 7), (7, 10), (10, 13), (13, 16)]


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_views_and_flatten_undo_each_other_under_any_leading_axes(leading):
    layout = Layout.of(Scaled())
    flat = torch.arange(16.0) + 100 * torch.ones(*leading, 1)
    views = layout.views(flat)

    assert {name: (*leading, *shape) for name, shape in [(s.name, s.shape) for s in layout.tensors]} == {
        n: tuple(v.shape) for n, v in views.items()
    }
    assert torch.equal(flat, layout.flatten(views))


def test_views_share_memory_with_the_vector():
    flat = torch.zeros(16)
    Layout.of(Scaled()).views(flat)["linear.bias"] += 1

    assert flat.tolist() == [0.0] * 7 + [1.0] * 3 + [0.0] * 6


def test_what_a_model_computes_survives_the_way_to_a_vector_and_back():
    model, other = Scaled(), Scaled()
    flat = parameters_of(model)
    load_parameters(other, flat)

    assert not flat.requires_grad
    assert torch.equal(flat, parameters_of(other))
    assert torch.equal(model.linear.weight, other.linear.weight)
    assert other.linear.weight.requires_grad
    flat.zero_()
    assert model.scale.item() == 3.0


def test_wrong_vectors_and_tensors_are_refused_by_name():
    layout = Layout.of(Scaled())
    good = layout.views(torch.zeros(16))

    with pytest.raises(ValueError, match="a vector of 15 parameters: this layout has 16"):
        layout.views(torch.zeros(15))
    with pytest.raises(ValueError, match=re.escape("tensor linear.bias is missing: expected 5 tensors")):
        layout.flatten({name: tensor for name, tensor in good.items() if name != "linear.bias"})
    with pytest.raises(ValueError, match=re.escape("tensor linear.weight has shape (2, 3): expected (..., 3, 2)")):
        layout.flatten({**good, "linear.weight": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=re.escape("tensor linear.weight has shape (2,)")):
        layout.flatten({**good, "linear.weight": torch.zeros(2)})


def test_models_that_cannot_be_exchanged_are_refused():
    mixed = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).double())
    whole = nn.Module()
    whole.count = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)

    with pytest.raises(ValueError, match="no parameters"):
        Layout.of(nn.ReLU())
    with pytest.raises(ValueError, match=r"parameter 1\.weight has dtype float64, 0\.weight has float32: expected one dtype"):
        Layout.of(mixed)
    with pytest.raises(ValueError, match=r"none of the model.s parameters requires a gradient"):
        Layout.of(whole)


def test_a_digest_depends_on_names_shapes_and_dtypes_alone():
    text = b'[["weight",[1,2],"float32"],["bias",[1],"float32"]]'
    one, two = nn.Linear(2, 1), nn.Linear(2, 1)

    assert hashlib.sha256(text).hexdigest() == Layout.of(one).digest
    assert Layout.of(one).digest == Layout.of(two).digest
    others = [nn.Linear(2, 1).double(), nn.Linear(1, 2), nn.Linear(2, 1, bias=False), nn.Sequential(nn.Linear(2, 1))]
    assert len({Layout.of(model).digest for model in [one, *others]}) == 5


def test_a_vectors_digest_is_that_of_its_little_endian_bytes():
    values = torch.tensor([1.0, -2.5, 1e-30])

    assert hashlib.sha256(np.array([1.0, -2.5, 1e-30], dtype="<f4").tobytes()).hexdigest() == digest_of(values)
    assert digest_of(values) != digest_of(values.double())
    assert digest_of(values) == digest_of(torch.stack([values, values], dim=1)[:, 0])


def test_a_read_only_array_is_a_tensor_over_the_same_memory_and_torch_is_not_heard():
    for _ in range(2):
        array = np.arange(3.0)
        array.flags.writeable = False

        assert tensor_over(array).data_ptr() == array.ctypes.data
