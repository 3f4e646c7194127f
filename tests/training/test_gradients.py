"""Gradients of N models at once: the same as one by one, each row with its own keys and buffers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from p2pfl.draws import Purpose, torch_seed
from p2pfl.params import Layout, parameters_of
from p2pfl.training.backends import gradients as gradients_module
from p2pfl.training.backends.gradients import RETURN_AT_ONCE_BYTES, Gradients, outputs_of, put_side_by_side

SEED, ROUND, STEP = 11, 4, 2
NODES = torch.tensor([3, 0, 9])


class OwnMind(torch.autograd.Function):
    """A function of a user's own, without a rule for vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, inputs):
        return OwnMind.apply(self.linear(inputs))


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def dropout():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))


def batch_norm():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def constant_buffer():
    model = nn.Sequential(nn.Linear(4, 2))
    model.register_buffer("scale", torch.ones(2))
    return model


def group_norm():
    return nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8), nn.Linear(8, 2))


def prepared(make_model, num_rows=3, batch=6):
    torch.manual_seed(0)
    model = make_model()
    x_NP = parameters_of(model) + 0.1 * torch.randn(num_rows, Layout.of(model).size)
    inputs, targets = torch.randn(num_rows, batch, 4), torch.randn(num_rows, batch, 2)
    return model, x_NP, inputs, targets


def gradients_of(model, inputs, targets, num_rows=3):
    return Gradients(model, F.mse_loss, (inputs[0], targets[0]), num_rows)


def call(gradients, x_NP, inputs, targets, *, rows=None, round=ROUND, step=STEP):
    rows_N = torch.arange(len(x_NP)) if rows is None else torch.tensor(rows)
    return gradients(x_NP, inputs, targets, seed=SEED, nodes_N=NODES[rows_N], rows_N=rows_N, round=round, step=step)[:2]


def by_hand(model, x_P, inputs, targets, seed=None, buffers=None):
    """torch alone, on one row."""
    own = copy.deepcopy(model).train()
    torch.nn.utils.vector_to_parameters(x_P, own.parameters())
    if buffers is not None:
        own.load_state_dict(buffers, strict=False)
    if seed is not None:
        torch.manual_seed(seed)
    loss = F.mse_loss(own(inputs), targets)
    loss.backward()
    return torch.cat([p.grad.reshape(-1) for p in own.parameters()]), loss.detach(), dict(own.named_buffers())


@pytest.mark.parametrize("make_model", [mlp, constant_buffer, group_norm])
def test_models_without_chance_or_changing_buffers_go_together(make_model):
    model, x_NP, inputs, targets = prepared(make_model)
    gradients = gradients_of(model, inputs, targets)
    gradient_NP, loss_N = call(gradients, x_NP, inputs, targets)

    assert gradients.row_by_row is None
    assert not gradient_NP.requires_grad
    for row in range(3):
        expected, loss, _ = by_hand(model, x_NP[row], inputs[row], targets[row])
        torch.testing.assert_close(gradient_NP[row], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss_N[row], loss, rtol=1e-6, atol=0)


def test_together_and_row_by_row_agree_to_rounding():
    model, x_NP, inputs, targets = prepared(mlp)
    together = gradients_of(model, inputs, targets)
    alone = gradients_of(model, inputs, targets)
    alone.row_by_row = "for this test"
    gradient_NP, loss_N = call(together, x_NP.double().float(), inputs, targets)
    other_NP, other_N = call(alone, x_NP, inputs, targets)

    # sums of at most 6 x 8 terms in float32
    torch.testing.assert_close(gradient_NP, other_NP, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss_N, other_N, rtol=1e-6, atol=0)


def test_one_row_of_many_is_the_row_alone():
    model, x_NP, inputs, targets = prepared(mlp)
    together, _ = call(gradients_of(model, inputs, targets), x_NP, inputs, targets)
    for row in range(3):
        alone = Gradients(model, F.mse_loss, (inputs[0], targets[0]), 1)
        one, _, _ = alone(
            x_NP[row : row + 1],
            inputs[row : row + 1],
            targets[row : row + 1],
            seed=SEED,
            nodes_N=NODES[row : row + 1],
            rows_N=torch.tensor([0]),
            round=ROUND,
            step=STEP,
        )
        torch.testing.assert_close(one[0], together[row], rtol=1e-5, atol=1e-6)


def test_dropout_goes_row_by_row_under_each_nodes_own_key():
    model, x_NP, inputs, targets = prepared(dropout)
    gradients = gradients_of(model, inputs, targets)
    gradient_NP, loss_N = call(gradients, x_NP, inputs, targets)

    assert gradients.row_by_row == "the model draws random numbers while it trains"
    for row, node in enumerate(NODES.tolist()):
        seed = torch_seed(SEED, Purpose.MODEL, node=node, round=ROUND, step=STEP)
        expected, loss, _ = by_hand(model, x_NP[row], inputs[row], targets[row], seed)
        assert torch.equal(gradient_NP[row], expected)
        assert torch.equal(loss_N[row], loss)


