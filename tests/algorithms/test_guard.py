"""An update that is far too large is refused at both ends, one that is suddenly far away is reported, and honest runs meet neither.

Shapes: N rows, K neighbour slots, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from networks import HASTY, Network, finish, plan_of
from p2pfl.algorithms import ALGORITHMS, COMPRESSORS, Algorithm, Choco, Context, Guard, Inbox, State
from p2pfl.algorithms.guard import QUIET, DistanceWatch, bound, norm_of, refusal_of
from p2pfl.node.mixing import Mixing
from p2pfl.node.pairwise_mixing import PairwiseMixing
from p2pfl.simulator import FaultScript, simulate
from p2pfl.topology import Topology, make, weighted
from p2pfl.training import Population
from rows import LAYOUT, P, context, inbox_of, one_round, tables
from thorough import first_fast

# ---- the rule


def test_the_norm_of_the_largest_numbers_of_each_dtype_is_no_infinity():
    assert norm_of(torch.full((1, 4), 1e38)) == pytest.approx(2e38, rel=1e-6)
    assert norm_of(torch.full((4,), 60_000.0, dtype=torch.float16)) == pytest.approx(120_000, rel=1e-3)
    assert norm_of(torch.full((4,), 1e300, dtype=torch.float64)) == pytest.approx(2e300, rel=1e-12)


@pytest.mark.parametrize(
    ("numbers", "norm"),
    [([3.0, 4.0], 5.0), ([0.0, 0.0], 0.0), ([math.nan, 1.0], math.inf), ([math.inf, 1.0], math.inf), ([3e38, 0.0], 3e38)],
)
def test_only_what_is_infinite_or_no_number_has_an_infinite_norm(numbers, norm):
    assert norm_of(torch.tensor(numbers)) == pytest.approx(norm, rel=1e-6)


def test_a_hundred_times_the_largest_of_own_norm_first_norm_and_one_is_the_most():
    assert (bound(0.2, 0.1), bound(7.0, 3.0), bound(2.0, 5.0)) == (100.0, 700.0, 500.0)
    assert bound(7.0, 3.0, noise_norm=12.0) == 712.0
    assert refusal_of(700.0, 700.0) is None
    refusal = refusal_of(math.nextafter(700.0, math.inf), 700.0)
    assert refusal is not None
    assert refusal.reason == "too_large"
    assert refusal_of(math.nan, 700.0) is not None


# ---- what each algorithm makes of a message


@lru_cache
def graph_for(algorithm: Algorithm) -> Topology:
    if "tree" in algorithm.requires:
        return weighted(Topology.from_edges("tree", 7, [0, 0, 1, 1, 1, 5], [1, 2, 3, 4, 5, 6]), "metropolis")
    return weighted(make("complete" if "complete" in algorithm.requires else "erdos-renyi", 7, seed=0), "metropolis")


def guard_of(algorithm: Algorithm, first_norm: float = 1.0) -> Guard:
    return Guard(algorithm=algorithm, layout=LAYOUT, first_norm=first_norm, num_nodes=7)


def messages(algorithm: Algorithm, graph: Topology, sent: Mapping[str, Tensor]) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Row, slot and decoded message of each edge."""
    inbox, linked_NK = inbox_of(algorithm, graph, sent), tables(graph)[2]
    decoded = [name for name in sent if algorithm.channels[name].encodes is None]
    for i, k in linked_NK.nonzero().tolist():
        yield i, k, {name: inbox.slot(name, k, torch.tensor([i]))[0] for name in decoded}


