"""Networks of real daemons of which one member lies: it harms itself only."""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from itertools import product

import pytest

from lying_members import start_liar
from networks import Institutions, plan_of, wait_until
from p2pfl.runs.records import read_run
from thorough import long_or_short

pytestmark = pytest.mark.slow

TRAIN_S = long_or_short(0.3, 0.15)
ROUNDS = long_or_short(40, 20)
FIRST_LIE = 5
POISONED_ROUNDS = long_or_short(60, 30)
DEADLINE_S = 3.0
USUAL_WAIT_S = long_or_short(0.5, 0.8)
"""What a round needs without a liar, at most; in the short form other tests run beside these."""
MOST_DEADLINES = 3
"""That one member costs each other one."""


def training(nodes, topology, rounds=ROUNDS):
    return plan_of(
        task={"name": "synthetic-logistic", "features": 10, "samples": 60},
        nodes=nodes,
        topology=topology,
        algorithm={"local_steps": 2, "batch_size": 16},
        rounds=rounds,
        stop=None,
        evaluate_every=rounds,
    )


def three_chunks():
    return plan_of(
        task={"name": "averaging", "dimension": 300_000},
        nodes=3,
        topology={"name": "complete"},
        rounds=0,
        stop={"relative_consensus": 1e-300, "settle": 100_000},
    )


@contextmanager
def lied_to(plan, place, program, first_lie=FIRST_LIE, **settings):
    """A network whose last member lies; the others' names come with it."""
    *honest, liar = plan.names
    with Institutions(plan, place, **{"linger_s": 2.0, "deadline_floor_s": DEADLINE_S, **settings}) as network:
        network.start(*honest)
        process = start_liar(program, first_lie, network.site(liar))
        try:
            yield network, honest
        finally:
            process.kill()
            process.wait()


def returns_of(member, state):
    """Rounds in which the node with this state folder was told that a member is back."""
    events = read_run(state / "run").events
    return [event["round"] for event in events if event["event"] == "returned" and event["detail"].startswith(f"{member} ")]


def ended(network, names):
    wait_until(lambda: all(network.exit_code(name) is not None for name in names))


@pytest.mark.parametrize("topology", long_or_short(["complete", "path"], ["path"]))
def test_a_member_that_claims_to_be_ahead_costs_nobody_a_round_of_training(topology, tmp_path):
    with lied_to(training(4, {"name": topology}), tmp_path, "ahead", round_at_least_s=TRAIN_S) as (network, honest):
        ended(network, honest)
        trained = {name: sum(row["loss"] is not None for row in network.rows(name)) for name in honest}

        assert min(trained.values()) >= ROUNDS - 1
        assert all("jumped" not in network.events(name) for name in honest)
        assert [network.exit_code(name) for name in honest] == [3] * 3  # a member did not end with the others


@pytest.mark.parametrize(
    ("program", "first_lie"),
    long_or_short(
        list(product(["only_alive", "waiting", "endless", "restarts", "silent"], [0, FIRST_LIE])),
        [("only_alive", 0), ("waiting", FIRST_LIE), ("endless", FIRST_LIE), ("restarts", 0), ("silent", FIRST_LIE)],
    ),
)
def test_a_member_stops_nobodys_clock(program, first_lie, tmp_path):
    with lied_to(three_chunks(), tmp_path, program, first_lie, deadline_factor=2.0) as (network, honest):
        wait_until(lambda: all(network.round(name) >= first_lie + ROUNDS + 1 for name in honest))
        for name in honest:
            rows = network.rows(name)[first_lie : first_lie + ROUNDS]
            lost_s = sum(max(0.0, row["seconds"]["wait"] - USUAL_WAIT_S) for row in rows)
            print(f"{program} from {first_lie}: {name} lost {lost_s / DEADLINE_S:.2f} deadlines in {len(rows)} rounds")  # noqa: T201

            assert lost_s <= MOST_DEADLINES * DEADLINE_S


def test_an_honest_member_that_was_stopped_is_waited_for_again_while_another_one_lies(tmp_path):
    plan = plan_of(
        task={"name": "averaging", "dimension": 5},
        nodes=4,
        topology={"name": "complete"},
        rounds=0,
        stop={"relative_consensus": 1e-300, "settle": 100_000},
    )
    deadline_s = long_or_short(DEADLINE_S, 2.0)
    with lied_to(plan, tmp_path, "only_alive", deadline_factor=2.0, deadline_floor_s=deadline_s) as (network, honest):
        *others, sleeper = honest
        wait_until(lambda: all(network.round(name) >= FIRST_LIE + 30 for name in honest))
        before = {name: len(returns_of(sleeper, network.state(name))) for name in others}
        network.signal(sleeper, signal.SIGSTOP)
        time.sleep(4 * deadline_s)  # that is how long it stands still
        network.signal(sleeper, signal.SIGCONT)

        def returned():
            return [rounds[0] for name in others if (rounds := returns_of(sleeper, network.state(name))[before[name] :])]

        wait_until(returned)
        since = min(returned())
        wait_until(lambda: network.rows(sleeper)[-1]["round"] >= since + 10)
        rows = [row for row in network.rows(sleeper) if row["round"] >= since]
        met = [set(others) - set(row["skipped"]) for row in rows]

        assert any(met[:2])  # of its rounds since the first of them waits for it again
        wait_until(lambda: all(set(network.rows(name)[-1]["skipped"]).isdisjoint({sleeper}) for name in others))


def test_a_member_that_announces_a_stop_ends_nobodys_run_as_converged(tmp_path):
    plan = plan_of(
        task={"name": "averaging", "dimension": 50},
        nodes=4,
        topology={"name": "path"},
        rounds=0,
        stop={"relative_consensus": 1e-9, "settle": 2000},
    )
    with lied_to(plan, tmp_path, "early_stop", deadline_floor_s=10.0) as (network, honest):
        ended(network, honest)
        for name in honest:
            summary, rows = network.summary(name), network.rows(name)
            tolerated = plan.stop_rule.lambda_2 * (plan.stop_rule.tolerance * rows[-1]["norm"]) ** 2

            assert len(rows) > plan.stop_rule.earliest(0) + 10
            assert summary["stop_reason"] == "rounds" or rows[-1]["disagreement"] <= tolerated


@pytest.mark.parametrize("program", ["poison_once", "poison_always"])
def test_updates_of_the_largest_numbers_harm_their_sender_only(program, tmp_path):
    with lied_to(training(4, {"name": "complete"}, rounds=POISONED_ROUNDS), tmp_path, program, deadline_floor_s=0.5) as (network, honest):
        ended(network, honest)
        for name in honest:
            events, rows = read_run(network.state(name) / "run").events, network.rows(name)
            told = [event["detail"] for event in events if event["event"] == "refused"]

            assert any("node-3: too_large: an update of norm" in detail for detail in told)
            assert not {"overflow", "diverged", "no_loss"} & {event["event"] for event in events}
            assert len(rows) == POISONED_ROUNDS
            assert all(row["norm"] < 20 and row["loss"] < 2 for row in rows)
            assert "node-3" in rows[FIRST_LIE]["skipped"]
