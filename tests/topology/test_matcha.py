"""MATCHA: matchings, how often each is used, and what a round leaves on average."""

from __future__ import annotations

from itertools import product

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from test_topology_weights import connected_graphs

from p2pfl.cli.study import _without_folders
from p2pfl.errors import ConfigError, TopologyError
from p2pfl.experiment.graph import build_schedule
from p2pfl.experiment.loading import experiment_from, load_experiment
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.launcher import up
from p2pfl.simulator import simulate
from p2pfl.topology import SMALL_GRAPHS, TOPOLOGIES, Topology, describe, make, make_schedule, schedule, schedule_faults, weighted
from p2pfl.topology.matcha import activation, best_step, laplacian, matchings, mean_square_left, most_connected
from p2pfl.yaml_files import load_yaml
from thorough import first_fast

pytestmark = pytest.mark.no_cover  # what other tests cover, many times over: being traced would take a third longer

NAMES = ["a", "b", "c", "d"]
AVERAGING = {"task": {"name": "averaging"}, "nodes": 4, "stop": None, "rounds": 1}


def sized(name):
    """A graph of every generator."""
    if name in SMALL_GRAPHS:
        return [make(name)]
    options = {"directed": False} if name == "exponential" else {}
    sizes = {"hypercube": (2, 16), "barbell": (10, 11), "random-regular": (6, 16)}.get(name, (5, 8, 9, 16))
    return [make(name, n, **options) for n in sizes]


def check_colouring(graph):
    groups = matchings(graph)
    links = {(i, j) for i, j in zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True) if i < j}

    assert sorted(tuple(link) for group in groups for link in group.tolist()) == sorted(links)
    assert all(len(set(group.ravel().tolist())) == group.size for group in groups)
    return len(groups) - int(graph.degrees.max())


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_links_of_one_matching_share_no_node(name):
    for graph in sized(name):
        more = check_colouring(graph)

        assert more <= 1
        if nx.is_bipartite(nx.Graph(list(zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True)))):
            assert more == 0


@given(graph=connected_graphs())
@settings(max_examples=200, deadline=None)
def test_a_random_graph_has_at_most_one_matching_more_than_the_largest_degree(graph):
    assert check_colouring(graph) <= 1


@pytest.mark.parametrize(("name", "n"), [("ring", 9), ("petersen", 10), ("complete", 9), ("tutte", 46), ("small-world", 17)])
def test_where_as_many_as_the_degree_cannot_do_there_is_one_more(name, n):
    """Odd rings, odd complete graphs and Petersen's graph have no colouring in D colours; the fans find D + 1."""
    assert check_colouring(make(name, n)) == 1


def test_a_ring_of_even_length_has_two_matchings_used_alike():
    for budget in (0.1, 0.37, 0.5, 0.9):
        made = make_schedule("matcha", 8, budget=budget)

        assert made.facts["matchings"] == 2
        assert made.agreed["probabilities"] == [budget, budget]


def test_with_the_whole_budget_every_link_is_used_in_every_round():
    made = make_schedule("matcha", 34, base=make("karate-club"), budget=1)
    best = weighted(make("karate-club"), "best-constant")

    assert set(made.agreed["probabilities"]) == {1.0}
    assert made.period == 1
    assert made.at(7).num_edges == 78
    np.testing.assert_allclose(made.at(7).weights, best.weights, atol=5e-7)
    # half a millionth of the step moves (1 - step lambda)**2 by at most lambda_max = 18.14 of it
    assert made.facts["squared_left"] == pytest.approx((1 - describe(best)["spectral_gap"]) ** 2, abs=2e-5)


GRAPHS = [("ring", 9, 0.5), ("karate-club", 34, 0.3), ("grid", 9, 0.5), ("erdos-renyi", 24, 0.2), ("star", 6, 0.4), ("petersen", 10, 0.4)]


