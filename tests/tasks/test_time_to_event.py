"""A Cox model is trained by gossip: its loss is the partial likelihood, and its figure Harrell's concordance."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from clinic_tables import CONTRACT, NAMES, contract, patients, preprocessing, write_clinics, write_csv
from torch.func import grad_and_value, vmap

from commands import run_here
from p2pfl.errors import ConfigError
from p2pfl.evaluation.results import Run
from p2pfl.experiment.loading import load_experiment
from p2pfl.privacy import MECHANISMS
from p2pfl.simulator import simulate
from p2pfl.statistics.cox import CoxRows, fit_cox, partial_likelihood, risk_sums
from p2pfl.statistics.sums import analyse
from p2pfl.tasks import load_task
from p2pfl.tasks.time_to_event import concordance, negative_log_partial_likelihood
from p2pfl.yaml_files import dump_yaml, load_yaml
from simulations import plan_of

TIMED = {**CONTRACT, "outcome": ["days", "died"]}
TRAINING = {
    "topology": {"name": "complete"},
    "weighting": "samples",
    "algorithm": {"name": "dpsgd", "local_steps": 1, "batch_size": "full"},
    "optimizer": {"name": "sgd", "lr": 2.0},
    "rounds": 100,
    "stop": None,
    "baselines": [],
}


def drawn(num_rows, seed=0, num_times=12):
    """Risk scores and targets with ties among times, events and scores."""
    random = np.random.default_rng(seed)
    times, events = random.integers(1, num_times, num_rows), random.random(num_rows) < 0.6
    return torch.from_numpy(random.normal(size=(num_rows, 1)).round(1)), torch.from_numpy(np.stack([times, events], axis=-1)).double()


def log_likelihood(scores, targets):
    """Of the room for statistics, in whose default ties are Efron's."""
    times, events = targets[:, 0].numpy(), targets[:, 1].numpy() > 0
    rows = CoxRows(columns_MP=scores.numpy(), times_M=times, events_M=events)
    return partial_likelihood(risk_sums(rows.columns_MP, rows, np.unique(times), np.ones(1)), "efron")[0]


@pytest.mark.parametrize(("num_rows", "num_times"), [(1, 5), (2, 3), (40, 12), (300, 40), (300, 10**6)])
def test_the_loss_is_the_partial_likelihood_of_the_statistics_for_each_row(num_rows, num_times):
    scores, targets = drawn(num_rows, num_times=num_times)
    targets[0, 1] = 1

    assert float(negative_log_partial_likelihood(scores, targets)) == pytest.approx(-log_likelihood(scores, targets) / num_rows, abs=1e-12)


def test_its_gradient_is_that_of_finite_differences_also_of_many_sites_at_once():
    several = [drawn(20, seed, num_times=6) for seed in range(3)]
    scores, targets = (torch.stack(parts) for parts in zip(*several, strict=True))
    together, _ = vmap(grad_and_value(negative_log_partial_likelihood))(scores, targets)

    for gradient, (own, seen) in zip(together, several, strict=True):
        steps = 1e-5 * torch.eye(len(own), dtype=torch.float64).unsqueeze(-1)
        ends = [[negative_log_partial_likelihood(own + sign * step, seen) for step in steps] for sign in (1, -1)]
        torch.testing.assert_close(gradient[:, 0], (torch.stack(ends[0]) - torch.stack(ends[1])) / 2e-5, atol=1e-9, rtol=0)


def test_a_site_without_an_event_pulls_nowhere_and_large_scores_stay_numbers():
    scores, targets = drawn(30)
    gradient, loss = grad_and_value(negative_log_partial_likelihood)(scores, targets * torch.tensor([1.0, 0.0]))
    steep, of_steep = grad_and_value(negative_log_partial_likelihood)(1000 * scores, targets)

    assert float(loss) == float(gradient.abs().max()) == 0
    assert torch.isfinite(steep).all()
    assert torch.isfinite(of_steep)


def pairs(scores, targets):
    """Harrell's concordance, pair by pair."""
    right = number = 0.0
    rows = [(float(time), bool(event), float(score)) for (time, event), score in zip(targets, scores[:, 0], strict=True)]
    for time, event, score in rows:
        for later, also, other in rows:
            if event and (time < later or (time == later and not also)):
                number += 1
                right += 1 if score > other else 0.5 if score == other else 0
    return right / number


@pytest.mark.parametrize(("num_rows", "num_times"), [(9, 4), (64, 8), (65, 8), (330, 20), (330, 3), (330, 10**6)])
def test_concordance_is_that_of_all_pairs(num_rows, num_times):
    scores, targets = drawn(num_rows, num_times=num_times)

    assert concordance(scores, targets) == pytest.approx(pairs(scores, targets), abs=1e-14)


