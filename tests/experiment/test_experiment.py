"""An experiment from its file: defaults, faults all at once, replaced keys."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from commands import run_here
from p2pfl.algorithms import ALGORITHMS, COMPRESSORS, DPSGD, AllReduce
from p2pfl.errors import ConfigError, ConflictError
from p2pfl.experiment.graph import build_topology, stop_rule
from p2pfl.experiment.loading import experiment_from, load_experiment, parse_assignment, resolve
from p2pfl.experiment.plan import build_algorithm
from p2pfl.experiment.spec import Experiment
from p2pfl.tasks import TASKS
from p2pfl.topology import SCHEDULES, TOPOLOGIES, WEIGHTS, Schedule
from p2pfl.yaml_files import dump_yaml, parse_yaml

FOUR_HOSPITALS = Path(__file__).parents[2] / "topologies" / "four-hospitals.yaml"

QUADRATIC = {"task": {"name": "quadratic"}}

DEFAULTS = """
name: NAME
schema: 2
task: {name: breast-cancer}
nodes: null
partition: {name: dirichlet, alpha: 0.5}
topology: {name: ring}
weights: metropolis
weighting: uniform
algorithm: {name: dpsgd, local_steps: 5, batch_size: 32}
optimizer: {name: sgd, lr: 0.05, momentum: 0.0, weight_decay: 0.0, schedule: constant, warmup_rounds: 0, clip_norm: null}
aggregator: {name: mean}
compressor: {name: none}
privacy: null
pace: {name: synchronous, max_age: 16, staleness: 1.0}
clock: null
rounds: 100
stop: {relative_consensus: 1.0e-3, patience: 3, settle: 200}
dtype: null
validation: 0.0
evaluate_every: 10
checkpoint_every: 1
save_models_every: null
baselines: [local, pooled]
compiled: auto
seed: 0
"""

FIVE_FAULTS = """
task: {name: quadratic}
topolgy: {name: star}
topology: {name: rign}
algorithm: {name: dpsdg, local_steps: -1}
optimizer: {name: sgd, lrr: 0.1}
"""
TASK_NAMES = f"{', '.join(TASKS)}, package.module:function"
WEIGHT_NAMES = ", ".join(WEIGHTS)
KEYS = ", ".join(field.name for field in fields(Experiment))
FIVE_FINDINGS = {
    f"topolgy = {{'name': 'star'}}: unknown key, did you mean topology? one of {KEYS}",
    "optimizer.lrr = 0.1: unknown key, did you mean lr? one of name, lr, momentum, weight_decay, schedule, warmup_rounds, clip_norm",
    f"topology.name = 'rign': did you mean ring? one of {', '.join([*TOPOLOGIES, *SCHEDULES])}",
    f"algorithm.name = 'dpsdg': did you mean dpsgd? one of {', '.join(ALGORITHMS)}",
    "algorithm.local_steps = -1: must be >= 0",
}


def written(tmp_path, text, name="trial.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def findings_of(raw, **overrides):
    with pytest.raises(ConfigError) as caught:
        experiment_from({**QUADRATIC, **raw}, "trial.yaml", overrides)
    assert caught.value.place == "trial.yaml"
    return list(caught.value.findings)


def test_a_task_is_enough_and_everything_else_has_its_default(tmp_path):
    experiment = load_experiment(written(tmp_path, "task: {name: breast-cancer}"))

    assert experiment.as_dict() == {**parse_yaml(DEFAULTS, "defaults"), "name": "trial"}


def test_an_experiment_written_out_is_the_same_experiment():
    experiment = experiment_from(
        {
            "task": {"name": "synthetic-logistic", "features": 3, "samples": 40},
            "nodes": 6,
            "topology": {"name": "random-regular", "degree": 3},
            "partition": {"name": "unequal", "sizes": [1, 2, 3]},
            "optimizer": {"name": "adam", "lr": 1e-3, "clip_norm": 1.0},
            "stop": None,
            "baselines": [],
            "dtype": "float64",
        }
    )

    assert experiment_from(parse_yaml(dump_yaml(experiment.as_dict()), "again")) == experiment
    assert resolve(experiment) is experiment
    assert resolve(experiment.as_dict()) == experiment
    assert resolve(experiment, {"rounds": 3}).rounds == 3


def test_five_faults_of_a_file_are_five_findings(tmp_path):
    path = written(tmp_path, FIVE_FAULTS)
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)

    assert set(caught.value.findings) == FIVE_FINDINGS
    assert len(caught.value.findings) == 5
    assert caught.value.place == str(path)


def test_five_faults_of_a_file_are_five_lines_of_the_command(tmp_path, monkeypatch, capfd):
    path = written(tmp_path, FIVE_FAULTS)
    monkeypatch.chdir(tmp_path)
    code, out, err = run_here("simulate", path, monkeypatch=monkeypatch, capfd=capfd)
    first, *lines = err.splitlines()

    assert code == 2
    assert out == ""
    assert first == f"p2pfl: {path}:"
    assert {line.strip() for line in lines} == FIVE_FINDINGS
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("raw", "findings"),
    [
        ({"task": {}}, ["task.name: required, but missing"]),
        ({"task": {"name": None}}, ["task.name = null: expected a text"]),
        ({"task": "quadratic"}, ["task = 'quadratic': expected a mapping (key: value)"]),
        (
            {"task": {"name": "quadratik"}},
            [f"task.name = 'quadratik': did you mean quadratic? one of {TASK_NAMES}"],
        ),
        ({"topology": "ring"}, ["topology = 'ring': expected a mapping (key: value)"]),
        ({"topology": {"degree": 3}}, ["topology = {'degree': 3}: expected a name (see `p2pfl topology list`) or a file"]),
        ({"optimizer": None}, ["optimizer = null: expected a mapping (key: value)"]),
        ({"algorithm": None}, ["algorithm = null: expected a mapping (key: value)"]),
        ({"algorithm": {"name": 3}}, ["algorithm.name = 3: expected a text"]),
        ({"algorithm": {"name": "dpsdg"}}, [f"algorithm.name = 'dpsdg': did you mean dpsgd? one of {', '.join(ALGORITHMS)}"]),
        ({"algorithm": {"gamma": 1}}, ["algorithm.gamma = 1: unknown key, one of name, local_steps, batch_size"]),
        (
            {"weights": "metropolitan"},
            [f"weights = 'metropolitan': did you mean metropolis? one of {WEIGHT_NAMES}"],
        ),
        ({"weighting": "sample"}, ["weighting = 'sample': one of 'uniform' or 'samples'"]),
        ({"partition": {"name": "dirichlt"}}, ["partition.name = 'dirichlt': did you mean dirichlet? one of iid, dirichlet, unequal"]),
        ({"aggregator": {"name": "krum"}}, ["aggregator.name = 'krum': expected mean"]),
        ({"compressor": {"name": "int9"}}, [f"compressor.name = 'int9': did you mean int8? one of {', '.join(COMPRESSORS)}"]),
        ({"compressor": {"name": "int8"}}, ["compressor.name = 'int8': algorithm dpsgd takes no compressor; choco does"]),
        (
            {"algorithm": {"name": "choco"}, "compressor": {"name": "top-k", "share": 2.0}},
            ["compressor.share = 2.0: must be <= 1.0"],
        ),
        ({"algorithm": {"name": "qg-dsgdm", "beta": 1.5}}, ["algorithm.beta = 1.5: must be < 1.0"]),
        ({"rounds": 0, "stop": None}, ["rounds = 0: with stop: null there is nothing to do; give rounds >= 1 or a stop"]),
        ({"optimizer": {"name": "adam", "momentum": 0.9}}, ["optimizer.momentum = 0.9: adam has none; only sgd and rmsprop take it"]),
        ({"algorithm": {"name": "allreduce"}}, ["topology.name = 'ring': algorithm allreduce needs complete"]),
        ({"optimizer": {"lr": float("nan")}}, ["optimizer.lr = nan: expected a finite number"]),
        ({"seed": 2**32}, ["seed = 4294967296: must be < 4294967296"]),
        ({"stop": {"relative_consensus": 0, "patience": 0, "settle": -1}}, None),
        ({"validation": 1.0}, ["validation = 1.0: must be <= 0.9"]),
        ({"baselines": ["global"]}, ["baselines.0 = 'global': one of 'local' or 'pooled'"]),
        ({"dtype": "float16"}, ["dtype = 'float16': one of 'float32' or 'float64'"]),
        ({"nodes": 0}, ["nodes = 0: must be >= 1"]),
        ({"rounds": "many"}, ["rounds = 'many': expected a whole number"]),
    ],
)
def test_a_fault_says_key_value_and_what_is_allowed(raw, findings):
    expected = findings or [
        "stop.relative_consensus = 0: must be > 0.0",
        "stop.patience = 0: must be >= 1",
        "stop.settle = -1: must be >= 0",
    ]

    assert findings_of(raw) == expected


def test_a_task_of_ones_own_needs_no_registration():
    assert experiment_from({"task": {"name": "package.module:function", "path": "x"}}).task.options == {"path": "x"}


def test_keys_are_replaced_by_their_dotted_names(tmp_path):
    path = written(tmp_path, "task: {name: quadratic}\nalgorithm: {local_steps: 2}\nstop: null\n")
    overrides = dict(map(parse_assignment, ["algorithm.local_steps=10", "optimizer.lr=1e-3", "stop.patience=5", "seed=7", "name=other"]))
    experiment = load_experiment(path, overrides)

    assert experiment.algorithm.local_steps == 10
    assert experiment.optimizer.lr == 0.001
    assert experiment.stop is not None  # a null section is taken as empty where a key is put into it
    assert experiment.stop.patience == 5
    assert experiment.seed == 7
    assert experiment.name == "other"
    assert load_experiment(path, {"stop": {"patience": 2}}).stop.patience == 2


@pytest.mark.parametrize(
    "order", [["topology.name=random-regular", "topology.degree=3"], ["topology.degree=3", "topology.name=random-regular"]]
)
def test_another_generator_forgets_the_options_of_the_one_before_and_keeps_its_own(order):
    raw = {**QUADRATIC, "topology": {"name": "small-world", "degree": 4, "p": 0.2}}
    experiment = experiment_from(raw, overrides=dict(map(parse_assignment, order)))

    assert experiment.topology.name == "random-regular"
    assert experiment.topology.options == {"degree": 3}


def test_another_rule_forgets_the_options_of_the_one_before_and_keeps_what_all_rules_have():
    raw = {
        **QUADRATIC,
        "algorithm": {"name": "choco", "local_steps": 2, "gamma": 0.3},
        "compressor": {"name": "top-k", "share": 0.5},
    }
    other = experiment_from(raw, overrides={"compressor.name": "none", "algorithm.name": "dpsgd"})

    assert (other.algorithm.name, other.algorithm.local_steps, other.algorithm.options) == ("dpsgd", 2, {})
    assert (other.compressor.name, other.compressor.options) == ("none", {})


def test_the_same_name_again_keeps_its_options():
    raw = {**QUADRATIC, "topology": {"name": "small-world", "degree": 4, "p": 0.2}, "algorithm": {"name": "choco", "gamma": 0.3}}
    same = experiment_from(raw, overrides={"topology.name": "small-world", "algorithm.name": "choco"})

    assert same.topology.options == {"degree": 4, "p": 0.2}
    assert same.algorithm.options == {"gamma": 0.3}


@pytest.mark.parametrize(
    "raw",
    [
        {"algorithm": {"name": "allreduce"}, "topology": {"name": "ring"}},
        {"compressor": {"name": "int8"}},
        {"rounds": 0, "stop": None},
        {"weights": "lazy", "topology": {"name": "base-2"}},
    ],
)
def test_values_that_are_wrong_only_together_are_a_conflict(raw):
    with pytest.raises(ConflictError):
        experiment_from({**QUADRATIC, **raw})


@pytest.mark.parametrize(
    "raw",
    [
        {"algorithm": {"name": "dpsdg"}},
        {"rounds": -1},
        {"algorithm": {"name": "choco", "gamma": -1}},
        {"compressor": {"name": "top-k", "share": 7}, "algorithm": {"name": "choco"}},
        {"algorithm": {"name": "dpsdg"}, "rounds": 0, "stop": None},  # one of each
    ],
)
def test_a_value_that_is_wrong_by_itself_is_none(raw):
    with pytest.raises(ConfigError) as refused:
        experiment_from({**QUADRATIC, **raw})

    assert not isinstance(refused.value, ConflictError)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rounds=10", ("rounds", 10)),
        ("optimizer.lr=1e-3", ("optimizer.lr", 0.001)),
        ("stop=null", ("stop", None)),
        ("baselines=[local]", ("baselines", ["local"])),
        ("task.path=a=b", ("task.path", "a=b")),
        ("name=", ("name", None)),
        (" name = x", ("name", "x")),
    ],
)
def test_an_assignment_is_a_key_and_a_yaml_value(text, expected):
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["rounds", "=3", " =3"])
def test_an_assignment_without_key_or_value_is_refused(text):
    with pytest.raises(ConfigError, match="expected KEY=VALUE, such as"):
        parse_assignment(text)


def test_a_topologys_file_and_its_name_replace_each_other():
    def options(raw, **overrides):
        topology = experiment_from({**QUADRATIC, "topology": raw}, overrides=overrides).topology
        return topology.name, topology.options

    assert options({"name": "small-world", "p": 0.2}, **{"topology.file": "x.yaml"}) == ("file", {"file": "x.yaml"})
    assert options({"file": "x.yaml"}, **{"topology.name": "star"}) == ("star", {})


def test_conflicts_are_found_beside_unknown_names():
    assert findings_of({"rounds": 3, "optimizer": {"warmup_rounds": 3}, "weights": "lasy", "algorithm": {"name": "dpsdg"}}) == [
        f"algorithm.name = 'dpsdg': did you mean dpsgd? one of {', '.join(ALGORITHMS)}",
        f"weights = 'lasy': did you mean lazy? one of {WEIGHT_NAMES}",
        "optimizer.warmup_rounds = 3: must be < rounds, which is 3",
    ]


def test_a_replaced_key_that_is_wrong_is_found_like_any_other():
    assert findings_of({}, **{"optimizer.lr": -1}) == ["optimizer.lr = -1: must be > 0.0"]
    with pytest.raises(ConfigError, match=r"--set: rounds.x: rounds = 100 is not a mapping"):
        experiment_from({**QUADRATIC, "rounds": 100}, overrides={"rounds.x": 1})


def test_a_topologys_file_is_looked_for_beside_the_experiment(tmp_path):
    (tmp_path / "graph.yaml").write_text(FOUR_HOSPITALS.read_text())
    experiment = load_experiment(written(tmp_path, "task: {name: heart-disease}\ntopology: {file: graph.yaml}"))
    names = parse_yaml(FOUR_HOSPITALS.read_text(), "graph")["nodes"]

    assert experiment.as_dict()["topology"] == {"file": str(tmp_path / "graph.yaml")}
    assert experiment_from(experiment.as_dict()) == experiment
    assert build_topology(experiment, sorted(names)).names == tuple(sorted(names))
    with pytest.raises(ConfigError, match=r"topology.file names the nodes .*: the run has a, b, c, d"):
        build_topology(experiment, ["a", "b", "c", "d"])


def test_a_nameless_topology_file_must_have_as_many_nodes(tmp_path):
    (tmp_path / "graph.yaml").write_text("nodes: 3\nedges: [[0, 1], [1, 2]]\n")
    experiment = experiment_from({**QUADRATIC, "topology": {"file": str(tmp_path / "graph.yaml")}})

    assert build_topology(experiment, ["a", "b", "c"]).num_edges == 2
    with pytest.raises(ConfigError, match=r"topology.file has 3 nodes: the run has 2"):
        build_topology(experiment, ["a", "b"])


def test_a_graph_with_its_own_number_of_nodes_says_which():
    experiment = experiment_from({**QUADRATIC, "topology": {"name": "petersen"}})

    with pytest.raises(ConfigError, match="10"):
        build_topology(experiment, [f"n{i}" for i in range(8)])
    assert findings_of({"topology": {"name": "random-regular", "degre": 3}}) == [
        "topology random-regular has no option degre = 3: expected degree"
    ]


def test_a_random_graph_follows_the_experiments_seed_or_its_own():
    names = [f"n{i:02d}" for i in range(12)]

    def edges(**raw):
        graph = build_topology(experiment_from({**QUADRATIC, **raw}), names)
        return graph.senders.tolist()

    drawn = {"name": "random-regular", "degree": 3}
    assert edges(topology=drawn, seed=1) == edges(topology=drawn, seed=1)
    assert edges(topology=drawn, seed=1) != edges(topology=drawn, seed=2)
    assert edges(topology={**drawn, "seed": 1}, seed=2) == edges(topology=drawn, seed=1)


def test_rounds_and_steps_follow_from_the_file():
    experiment = experiment_from({**QUADRATIC, "rounds": 10, "stop": {"settle": 7}, "algorithm": {"local_steps": 3}})

    assert experiment.last_possible_round == 17
    assert [experiment.local_steps_at(r) for r in (0, 9, 10, 16)] == [3, 3, 0, 0]
    assert resolve(experiment, {"stop": None}).last_possible_round == 10


def test_the_stop_rule_is_that_of_the_graph():
    experiment = experiment_from({**QUADRATIC, "stop": {"relative_consensus": 1e-4, "patience": 2}})
    graph = build_topology(experiment, [f"n{i}" for i in range(8)])
    rule = stop_rule(experiment, Schedule.static(graph))

    assert (rule.tolerance, rule.patience, rule.diameter) == (1e-4, 2, 4)
    assert rule.lambda_2 == pytest.approx(2 - 2**0.5, rel=1e-12)  # 2 - 2 cos(2 pi / 8)
    assert stop_rule(resolve(experiment, {"stop": None}), Schedule.static(graph)) is None


def test_the_rule_is_made_from_its_name():
    assert build_algorithm(experiment_from(QUADRATIC)) == DPSGD()
    complete = {"topology": {"name": "complete"}, "algorithm": {"name": "allreduce"}}
    assert isinstance(build_algorithm(experiment_from({**QUADRATIC, **complete})), AllReduce)


def test_an_experiment_cannot_be_changed():
    experiment = experiment_from(QUADRATIC)

    assert isinstance(experiment, Experiment)
    with pytest.raises(AttributeError):
        experiment.rounds = 3


def test_a_misspelt_algorithm_alone_is_a_finding_and_not_a_crash():
    with pytest.raises(ConfigError) as caught:
        experiment_from({"task": {"name": "averaging"}, "algorithm": {"name": "dpsgdd"}})

    (finding,) = caught.value.findings
    assert finding.startswith("algorithm.name = 'dpsgdd': did you mean dpsgd?")


@pytest.mark.parametrize(
    ("raw", "finding"),
    [
        (
            {"pace": {"name": "pairwise"}},
            "pace.name = 'pairwise': algorithm dpsgd needs synchronous or asynchronous; pairwise is for ad-psgd",
        ),
        (
            {"algorithm": {"name": "ad-psgd"}, "pace": {"name": "synchronous"}},
            "pace.name = 'synchronous': algorithm ad-psgd needs pairwise",
        ),
        (
            {"algorithm": {"name": "gradient-tracking"}, "pace": {"name": "asynchronous"}},
            "pace.name = 'asynchronous': algorithm gradient-tracking needs all messages of a round together; take synchronous, or dpsgd",
        ),
        (
            {"topology": {"name": "base-2"}, "pace": {"name": "asynchronous"}},
            "topology.name = 'base-2': changes from round to round, and pace asynchronous has no common rounds",
        ),
        ({"pace": {"max_age": 0}}, "pace.max_age = 0: must be >= 1"),
    ],
)
def test_what_does_not_go_with_a_pace_is_a_finding(raw, finding):
    assert findings_of({"stop": None, **raw}) == [finding]


def test_nodes_at_their_own_pace_have_no_round_to_stop_after():
    assert findings_of({"pace": {"name": "asynchronous"}}) == ["stop: pace asynchronous has no common round to stop after; take stop: null"]


def test_the_pace_is_what_the_algorithm_needs_unless_said():
    assert experiment_from({**QUADRATIC, "algorithm": {"name": "ad-psgd"}, "stop": None}).pace.name == "pairwise"
    assert experiment_from({**QUADRATIC, "pace": {"max_age": 3}}).pace.name == "synchronous"