def judged(
    algorithm: Algorithm, graph: Topology, state: State, phase: int, number: int
) -> Iterator[tuple[float, float, dict[str, Tensor]]]:
    """The norm and the bound of each edge's message, and a function's worth of what is needed to judge another one."""
    sent = algorithm.outgoing(state, phase, context(graph, number))
    for i, k, message in messages(algorithm, graph, sent):
        ctx, row = context(graph, number, row=i), {name: tensor[i : i + 1] for name, tensor in state.items()}
        most = guard_of(algorithm).bound(row, phase, {name: tensor[i : i + 1] for name, tensor in sent.items()}, ctx)
        yield guard_of(algorithm).norm(row, phase, message, ctx, slot=k, num_exchanges=number + 1), most, message


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_norm_that_is_known_is_the_one_that_would_be_computed(name):
    algorithm = ALGORITHMS[name]()
    graph = graph_for(algorithm)
    state = algorithm.init(torch.from_numpy(np.random.default_rng(0).normal(size=(7, P))), context(graph, 0))
    for phase in range(algorithm.phases):
        sent = algorithm.outgoing(state, phase, context(graph, 0))
        for i, k, message in messages(algorithm, graph, sent):
            row, known = (
                {of: tensor[i : i + 1] for of, tensor in state.items()},
                {of: float(v.double().norm()) for of, v in message.items()},
            )
            ctx, guard = context(graph, 0, row=i), guard_of(algorithm)
            computed = guard.norm(row, phase, message, ctx, slot=k)
            assert guard.norm(row, phase, message, ctx, slot=k, norms=known) == pytest.approx(computed, rel=1e-12)


def gradients(x_NP: Tensor, round: int, step: int) -> Tensor:
    """Quadratics whose curvatures and optima differ by row."""
    rows = torch.arange(len(x_NP), dtype=x_NP.dtype)[:, None]
    return (0.2 + rows) * (x_NP - 5 * rows)


RULES = {name: rule() for name, rule in ALGORITHMS.items()} | {
    f"choco {name}": Choco(compressor=compressor()) for name, compressor in COMPRESSORS.items()
}


@pytest.mark.no_cover
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("arrives", [1.0, 0.6])
def test_honest_messages_are_far_below_the_bound_whatever_is_lost(name, arrives):
    algorithm = RULES[name]
    if arrives < 1 and "reliable" in algorithm.requires:
        pytest.skip("it needs every message")
    graph, chance = graph_for(algorithm), np.random.default_rng(0)
    state = algorithm.init(torch.from_numpy(np.full((7, P), 0.01)), context(graph, 0))
    furthest = 0.0
    for number in range(30):
        for phase in range(algorithm.phases):
            furthest = max([furthest, *(norm / most for norm, most, _ in judged(algorithm, graph, state, phase, number))])
        present_NK = torch.from_numpy(chance.random(tables(graph)[2].shape) < arrives)
        state = one_round(algorithm, graph, state, context(graph, number, lr=0.05), gradients, present_NK)

    assert furthest < 0.3


@pytest.mark.parametrize("name", RULES)
def test_a_huge_number_in_any_channel_is_above_it(name):
    algorithm = RULES[name]
    graph = graph_for(algorithm)
    state = algorithm.init(torch.from_numpy(np.random.default_rng(1).standard_normal((7, P))), context(graph, 0))
    for number in range(3):
        state = one_round(algorithm, graph, state, context(graph, number), gradients)
    judged_channels = set()
    for phase in range(algorithm.phases):
        sent = algorithm.outgoing(state, phase, context(graph))
        i, k, message = next(messages(algorithm, graph, sent))
        row, ctx = {key: tensor[i : i + 1] for key, tensor in state.items()}, context(graph, row=i)
        most = guard_of(algorithm).bound(row, phase, {key: tensor[i : i + 1] for key, tensor in sent.items()}, ctx)
        for channel, tensor in message.items():
            if not tensor.is_floating_point():
                continue
            for place, value in [(0, 1e38), (-1, -1e38), (-1, 1e38)]:
                lie = tensor.clone()
                lie[place] = value
                norm = guard_of(algorithm).norm(row, phase, {**message, channel: lie}, ctx, slot=k, num_exchanges=3)
                assert refusal_of(norm, most) is not None, (channel, place, value)
            judged_channels.add(channel)

    assert judged_channels >= {channel for channel, c in algorithm.channels.items() if c.model}


