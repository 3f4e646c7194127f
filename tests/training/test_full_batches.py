"""No batch has a row twice: exact methods are exact on unequal sites, and what earlier versions resolved is drawn as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from networks import Network, finish
from p2pfl.draws import batch_positions
from p2pfl.errors import ConfigError
from p2pfl.experiment.loading import experiment_from, recorded_experiment, resolve
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.runs.folder import RunFolder
from p2pfl.simulator import Simulation, simulate
from p2pfl.tasks import Site, Task
from p2pfl.yaml_files import dump_yaml
from thorough import first_fast

SIZES = {"basel": 3, "bern": 5, "chur": 9, "genf": 20, "lugano": 33}
FEATURES = 3


def rows_of(size, seed):
    """Rows of a site whose best weights are not its neighbours'."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, FEATURES, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.5 * seed
    return inputs, (inputs @ weights + 0.1 * torch.randn(size, generator=generator, dtype=torch.float64)).unsqueeze(1)


SITES = [Site(name=name, train=rows_of(size, number), test=None) for number, (name, size) in enumerate(SIZES.items())]
LINEAR = Task(name="linear", model=lambda: nn.Linear(FEATURES, 1, bias=False), loss=F.mse_loss, metrics={}, sites=SITES, dtype="float64")


def plan_of(task=LINEAR, **changes):
    base = {
        "task": {"name": "tests:linear"},
        "algorithm": {"name": "gradient-tracking", "local_steps": 1, "batch_size": "full"},
        "optimizer": {"lr": 0.1},
        "stop": None,
        "baselines": [],
    }
    return make_plan(recorded_experiment({"schema": 2, **base, **changes}, "test"), task)


def trained(plan, place, rounds):
    simulation = Simulation(plan, RunFolder.create(place, plan.experiment.as_dict()))
    for _ in range(rounds):
        simulation.step()
    return simulation.population.estimate()


def pooled_optimum(weighting):
    """The weights with the least loss on all sites' rows, or on the mean of the sites' losses."""
    factors = {name: 1.0 if weighting == "samples" else 1 / size for name, size in SIZES.items()}
    gram = sum(factors[site.name] * site.train[0].T @ site.train[0] for site in SITES)
    return torch.linalg.solve(gram, sum(factors[site.name] * site.train[0].T @ site.train[1] for site in SITES)).flatten()


@pytest.mark.no_cover
@pytest.mark.parametrize("name", first_fast(["gradient-tracking", "extra", "exact-diffusion"]))
@pytest.mark.parametrize(
    ("batch_size", "weighting"), first_fast([("full", "samples"), (64, "uniform"), ("full", "uniform"), (64, "samples")], 2)
)
def test_exact_methods_find_the_pooled_optimum_of_unequal_sites(name, batch_size, weighting, tmp_path):
    rule = {"name": name, "local_steps": 1, "batch_size": batch_size}
    lr, optimum_P, off = 0.1 if weighting == "samples" else 0.15, pooled_optimum(weighting), 1.0
    plan = plan_of(algorithm=rule, weighting=weighting, optimizer={"lr": lr}, rounds=400)
    simulation = Simulation(plan, RunFolder.create(tmp_path / "run", {}))
    while off >= 1e-9 and simulation.round < 400:
        simulation.step()
        off = float((simulation.population.estimate() - optimum_P).abs().max())

    assert off < 1e-9