@pytest.mark.parametrize(("name", "n", "budget"), GRAPHS)
def test_no_other_probabilities_connect_better(name, n, budget):
    graph = make(name, n)
    groups = matchings(graph)
    p_M, bound = most_connected(n, groups, budget)
    chance = np.random.default_rng(0)

    def connectivity(p_M):
        return np.linalg.eigvalsh(laplacian(n, groups, p_M))[1]

    assert p_M.sum() == pytest.approx(budget * len(groups), abs=1e-12)
    assert p_M.min() >= 0
    assert p_M.max() <= 1
    assert 0 <= bound - connectivity(p_M) + 1e-14 <= 2e-7 * bound
    for _ in range(200):  # the bound holds for whatever is allowed
        other_M = chance.random(len(groups)) ** 3
        other_M *= min(budget * len(groups) / other_M.sum(), 1 / other_M.max())
        assert connectivity(other_M) <= bound + 1e-12


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
@pytest.mark.parametrize(("name", "n", "budget"), GRAPHS)
def test_a_solver_of_others_finds_the_same(name, n, budget):
    cvxpy = pytest.importorskip("cvxpy")
    groups = matchings(make(name, n))
    p, t = cvxpy.Variable(len(groups)), cvxpy.Variable()
    parts = [laplacian(n, [group], [1.0]) for group in groups]
    lifted = sum(p[j] * part for j, part in enumerate(parts)) + (1 + t) * np.ones((n, n)) / n - t * np.eye(n)
    problem = cvxpy.Problem(cvxpy.Maximize(t), [lifted >> 0, p >= 0, p <= 1, cvxpy.sum(p) <= budget * len(groups)])
    problem.solve(solver=cvxpy.CLARABEL)
    found_M, _ = activation(make(name, n), groups, budget)

    assert np.linalg.eigvalsh(laplacian(n, groups, found_M))[1] == pytest.approx(problem.value, abs=2e-6)


def every_round(n, groups, probabilities, step):
    """(probability, W) of each of the 2**M rounds that there can be."""
    for used in product((0, 1), repeat=len(groups)):
        chance = np.prod([p if on else 1 - p for on, p in zip(used, probabilities, strict=True)])
        yield chance, np.eye(n) - step * laplacian(n, groups, used)


@pytest.mark.parametrize(("name", "n"), [("ring", 7), ("house", 5), ("petersen", 10), ("grid", 9)])
def test_what_a_round_leaves_is_the_mean_over_all_rounds_that_there_can_be(name, n):
    graph = make(name, n)
    groups = matchings(graph)
    probabilities, step = activation(graph, groups, 0.4)
    second_NN = sum(chance * w.T @ w for chance, w in every_round(n, groups, probabilities, step))
    expected = np.linalg.eigvalsh(second_NN - 1 / n)[-1]

    assert mean_square_left(n, groups, probabilities, step) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(("name", "n"), [("ring", 8), ("house", 5), ("karate-club", 34)])
def test_no_other_step_leaves_less(name, n):
    graph = make(name, n)
    groups = matchings(graph)
    p_M, _ = activation(graph, groups, 0.5)
    step = best_step(n, groups, p_M)
    best = mean_square_left(n, groups, p_M, step)

    assert all(mean_square_left(n, groups, p_M, step * factor) >= best for factor in (0.9, 0.999, 1.001, 1.1))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n", "budget"), [("grid", 9, 0.5), ("ring", 8, 0.5), ("karate-club", 34, 0.3)])
def test_rounds_contract_as_computed(name, n, budget):
    """||W x||**2 / ||x||**2 over 4000 rounds within three standard errors, for the x that contracts least and for a random one."""
    base = make(name, n)
    groups = matchings(base)
    made = make_schedule("matcha", n, base=base, budget=budget, seed=5)
    p_M, step = made.agreed["probabilities"], made.agreed["step"]
    linear = laplacian(n, groups, p_M)
    square = linear @ linear + 2 * laplacian(n, groups, [p * (1 - p) for p in p_M])
    second = np.eye(n) - 2 * step * linear + step**2 * square
    worst = np.linalg.eigh(second - 1 / n)[1][:, -1]
    any_x = np.random.default_rng(1).standard_normal(n)
    matrices = [made.at(number).mixing_matrix() for number in range(4000)]
    assert worst @ second @ worst == pytest.approx(made.facts["squared_left"], abs=1e-12)
    for x in (worst, any_x - any_x.mean()):
        found = [np.square(w @ x).sum() / np.square(x).sum() for w in matrices]
        expected = x @ second @ x / (x @ x)

        assert abs(np.mean(found) - expected) < 3 * np.std(found) / np.sqrt(len(found))


def whole_graph_left(graph, budget):
    """rho of using all links at once in a random part of the rounds, with its own best step: 1 - budget (1 - rho**2 of all links)."""
    return 1 - budget * (1 - (1 - describe(weighted(graph, "best-constant"))["spectral_gap"]) ** 2)


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize(
    ("name", "n"), first_fast([("petersen", 10), ("erdos-renyi", 20), ("karate-club", 34), ("complete", 8), ("star", 6), ("grid", 9)], 2)
)
def test_it_contracts_at_least_as_fast_as_the_whole_graph_used_as_often(name, n, budget):
    graph = make(name, n)

    assert make_schedule("matcha", n, base=graph, budget=budget).facts["squared_left"] <= whole_graph_left(graph, budget)


def test_on_a_long_ring_it_does_not():
    """Where lambda_2 is below 2, independent matchings add more variance to the slowest mode than they save."""
    assert make_schedule("matcha", 8, budget=0.5).facts["squared_left"] == pytest.approx(0.783907, abs=1e-6)
    assert whole_graph_left(make("ring", 8), 0.5) == pytest.approx(0.777156, abs=1e-6)