@pytest.mark.parametrize("count", [0.0, -1.0, 0.5, 8.0, 1e9])
def test_a_relayed_sum_of_no_models_or_of_more_than_there_are_is_refused(count):
    algorithm = ALGORITHMS["relaysgd"]()
    graph = graph_for(algorithm)
    state = algorithm.init(torch.ones(7, P, dtype=torch.float64), context(graph, 0))
    message = {"m": torch.ones(P, dtype=torch.float64), "count": torch.tensor([count], dtype=torch.float64)}
    row = {key: tensor[:1] for key, tensor in state.items()}

    assert guard_of(algorithm).norm(row, 0, message, context(graph, row=0), slot=0) == math.inf


def test_a_running_sum_grows_by_no_more_weight_than_there_is_in_the_network():
    algorithm = ALGORITHMS["push-sum"]()
    graph = graph_for(algorithm)
    state = algorithm.init(torch.ones(7, P, dtype=torch.float64), context(graph, 0))
    row, ctx = {key: tensor[:1] for key, tensor in state.items()}, context(graph, row=0)

    def norm(weight: float, num_exchanges: int) -> float:
        message = {"sigma": torch.tensor([*[0.5 * weight] * P, weight], dtype=torch.float64)}
        return guard_of(algorithm).norm(row, 0, message, ctx, slot=0, num_exchanges=num_exchanges)

    assert norm(7.0, 1) == pytest.approx(0.5 * math.sqrt(P))
    assert norm(8.0, 1) == math.inf
    assert norm(8.0, 2) == pytest.approx(0.5 * math.sqrt(P))
    assert norm(-0.1, 2) == math.inf


def test_personal_parameters_do_not_count():
    plan = plan_of(**{**LEARNING, "task": {"name": "digits"}, "personal": ["*bias"]})
    population = plan.population(plan.names[:1])
    state, ctx = population.state, population.context(0, local_steps=1)
    sent = population.outgoing(0, 0, local_steps=1)
    before = plan.guard.bound(state, 0, sent, ctx)
    inflated = {**state, "x": state["x"].clone()}
    for spec, place in plan.layout.slices():
        if spec.name in plan.layout.personal:
            inflated["x"][:, place] = 1e9

    assert plan.guard.bound(inflated, 0, sent, ctx) == before


# ---- daemons beside one that poisons

LEARNING = {
    "task": {"name": "synthetic-logistic"},
    "nodes": 4,
    "topology": {"name": "complete"},
    "rounds": 30,
    "stop": None,
    "baselines": [],
}
EVIL = "node-3"


def beside_poison(place, monkeypatch, poison, **experiment):
    """A whole run, one of whose daemons sends what *poison* makes of its tensors and their rounds; the network and what it ended with.

    It poisons until every honest node has refused an update of it.
    """
    pack, meet = Mixing.pack, PairwiseMixing.outgoing
    running = []

    def still_lies(me):
        (network,) = running
        return me == EVIL and not all(network.nodes[name].daemon.protocol.edges.refused["too_large"] for name in honest(network))

    def poisoned(self, outgoing, phase):
        number = self._protocol.edges.exchange // self._protocol.edges.phases
        lies = still_lies(self._protocol.edges.me)
        sent = {name: poison(t, number) if t.is_floating_point() else t for name, t in outgoing.items()} if lies else outgoing
        return pack(self, sent, phase)

    def poisoned_pair(self, number):
        outgoing = meet(self, number)
        return {name: poison(tensor, number) for name, tensor in outgoing.items()} if still_lies(self._protocol.edges.me) else outgoing

    monkeypatch.setattr(Mixing, "pack", poisoned)
    monkeypatch.setattr(PairwiseMixing, "outgoing", poisoned_pair)

    async def main():
        async with Network(plan_of(**{**LEARNING, **experiment}), place) as network:
            running.append(network)
            network.start()
            await network.ended()
            return network

    return finish(main())


def honest(network):
    return [name for name in network.plan.names if name != EVIL]


