"""The worked example of docs/extending.md, as it stands there: one file, one line, and both runtimes give the same weights."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from networks import Network, finish, plan_of
from p2pfl.algorithms import ALGORITHMS
from p2pfl.errors import ConfigError
from p2pfl.experiment import experiment_from
from p2pfl.simulator import simulate

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
EXPERIMENT = {
    "task": {"name": "synthetic-logistic"},
    "nodes": 4,
    "algorithm": {"name": "careful", "theta": 0.3, "local_steps": 2},
    "rounds": 5,
    "stop": {"relative_consensus": 1e-2},
    "baselines": [],
}


@pytest.fixture(autouse=True)
def careful(tmp_path, monkeypatch):
    """The page's file as a module, and its line in the registry."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "careful_of_the_page.py").write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    rule = importlib.import_module("careful_of_the_page").Careful
    monkeypatch.setitem(ALGORITHMS, "careful", rule)
    return rule


def test_both_runtimes_run_it_and_give_the_same_weights(tmp_path):
    simulated = simulate(EXPERIMENT, out=tmp_path / "simulator")

    async def main():
        async with Network(plan_of(**EXPERIMENT), tmp_path) as network:
            network.start()
            assert set(await network.ended()) == {"converged"}
            return network.models()

    assert simulated.summary["stop_reason"] == "converged"
    assert torch.equal(finish(main()), torch.stack([simulated.models[name] for name in sorted(simulated.models)]))


def test_its_options_are_checked(careful):
    assert experiment_from(EXPERIMENT).build_algorithm() == careful(theta=0.3)
    with pytest.raises(ConfigError, match=r"algorithm\.theta = 2\.0: must be <= 1\.0"):
        experiment_from({**EXPERIMENT, "algorithm": {"name": "careful", "theta": 2.0}})
