"""What a run left behind, as Python objects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import p2pfl
from p2pfl.errors import ConfigError, StoreError
from p2pfl.evaluation.results import STACKED_ABOVE, Run, build_loaded, load, read_buffers, read_models, write_models
from p2pfl.params import Layout, parameters_of
from p2pfl.simulator import simulate
from simulations import LOGISTIC, QUICK, plan_of, run_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return simulate({**QUICK, **LOGISTIC, "rounds": 2, "evaluate_every": 1}, out=tmp_path_factory.mktemp("results") / "run")


def batch_norm():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))


def rows_and_buffers(num_rows):
    """Random parameters and statistics for batch_norm."""
    layout = Layout.of(batch_norm())
    buffers = {
        "1.running_mean": torch.randn(num_rows, 2),
        "1.running_var": torch.rand(num_rows, 2) + 0.5,
        "1.num_batches_tracked": torch.arange(num_rows),
    }
    return layout, torch.randn(num_rows, layout.size), buffers


def test_a_run_gives_its_records_as_dicts(run):
    assert run.summary["rounds"] == 2
    assert [row["round"] for row in run.records] == [0, 1]
    assert [(row["round"], row["node"]) for row in run.node_records] == [(r, f"node-{i}") for r in (0, 1) for i in range(4)]
    assert run.events == []
    assert run.experiment.rounds == 2
    assert list(run.models) == [f"node-{i}" for i in range(4)]
    assert p2pfl.Run is Run


def test_a_models_file_bears_the_models_own_names(run):
    saved = load_file(run.path / "models" / "node-1.safetensors")
    model = load(run, "node-1")

    assert set(saved) == {name for name, _ in model.named_parameters()}
    model.load_state_dict(saved)
    assert torch.equal(parameters_of(model), run.models["node-1"])


def test_a_loaded_model_is_ready_to_use(run):
    model = p2pfl.load(str(run.path), "node-2")

    assert not model.training
    assert torch.equal(parameters_of(model), run.models["node-2"])
    with pytest.raises(ConfigError, match=r"node 'node-9': one of node-0, node-1, node-2, node-3"):
        load(run.path, "node-9")


def test_a_loaded_model_has_its_nodes_own_statistics(tmp_path):
    made = plan_of(LOGISTIC, rounds=2)
    torch.manual_seed(0)
    model = batch_norm()
    made = replace(made, model=model, layout=Layout.of(model), gradients=None, task=replace(made.task, model=batch_norm))
    run = run_of(made, tmp_path / "run")
    for name in made.names:
        model = build_loaded(made.task, made.experiment, run.models[name], read_buffers(run.path, name))
        inputs, targets = made.sites[name].test
        with torch.no_grad():
            loss = made.task.loss(model(inputs), targets)

        assert int(model[1].num_batches_tracked) == 2 * 5
        assert made.task.metrics["log_loss"](model(inputs).detach(), targets) == run.summary["metrics"]["log_loss"]["per_node"][name]
        assert loss.isfinite()


@pytest.mark.parametrize("num_rows", [3, STACKED_ABOVE + 1])
def test_models_and_buffers_come_back_bit_for_bit(num_rows, tmp_path):
    layout, x_NP, buffers = rows_and_buffers(num_rows)
    names = tuple(f"n{i:04d}" for i in range(num_rows))
    write_models(tmp_path, names, x_NP, layout, buffers)
    write_models(tmp_path, names, x_NP + 1, layout, buffers, 7)
    found = read_models(tmp_path)

    assert list(found) == list(names)
    assert torch.equal(torch.stack(list(found.values())), x_NP)
    assert torch.equal(torch.stack(list(read_models(tmp_path, 7).values())), x_NP + 1)
    for row in (0, num_rows - 1):
        own = read_buffers(tmp_path, names[row])
        assert own.keys() == buffers.keys()
        assert all(torch.equal(own[name], rows[row]) for name, rows in buffers.items())
        assert own["1.num_batches_tracked"].dtype == torch.int64
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.safetensors")}
    if num_rows > STACKED_ABOVE:
        assert files == {"models.safetensors", "models/round-000007.safetensors"}
    else:
        assert files == {f"models/{part}n{i:04d}.safetensors" for part in ("", "round-000007/") for i in range(3)}


def test_names_are_ordered_as_the_rows_are_whatever_the_files_are_called(tmp_path):
    layout, x_NP, _ = rows_and_buffers(4)
    names = ("a", "a-1", "a.b", "ab")  # the file a-1.safetensors sorts before a.safetensors
    write_models(tmp_path, names, x_NP, layout, {})

    assert list(read_models(tmp_path)) == list(names)


def test_a_run_in_progress_says_so(run, tmp_path):
    for name in ("experiment.yaml", "environment.json", "rounds.jsonl"):
        (tmp_path / name).write_bytes((run.path / name).read_bytes())
    unfinished = Run(tmp_path)

    assert len(unfinished.records) == 2
    with pytest.raises(
        ConfigError, match=r"the run has no summary.json: it is still running or was interrupted; continue it with --resume"
    ):
        _ = unfinished.summary
    with pytest.raises(ConfigError, match="no final models: the run has not ended"):
        _ = unfinished.models
    with pytest.raises(ConfigError, match="no models of round 0: save_models_every decides which are kept"):
        unfinished.models_after(0)


@pytest.mark.parametrize("damage", ["single", "stacked", "foreign"])
def test_models_that_cannot_be_read_are_said_to_be_so(damage, tmp_path):
    place = tmp_path / "models.safetensors" if damage == "stacked" else tmp_path / "models" / "a.safetensors"
    place.parent.mkdir(exist_ok=True)
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(2)}, place, {"parameters": "bias"})
    else:
        place.write_bytes(b"nothing of the kind")

    with pytest.raises(StoreError, match="models: not readable as models"):
        read_models(tmp_path)
    if damage != "foreign":
        with pytest.raises(StoreError, match="the model of a is not readable"):
            read_buffers(tmp_path, "a")


def test_where_there_is_no_run_there_is_none(tmp_path):
    with pytest.raises(ConfigError, match=r"no such folder"):
        _ = Run(Path(tmp_path / "nothing")).summary
    with pytest.raises(ConfigError, match=r"holds no experiment.yaml"):
        _ = Run(tmp_path).records


def test_a_model_that_has_changed_since_is_a_finding():
    made = plan_of(LOGISTIC, rounds=2)

    with pytest.raises(ConfigError, match="its model has changed since it was trained: a vector of 3 parameters"):
        build_loaded(made.task, made.experiment, torch.zeros(3), {})