@pytest.mark.parametrize(
    "experiment",
    first_fast(
        [
            {},
            {"algorithm": {"name": "choco"}},
            {"algorithm": {"name": "gradient-tracking"}},
            {"algorithm": {"name": "push-sum"}, "pace": {"name": "asynchronous"}},
            {"algorithm": {"name": "ad-psgd"}, "pace": {"name": "pairwise"}, "topology": {"name": "complete"}},
        ]
    ),
    ids=lambda experiment: experiment.get("algorithm", {}).get("name", "dpsgd"),
)
def test_an_update_of_1e38_harms_nobody_else_and_is_skipped_at_both_ends(experiment, tmp_path, monkeypatch):
    in_step = "pace" not in experiment

    def poison(tensor: Tensor, number: int) -> Tensor:
        return torch.full_like(tensor, 1e38) if number == 9 or (number > 9 and not in_step) else tensor

    network = beside_poison(tmp_path, monkeypatch, poison, **experiment)
    names = network.plan.names
    models = dict(zip(names, network.models(), strict=True))

    norms = {name: norm_of(models[name]) for name in honest(network)}
    assert max(norms.values()) < 20, norms
    assert sum(network.nodes[name].daemon.protocol.edges.refused["too_large"] for name in honest(network)) >= 1
    assert not {"overflow", "diverged"} & {event for name in honest(network) for event in network.events(name)}
    assert not any("non_finite" in str(network.summary(name)["departures"]) for name in honest(network))
    if in_step:
        phases = network.plan.recipe.algorithm.phases
        assert {network.nodes[name].daemon.protocol.edges.refused["too_large"] for name in honest(network)} <= {
            1,
            phases,
        }  # nobody waits for its second
        assert all(EVIL in network.rows(name)[9]["skipped"] for name in honest(network))
        assert network.events(EVIL).count("took_back") >= 3
        models_NP = network.models()
        assert float((models_NP - models_NP.mean(dim=0)).norm()) < 5


@pytest.mark.no_cover
def test_a_model_that_is_suddenly_far_away_is_merged_and_reported(tmp_path, monkeypatch):
    network = beside_poison(tmp_path, monkeypatch, lambda tensor, number: tensor + 20 if number == 25 else tensor)

    for name in honest(network):
        assert "far_update" in network.events(name)
        assert EVIL not in network.rows(name)[25]["skipped"]


# ---- the report


def test_a_distance_is_far_beyond_ten_times_the_usual_one_and_only_after_some_quiet():
    watch = DistanceWatch()
    first = [watch.look(50.0 if number % 2 else 1.0, 1.0, 1) for number in range(QUIET)]
    then = [watch.look(1.0, 1.0, 1) for _ in range(20)]

    assert first + then == [None] * (QUIET + 20)
    assert watch.look(9.9, 1.0, 1) is None
    assert "its model is 10.1 away" in (watch.look(10.1, 1.0, 1) or "")


def test_a_link_that_was_down_and_a_jump_make_it_quiet_for_ten_exchanges():
    for interrupt in ["new link", "jump"]:
        watch = DistanceWatch()
        for _ in range(30):
            watch.look(1.0, 1.0, 1)
        if interrupt == "jump":
            watch.interrupt()
        greeting = 2 if interrupt == "new link" else 1
        said = [watch.look(100.0 if number in (0, QUIET - 1) else 1.0, 1.0, greeting) for number in range(QUIET)]

        assert said == [None] * QUIET
        assert watch.look(100.0, 1.0, greeting) is not None


def test_models_that_agree_and_differ_by_rounding_are_not_reported():
    watch = DistanceWatch()
    for _ in range(30):
        watch.look(0.0, 5.0, 1)

    assert watch.look(0.4, 5.0, 1) is None


def test_a_model_that_is_far_away_again_and_again_is_said_more_and_more_rarely():
    watch = DistanceWatch(quiet=0)
    for _ in range(20):
        watch.look(1.0, 1.0, 0)
    said = [watch.look(50.0, 1.0, 0) is not None for _ in range(9)]

    assert said == [True, True, False, True, False, False, False, True, False]


# ---- runs in which everybody is honest


