"""The grid of a sweep: its cells, their names, and values that do not go together."""

from __future__ import annotations

import json
import re

import pytest
from test_sweep import AVERAGING, QUADRATIC

from p2pfl.errors import ConfigError, ConflictError
from p2pfl.sweeps import make_grid, parse_variations
from p2pfl.sweeps.grid import checked


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("topology.name=ring,torus, base-2", ["ring", "torus", "base-2"]),
        ("optimizer.lr=1e-3,0.01,1", [0.001, 0.01, 1]),
        ("stop=null,{relative_consensus: 1e-2, patience: 2}", [None, {"relative_consensus": 0.01, "patience": 2}]),
        ("task.path='a,b',c", ["a,b", "c"]),
        ('task.path="a,b"', ["a,b"]),
        ("baselines=[],[local, pooled]", [[], ["local", "pooled"]]),
        ("task.name=mine:one,mine:two", ["mine:one", "mine:two"]),
        ("task.path=a=b", ["a=b"]),
        (" rounds =1,2,", [1, 2]),
        ("rounds=", []),
    ],
)
def test_values_are_read_as_a_list_in_yaml(text, values):
    assert list(parse_variations([text]).values()) == [values]


@pytest.mark.parametrize("text", ["rounds", "=1,2", "rounds=1,,2", "rounds=1],[2", "rounds='1"])
def test_what_is_no_list_of_values_is_refused_by_its_option(text):
    with pytest.raises(ConfigError, match=r"^--vary"):
        parse_variations([text])


@pytest.mark.parametrize(
    ("vary", "seeds", "fixed", "words"),
    [
        ({}, 1, {}, "there is nothing to vary"),
        ({"rounds": []}, 1, {}, "rounds: no values"),
        ({"rounds": "12"}, 1, {}, "rounds: no values"),
        ({"rounds": [1, 2, 1]}, 1, {}, "rounds = 1 is given twice"),
        ({"rounds": [1]}, 0, {}, "seeds = 0: must be >= 1"),
        ({"seed": [1]}, 2, {}, "seed: --seeds counts the seeds"),
        ({"rounds": [1]}, 1, {"rounds": 2}, "rounds is fixed and varied"),
        (
            {"topology": [{"name": "ring"}], "topology.name": ["star"]},
            1,
            {},
            "topology is varied, and topology.name, which is a part of it",
        ),
        ({"rounds": list(range(1001)), "nodes": list(range(100))}, 1, {}, "the grid has 100,100 runs: expected at most 100,000"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(vary, seeds, fixed, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        make_grid(AVERAGING, vary, seeds, fixed)


def test_a_key_given_twice_is_refused():
    with pytest.raises(ConfigError, match="--vary: rounds is given twice: write all its values behind one --vary rounds="):
        parse_variations(["rounds=1", "seed=3", "rounds=2"])


def test_one_and_true_are_two_values():
    assert len(make_grid(AVERAGING, {"rounds": [1, True]}, 1).cells) == 2


def test_cells_are_all_combinations_and_seeds_follow_the_experiments_own():
    grid = make_grid({**AVERAGING, "seed": 7}, {"topology.name": ["ring", "star"], "rounds": [1, 2, 3]}, 2)

    assert [cell.name for cell in grid.cells] == ["0-ring-1", "1-ring-2", "2-ring-3", "3-star-1", "4-star-2", "5-star-3"]
    assert grid.cells[4].values == {"topology.name": "star", "rounds": 2}
    assert [(cell.number, seed) for cell, seed in grid.runs] == [(number, seed) for seed in (7, 8) for number in range(6)]
    experiment = grid.experiment_of(grid.cells[4], 8)
    assert (experiment.topology.name, experiment.rounds, experiment.seed) == ("star", 2, 8)


def test_a_name_drops_the_options_of_the_name_before_and_goes_before_its_own():
    raw = {**AVERAGING, "nodes": 8, "topology": {"name": "small-world", "degree": 4, "p": 0.2}}
    grid = make_grid(raw, {"topology.degree": [3], "topology.name": ["random-regular"]}, 1)
    assert grid.experiment_of(grid.cells[0], 0).topology.options == {"degree": 3}
    names = make_grid(raw, {"topology.name": ["ring", "small-world"]}, 1)
    assert [names.experiment_of(cell, 0).topology.options for cell in names.cells] == [{}, {"degree": 4, "p": 0.2}]


def test_strange_values_make_plain_folder_names():
    values = ["../../etc", {"name": "ring"}, "ä" * 5, "x" * 500, None]
    grid = make_grid(AVERAGING, {"task.path": values}, 1)

    assert [cell.name for cell in grid.cells] == ["0-etc", "1-name-ring", "2-value", f"3-{'x' * 60}", "4-null"]


def test_a_graphs_file_is_found_beside_the_experiment(tmp_path):
    (tmp_path / "graph.yaml").write_text("nodes: 3\nedges: [[0, 1], [1, 2]]\n")
    (tmp_path / "mean.yaml").write_text(json.dumps({**AVERAGING, "nodes": 3}))
    grid = make_grid(tmp_path / "mean.yaml", {"topology.file": ["graph.yaml"]}, 1)

    assert grid.vary == {"topology.file": [str(tmp_path / "graph.yaml")]}
    assert checked(grid).left_out == {}


# ---- cells that cannot be


def test_cells_whose_values_do_not_go_together_are_left_out_with_the_reason():
    grid = make_grid(QUADRATIC, {"topology.name": ["ring", "hypercube", "complete"], "algorithm.name": ["dpsgd", "allreduce"]}, 1)

    assert checked(grid).left_out == {
        "1-ring-allreduce": "topology.name = 'ring': algorithm allreduce needs complete",
        "3-hypercube-allreduce": "topology.name = 'hypercube': algorithm allreduce needs complete",
    }
    sizes = make_grid(QUADRATIC, {"nodes": [4, 6], "topology.name": ["ring", "hypercube"]}, 1)
    assert list(checked(sizes).left_out) == ["3-6-hypercube"]
    assert checked(sizes).left_out["3-6-hypercube"].startswith("hypercube of 6 nodes: expected a power of two")


def test_a_value_that_no_cell_can_have_is_refused():
    with pytest.raises(ConfigError, match=r"algorithm.name = 'allreduce': no cell can have it: .* needs complete"):
        checked(make_grid(QUADRATIC, {"topology.name": ["ring", "star"], "algorithm.name": ["dpsgd", "allreduce"]}, 1))
    with pytest.raises(ConfigError) as refused:
        checked(make_grid(QUADRATIC, {"topology.name": ["ring", "star"], "algorithm.name": ["allreduce"]}, 1))
    assert len(refused.value.findings) == 2
    assert not isinstance(refused.value, ConflictError)
