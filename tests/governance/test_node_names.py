"""Nodes of a graph's file are matched with sites by name, also where names are numbers."""

from __future__ import annotations

import json

import networkx as nx
import pytest

from p2pfl import simulate
from p2pfl.errors import ConflictError, TopologyError
from p2pfl.experiment.graph import build_schedule, build_topology
from p2pfl.experiment.loading import experiment_from, load_experiment, load_study
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.topology import load, load_over

PATH = [[i, i + 1] for i in range(10)]
NUMBERS = sorted(map(str, range(11)))  # as text: 0, 1, 10, 2, ...
OTHERS = "topology.file names the nodes 0, 1, 2: the run has"
HOSPITALS = sorted(f"hospital-{i}" for i in range(11))


def yaml_of(nodes, edges):
    return json.dumps({"nodes": nodes, "edges": edges})


def built(tmp_path, text, names, file="net.yaml", **keys):
    (tmp_path / file).write_text(text, encoding="utf-8")
    experiment = experiment_from({"task": {"name": "averaging"}, "topology": {"file": str(tmp_path / file)}, **keys})
    return build_topology(experiment, names)


def neighbours(graph, name):
    return {graph.names[i] for i in graph.neighbours(graph.names.index(name)).tolist()}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("net.yaml", yaml_of(list(range(11)), PATH)),
        ("net.yaml", yaml_of(11, PATH)),
        ("net.yaml", yaml_of([str(i) for i in range(10, -1, -1)], PATH)),
        ("net.json", json.dumps(nx.node_link_data(nx.path_graph(11), edges="edges"))),
        ("net.graphml", "\n".join(nx.generate_graphml(nx.path_graph(11)))),
        ("net.gml", "\n".join(nx.generate_gml(nx.path_graph(11)))),
        ("net.txt", "\n".join(f"{i} {i + 1}" for i in range(10))),
    ],
)
def test_a_node_called_2_is_the_site_called_2(tmp_path, file, text):
    graph = built(tmp_path, text, NUMBERS, file)

    assert graph.names == tuple(NUMBERS)
    assert neighbours(graph, "2") == {"1", "3"}
    assert neighbours(graph, "10") == {"9"}


def test_masses_of_numbered_nodes_belong_to_the_sites_of_their_names(tmp_path):
    nodes = [{"name": i, "mass": 100 + i} for i in range(11)]
    graph = built(tmp_path, yaml_of(nodes, PATH), NUMBERS, weights="stationary")

    assert dict(zip(graph.names, graph.masses.tolist(), strict=True)) == {str(i): 100 + i for i in range(11)}


def test_a_schedules_base_is_matched_by_name(tmp_path):
    (tmp_path / "net.yaml").write_text(yaml_of(list(range(11)), PATH), encoding="utf-8")
    topology = {"name": "matchings", "base": {"file": str(tmp_path / "net.yaml")}}
    union = build_schedule(experiment_from({"task": {"name": "averaging"}, "topology": topology}), NUMBERS).union()

    assert neighbours(union, "2") == {"1", "3"}


@pytest.mark.parametrize("nodes", [11, list(range(11))])
def test_numbered_nodes_are_the_sites_whose_names_end_so(tmp_path, nodes):
    graph = built(tmp_path, yaml_of(nodes, PATH), HOSPITALS)

    assert neighbours(graph, "hospital-2") == {"hospital-1", "hospital-3"}
    assert neighbours(graph, "hospital-10") == {"hospital-9"}


def test_a_number_of_nodes_without_names_goes_by_the_order_of_names(tmp_path):
    graph = built(tmp_path, yaml_of(3, [[0, 1], [1, 2]]), ["basel", "bern", "chur"])

    assert neighbours(graph, "bern") == {"basel", "chur"}


@pytest.mark.parametrize(
    ("nodes", "names", "sentence"),
    [
        (["1", "2", "3"], ["1", "2", "4"], "topology.file names the nodes 3: the run has 4; nodes are matched by name"),
        ([0, 1, 2], ["1", "2", "3"], "topology.file names the nodes 0: the run has 3; nodes are matched by name"),
        (3, ["1", "2", "3"], "topology.file names the nodes 0: the run has 3; nodes are matched by name"),
        ([0, 1, 2], ["basel", "bern", "chur"], f"{OTHERS} basel, bern, chur; nodes are matched by name"),
        ([0, 1, 2], ["0", "1"], "topology.file names the nodes 2, which the run does not have; nodes are matched by name"),
        (["a", "b"], ["a", "b", "c"], "topology.file lacks the nodes c, which the run has; nodes are matched by name"),
        (3, ["site-2", "site-10", "site-11"], f"{OTHERS} site-10, site-11, site-2; nodes are matched by name"),
        (3, ["a", "b"], "topology.file has 3 nodes: the run has 2"),
    ],
)  # fmt: skip
def test_other_nodes_are_refused_and_both_differences_are_named(tmp_path, nodes, names, sentence):
    count = nodes if isinstance(nodes, int) else len(nodes)
    edges = [[nodes[i], nodes[i + 1]] if isinstance(nodes, list) else [i, i + 1] for i in range(count - 1)]
    with pytest.raises(ConflictError) as caught:
        built(tmp_path, yaml_of(nodes, edges), sorted(names))

    assert caught.value.findings == (sentence,)