@pytest.fixture
def looked_at(monkeypatch) -> list[float]:
    """The largest norm in each exchange of the simulations of a test, as a fraction of the bound; more than 1 would be refused."""
    merge, found = Population.merge_in_parts, []

    def watched(self, number, phase, inboxes, **options):
        ctx = self.context(number, local_steps=options["local_steps"])
        start = (p for p in self._model.parameters() if p.requires_grad)
        guard = Guard.of(self.recipe.algorithm, self.layout, start, len(self.sites))
        ((_, inbox),) = inboxes = list(inboxes)
        left = {i for i, site in enumerate(self.sites) if options["local_steps"] and site.name in self.diverged}
        found.append(furthest(guard, self.state, phase, inbox, ctx, left))
        return merge(self, number, phase, inboxes, **options)

    monkeypatch.setattr(Population, "merge_in_parts", watched)
    return found


def furthest(guard: Guard, state: State, phase: int, inbox: Inbox, ctx: Context, left: Collection[int] = ()) -> float:
    """The largest norm of a message as a fraction of the bound; *left* are rows whose training has left the finite numbers."""
    decoded = [name for name in inbox.sent if inbox.channels[name].encodes is None]
    found = 0.0
    for i in range(len(inbox.present_NK)):
        one = replace(ctx, nodes_N=ctx.nodes_N[[i]], slots_NK=None if ctx.slots_NK is None else ctx.slots_NK[[i]])
        row = {name: tensor[[i]] for name, tensor in state.items()}
        most = guard.bound(row, phase, {name: tensor[[i]] for name, tensor in inbox.sent.items()}, one, diverged=i in left)
        for k in inbox.present_NK[i].nonzero().flatten().tolist():
            message = {name: inbox.slot(name, k, torch.tensor([i]))[0] for name in decoded}
            found = max(found, guard.norm(row, phase, message, one, slot=k, num_exchanges=ctx.round + 1) / most)
    return found


HETEROGENEOUS = {
    "task": {"name": "breast-cancer", "partition": {"name": "dirichlet", "alpha": 0.05}},
    "nodes": 8,
    "topology": {"name": "ring"},
    "rounds": 12,
    "stop": None,
    "baselines": [],
    "evaluate_every": 12,
}
UNEQUAL = ["dpsgd", "gradient-tracking", "k-gt", "choco", "push-sum", "diloco", "exact-diffusion", "qg-dsgdm"]


