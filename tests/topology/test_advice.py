"""Which links to use and which to add: against trying everything, in seconds."""

from __future__ import annotations

import json
import math
import sys
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from p2pfl.cli.topology import app
from p2pfl.errors import ConfigError, TopologyError
from p2pfl.topology import Topology, advice, check_connected, make, make_schedule, rounds_to, weighted
from p2pfl.topology.advice import RULES, at_random, best_links, best_new_link, fastest_weights, in_turns, link_costs, options, recommended
from p2pfl.topology.matcha import matchings
from thorough import first_fast

MODEL_BYTES = 4_000_000


def graph_of(num_nodes, pairs, latency_ms, bandwidth_mbps):
    ends = np.array(pairs)
    return Topology.from_edges(
        "small", num_nodes, ends[:, 0], ends[:, 1], latency_ms=np.array(latency_ms, float), bandwidth_mbps=np.array(bandwidth_mbps, float)
    )


def random_graph(seed, num_nodes, num_links):
    """Connected, with speeds that differ a hundredfold."""
    chance = np.random.default_rng(seed)
    while True:
        every = list(combinations(range(num_nodes), 2))
        pairs = [every[k] for k in sorted(chance.choice(len(every), num_links, replace=False))]
        graph = graph_of(num_nodes, pairs, chance.uniform(1, 200, num_links), 10 ** chance.uniform(1, 3, num_links))
        if is_connected(graph):
            return graph


def is_connected(graph):
    try:
        check_connected(graph)
    except TopologyError:
        return False
    return True


def seconds_by_pair(graph):
    edges = zip(graph.receivers.tolist(), graph.senders.tolist(), graph.latency_ms, graph.bandwidth_mbps, strict=True)
    return {(i, j): ms / 1e3 + MODEL_BYTES * 8 / (mbps * 1e6) for i, j, ms, mbps in edges if i < j}


def every_choice(num_nodes, seconds, rules):
    """Seconds of every connected choice of links with every rule."""
    for used in product((False, True), repeat=len(seconds)):
        pairs = [pair for pair, on in zip(seconds, used, strict=True) if on]
        if len(pairs) < num_nodes - 1:
            continue
        chosen = Topology.from_edges("chosen", num_nodes, *zip(*pairs, strict=True))
        if not is_connected(chosen):
            continue
        slowest = max(seconds[pair] for pair in pairs)
        for rule in rules:
            rounds = rounds_to(weighted(chosen, rule))
            if rounds is not None:
                yield rounds * slowest, rule, tuple(pairs)


def turns_of(num_nodes, seconds):
    """The links of every speed and faster in turns, multiplied out."""
    best = math.inf
    for limit in sorted(set(seconds.values())):
        pairs = [pair for pair in seconds if seconds[pair] <= limit]
        chosen = Topology.from_edges("chosen", num_nodes, *zip(*pairs, strict=True))
        if not is_connected(chosen):
            continue
        groups, whole, spent = matchings(chosen), np.eye(num_nodes) - 1 / num_nodes, 0.0
        for number in range(5000):
            group = groups[number % len(groups)]
            w = np.eye(num_nodes)
            for i, j in group.tolist():
                w[[i, i, j, j], [i, j, i, j]] = 0.5
            whole, spent = w @ whole, spent + max(seconds[i, j] for i, j in group.tolist())
            if np.linalg.norm(whole, 2) <= 1e-6:
                best = min(best, spent)
                break
    return best


def test_a_message_takes_latency_and_its_bits():
    links = link_costs(graph_of(3, [(0, 1), (1, 2)], [10, 0], [100, 32]), MODEL_BYTES)

    assert links.seconds_E.tolist() == pytest.approx([0.01 + 0.32, 1.0])
    option = next(o for o in options(links) if o.weights == "metropolis")
    assert (option.round_s, option.seconds) == (1.0, option.rounds)
    assert option.rounds == rounds_to(weighted(make("path", 3)))
    assert option.bytes_sent == pytest.approx(option.rounds * MODEL_BYTES * 4 / 3)


SMALL = [(seed, n, m) for seed, (n, m) in enumerate([(3, 3), (4, 5), (4, 6), (5, 6), (5, 8), (6, 7), (6, 8), (6, 9)])]


