"""Aggregators of one's own: what an inbox mixes is theirs to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from p2pfl.algorithms import AGGREGATORS, DPSGD, InboxFactory
from p2pfl.simulator import simulate
from simulations import plan_of, starts_of


@dataclass(frozen=True)
class Median:
    """Coordinate-wise median of the neighbourhood, the own model in place of one that did not come."""

    sums_flows: ClassVar[bool] = False

    def mix(self, messages):
        models = [messages.own, *(messages.or_own(k) for k in range(messages.weights_NK.shape[1]))]
        return torch.stack(models).median(dim=0).values


def test_an_inbox_mixes_as_its_aggregator_says():
    inbox = InboxFactory(channels=DPSGD.channels, aggregator=Median()).for_node(
        {"x": torch.tensor([[0.0, 5.0]])},
        ["b", "c", "d", "e"],
        {"b": {"x": torch.tensor([1.0, 1e9])}, "c": {"x": torch.tensor([2.0, 6.0])}},
        {"b": 0.2, "c": 0.2, "d": 0.2, "e": 0.2},
        self_weight=0.2,
        dtype=torch.float32,
    )

    assert inbox.mix("x").tolist() == [[0.0, 5.0]]
    assert inbox.squared_distances("x")[0] > 1e17


def test_one_line_of_the_registry_lets_an_experiment_ask_for_it(tmp_path, monkeypatch):
    monkeypatch.setitem(AGGREGATORS, "median", Median)
    raw = {"task": {"name": "averaging"}, "nodes": 5, "topology": {"name": "complete"}, "rounds": 1, "stop": None}
    plan = plan_of({**raw, "aggregator": {"name": "median"}})
    run = simulate(plan.experiment, out=tmp_path / "median")
    middle = starts_of(plan).median(dim=0).values

    assert all(torch.equal(model, middle) for model in run.models.values())


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_every_aggregator_says_whether_it_sums_flows(name):
    assert isinstance(AGGREGATORS[name].sums_flows, bool)
