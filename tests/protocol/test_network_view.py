"""The network's view at every node: rows, certificates, what a site withholds, and what a node's address tells an inspector."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sklearn.metrics import roc_auc_score

from networks import DEADLINE_S, HASTY, Institutions, Network, averaging, finish, plan_of, signing_of, wait_until
from p2pfl.errors import ConfigError, StoreError, TransportError
from p2pfl.evaluation.mean_model import consensus_distance
from p2pfl.inspector.convergence import convergence
from p2pfl.inspector.sources import read_source
from p2pfl.protocol import network_view
from p2pfl.protocol.network_view import ViewPolicy
from p2pfl.runs.records import read_run
from p2pfl.runs.rows import NodeRow
from p2pfl.simulator import simulate
from p2pfl.wire.round_record import seal
from thorough import first_fast
from wire_samples import RECORD

ALL = ViewPolicy(bytes_per_s=None)


class Watched(Network):
    """Daemons with a view, whose messages are kept as they are sent."""

    def __init__(self, plan, place, *, policies=None, policy=ALL, **options):
        super().__init__(plan, place, **options)
        self.policies = dict.fromkeys(plan.names, policy) | (policies or {})
        self.messages = {}
        """(N, P) by round."""

    def start(self, *names):
        for name in names or self.plan.names:
            self.options["view"] = self.policies[name]
            super().start(name)
            self._listen(name, self.nodes[name].daemon.node.population)

    def _listen(self, name, population):
        plainly = population.outgoing

        def outgoing(round, phase, **more):
            sent = plainly(round, phase, **more)
            rows = self.messages.setdefault(round, torch.full((len(self.plan.names), sent["x"].shape[-1]), math.nan, dtype=torch.float64))
            rows[self.plan.names.index(name)] = sent["x"][0].double()
            return sent

        population.outgoing = outgoing

    def truth(self, number):
        """The disagreement of the models that were exchanged in a round, before they were mixed."""
        return consensus_distance(self.messages[number])

    def certificates(self, name):
        return {row["round"]: row for row in read_run(self.states[name] / "run").network}


def learning(nodes=16, rounds=30, **more):
    return plan_of(
        task={"name": "breast-cancer"},
        nodes=nodes,
        partition={"name": "iid"},
        topology={"name": "ring"},
        rounds=rounds,
        stop=None,
        algorithm={"name": "dpsgd", "local_steps": 2, "batch_size": 16},
        evaluate_every=5,
        **more,
    )


def check_certificates(network, rounds, diameter):
    for name in network.plan.names:
        found = network.certificates(name)

        assert sorted(found) == list(range(rounds))
        for number, row in found.items():
            assert row["nodes"] == len(network.plan.names)
            assert row["missing"] == []
            rounding = 1e-14 * row["rms_norm"]
            assert row["bound_low"] - rounding <= network.truth(number) <= row["bound_high"] + rounding
            assert row["known_in"] - number <= diameter + 2


@pytest.mark.slow
def test_sixteen_daemons_on_a_ring_certify_every_round_of_a_run(tmp_path):
    plan = learning()
    network = Watched(plan, tmp_path)
    oldest = dict.fromkeys(plan.names, 0)

    async def main():
        async with network:
            network.start()
            for number in range(10, 30):
                await network.reached(number)
                for name, node in network.nodes.items():
                    view = node.daemon.status()["network"]
                    assert len(view["rows"]) == 16
                    oldest[name] = max(oldest[name], *(row["age_rounds"] for row in view["rows"]))
            return await network.ended()

    assert finish(main()) == ["rounds"] * 16
    assert max(oldest.values()) <= 8 + 2
    check_certificates(network, 30, diameter=8)


@pytest.mark.slow
def test_pure_averaging_is_certified_until_it_stops_and_foreseen_at_half_time(tmp_path):
    tolerance = 1e-3
    plan = averaging({"name": "ring"}, 8, tolerance=tolerance)
    network = Watched(plan, tmp_path)

    async def main():
        async with network:
            network.start()
            return await network.ended()

    assert finish(main()) == ["converged"] * 8
    rounds = network.summary("node-3")["rounds"]
    check_certificates(network, rounds, diameter=4)

    run = read_run(network.states["node-3"] / "run")
    rows = run.network
    reached = next(row["round"] for row in rows if row["bound_high"] / row["rms_norm"] <= tolerance)
    half = type(run)(**{field: getattr(run, field) for field in run.__slots__} | {"network": rows[: reached // 2], "summary": None})
    course = convergence(half)
    left = reached - course.rounds[-1]

    assert course.basis == "upper bound"
    assert abs(course.rounds_to_go - left) <= 0.2 * left
    assert course.rounds_to_go_between[0] <= left
    assert course.fitted_rate <= course.predicted_rate * (1 + 1e-3)


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("topology", "nodes", "diameter"), first_fast([("star", 6, 2), ("complete", 5, 1), ("path", 5, 4), ("hypercube", 8, 3)])
)
def test_certificates_hold_on_any_graph(topology, nodes, diameter, tmp_path):
    plan = averaging({"name": topology}, nodes, tolerance=1e-2)
    network = Watched(plan, tmp_path)

    async def main():
        async with network:
            network.start()
            await network.ended()

    finish(main())
    check_certificates(network, network.summary("node-0")["rounds"], diameter)


@pytest.mark.slow
def test_while_a_node_is_away_only_the_lower_bound_is_certified_and_then_both_again(tmp_path):
    plan = averaging({"name": "ring"}, 6, tolerance=1e-9)
    network = Watched(plan, tmp_path, timeouts=HASTY)

    async def main():
        async with network:
            network.start()
            await network.reached(10)
            await network.kill("node-2")
            await network.reached(network.round("node-5") + 40, [name for name in plan.names if name != "node-2"])
            away = network.round("node-5")
            network.start("node-2")
            await network.reached(away + 40)
            return await network.ended()

    finish(main())
    found = network.certificates("node-5")
    partial = [row for row in found.values() if row["missing"] == ["node-2"]]

    assert len(partial) >= 5
    for row in found.values():
        others = network.truth(row["round"]) if not network.messages[row["round"]].isnan().any() else math.inf
        rounding = 1e-14 * row["rms_norm"]
        assert row["bound_low"] - rounding <= others
        assert row["bound_high"] is None or others <= row["bound_high"] + rounding
    assert all(row["bound_high"] is None for row in partial)
    assert found[max(found)]["bound_high"] is not None


def check_sums(network, period_at_most):
    """Every node has certified the same rounds, and what they certify holds."""
    rounds = {name: sorted(network.certificates(name)) for name in network.plan.names}
    assert len({tuple(r) for r in rounds.values()}) == 1
    certified = rounds[network.plan.names[0]]
    assert certified
    assert max(b - a for a, b in pairwise([0, *certified])) <= period_at_most
    for name in network.plan.names:
        for number, row in network.certificates(name).items():
            assert row["bound_low"] <= network.truth(number) <= row["bound_high"]
            assert row["nodes"] == len(network.plan.names)


@pytest.mark.slow
def test_of_many_members_the_certificate_is_a_sum(tmp_path, monkeypatch):
    monkeypatch.setattr(network_view, "ROWS_UP_TO", 4)
    plan = learning(nodes=8, rounds=60)
    network = Watched(plan, tmp_path)

    async def main():
        async with network:
            network.start()
            await network.ended()

    finish(main())
    check_sums(network, 30)
    rows = network.nodes[plan.names[0]].daemon.status()["network"]["rows"]

    assert [row["node"] for row in rows] == list(plan.names)


def test_a_site_says_no_more_than_its_policy_allows(tmp_path):
    plan = learning(nodes=3, rounds=12)
    names = plan.names
    policies = {
        names[0]: ViewPolicy(bytes_per_s=None, metrics=False),
        names[1]: ViewPolicy(bytes_per_s=None, counts="tens"),
        names[2]: ViewPolicy(bytes_per_s=None, counts="withheld"),
    }
    network = Watched(plan, tmp_path, policies=policies)
    seen = {}

    async def main():
        async with network:
            network.start()
            await network.reached(11)
            seen.update({row["node"]: row for row in network.nodes[names[1]].daemon.status()["network"]["rows"]})
            await network.ended()

    finish(main())
    train, test = (len(part[0]) for part in (plan.sites[names[0]].train, plan.sites[names[0]].test))

    assert seen[names[0]]["loss"] is None
    assert "metrics" not in seen[names[0]]
    assert seen[names[0]]["rows"] == {"train": train, "test": test}
    assert set(seen[names[1]]["metrics"]) == set(plan.task.metrics)
    assert all(count % 10 == 0 for count in seen[names[1]]["rows"].values())
    assert "rows" not in seen[names[2]]


@pytest.mark.slow
def test_no_metric_of_a_handful_of_patients_leaves_the_site(tmp_path):
    plan = learning(nodes=16, rounds=6)
    site = plan.sites[plan.names[4]]
    few = type(site)(name=site.name, train=site.train, test=(site.test[0][:9], site.test[1][:9]))
    plan.sites[plan.names[4]] = few
    network = Watched(plan, tmp_path)

    async def main():
        async with network:
            network.start()
            await network.ended()

    finish(main())
    rows = {row["node"]: row for row in network.nodes[plan.names[0]].daemon.status()["network"]["rows"]}

    assert "metrics" not in rows[plan.names[4]]
    assert "metrics" in rows[plan.names[5]]


@pytest.mark.slow
def test_records_under_another_key_cost_who_sends_them_its_word_and_no_node_its_run(tmp_path):
    plan = averaging({"name": "ring"}, 5, tolerance=1e-3)
    network = Watched(plan, tmp_path)
    stranger = Ed25519PrivateKey.generate()

    async def main():
        async with network:
            network.start()
            network.nodes["node-1"].daemon.protocol.view._sign = stranger.sign
            return await network.ended(dishonest="node-1")  # so many of them in a second that it may be disconnected for a while

    assert finish(main()) == ["converged"] * 5
    status = network.nodes["node-0"].daemon.status()

    assert status["refused"]["wrong_signature"] >= 1
    assert status["network"]["not_heard_of"] == ["node-1"]


@pytest.mark.no_cover
def test_a_nodes_address_tells_an_inspector_of_the_whole_network(tmp_path, monkeypatch):
    plan = averaging({"name": "ring"}, 6, tolerance=1e-9)
    found = {}

    async def main():
        async with Watched(plan, tmp_path, status_port=0) as network:
            network.start()
            await network.reached(30)
            state = network.states["node-4"]
            found["run"] = await asyncio.to_thread(read_source, str(state / "status.url"))
            url = (state / "status.url").read_text().strip()
            with pytest.raises(ConfigError, match=r"set P2PFL_STATUS_TOKEN to what is in its state folder's status\.token"):
                await asyncio.to_thread(read_source, url)
            monkeypatch.setenv("P2PFL_STATUS_TOKEN", (state / "status.token").read_text())
            assert (await asyncio.to_thread(read_source, url)).experiment == found["run"].experiment
            await network.ended()

    finish(main())
    run = found["run"]
    course = convergence(run)

    assert run.experiment["name"] == plan.experiment.name
    assert {row["node"] for row in run.nodes} == set(plan.names)
    assert course.basis == "upper bound"
    assert course.rounds[-1] >= 20
    assert course.rounds_to_go is not None


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("http://127.0.0.1:1/", TransportError),
        ("http://hospital.example:80/", ConfigError),
        ("https://127.0.0.1:80/", ConfigError),
        ("runs/there-is-none", ConfigError),
    ],
)
def test_an_address_at_which_no_node_can_be_is_said_so(source, error):
    with pytest.raises(error):
        read_source(source)


def test_what_is_no_node_is_said_so(tmp_path):
    from test_status import served

    async def ask():
        await asyncio.to_thread(read_source, str(tmp_path / "status.url"))

    with pytest.raises((StoreError, TransportError)):
        served(tmp_path, {}, ask)


@pytest.mark.slow
def test_sixteen_processes_on_a_ring_certify_every_round_within_their_allowance(tmp_path):
    rounds = 13
    plan = learning(rounds=rounds)
    # records of 166 bytes of sixteen members need 3.14 s a round within the allowance: shorter rounds are not all spoken of
    with Institutions(plan, tmp_path / "sites", round_at_least_s=3.5) as sites:
        sites.start()
        name = plan.names[5]
        wait_until(lambda: sites.round(name) >= 11, 2 * DEADLINE_S)
        run = read_source(str(sites.state(name) / "status.url"))
        ages = [row["age_rounds"] for row in sites.status(name)["network"]["rows"]]
        wait_until(sites.is_over)
        sites.all_ended_as_agreed()
        found = {name: {row["round"]: row for row in read_run(sites.state(name) / "run").network} for name in plan.names}
        summaries = [sites.summary(name) for name in plan.names]
    truth = read_run(simulate(plan.experiment.as_dict(), out=tmp_path / "simulated").path).rounds

    assert {row["node"] for row in run.nodes} == set(plan.names)
    assert len(ages) == 16
    assert max(ages) <= 8 + 2
    assert all(summary["stop_reason"] == "rounds" for summary in summaries)
    for certificates in found.values():
        assert sorted(certificates) == list(range(rounds))
        for number, row in certificates.items():
            assert row["known_in"] - number <= 8 + 2
            assert row["bound_low"] * (1 - 1e-6) <= truth[number]["rms_disagreement"] <= row["bound_high"] * (1 + 1e-6)


def test_each_institution_measures_the_models_that_it_was_sent_on_its_own_rows(tmp_path):
    plan = learning(nodes=4, rounds=10)
    network = Watched(plan, tmp_path)

    async def main():
        async with network:
            network.start()
            await network.ended()

    finish(main())
    sent = network.messages[9]
    for name in plan.names:
        found = read_run(network.states[name] / "run").cross_site
        assert found["models"] == [name, *plan.neighbours(name)]
        assert [site["name"] for site in found["sites"]] == [name]
        inputs, targets = plan.sites[name].test
        for model, (value,) in zip(found["models"][1:], found["value"][1:], strict=True):
            weights = sent[plan.names.index(model)]
            expected = roc_auc_score(targets.reshape(-1), inputs.double() @ weights[:-1] + weights[-1])
            assert value == pytest.approx(expected, abs=1e-9)


def test_a_node_started_again_bounds_nothing_for_two_rounds_nor_with_its_last_word():
    plan = averaging({"name": "ring"}, 4)
    name = plan.names[0]
    adapter = network_view.NetworkViewAdapter(plan, name, signing_of(plan)[name], ALL, "ab" * 32)
    adapter.start("2026-11-26T10:00:00.000Z", again=True)
    row = {"kind": "settle", "loss": None, "disagreement": 1.0, "norm": 2.0, "skipped": [], "agreed_for": 0, "bytes_sent": 9, "seconds": {}}
    said = []
    for number in range(3):
        own = NodeRow.of({**row, "node": name, "round": number})
        adapter.end_round(own, float(number), agreed=True)
        said.append(adapter.view.newest[0].record.disagreement)
        if number == 1:
            adapter.say(own, float(number), closing=True)
            said.append(adapter.view.newest[0].record.disagreement)

    assert said == [None, None, None, 1.0]


def test_who_was_held_up_has_signed_that_another_neighbour_of_it_did_not_come():
    """On a path a-b-c-d, b hears of c's rounds, and of its own part in them it knows itself."""
    plan = averaging({"name": "path"}, 4)
    a, b, c, d = plan.names
    signing = signing_of(plan)
    adapter = network_view.NetworkViewAdapter(plan, b, signing[b], ALL, "ab" * 32)

    def says(name, number, *without):
        changes = {"member": plan.names.index(name), "round": number, "level": 0, "without": tuple(map(plan.names.index, without))}
        sealed = seal(replace(RECORD, skipped=len(without), **changes), signing[name].sign, bytes.fromhex("ab" * 32))
        adapter.view.hear(c, [sealed], float(number))

    says(c, 1, b)
    assert not adapter.was_held_up(c, 1)
    says(c, 2, b, d)
    assert adapter.was_held_up(c, 2)
    assert not adapter.was_held_up(c, 3)
    assert not adapter.waits_for_others(c, 2)
    says(a, 2, b)
    assert not adapter.waits_for_others(c, 2)
    says(a, 3, d)
    assert adapter.waits_for_others(c, 2)