@pytest.mark.parametrize(("seed", "n", "m"), first_fast(SMALL, 3))
def test_no_choice_of_links_is_faster_than_the_one_advised(seed, n, m):
    graph = random_graph(seed, n, m)
    links = link_costs(graph, MODEL_BYTES)
    tried = list(every_choice(n, seconds_by_pair(graph), RULES))
    found = {option.weights: option for option in best_links(links)}

    for rule in RULES:
        assert found[rule].seconds == pytest.approx(min(seconds for seconds, used, _ in tried if used == rule), rel=1e-12)
        assert (pytest.approx(found[rule].seconds), rule, found[rule].links) in tried
    static = [option.seconds for option in options(links) if option.use == "links" and option.weights != "fdla"]
    assert min(static) == pytest.approx(min(tried)[0], rel=1e-12)


@pytest.mark.parametrize(("seed", "n", "m"), first_fast([(1, 4, 5), (3, 5, 6), (11, 5, 7)], 2))
def test_no_choice_of_links_is_faster_with_the_fastest_weights(seed, n, m):
    pytest.importorskip("cvxpy")
    graph = random_graph(seed, n, m)
    best = min(seconds for seconds, _, _ in every_choice(n, seconds_by_pair(graph), (*RULES, "fdla")))
    found = options(link_costs(graph, MODEL_BYTES))

    assert min(option.seconds for option in found if option.use == "links") == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("slow_ms", [330, 400, 700, 1000, 1200, 1300, 1500, 3000])
@pytest.mark.parametrize("rule", RULES)
def test_a_slow_link_of_a_ring_is_left_out_exactly_where_the_path_is_done_first(rule, slow_ms):
    ring, path = make("ring", 6), make("path", 6)
    graph = graph_of(6, [(i, (i + 1) % 6) for i in range(6)], [10, 10, 10, 10, 10, slow_ms - 320], [100] * 6)
    on_ring, on_path = rounds_to(weighted(ring, rule)) * slow_ms / 1e3, rounds_to(weighted(path, rule)) * 0.33
    (option,) = best_links(link_costs(graph, MODEL_BYTES), rules=(rule,))

    assert option.seconds == pytest.approx(min(on_ring, on_path))
    assert (len(option.links) == 5) == (on_path < on_ring)
    assert ((0, 5) in option.links) == (on_ring < on_path)


def test_both_happen_in_the_test_above():
    """28 rounds on the ring and 97 on the path with the best constants: the slow link may take 97 / 28 of a fast one's 330 ms."""
    rounds = [rounds_to(weighted(make(name, 6), "best-constant")) for name in ("ring", "path")]

    assert rounds == [28, 97]
    assert 330 < 330 * rounds[1] / rounds[0] < 3000


@pytest.mark.parametrize(("seed", "n", "m"), first_fast([(0, 4, 4), (1, 5, 6), (2, 5, 5), (4, 6, 6)]))
def test_no_other_new_link_helps_more(seed, n, m):
    graph = random_graph(seed, n, m)
    seconds = seconds_by_pair(graph)
    rules = (*RULES, "fdla") if has_solver() else RULES
    brute = {}
    for pair in combinations(range(n), 2):
        if pair not in seconds:
            more = {**seconds, pair: 0.05}
            brute[pair] = min(*(s for s, _, _ in every_choice(n, more, rules)), turns_of(n, more))
    pair, best, tried = best_new_link(link_costs(graph, MODEL_BYTES), 0.05)

    assert tried == len(brute)
    assert best.seconds == pytest.approx(min(brute.values()), rel=1e-9)
    assert brute[pair] == pytest.approx(min(brute.values()), rel=1e-9)


def has_solver():
    try:
        import cvxpy  # noqa: F401
    except ImportError:
        return False
    return True


def test_what_a_round_of_matcha_lasts_on_average():
    graph = random_graph(3, 5, 7)
    links = link_costs(graph, MODEL_BYTES)
    (option,) = at_random(links)
    made = make_schedule("matcha", 5, base=Topology.from_edges("x", 5, *links.pairs.T), budget=option.budget)
    p_M, groups, seconds = made.agreed["probabilities"], matchings(graph), seconds_by_pair(graph)
    mean_s = 0.0
    for used in product((0, 1), repeat=len(groups)):
        chance = math.prod(p if on else 1 - p for p, on in zip(p_M, used, strict=True))
        pairs = [tuple(pair) for group, on in zip(groups, used, strict=True) if on for pair in group.tolist()]
        mean_s += chance * max((seconds[pair] for pair in pairs), default=0.0)

    assert option.round_s == pytest.approx(mean_s, rel=1e-12)
    assert option.rounds == math.ceil(math.log(1e-12) / math.log(made.facts["squared_left"]))
    assert option.seconds == option.rounds * option.round_s