def test_thousands_of_other_nodes_are_summed_up(tmp_path):
    (tmp_path / "net.txt").write_text("\n".join(f"a{i} a{i + 1}" for i in range(4000)), encoding="utf-8")
    with pytest.raises(ConflictError) as caught:
        load_over(tmp_path / "net.txt", sorted(f"b{i}" for i in range(4001)))

    assert len(str(caught.value)) < 400
    assert "(4001 in all)" in str(caught.value)


def test_names_with_leading_zeros_or_colons_stay_as_they_are_written(tmp_path):
    (tmp_path / "net.yaml").write_text("nodes: [010, 008, 1:30]\nedges: [[010, 008], [008, 1:30]]\n", encoding="utf-8")

    assert load_over(tmp_path / "net.yaml", ["008", "010", "1:30"]).num_edges == 2


def test_speeds_of_nodes_whose_names_are_numbers_need_no_quotes(tmp_path):
    (tmp_path / "speeds.yaml").write_text("task: {name: averaging}\nclock: {speeds: {10: 2.0, 2: 0.5, 010: 3}}\n", encoding="utf-8")

    assert load_experiment(tmp_path / "speeds.yaml").clock.speeds == {"10": 2.0, "2": 0.5, "010": 3.0}


@pytest.mark.parametrize("word", ["no", "off", "yes", "on"])
def test_a_node_called_by_a_word_for_false_or_true_needs_quotes(tmp_path, word):
    (tmp_path / "net.yaml").write_text(f"nodes: [oslo, {word}]\nedges: [[oslo, {word}]]\n", encoding="utf-8")
    (tmp_path / "quoted.yaml").write_text(f"nodes: [oslo, '{word}']\nedges: [[oslo, '{word}']]\n", encoding="utf-8")
    with pytest.raises(TopologyError) as caught:
        load(tmp_path / "net.yaml")
    read_as = "false" if word in ("no", "off") else "true"

    assert caught.value.findings[-1] == f"nodes[1] = {read_as}: expected a text; put it in quotes"
    assert load(tmp_path / "quoted.yaml").names == tuple(sorted(["oslo", word]))


MODULE = """
import torch
from torch import nn
from p2pfl.tasks import Site, Task, task

@task
def wards():
    rows = (torch.ones(4, 2), torch.zeros(4, 1))
    sites = [Site(name=name, train=rows, test=None) for name in map(str, range(10, -1, -1))]
    return Task(name="wards", model=lambda: nn.Linear(2, 1), loss=nn.functional.mse_loss, metrics={}, sites=sites)
"""


def test_a_run_of_sites_that_are_numbers_has_each_under_its_name(tmp_path, monkeypatch):
    (tmp_path / "wards_of_a_test.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "net.txt").write_text("\n".join(f"{i} {i + 1}" for i in range(10)), encoding="utf-8")
    task = {"name": "wards_of_a_test:wards"}
    keys = {"topology": {"file": str(tmp_path / "net.txt")}, "rounds": 1, "stop": None, "baselines": []}
    run = simulate({"task": task, **keys}, out=tmp_path / "run", allow_tasks=[task["name"]])
    record = json.loads((tmp_path / "run" / "topology.json").read_text(encoding="utf-8"))

    assert {frozenset(record["nodes"][i] for i in edge[:2]) for edge in record["edges"]} == {frozenset(map(str, pair)) for pair in PATH}
    assert sorted(run.models) == sorted(path.stem for path in (tmp_path / "run" / "models").iterdir()) == NUMBERS


def test_a_study_of_members_that_are_numbers_has_the_links_of_the_file(tmp_path):
    (tmp_path / "net.yaml").write_text(yaml_of([{"name": i, "mass": 10 + i} for i in range(11)], PATH), encoding="utf-8")
    experiment = experiment_from(
        {"task": {"name": "averaging"}, "weights": "stationary", "topology": {"file": str(tmp_path / "net.yaml")}, "stop": None}
    )
    cards = [Identity.new().card(name, f"tcp://ward-{name}.example:7700", 100) for name in NUMBERS]
    Study.create(experiment.as_dict(), cards, build_topology(experiment, NUMBERS)).save(tmp_path / "study.yaml")
    study = load_study(tmp_path / "study.yaml")

    assert study.neighbours("2") == ("1", "3")
    assert study.neighbours("10") == ("9",)
    assert {frozenset(edge[:2]) for edge in study.graph.edges} == {frozenset(map(str, pair)) for pair in PATH}