def test_rounds_never_change():
    """Studies of before would fall apart."""
    made = make_schedule("matcha", 5, base=make("house"), budget=0.5, seed=7)

    assert made.agreed == {"probabilities": [0.3, 0.6, 0.6], "step": 0.48465}
    assert [made.at(number).num_edges for number in range(10)] == [4, 4, 2, 2, 2, 4, 4, 6, 4, 2]
    assert made.at(3).senders.tolist() == [2, 0, 4, 3]
    assert made.at(1_000_003).senders.tolist() == [3, 4, 1, 2]


def test_every_round_keeps_the_mean_and_stays_on_the_base_graph():
    base = make("karate-club")
    made = make_schedule("matcha", 34, base=base, budget=0.2, seed=1)
    union = made.union()
    links = {*zip(base.senders.tolist(), base.receivers.tolist(), strict=True)}

    assert {*zip(union.senders.tolist(), union.receivers.tolist(), strict=True)} == links
    for number in range(50):
        graph = made.at(number)
        w = graph.mixing_matrix().toarray()
        assert np.array_equal(w, w.T)
        assert np.abs(w.sum(axis=0) - 1).max() < 1e-14
        assert {*zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True)} <= links
        assert graph.self_weights.min() >= made.least_weight() - 1e-15
    assert np.mean([made.at(number).num_edges for number in range(2000)]) == pytest.approx(
        sum(p * len(group) for p, group in zip(made.agreed["probabilities"], matchings(base), strict=True)), rel=0.02
    )


def test_a_round_without_links_changes_nothing():
    made = make_schedule("matcha", 4, budget=0.02, seed=0)
    empty = next(graph for graph in map(made.at, range(50)) if graph.num_edges == 0)

    assert np.array_equal(empty.mixing_matrix().toarray(), np.eye(4))


def test_matchings_in_turns_are_exact_on_a_hypercube_and_never_on_a_ring_of_eight():
    cube, ring = make_schedule("matchings", 16, base=make("hypercube", 16)), make_schedule("matchings", 8)

    assert (cube.period, cube.exact_after) == (4, 4)
    assert (ring.period, ring.exact_after) == (2, None)
    assert all(ring.at(number).degrees.max() == 1 for number in range(2))
    w = ring.at(1).mixing_matrix().toarray() @ ring.at(0).mixing_matrix().toarray()
    # two projections onto what pairs share: the largest singular value of a period is cos(2 pi / 8)
    assert np.linalg.norm(w - 1 / 8, 2) == pytest.approx(np.cos(2 * np.pi / 8), abs=1e-12)


def plan_of(topology):
    experiment = experiment_from({**AVERAGING, "topology": topology})
    return make_plan(experiment, load_sites(experiment))


def test_what_eigenvalues_said_is_written_down_for_everybody(monkeypatch):
    plan = plan_of({"name": "matcha", "base": {"name": "path"}, "budget": 0.4})
    written = plan.experiment.as_dict()
    computed = plan.schedule.agreed

    assert written["topology"] == {"name": "matcha", "base": {"name": "path"}, "budget": 0.4, **computed}
    monkeypatch.setattr(schedule, "activation", None)  # nobody computes it again
    experiment = experiment_from(written)
    again = make_plan(experiment, load_sites(experiment), topology=plan.topology)
    assert again.experiment == plan.experiment
    for number in range(20):
        assert again.schedule.at(number).weights.tobytes() == plan.schedule.at(number).weights.tobytes()
        assert again.schedule.at(number).senders.tolist() == plan.schedule.at(number).senders.tolist()


def test_another_budget_or_base_is_computed_anew():
    written = plan_of({"name": "matcha", "base": "path", "budget": 0.4}).experiment.as_dict()

    assert experiment_from(written, overrides={"topology.budget": 0.7}).topology.options == {"base": "path", "budget": 0.7}
    assert experiment_from(written, overrides={"topology.base": "star"}).topology.options == {"base": "star", "budget": 0.4}
    assert "step" in experiment_from(written, overrides={"seed": 3}).topology.options