def test_four_in_a_ring_are_done_after_two_turns():
    graph = graph_of(4, [(0, 1), (1, 2), (2, 3), (0, 3)], [0] * 4, [32, 16, 32, 16])
    (option,) = in_turns(link_costs(graph, MODEL_BYTES))

    assert (option.rounds, option.seconds) == (2, pytest.approx(1 + 2))
    assert option.bytes_sent == 2 * MODEL_BYTES
    assert recommended(options(link_costs(graph, MODEL_BYTES))) == option


def test_matcha_is_advised_only_where_it_saves_more_than_a_hundredth():
    found = options(link_costs(random_graph(5, 6, 9), MODEL_BYTES))
    certain = min((o for o in found if o.use != "matcha"), key=lambda o: o.seconds)
    chance = next(o for o in found if o.use == "matcha")

    def with_seconds(seconds):
        return [certain, advice.replace(chance, seconds=seconds)]

    assert recommended(with_seconds(certain.seconds * 0.995)) is certain
    assert recommended(with_seconds(certain.seconds * 0.98)).use == "matcha"


@pytest.mark.parametrize(("seed", "n", "m"), [*SMALL, (20, 9, 18)])
def test_where_not_every_choice_is_tried_no_single_link_more_or_less_is_faster(seed, n, m, monkeypatch):
    graph = random_graph(seed, n, m)
    links = link_costs(graph, MODEL_BYTES)
    monkeypatch.setattr(advice, "_MAX_SEARCHED_LINKS", 0)
    seconds = seconds_by_pair(graph)
    for option in best_links(links):
        neighbours = [[pair for pair in option.links if pair != out] for out in option.links]
        neighbours += [[pair for pair in seconds if seconds[pair] <= limit] for limit in seconds.values()]
        for pairs in neighbours:
            chosen = Topology.from_edges("chosen", n, *zip(*pairs, strict=True))
            if is_connected(chosen):
                rounds = rounds_to(weighted(chosen, option.weights))
                assert rounds is None or option.seconds <= rounds * max(seconds[pair] for pair in pairs) * (1 + 1e-12)


@pytest.mark.slow
def test_of_many_pairs_those_are_tried_that_the_slowest_mode_keeps_apart(monkeypatch):
    monkeypatch.setattr(advice, "_MAX_NEW_LINKS", 12)
    graph = make("path", 12)
    graph = graph_of(12, [(i, i + 1) for i in range(11)], [5] * 11, [100] * 11)
    _, best, tried = best_new_link(link_costs(graph, MODEL_BYTES), 0.325)

    assert tried == 12
    assert best.seconds < min(option.seconds for option in options(link_costs(graph, MODEL_BYTES)))


def test_given_weights_count_as_a_choice(tmp_path):
    graph = graph_of(3, [(0, 1), (1, 2)], [10, 10], [100, 100]).with_weights([0.5, 0.5, 0.5, 0.5])
    found = {option.weights: option for option in options(link_costs(graph, MODEL_BYTES))}

    assert found["given"].rounds == rounds_to(graph)


def test_graphs_that_there_is_no_advice_for(monkeypatch):
    with pytest.raises(TopologyError, match=r"its 3 links have no latency_ms and no bandwidth_mbps \(0 - 1, 0 - 2, 1 - 2\); write it on"):
        link_costs(make("ring", 3), 1)
    with pytest.raises(TopologyError, match="topology exponential is directed; advice is for links that go both ways"):
        link_costs(make("exponential", 8), 1)
    with pytest.raises(TopologyError, match="topology ring of 129 nodes: advice is for at most 128"):
        link_costs(make("ring", 129), 1)


# ---- the command