def test_concordance_is_undefined_without_a_comparable_pair():
    scores, targets = drawn(20)
    same = torch.stack([torch.ones(20), torch.ones(20)], dim=-1)

    assert np.isnan(concordance(scores, same))
    assert np.isnan(concordance(scores, targets * torch.tensor([1.0, 0.0])))
    assert np.isnan(concordance(scores[:0], targets[:0]))
    assert np.isnan(concordance(scores * torch.nan, targets))


@pytest.fixture
def clinics(tmp_path):
    write_clinics(tmp_path)
    return tmp_path


def made(clinics, **said):
    agreed = said.pop("contract", TIMED)
    changes = {key: value for key, value in agreed.items() if key != "name"}
    said = {"model": "cox", "sites": [str(clinics / name / "site.yaml") for name in NAMES], **said}
    return load_task("table", contract=agreed, preprocessing=preprocessing(contract(**changes)), **said)


def test_a_time_and_an_event_of_the_contract_are_the_targets(clinics):
    task = made(clinics)
    inputs, targets = task.sites[0].train
    seen = {(float(row["days"]), float(row["died"])) for row in patients("basel")}

    assert task.model()(inputs).shape == (len(inputs), 1)
    assert [name for name, _ in task.model().named_parameters()] == ["weight"]
    assert {tuple(row) for row in targets.tolist()} <= seen
    assert (len(targets), task.dtype, task.compares_rows, list(task.metrics)) == (64, "float64", True, ["concordance"])


def test_an_event_may_be_the_second_of_two_categories(clinics):
    variables = {**CONTRACT["variables"], "died": {"type": "category", "categories": {"no": ["0"], "yes": ["1"]}}}
    by_label = made(clinics, contract={**CONTRACT, "variables": variables}, outcome=["days", "died"])

    assert torch.equal(by_label.sites[0].train[1], made(clinics).sites[0].train[1])


def test_rows_without_time_or_event_are_left_out(clinics):
    rows = [row | ({"died": ""} if place < 10 else {"days": ""} if place < 20 else {}) for place, row in enumerate(patients("basel"))]
    write_csv(clinics / "basel" / "table.csv", rows)
    site = made(clinics).sites[0]

    assert len(site.train[0]) + len(site.test[0]) == 60


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"contract": CONTRACT}, "task.outcome: required, as the contract's outcome is died: cox takes a time and an event"),
        ({"outcome": "days"}, "task.outcome = 'days': cox takes a time and an event, such as outcome: [days, died]"),
        ({"outcome": ["days", "dies"]}, "task.outcome has 'dies': no variable of the contract; did you mean"),
        ({"outcome": ["age", "died"]}, "task.outcome has 'age': it is one of the contract's inputs as well"),
        ({"outcome": ["patient", "died"]}, "task.outcome has the time 'patient': expected a number, and the variable is of type id"),
        ({"outcome": ["died", "days"]}, "task.outcome has the event 'days': expected whole numbers with range [0, 1], or two categories"),
        ({"hidden": [3]}, "task.hidden = [3]: only an mlp has hidden layers"),
        ({"model": "logistic", "outcome": ["days", "died"]}, "task.outcome = ['days', 'died']: expected one variable; only cox takes"),
    ],
)
def test_an_outcome_that_is_no_time_to_an_event_is_one_sentence(clinics, said, sentence):
    with pytest.raises(ConfigError) as error:
        made(clinics, **said)

    assert sentence in str(error.value)


def test_a_time_of_zero_is_refused(clinics):
    write_csv(clinics / "basel" / "table.csv", [{**row, "days": "0"} for row in patients("basel")])

    with pytest.raises(ConfigError, match="days is 0 or less in some rows: whoever is not followed cannot be counted; say missing"):
        made(clinics)


@dataclass(frozen=True, kw_only=True)
class Mean:
    def gradient(self, gradients_CBP, normal):
        return gradients_CBP.mean(dim=1)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"algorithm": {"batch_size": 32}}, "algorithm.batch_size = 32: the loss of task table compares all rows of a site; take full"),
        (
            {"algorithm": {"batch_size": "full"}, "privacy": {"name": "mean"}},
            "privacy: needs gradients of single examples, and the loss of task table compares all rows of a site; take another model",
        ),
    ],
)
def test_batches_of_some_rows_and_gradients_of_single_ones_are_refused(clinics, monkeypatch, changed, sentence):
    monkeypatch.setitem(MECHANISMS, "mean", Mean)
    agreed = {"contract": TIMED, "preprocessing": preprocessing(contract(outcome=["days", "died"]))}
    sites = [str(clinics / name / "site.yaml") for name in NAMES]

    with pytest.raises(ConfigError) as error:
        plan_of({"task": {"name": "table", "model": "cox", "sites": sites, **agreed}, "rounds": 2, "stop": None, **changed})

    assert list(error.value.findings) == [sentence]


