"""The worked examples of docs/extending.md, as they stand there: one file, one line, and both runtimes give the same weights."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from networks import Network, finish, plan_of
from p2pfl.algorithms import ALGORITHMS
from p2pfl.errors import ConfigError
from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import build_algorithm
from p2pfl.simulator import FaultScript, simulate

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
EXPERIMENT = {
    "task": {"name": "synthetic-logistic"},
    "nodes": 4,
    "algorithm": {"name": "careful", "theta": 0.3, "local_steps": 2},
    "rounds": 5,
    "stop": {"relative_consensus": 1e-2},
    "baselines": [],
}


FRUGAL = {**EXPERIMENT, "algorithm": {"name": "frugal", "theta": 0.3, "local_steps": 2}, "stop": None}


@pytest.fixture(autouse=True)
def careful(tmp_path, monkeypatch):
    """The page's file as a module, with the second example in it, and their lines in the registry."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text().partition("# An aggregator of your own")[0], re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "rules_of_the_page.py").write_text("\n\n".join(blocks))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    rules = importlib.import_module("rules_of_the_page")
    monkeypatch.setitem(ALGORITHMS, "careful", rules.Careful)
    monkeypatch.setitem(ALGORITHMS, "frugal", rules.Frugal)
    return rules.Careful


@pytest.mark.parametrize(
    ("experiment", "reason"), [(EXPERIMENT, "converged"), pytest.param(FRUGAL, "rounds", marks=pytest.mark.slow)], ids=["careful", "frugal"]
)
def test_both_runtimes_run_it_and_give_the_same_weights(experiment, reason, tmp_path):
    simulated = simulate(experiment, out=tmp_path / "simulator")

    async def main():
        async with Network(plan_of(**experiment), tmp_path) as network:
            network.start()
            assert set(await network.ended()) == {reason}
            return network.models(), sum(network.summary(name)["bytes_sent"] for name in network.plan.names)

    models, bytes_sent = finish(main())
    assert simulated.summary["stop_reason"] == reason
    assert torch.equal(models, torch.stack([simulated.models[name] for name in sorted(simulated.models)]))
    assert bytes_sent == simulated.summary["bytes_sent"]


def test_what_continues_is_repaired_where_it_was_lost(tmp_path):
    experiment = {**FRUGAL, "task": {"name": "averaging"}, "rounds": 80}
    plan = plan_of(**experiment)
    a, b, c, _ = plan.names
    faults = FaultScript.in_rounds(lost={(a, b): frozenset({0, 4, 5}), (c, b): frozenset({5})}, paused={c: frozenset({2})})
    run = simulate(experiment, out=tmp_path / "run", faults=faults)
    x_NP, start_NP = torch.stack([run.models[name] for name in sorted(run.models)]), plan.population(plan.names).estimate()

    assert {(event["round"], event["node"]) for event in run.events if event["event"] == "resynchronised"} >= {(1, b), (6, b)}
    assert float((x_NP.mean(dim=0) - start_NP.mean(dim=0)).abs().max()) < 1e-13
    assert float((x_NP - x_NP.mean(dim=0)).abs().max()) < 2.0**-23  # half precision holds no difference below 2**-24


def test_its_options_are_checked(careful):
    assert build_algorithm(experiment_from(EXPERIMENT)) == careful(theta=0.3)
    with pytest.raises(ConfigError, match=r"algorithm\.theta = 2\.0: must be <= 1\.0"):
        experiment_from({**EXPERIMENT, "algorithm": {"name": "careful", "theta": 2.0}})
