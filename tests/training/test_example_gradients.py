"""Mechanisms on the gradients of single examples: they see all of them, and no backend takes several steps at once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from p2pfl.errors import ConfigError
from p2pfl.experiment.loading import experiment_from
from p2pfl.privacy import MECHANISMS
from p2pfl.simulator import simulate
from simulations import LOGISTIC, QUICK, plan_of

LEARNING = {**LOGISTIC, **QUICK, "rounds": 2, "dtype": "float64", "algorithm": {"name": "dpsgd", "local_steps": 3, "batch_size": 4}}
MOST_APART = 1e-12  # a batch's mean and the mean of its examples differ by the order of their sums


@dataclass(frozen=True, kw_only=True)
class Noisy:
    scale: float = 0.0

    def gradient(self, gradients_CBP, normal):
        return gradients_CBP.mean(dim=1) + self.scale * normal()


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(MECHANISMS, "noisy", Noisy)


def test_the_mean_over_examples_is_the_gradient_of_the_batch(tmp_path):
    plain = simulate(LEARNING, out=tmp_path / "plain").models
    private = simulate({**LEARNING, "privacy": {"name": "noisy"}}, out=tmp_path / "private").models

    assert all(torch.allclose(plain[name], private[name], rtol=0, atol=MOST_APART) for name in plain)


def test_a_row_alone_draws_what_it_draws_among_others():
    plan = plan_of({**LEARNING, "privacy": {"name": "noisy", "scale": 0.5}})
    everybody, one = plan.population(plan.names), plan.population([plan.names[2]])
    everybody.train(0)
    one.train(0)

    assert torch.allclose(everybody.estimate()[2], one.estimate()[0], rtol=0, atol=MOST_APART)
    assert not torch.allclose(everybody.estimate()[1], one.estimate()[0], rtol=0, atol=1e-3)


def test_no_backend_takes_several_steps_at_once():
    with pytest.raises(ConfigError, match="compiled = 'on': privacy needs the gradients of single examples"):
        plan_of({**LEARNING, "compiled": "on", "privacy": {"name": "noisy"}})


@pytest.mark.parametrize(
    ("privacy", "finding"),
    [
        ({"name": "noise"}, "privacy.name = 'noise': expected noisy"),
        ({"name": "noisy", "scales": 1}, "privacy.scales = 1: unknown key, did you mean scale? one of name, scale"),
        ({"name": "noisy", "scale": "much"}, "privacy.scale = 'much': expected a number"),
    ],
)
def test_a_mechanism_that_cannot_be_is_a_finding(privacy, finding):
    with pytest.raises(ConfigError) as raised:
        experiment_from({**LEARNING, "privacy": privacy})

    assert list(raised.value.findings) == [finding]