def test_the_base_may_be_a_file_beside_the_experiment(tmp_path):
    (tmp_path / "links.yaml").write_text("nodes: [a, b, c, d]\nedges: [[a, b], [b, c], [c, d], [b, d]]\n", encoding="utf-8")
    for base in ("links.yaml", "{file: links.yaml}"):
        (tmp_path / "run.yaml").write_text(f"task: {{name: averaging}}\ntopology: {{name: matcha, base: {base}}}\n", encoding="utf-8")
        experiment = load_experiment(tmp_path / "run.yaml")
        made = build_schedule(experiment, NAMES)

        assert experiment.topology.options == {"base": {"file": str(tmp_path / "links.yaml")}}
        assert made.union().num_edges == 4
        assert made.names == tuple(NAMES)
        assert made.facts["base"] == "links"
        with pytest.raises(ConfigError, match=r"topology.file names the nodes a, b, c, d: the run has x, y"):
            build_schedule(experiment, ["x", "y"])
    shown = _without_folders(experiment.as_dict()["topology"])
    assert shown["base"] == {"file": "links.yaml"}


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"budget": 0}, "topology matcha with budget = 0: expected a number above 0, at most 1"),
        ({"budget": True}, "topology matcha with budget = true: expected a number above 0, at most 1"),
        ({"base": 7}, "topology matcha with base = 7: expected a graph's name, a file, or a mapping with name or file"),
        ({"base": "rng"}, "topology matcha: base.name = 'rng': did you mean ring? one of "),
        ({"base": {"name": "torus", "row": 2}}, "base: topology torus has no option row = 2: expected rows, columns"),
        ({"base": {"file": ""}}, "topology matcha: base.file = '': expected a path"),
        ({"base": {"file": "x.yaml", "p": 1}}, "topology matcha: base.p = 1: unknown key, expected file"),
        ({"probabilities": [0.5, 2], "step": 0.3}, "topology matcha with probabilities = [0.5, 2]: expected a list of numbers from 0 to 1"),
        ({"probabilities": [0.5]}, "topology matcha with one of probabilities and step: give both or none"),
        ({"step": 0.5}, "topology matcha with one of probabilities and step: give both or none"),
        ({"probabilities": [0.5], "step": -1}, "topology matcha with step = -1: expected a number above 0"),
        ({"base": {"name": ["ring"]}}, "topology matcha: base.name = ['ring']: did you mean ring? one of ring, "),
        ({"degree": 2}, "topology matcha has no option degree = 2: expected base, budget, probabilities, step"),
    ],
)
def test_options_that_cannot_be(options, fault):
    (found,) = schedule_faults("matcha", options)

    assert found.startswith(fault)


def test_bases_that_cannot_be():
    with pytest.raises(TopologyError, match="topology matcha: its base exponential is directed; expected links that go both ways"):
        make_schedule("matcha", 8, base=make("exponential", 8))
    with pytest.raises(TopologyError, match="topology matchings of 8 nodes: its base petersen has 10"):
        make_schedule("matchings", 8, base=make("petersen"))
    with pytest.raises(TopologyError, match="nothing from 0 can reach 2"):
        make_schedule("matcha", 4, base=Topology.from_edges("split", 4, [0, 2], [1, 3]))
    with pytest.raises(TopologyError, match="topology matcha on ring of 129 nodes: expected at most 128; random-matching takes any number"):
        make_schedule("matcha", 129)
    with pytest.raises(TopologyError, match="topology matcha with 3 probabilities: its base ring has 2 matchings"):
        make_schedule("matcha", 8, probabilities=[0.5] * 3, step=0.3)


def test_a_run_says_with_which_numbers_it_was_made(tmp_path):
    run = simulate({**AVERAGING, "topology": {"name": "matcha", "budget": 0.3}, "rounds": 5}, out=tmp_path / "run")
    written = load_yaml(run.path / "experiment.yaml")["topology"]

    assert written == {"name": "matcha", "budget": 0.3, "probabilities": [0.3, 0.3], "step": 0.5}
    again = simulate(run.path / "experiment.yaml", out=tmp_path / "again")
    assert all(torch.equal(again.models[name], model) for name, model in run.models.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "graph",
    [
        {"topology": {"name": "matcha", "base": {"name": "complete"}, "budget": 0.4}},
        {"topology": {"name": "matchings", "base": "star"}},
        {"weights": "stationary"},
        {"weights": "fdla", "topology": {"name": "star"}},
    ],
    ids=["matcha", "matchings", "stationary", "fdla"],
)
def test_processes_give_the_simulators_weights(graph, tmp_path):
    """From a study, over encrypted links."""
    experiment = {"task": {"name": "breast-cancer"}, "rounds": 6, "stop": None, "save_models_every": 1, "baselines": [], **graph}
    if graph.get("weights") == "fdla":
        pytest.importorskip("cvxpy")
    simulated = simulate(experiment, out=tmp_path / "simulator")
    ran = up(experiment, out=tmp_path / "daemons", site={"deadline_floor_s": 300.0, "deadline_factor": 100.0})

    for number in range(6):
        for name, model in simulated.models_after(number).items():
            torch.testing.assert_close(ran.models_after(number)[name], model, rtol=1e-6, atol=1e-6)
    assert load_yaml(ran.path / "experiment.yaml") == load_yaml(simulated.path / "experiment.yaml")