def lung_study(folder):
    """Contract, tables and the experiment of the lung cancer trial's sites, every row a training row; with the statistics' rows."""
    if "P2PFL_DATA" not in os.environ:
        pytest.skip("P2PFL_DATA is not set: no table of lung cancer")
    with (Path(os.environ["P2PFL_DATA"]) / "inference" / "lung2.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    variables = {
        "patient": {"type": "id"},
        "age": {"type": "number", "unit": "year", "range": [18, 110]},
        "sex": {"type": "category", "categories": ["0", "1"]},
        "time": {"type": "number", "unit": "day", "range": [0, 1100]},
        "status": {"type": "integer", "unit": 1, "range": [0, 1]},
    }
    inputs = ["age", "sex"]
    said = {"name": "lung", "patient": "patient", "outcome": ["time", "status"], "inputs": inputs, "table": {"decimal": "point"}}
    (folder / "contract.yaml").write_text(dump_yaml({**said, "variables": variables}))
    own, found = {}, []
    for place, row in enumerate(rows):
        numbers = {"time": row["time"], "age": row["age"], **{name: f"{float(row[name]):.0f}" for name in ("status", "sex")}}
        own.setdefault(row["site"], []).append({"patient": f"p{place}", **numbers})
    for name, each in own.items():
        write_csv(folder / f"{name}.csv", each)
        columns, times, events = ([[float(row[key]) for key in keys] for row in each] for keys in (inputs, ["time"], ["status"]))
        found.append(CoxRows(columns_MP=np.array(columns), times_M=np.array(times)[:, 0], events_M=np.array(events)[:, 0] > 0))
    task = {"name": "table", "contract": "contract.yaml", "preprocessing": "preprocessing.yaml", "model": "cox", "test": 0}
    path = folder / "lung.yaml"
    path.write_text(dump_yaml({"task": {**task, "sites": [f"{name}.csv" for name in own]}, **TRAINING}))
    return path, found


def test_gossip_ends_at_the_stratified_cox_model_of_the_statistics(tmp_path, monkeypatch, capfd):
    path, rows = lung_study(tmp_path)
    code, _, err = run_here("data", "prepare", path, monkeypatch=monkeypatch, capfd=capfd)
    assert (code, err) == (0, ""), err
    agreed = load_yaml(tmp_path / "preprocessing.yaml")["variables"]
    exact = analyse(fit_cox(["age", "sex"]), rows)
    run = simulate(load_experiment(path), out=tmp_path / "run")
    scales = [agreed["age"]["scale"], 1.0]  # categories stay 0 and 1

    assert exact.params == pytest.approx([0.0169897540, -0.5568810685], abs=1e-9)
    for weights in run.models.values():
        assert weights.numpy() / scales == pytest.approx(exact.params, rel=0, abs=1e-6)


def test_concordance_is_reported_and_new_patients_have_a_risk_score(clinics, monkeypatch, capfd):
    agreed = preprocessing(contract(outcome=["days", "died"]))
    sites = [str(clinics / name / "site.yaml") for name in NAMES]
    task = {"name": "table", "model": "cox", "contract": TIMED, "preprocessing": agreed, "sites": sites}
    run = simulate({"task": task, **TRAINING, "rounds": 20, "baselines": ["local", "pooled"]}, out=clinics / "run")
    rows = [{key: row[key] for key in ("patient", "age", "glucose", "sex", "ward")} for row in patients("basel")[:3]]
    write_csv(clinics / "new.csv", rows)
    (clinics / "new.yaml").write_text(dump_yaml({"table": {"file": "new.csv", "units": {"glucose": "mmol/l"}}}))
    code, out, _ = run_here("predict", clinics / "run", clinics / "new.yaml", "--node", "basel", monkeypatch=monkeypatch, capfd=capfd)
    inputs = made(clinics).read(clinics / "new.yaml")

    assert all(value > 0.7 for value in run.summary["metrics"]["concordance"]["per_node"].values())
    cells = json.loads((clinics / "run" / "cross_site.json").read_text())
    assert [high is None or high <= 1 for row in cells["high"] for high in row] == [True] * len(cells["models"]) * len(NAMES)
    assert cells["method"] == "jackknife of 16 groups of rows"
    assert code == 0
    expected = inputs.double() @ Run(clinics / "run").models["basel"]
    assert [float(line.split()[-1]) for line in out.splitlines()[-3:]] == pytest.approx(expected.tolist(), rel=1e-4)