def heterogeneous(seed: int) -> dict[str, Any]:
    """One of 200 runs; learning rates reach from 0.01 to 10, where training hardly holds together."""
    algorithm, lr = UNEQUAL[seed % len(UNEQUAL)], 10.0 ** (-2 + 3 * (seed // 8) / 24)
    return {**HETEROGENEOUS, "seed": seed, "algorithm": {"name": algorithm, "local_steps": 4}, "optimizer": {"name": "sgd", "lr": lr}}


def all_exchanges(experiment: Mapping[str, Any]) -> FaultScript | None:
    """No faults at all, so that plain gossip is not done in place, where nobody could look."""
    return FaultScript() if experiment["algorithm"]["name"] == "dpsgd" else None


@pytest.mark.parametrize("seed", [0, 65, 130, 195])
def test_unequal_sites_at_any_learning_rate_are_not_refused(seed, looked_at, tmp_path):
    simulate(heterogeneous(seed), out=tmp_path / "run", faults=all_exchanges(heterogeneous(seed)))

    assert len(looked_at) >= 12
    assert max(looked_at) <= 1


@pytest.mark.slow
def test_200_runs_with_unequal_sites_are_not_refused(looked_at, tmp_path):
    for seed in range(200):
        experiment = heterogeneous(seed)
        simulate(experiment, out=tmp_path / str(seed), faults=all_exchanges(experiment))

    assert len(looked_at) >= 200 * 12
    assert max(looked_at) <= 1


def test_a_healed_partition_is_not_refused(looked_at, tmp_path):
    cut = frozenset(range(5, 60))
    faults = FaultScript.in_rounds(cut={("hospital-0", "hospital-7"): cut, ("hospital-3", "hospital-4"): cut})
    simulate({**heterogeneous(96), "rounds": 70, "algorithm": {"name": "dpsgd", "local_steps": 4}}, out=tmp_path / "run", faults=faults)

    assert len(looked_at) == 70
    assert max(looked_at) <= 1


QUADRATIC = {"task": {"name": "quadratic"}}
PERCEPTRON = {"task": {"name": "digits"}, "nodes": 8, "topology": {"name": "ring"}}


def diverging(tmp_path, experiment: Mapping[str, Any], lr: float, local_steps: int, rounds: int) -> list[float]:
    """Norms of all nodes in all rounds, where weight decay makes any model grow."""
    asked = {"optimizer": {"name": "sgd", "lr": lr, "weight_decay": 0.2}, "algorithm": {"name": "dpsgd", "local_steps": local_steps}}
    rounds_only = {"rounds": rounds, "evaluate_every": rounds}
    run = simulate({**LEARNING, **experiment, **asked, **rounds_only}, out=tmp_path / "run", faults=FaultScript())
    return [row["norm"] for row in run.node_records if row["norm"] is not None]


@pytest.mark.no_cover
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # squares of the last models
@pytest.mark.parametrize(
    ("experiment", "lr", "local_steps", "rounds"),
    [
        ({}, 30.0, 1, 40),
        ({}, 1e3, 4, 20),  # a billionfold in each round, all alike
        (QUADRATIC, 3.0, 1, 40),
        (QUADRATIC, 5.0, 1, 200),  # until nothing is finite any more: the steepest by a factor of 10 in each round, the flattest by none
        (PERCEPTRON, 10.0, 4, 20),  # until training leaves the finite numbers
        (PERCEPTRON, 1e3, 4, 10),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_run_that_diverges_everywhere_is_not_refused(experiment, lr, local_steps, rounds, looked_at, tmp_path):
    norms = diverging(tmp_path, experiment, lr, local_steps, rounds)

    assert max(norms) > 1e3
    assert max(looked_at) <= 1


def test_whom_one_round_takes_a_hundred_times_further_than_its_neighbour_is_refused_although_it_is_honest(looked_at, tmp_path):
    diverging(tmp_path, {**QUADRATIC, "nodes": 8, "topology": {"name": "ring"}}, 3.0, 4, 5)

    assert max(looked_at) > 1


def test_a_node_whose_own_training_left_the_finite_numbers_refuses_only_what_is_none(tmp_path):
    plan = plan_of(**LEARNING)
    population = plan.population(plan.names[:1])
    state, sent, ctx = population.state, population.outgoing(0, 0, local_steps=1), population.context(0, local_steps=1)

    def refused(norm: float, *, diverged: bool) -> bool:
        return plan.guard.refusal(norm, state, 0, sent, ctx, diverged=diverged) is not None

    assert [refused(norm, diverged=True) for norm in (1.0, 1e300, math.inf, math.nan)] == [False, False, True, True]
    assert [refused(norm, diverged=False) for norm in (1.0, 1e300, math.inf, math.nan)] == [False, True, True, True]


@pytest.mark.no_cover
def test_daemons_whose_training_leaves_the_finite_numbers_refuse_nobody(tmp_path):
    optimizer = {"name": "sgd", "lr": 1e3, "weight_decay": 0.2}
    plan = plan_of(**{**LEARNING, **PERCEPTRON, "optimizer": optimizer, "algorithm": {"name": "dpsgd", "local_steps": 4}, "rounds": 6})

    async def main():
        async with Network(plan, tmp_path) as network:
            network.start()
            await network.ended()
            return network

    network = finish(main())
    for name in network.plan.names:
        assert "diverged" in network.events(name)
        assert network.nodes[name].daemon.protocol.edges.refused["too_large"] == 0


@pytest.mark.no_cover
def test_daemons_that_are_killed_and_cut_off_refuse_and_report_nothing(tmp_path):
    plan = plan_of(**{**LEARNING, "topology": {"name": "ring"}, "rounds": 60})

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            await network.reached(15)
            network.cut |= {("node-0", "node-1"), ("node-1", "node-0"), ("node-2", "node-3"), ("node-3", "node-2")}
            await network.reached(30)
            network.cut.clear()
            await network.kill("node-2")
            network.start("node-2")
            await network.ended()
            return network

    network = finish(main())
    for name in network.plan.names:
        assert network.nodes[name].daemon.protocol.edges.refused["too_large"] == 0
        assert "far_update" not in network.events(name)