@pytest.mark.parametrize("changes", [{}, {"optimizer": {"lr": 0.1, "momentum": 0.5}}], ids=["plain", "momentum"])
@pytest.mark.parametrize("batch_size", ["full", 8])
def test_steps_are_those_of_torch_alone_on_the_sites_own_rows(batch_size, changes, tmp_path):
    """Sites of 9 and more rows draw their batches of 8 as ever; smaller ones have all of theirs, once."""
    plan = plan_of(algorithm={"name": "dpsgd", "local_steps": 3, "batch_size": batch_size}, rounds=2, **changes)
    population = plan.population(plan.names)
    for number in range(2):
        population.train(number)

    for row, site in enumerate(SITES):
        model = nn.Linear(FEATURES, 1, bias=False, dtype=torch.float64)
        model.load_state_dict(plan.model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=plan.experiment.optimizer.momentum)
        inputs, targets = site.train
        size = len(inputs)
        whole = batch_size == "full" or size <= batch_size
        drawn = None if whole else batch_positions(0, torch.tensor([row]), torch.tensor([size]), 0, 6, batch_size)[0]
        for step in range(6):
            rows = torch.arange(size) if whole else drawn[step]
            optimizer.zero_grad()
            F.mse_loss(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
        torch.testing.assert_close(population.state["x"][row], model.weight.detach().flatten(), rtol=0, atol=1e-13)


class Residual(nn.Module):
    """Layers that are not written out: its own module computes."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.last = nn.Linear(FEATURES, FEATURES), nn.LayerNorm(FEATURES), nn.Linear(FEATURES, 1)

    def forward(self, inputs):
        return self.last(inputs + self.norm(torch.tanh(self.inner(inputs))))


@pytest.mark.no_cover
def test_a_module_that_computes_itself_is_used_by_one_thread_alone():
    """Two threads would train on each other's parameters: other weights in each run, without a word."""
    task, found = replace(LINEAR, model=Residual), []
    for threads in (1, 4):
        plan = plan_of(task, algorithm={"name": "dpsgd", "local_steps": 40, "batch_size": 8})
        population = plan.population(plan.names)
        population.use_threads(threads)
        for number in range(3):
            population.train(number)
        found.append(population.estimate().clone())

    assert torch.equal(*found)


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_with_batches_of_other_sizes_are_trained_in_threads_and_some_at_a_time(threads):
    plan = plan_of(algorithm={"name": "dpsgd", "local_steps": 2, "batch_size": "full"}, rounds=3)
    together, apart = plan.population(plan.names), [plan.population([name]) for name in plan.names]
    together.use_threads(threads)
    active_N = torch.tensor([True, False, True, True, False])
    for number in range(3):
        losses_N = together.train(number, active_N if number == 1 else None, in_place=True)
        for row, alone in enumerate(apart):
            if number != 1 or active_N[row]:
                assert torch.equal(losses_N[row], alone.train(number)[0])

    assert torch.equal(together.state["x"], torch.cat([alone.state["x"] for alone in apart]))


def test_daemons_with_full_batches_equal_the_simulator(tmp_path):
    plan = plan_of(rounds=4, save_models_every=1)
    expected_NP = trained(plan, tmp_path / "simulator", 4)

    async def main():
        async with Network(plan, tmp_path) as network:
            network.start()
            await network.ended()
            assert torch.equal(network.models(3), expected_NP)

    finish(main())


def test_batch_normalisation_is_refused_where_a_site_has_one_row_and_is_tried_with_as_many_as_there_are():
    def model():
        return nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, 1))

    few = [replace(SITES[0], train=tuple(part[:1] for part in SITES[0].train)), SITES[1]]
    with pytest.raises(ConfigError, match="site 'basel': ValueError: Expected more than 1 value per channel") as caught:
        plan_of(replace(LINEAR, model=model, sites=few))

    assert "before the first round" in str(caught.value)
    plan_of(replace(LINEAR, model=model, sites=SITES))


# files of earlier versions

LOGISTIC = {
    "name": "run",
    "task": {"name": "synthetic-logistic", "features": 3, "samples": 5},
    "nodes": 3,
    "algorithm": {"batch_size": 8, "local_steps": 1},
    "rounds": 2,
    "stop": None,
    "baselines": [],
}


def test_an_experiment_without_a_schema_is_new_where_a_user_wrote_it_and_old_where_it_was_resolved():
    new, old = experiment_from(LOGISTIC), recorded_experiment(LOGISTIC, "experiment.yaml")

    assert (new.schema, new.as_dict()["schema"]) == (2, 2)
    assert old.schema == 1
    assert "schema" not in old.as_dict()  # so that its study's digest stays
    assert recorded_experiment(new.as_dict(), "experiment.yaml") == new
    assert resolve(old, {"rounds": 3}).schema == 1
    assert experiment_from({**LOGISTIC, "schema": 1}).schema == 1
    with pytest.raises(ConfigError, match="schema = 3"):
        experiment_from({**LOGISTIC, "schema": 3})


def test_a_run_that_an_earlier_version_began_goes_on_with_its_draws(tmp_path):
    """Five rows and batches of eight: the first batch has three rows twice."""
    place = tmp_path / "run"
    old = recorded_experiment(LOGISTIC, "experiment.yaml")
    plan = make_plan(old, load_sites(old))
    began = Simulation(plan, RunFolder.create(place, {}))
    began.step()
    began.save()
    (place / "experiment.yaml").write_text(dump_yaml(old.as_dict()))
    resumed = simulate(experiment={}, resume=place)

    for row, name in enumerate(plan.names):
        model = nn.Linear(3, 1, dtype=plan.layout.dtype)
        model.load_state_dict({key.removeprefix("0."): value for key, value in plan.model.state_dict().items()})
        inputs, targets = plan.sites[name].train
        batches = batch_positions(0, torch.tensor([row]), torch.tensor([5]), 0, 1, 8, repeating=True)[0]
        loss = F.binary_cross_entropy_with_logits(model(inputs[batches[0]]), targets[batches[0]])
        assert began.population.sites[row].name == name
        assert float(loss.detach()) == pytest.approx(
            next(r["loss"] for r in resumed.node_records if r["round"] == 0 and r["node"] == name), rel=1e-6
        )
    newly = simulate(LOGISTIC, out=tmp_path / "new")
    assert resumed.experiment.schema == 1
    assert all(not torch.equal(resumed.models[name], newly.models[name]) for name in plan.names)


@pytest.mark.parametrize("batch_size", [0, -1, "ful", None, True, 2.5, "8"])
def test_a_batch_size_that_cannot_be_is_refused_in_one_sentence(batch_size):
    with pytest.raises(ConfigError) as caught:
        experiment_from({**LOGISTIC, "algorithm": {"batch_size": batch_size}})

    (finding,) = caught.value.findings
    assert finding.startswith("algorithm.batch_size = ")
    assert finding.endswith(": expected a whole number from 1 to 1,000,000, or full for all rows of each site")
