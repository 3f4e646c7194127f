"""Layers of many rows written out give what torch gives each row alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from p2pfl.params import Layout, parameters_of
from p2pfl.training.backends.gradients import Batched
from p2pfl.training.backends.layers import SgdStep

ROWS, BATCH = 3, 5


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Linear(4 * 4 * 4, 3)

    def forward(self, inputs):
        return self.head(torch.flatten(F.relu(self.conv(inputs)), 1))


class OnPixels(nn.Sequential):
    def forward(self, pixels):
        outputs = (pixels.to(next(self.parameters()).dtype) / 255 - 0.1) * 2.5 + 1
        for layer in self:
            outputs = layer(outputs)
        return outputs * 0.5


class OnPixelsByMethods(nn.Sequential):
    def forward(self, pixels):
        outputs = pixels.double().div(255).sub(0.1).mul(2.5).add(1)
        for layer in self:
            outputs = layer(outputs)
        return outputs.mul(0.5).double()


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, inputs):
        return self.other(inputs + self.one(inputs))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, inputs):
        return self.head(self.inner(self.inner(inputs)))


FLAT, IMAGE = (6,), (1, 8, 8)
CHAINS = {
    "linear": (lambda: nn.Linear(6, 3), FLAT),
    "without bias": (lambda: nn.Linear(6, 3, bias=False), FLAT),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)), FLAT),
    "nested": (lambda: nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(6, 4), nn.Sigmoid()), nn.Linear(4, 3)), FLAT),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 3)), FLAT),
    "plain layer norm": (lambda: nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 3)), FLAT),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2), nn.Tanh(), nn.Flatten(), nn.Linear(45, 3)
        ),
        IMAGE,
    ),
    "strides": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, (3, 2), stride=(2, 1), dilation=(1, 2)), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)),
        IMAGE,
    ),
    "overlapping pools": (lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Conv2d(1, 3, 4), nn.Flatten(1)), IMAGE),
    "functional": (Functional, IMAGE),
    "as groups": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 5, padding=2, stride=(1, 2)), nn.ReLU(), nn.Conv2d(2, 3, 9, padding=4), nn.Flatten(), nn.Linear(96, 3)
        ),
        IMAGE,
    ),
    "numbers": (lambda: OnPixels(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3)), IMAGE),
    "numbers by methods": (lambda: OnPixelsByMethods(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3)), IMAGE),
}


def rows_of(make, seed=0, dtype=torch.float64):
    models = []
    for row in range(ROWS):
        torch.manual_seed(seed + row)
        models.append(make().to(dtype))
    return models, torch.stack([parameters_of(model) for model in models])


def batches(shape, dtype=torch.float64):
    torch.manual_seed(9)
    return torch.randn(ROWS, BATCH, *shape, dtype=dtype), torch.randint(0, 3, (ROWS, BATCH))


def alone(model, loss, inputs, targets):
    value = loss(model(inputs), targets)
    gradients = torch.autograd.grad(value, list(model.parameters()))
    return torch.cat([gradient.reshape(-1) for gradient in gradients]), value.detach()


def batched_of(model, loss, inputs, targets):
    return Batched.of(model, loss, (inputs, targets), alone(model, loss, inputs, targets))


def smoothed(outputs, targets):
    return F.cross_entropy(outputs, targets, label_smoothing=0.1)


@pytest.fixture(autouse=True)
def many_patches(request, monkeypatch):
    if "as groups" in request.node.name:
        monkeypatch.setattr("p2pfl.training.backends.layers._MANY_PATCHES", 0)


@pytest.mark.parametrize("loss", [F.cross_entropy, smoothed])
@pytest.mark.parametrize("name", CHAINS)
def test_gradients_are_torchs(name, loss):
    make, shape = CHAINS[name]
    models, x_CP = rows_of(make)
    inputs, targets = batches(shape)
    batched = batched_of(models[0], loss, inputs[0], targets[0])
    assert batched is not None
    gradient_CP, loss_C = batched.gradients(x_CP, inputs, targets)

    for row, model in enumerate(models):
        expected, value = alone(model, loss, inputs[row], targets[row])
        torch.testing.assert_close(gradient_CP[row], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(loss_C[row], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("name", CHAINS)
def test_a_step_down_is_torchs_sgd(name, decay):
    make, shape = CHAINS[name]
    models, x_CP = rows_of(make)
    inputs, targets = batches(shape)
    batched = batched_of(models[0], F.cross_entropy, inputs[0], targets[0])
    scale_C = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    moved_CP = x_CP.clone()
    batched.run(moved_CP, inputs, targets, SgdStep(moved_CP, 0.1, decay), scale_C)

    for row, model in enumerate(models):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=decay)
        (scale_C[row] * F.cross_entropy(model(inputs[row]), targets[row])).backward()
        optimizer.step()
        torch.testing.assert_close(moved_CP[row], parameters_of(model), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", [F.binary_cross_entropy_with_logits, F.mse_loss])
def test_losses_of_numbers(loss):
    models, x_CP = rows_of(lambda: nn.Linear(6, 2))
    inputs, _ = batches(FLAT)
    targets = (inputs[..., :2] > 0).double()
    batched = batched_of(models[0], loss, inputs[0], targets[0])
    gradient_CP, loss_C = batched.gradients(x_CP, inputs, targets)

    for row, model in enumerate(models):
        expected, value = alone(model, loss, inputs[row], targets[row])
        torch.testing.assert_close(gradient_CP[row], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(loss_C[row], value, rtol=1e-10, atol=1e-12)


def test_tables_of_words():
    models, x_CP = rows_of(lambda: nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(12, 3)))
    torch.manual_seed(0)
    inputs, targets = torch.randint(0, 11, (ROWS, BATCH, 3)), torch.randint(0, 3, (ROWS, BATCH))
    batched = batched_of(models[0], F.cross_entropy, inputs[0], targets[0])
    gradient_CP, _ = batched.gradients(x_CP, inputs, targets)

    for row, model in enumerate(models):
        torch.testing.assert_close(gradient_CP[row], alone(model, F.cross_entropy, inputs[row], targets[row])[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        Branching,
        Twice,
        lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)),
        lambda: nn.Sequential(nn.Linear(6, 3), nn.GELU()),
        lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)),
    ],
)
def test_what_is_no_chain_of_known_layers_is_left_to_torch(make):
    model = make().double()
    inputs, targets = batches(FLAT)

    assert batched_of(model, F.cross_entropy, inputs[0], targets[0]) is None


def test_one_row_gives_the_bits_that_it_gives_among_many():
    make, shape = CHAINS["mlp"]
    models, x_CP = rows_of(make, dtype=torch.float32)
    inputs, targets = batches(shape, dtype=torch.float32)
    batched = batched_of(models[0], F.cross_entropy, inputs[0], targets[0])
    together, _ = batched.gradients(x_CP, inputs, targets)

    for row in range(ROWS):
        one, _ = batched.gradients(x_CP[row : row + 1], inputs[row : row + 1], targets[row : row + 1])
        torch.testing.assert_close(one[0], together[row], rtol=1e-6, atol=1e-7)
    assert Layout.of(models[0]).size == x_CP.shape[1]