def test_dropout_is_the_same_again_and_differs_between_nodes_rounds_and_steps():
    model, x_NP, inputs, targets = prepared(dropout)
    gradients = gradients_of(model, inputs, targets)
    x_NP, inputs, targets = x_NP[:1].expand(3, -1), inputs[:1].expand(3, -1, -1), targets[:1].expand(3, -1, -1)
    torch.manual_seed(1)
    first, _ = call(gradients, x_NP, inputs, targets)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    again, _ = call(gradients, x_NP, inputs, targets)

    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), state)  # and nobody else's draws are touched
    assert torch.equal(call(gradients, x_NP[1:2], inputs[:1], targets[:1], rows=[1])[0][0], first[1])
    drawn = [*first, *call(gradients, x_NP, inputs, targets, round=ROUND + 1)[0], *call(gradients, x_NP, inputs, targets, step=STEP + 1)[0]]
    assert len({tuple(row.tolist()) for row in drawn}) == 9


def test_batch_norm_keeps_its_statistics_at_each_row_and_says_so():
    model, x_NP, inputs, targets = prepared(batch_norm)
    own = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = gradients_of(model, inputs, targets)
    assert gradients.row_by_row == "the model changes its buffers while it trains (1.running_mean); they stay at each node"
    assert {name: tuple(b.shape) for name, b in gradients.buffers.items()} == {
        "1.running_mean": (3, 8),
        "1.running_var": (3, 8),
        "1.num_batches_tracked": (3,),
    }
    gradient_NP, _ = call(gradients, x_NP, inputs, targets)
    call(gradients, x_NP[1:2], inputs[1:2], targets[1:2], rows=[1])

    assert gradients.buffers["1.num_batches_tracked"].tolist() == [1, 2, 1]
    for row in range(3):
        expected, _, buffers = by_hand(model, x_NP[row], inputs[row], targets[row])
        if row == 1:
            _, _, buffers = by_hand(model, x_NP[row], inputs[row], targets[row], buffers=buffers)
        torch.testing.assert_close(gradient_NP[row], expected)
        for name, buffer in buffers.items():
            assert torch.equal(gradients.buffers[name][row], buffer), (name, row)
    assert all(torch.equal(buffer, own[name]) for name, buffer in model.named_buffers())


def test_what_cannot_be_vectorised_goes_row_by_row_with_the_reason():
    model, x_NP, inputs, targets = prepared(Squares)
    gradients = gradients_of(model, inputs, targets)
    gradient_NP, _ = call(gradients, x_NP, inputs, targets)

    assert gradients.row_by_row.startswith("the model cannot be vectorised: ")
    assert "\n" not in gradients.row_by_row
    for row in range(3):
        torch.testing.assert_close(gradient_NP[row], by_hand(model, x_NP[row], inputs[row], targets[row])[0])


def test_trying_the_model_leaves_it_and_the_global_generator_alone():
    model, _, inputs, targets = prepared(dropout)
    torch.manual_seed(3)
    state, before = torch.random.get_rng_state(), parameters_of(model)
    gradients_of(model, inputs, targets)

    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(parameters_of(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_outputs_are_those_of_evaluation_with_the_rows_buffers():
    model, x_NP, inputs, targets = prepared(batch_norm)
    gradients = gradients_of(model, inputs, targets)
    call(gradients, x_NP, inputs, targets)
    buffers = {name: stacked[2] for name, stacked in gradients.buffers.items()}
    model.train()
    outputs = outputs_of(model, x_NP[2], buffers, inputs[0])
    own = copy.deepcopy(model).eval()
    expected = functional_call(own, {**Layout.of(model).views(x_NP[2]), **{n: b.clone() for n, b in buffers.items()}}, (inputs[0],))

    assert torch.equal(outputs, expected.detach())
    assert not outputs.requires_grad
    assert model.training
    assert buffers["1.num_batches_tracked"] == 1


def test_parts_of_a_large_gradient_are_given_back_while_they_are_put_together(monkeypatch):
    left: list[int] = []
    parts = [torch.full((1, RETURN_AT_ONCE_BYTES // 8), float(number)) for number in range(5)]  # each half of what is given back at once
    expected = torch.cat(parts, dim=1)
    monkeypatch.setattr(gradients_module, "return_freed_memory", lambda: left.append(len(parts)))

    assert torch.equal(expected, put_side_by_side(parts))
    assert left == [3, 1]


def test_nothing_is_given_back_for_small_gradients_or_many_rows(monkeypatch):
    monkeypatch.setattr(gradients_module, "return_freed_memory", lambda: pytest.fail("it takes time"))
    put_side_by_side([torch.ones(1, 100), torch.ones(1, 100)])
    put_side_by_side([torch.ones(2, RETURN_AT_ONCE_BYTES // 8), torch.ones(2, RETURN_AT_ONCE_BYTES // 8)])