SWISS = """
nodes: [basel, bern, geneva, lausanne, zurich]
edges:
  - {between: [geneva, lausanne], latency_ms: 0.4, bandwidth_mbps: 200}
  - {between: [lausanne, bern], latency_ms: 0.5, bandwidth_mbps: 200}
  - {between: [bern, basel], latency_ms: 0.5, bandwidth_mbps: 200}
  - {between: [basel, zurich], latency_ms: 0.5, bandwidth_mbps: 200}
  - {between: [bern, zurich], latency_ms: 0.7, bandwidth_mbps: 200}
  - {between: [geneva, zurich], latency_ms: 1.6, bandwidth_mbps: 5}
"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "swiss.yaml").write_text(SWISS, encoding="utf-8")
    (tmp_path / "bare.yaml").write_text("nodes: [a, b, c]\nedges: [[a, b], [b, c]]\n", encoding="utf-8")

    def run(*arguments):
        return CliRunner().invoke(app, ["advise", *map(str, arguments)], catch_exceptions=False).stdout

    return run


@pytest.fixture
def without_solver(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", None)


@pytest.mark.usefixtures("without_solver")
def test_the_slow_link_is_left_out_in_plain_sentences(run):
    out = run("swiss.yaml", "--parameters", 1_000_000)
    table, sentences = out.split("\n\n")

    assert max(map(len, table.splitlines())) <= 80
    assert table.splitlines()[1].split("  ")[0] == "use"
    assert "Use the 4 links without basel - zurich, geneva - zurich in every round, with weights: best-constant: 9.0 s until" in sentences
    assert "All links in every round with weights: metropolis take 211.3 s." in sentences
    assert "Of 4 new links, one between" in sentences
    assert "The fastest weights were not tried: they need pip install 'p2pfl-mesh[optimal]' and at most 32 nodes." in sentences


@pytest.mark.usefixtures("without_solver")
def test_json_says_all_of_it(run):
    said = json.loads(run("swiss.yaml", "--json"))

    assert set(said) == {
        *("source", "parameters", "nodes", "links", "every_choice", "recommended", "options", "new_link", "new_links_tried", "advice")
    }
    assert said["recommended"] == said["options"][0]
    assert set(said["recommended"]) == {*("use", "weights", "budget", "links", "left_out", "round_s", "rounds", "seconds", "megabytes")}
    assert said["recommended"]["left_out"] == [["basel", "zurich"], ["geneva", "zurich"]]
    assert said["every_choice"]
    assert [o["seconds"] for o in said["options"]] == sorted(o["seconds"] for o in said["options"])
    assert said["new_link"]["seconds"] < said["recommended"]["seconds"]
    assert (said["new_link"]["latency_ms"], said["new_link"]["bandwidth_mbps"]) == (0.5, 200)
    assert len(said["advice"]) == 3


@pytest.mark.usefixtures("without_solver")
def test_what_is_almost_as_fast_for_far_fewer_bytes_is_said(run):
    Path("swiss.yaml").write_text(SWISS.replace("bandwidth_mbps: 5}", "bandwidth_mbps: 45}"), encoding="utf-8")
    said = json.loads(run("swiss.yaml", "--json"))["advice"]

    assert said[2] == (
        "Almost as fast, 9.3 s, with 86 MB a node instead of 358: use all 6 links in turns, topology: {name: matchings, base: swiss.yaml}."
    )


@pytest.mark.usefixtures("without_solver")
def test_a_new_link_may_be_as_slow_as_one_says(run):
    slow = json.loads(run("swiss.yaml", "--json", "--new-latency-ms", 900, "--new-bandwidth-mbps", 10))

    assert slow["new_link"] is None
    assert slow["advice"][-1] == "No single new link of 900 ms, 10 Mbit/s would shorten that (4 tried)."


@pytest.mark.usefixtures("without_solver")
def test_what_the_file_does_not_say_may_be_said_for_all(run):
    said = json.loads(run("bare.yaml", "--latency-ms", 10, "--bandwidth-mbps", 100, "--json"))
    named = json.loads(run("ring", "--nodes", 5, "--latency-ms", 10, "--bandwidth-mbps", 100, "--json"))

    assert said["recommended"]["round_s"] == pytest.approx(0.33)
    assert (named["nodes"], named["links"]) == (5, 5)


@pytest.mark.usefixtures("without_solver")
def test_a_complete_graph_has_nothing_to_add(run):
    assert "There is no link to add." in run("complete", "--nodes", 4, "--latency-ms", 1, "--bandwidth-mbps", 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bare.yaml"], r"topology bare: its 2 links have no latency_ms and no bandwidth_mbps \(a - b, b - c\); write it on each"),
        (["bare.yaml", "--latency-ms", "1"], r"its 2 links have no bandwidth_mbps .* or give --bandwidth-mbps for all"),
        (["swiss.yaml", "--latency-ms", "1"], "--latency-ms = 1: the links of swiss have their own; leave the option out"),
        (["base-2"], "base-2: changes from round to round; advice is for the links that there are: give its base, or a file"),
        (["exponential", "--latency-ms", "1", "--bandwidth-mbps", "1"], "topology exponential is directed"),
    ],
)
def test_what_was_asked_wrongly(run, arguments, message):
    with pytest.raises(ConfigError, match=message):
        run(*arguments)


def test_fdla_is_the_same_on_more_links_or_faster():
    pytest.importorskip("cvxpy")
    links = link_costs(random_graph(7, 6, 9), MODEL_BYTES)
    found = fastest_weights(links, math.inf)

    assert {len(option.links) for option in found} >= {9}
    assert max(option.rounds for option in found) >= next(o.rounds for o in found if len(o.links) == 9)
