"""How far a reader has to go: through how many files an experiment gets to its plan, and a round to its rows."""

from __future__ import annotations

from collections import Counter

import pytest

from p2pfl.experiment.loading import resolve
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.runs.folder import RunFolder
from p2pfl.simulator import Simulation, simulate
from p2pfl.simulator.mixer import Mixer
from p2pfl.yaml_files import dump_yaml
from simulations import QUICK, plan_of
from ways import way

LEARNING = {"task": {"name": "synthetic-logistic"}, "nodes": 4, "rounds": 3, **QUICK, "evaluate_every": 1}
MOST_STAYS = 13
MOST_CLIMBS = 2
MOST_STAYS_FROM_A_FILE = {"dpsgd": 27, "choco": 32}
MOST_STAYS_TO_A_MERGED_ROW = {"dpsgd": 24, "choco": 29, "gradient-tracking": 27, "push-sum": 28}


@pytest.mark.parametrize("algorithm", ["dpsgd", "gradient-tracking", "choco", "push-sum"])
def test_a_round_passes_through_few_files(algorithm, tmp_path):
    plan = plan_of({**LEARNING, "algorithm": {"name": algorithm}, "weights": "push-sum" if algorithm == "push-sum" else "metropolis"})
    simulation = Simulation(plan, RunFolder.create(tmp_path / "run", {}))
    simulation.step()

    with way() as taken:
        simulation.step()

    assert len(taken.stays()) <= MOST_STAYS
    assert len(taken.climbs()) <= MOST_CLIMBS


def way_until(owner, method, algorithm, tmp_path, monkeypatch):
    """The way of an experiment from its file until a method is called for the first time."""

    class Reached(Exception):
        pass

    def stop(*_):
        raise Reached

    file = tmp_path / "experiment.yaml"
    weights = "push-sum" if algorithm == "push-sum" else "metropolis"
    file.write_text(dump_yaml({**LEARNING, "algorithm": {"name": algorithm}, "weights": weights}), encoding="utf-8")
    simulate(file, out=tmp_path / "before")  # compiled loops are loaded once
    monkeypatch.setattr(owner, method, stop)
    with way() as taken, pytest.raises(Reached):
        simulate(file, out=tmp_path / "run")
    return taken


@pytest.mark.parametrize("algorithm", MOST_STAYS_FROM_A_FILE)
def test_an_experiment_gets_to_its_first_row_with_few_climbs(algorithm, tmp_path, monkeypatch):
    taken = way_until(RunFolder, "append_round", algorithm, tmp_path, monkeypatch)

    assert len(taken.stays()) <= MOST_STAYS_FROM_A_FILE[algorithm]
    assert len(taken.climbs()) <= MOST_CLIMBS


@pytest.mark.parametrize("algorithm", MOST_STAYS_TO_A_MERGED_ROW)
def test_an_experiment_gets_to_its_merged_rows_through_few_files(algorithm, tmp_path, monkeypatch):
    taken = way_until(Mixer, "measures", algorithm, tmp_path, monkeypatch)

    assert len(taken.stays()) <= MOST_STAYS_TO_A_MERGED_ROW[algorithm]
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
    assert taken.climbs() == set()
