"""How far a reader has to go: through how many files an experiment gets to its plan, and a round to its rows."""

from __future__ import annotations

from collections import Counter

import pytest

from p2pfl.experiment.loading import resolve
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.runs.folder import RunFolder
from p2pfl.simulator import Simulation, simulate
from p2pfl.yaml_files import dump_yaml
from simulations import QUICK, plan_of
from ways import way

LEARNING = {"task": {"name": "synthetic-logistic"}, "nodes": 4, "rounds": 3, **QUICK, "evaluate_every": 1}
MOST_STAYS = 14
MOST_CLIMBS = 3
MOST_STAYS_FROM_A_FILE = {"dpsgd": 33, "choco": 37}


@pytest.mark.parametrize("algorithm", ["dpsgd", "gradient-tracking", "choco", "push-sum"])
def test_a_round_passes_through_few_files(algorithm, tmp_path):
    plan = plan_of({**LEARNING, "algorithm": {"name": algorithm}, "weights": "push-sum" if algorithm == "push-sum" else "metropolis"})
    simulation = Simulation(plan, RunFolder.create(tmp_path / "run", {}))
    simulation.step()

    with way() as taken:
        simulation.step()

    assert len(taken.stays()) <= MOST_STAYS
    assert len(taken.climbs()) <= MOST_CLIMBS


@pytest.mark.parametrize("algorithm", MOST_STAYS_FROM_A_FILE)
def test_an_experiment_gets_to_its_first_row_with_few_climbs(algorithm, tmp_path, monkeypatch):
    class FirstRow(Exception):
        pass

    def stop(folder, row):
        raise FirstRow

    file = tmp_path / "experiment.yaml"
    file.write_text(dump_yaml({**LEARNING, "algorithm": {"name": algorithm}}), encoding="utf-8")
    simulate(file, out=tmp_path / "before")  # compiled loops are loaded once
    monkeypatch.setattr(RunFolder, "append_round", stop)

    with way() as taken, pytest.raises(FirstRow):
        simulate(file, out=tmp_path / "run")

    assert len(taken.stays()) <= MOST_STAYS_FROM_A_FILE[algorithm]
    assert len(taken.climbs()) <= MOST_CLIMBS


def test_every_file_of_an_experiment_is_entered_once_on_the_way_to_its_plan(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text(dump_yaml(LEARNING), encoding="utf-8")

    with way() as taken:
        experiment = resolve(file)
        make_plan(experiment, load_sites(experiment))

    entered = Counter(stay[-1] for stay in taken.stays())
    assert [entered[f"experiment/{name}.py"] for name in ("loading", "findings", "graph", "requirements", "plan")] == [1] * 5
    assert entered["experiment/spec.py"] == 0  # a look-up
    assert len(taken.climbs()) <= 1  # the reader of YAML makes what it was given a type of
