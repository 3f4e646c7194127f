"""State that was lost, or restored from an old backup: both ends notice it before anything is averaged, and somebody has to decide."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from nodes_by_hand import Node, alive, carry, greeted, pair
from test_real_faults import slow_ring

from networks import HASTY, Institutions, Network, averaging, finish, plan_of, starts, until, wait_until
from p2pfl.node.checkpoint import CHECKPOINT
from p2pfl.node.clock import Timeouts
from p2pfl.protocol.ledger import EdgeLedger
from p2pfl.runs.checkpoint import read_checkpoint
from p2pfl.runs.records import read_run
from simulations import drift
from thorough import first_fast

DRIFT = 1e-9
TIMEOUTS = Timeouts(deadline_floor_s=0.5, deadline_factor=1.0, linger_s=5.0, start_within_s=30.0)


def exchanges(a: Node, b: Node, number: int) -> None:
    for _ in range(number):
        for node in (a, b):
            node.post()
        carry(a, b)
        assert (a.close(), b.close()) == ([], [])


def restarted(node: Node, ledgers: dict | None, *, exchange: int = 0, incarnation: int = 7, anew: int = 0) -> Node:
    """The node's next process, with the ledgers of a checkpoint; None: it was deleted."""
    peers = list(node.protocol.neighbours)
    again = Node(node.me, *peers, incarnation=incarnation, anew=anew)
    for name, saved in (ledgers or {}).items():
        again.protocol.neighbours[name].restore_ledger(EdgeLedger.from_dict(json.loads(json.dumps(saved))))
    if exchange:
        again.protocol.begin(exchange, 0.0)
    return again


def meets(one: Node, other: Node) -> None:
    """Both say Hello for a while, as their ticks do."""
    for node in (one, other):
        node.now_s += 10.0
    for _ in range(3):
        for node in (one, other):
            node.now_s += 1.0
            node.protocol.tick(node.now_s)
        carry(one, other)


# ---- two nodes by hand


@pytest.mark.parametrize("rounds_back", [1, 2, 20])
def test_a_node_that_was_set_back_and_its_neighbour_both_see_it_and_do_not_talk(rounds_back):
    a, b = pair()
    exchanges(a, b, 22 - rounds_back)
    backup = b.protocol.edges.ledgers()
    exchanges(a, b, rounds_back)
    greeted(a, b)
    a.hear("b", b.protocol.stopping.where_it_is(b.protocol.neighbours["a"]))  # as the next update would tell
    again = restarted(b, backup, exchange=22 - rounds_back)
    a.post()
    meets(a, again)

    assert a.kinds().count("state_lost") == again.kinds().count("state_lost") == 1
    assert list(again.protocol.states.own) == ["a"]
    assert a.protocol.neighbours["b"].state_lost
    assert not a.protocol.neighbours["b"].session.is_open
    assert not again.protocol.neighbours["a"].session.is_open
    assert a.protocol.admitted() == {}
    assert a.protocol.edges.refused["state_lost"] >= 1
    (detail,) = (detail for kind, detail in a.events if kind == "state_lost")
    assert "after round 21" in detail
    assert f"after round {21 - rounds_back}" in detail
    assert "--start-anew" in detail


def test_a_node_whose_state_was_deleted_is_seen_as_well():
    a, b = pair()
    exchanges(a, b, 3)
    again = restarted(b, None)
    meets(a, again)

    assert again.protocol.states.own["a"].endswith("and it is at the start")
    assert "now is at the start" in a.protocol.neighbours["b"].state_lost
    assert [type(message) for message in again.said_to("a")] == []


def test_two_that_do_not_talk_say_hello_at_the_pace_of_their_ticks():
    a, b = pair()
    exchanges(a, b, 3)
    again = restarted(b, None)
    again.protocol.tick(again.now_s)
    a.now_s += 10
    a.protocol.tick(a.now_s)
    sent = 0
    for _ in range(10):  # what each says may make the other say something
        for sender, receiver in ((a, again), (again, a)):
            for frames in sender.frames_for(receiver.me):
                sent += 1
                receiver.protocol.hear(sender.me, tuple(map(memoryview, frames)), receiver.now_s)

    assert sent <= 6


def test_a_node_that_was_killed_at_any_moment_has_lost_nothing():
    """What it had not written it has told nobody."""
    a, b = pair()
    for number in range(6):
        backup, at = b.protocol.edges.ledgers(), b.protocol.edges.exchange
        for node in (a, b):
            node.post()
        carry(a, b)
        a.close()
        b.close(keep=False)
        carry(a, b)
        b = restarted(b, backup, exchange=at, incarnation=100 + number)
        meets(a, b)

        assert a.protocol.neighbours["b"].session.is_open
        assert b.protocol.neighbours["a"].session.is_open
        assert not {"state_lost"} & {*a.kinds(), *b.kinds()}
        a.hear("b", alive(a.protocol.edges.exchange))
        b.protocol.jump(a.protocol.edges.exchange, b.now_s)
        b.protocol.edges.checkpointed(b.protocol.edges.ledgers())
        b.protocol.begin(a.protocol.edges.exchange, b.now_s)
        meets(a, b)


def test_what_is_remembered_outlives_the_process_that_heard_it():
    a, b = pair()
    exchanges(a, b, 5)
    a_again, b_again = restarted(a, a.protocol.edges.ledgers(), exchange=5, incarnation=8), restarted(b, None)
    meets(a_again, b_again)

    assert a_again.protocol.neighbours["b"].state_lost
    assert b_again.protocol.states.own


def test_an_old_hello_that_comes_late_shows_nothing():
    a, b = pair()
    old = b.protocol.stopping.hello(b.protocol.neighbours["a"])
    exchanges(a, b, 5)
    a.hear("b", old)

    assert "state_lost" not in a.kinds()


def test_state_that_is_restored_after_all_ends_it():
    a, b = pair()
    exchanges(a, b, 5)
    newest, at = b.protocol.edges.ledgers(), b.protocol.edges.exchange
    meets(a, restarted(b, None))
    again = restarted(b, newest, exchange=at, incarnation=9)
    meets(a, again)

    assert a.kinds()[-3:] == ["state_restored", "returned", "greeted"]
    assert (a.protocol.neighbours["b"].state_lost, again.protocol.states.own) == ("", {})
    exchanges(a, again, 3)


def test_a_node_that_is_started_anew_is_talked_to_and_written_down():
    a, b = pair()
    exchanges(a, b, 5)
    meets(a, restarted(b, None))
    anew = restarted(b, None, incarnation=9, anew=1_790_000_000_000)
    meets(a, anew)

    assert "started_anew" in a.kinds()
    told = "b: it was started anew without its state: it was after round 3, and now is at the start"
    assert ("started_anew", told) in a.events
    assert anew.protocol.claims.is_behind()
    anew.protocol.jump(5, anew.now_s)
    anew.protocol.edges.checkpointed(anew.protocol.edges.ledgers())
    anew.protocol.begin(5, anew.now_s)
    greeted(a, anew)
    anew.protocol.neighbours["a"].queue(anew.protocol.stopping.where_it_is(anew.protocol.neighbours["a"]))
    carry(a, anew)
    exchanges(a, anew, 3)
    assert a.protocol.neighbours["b"].ledger.remembered().report.closed_through == 6


def test_the_state_from_before_it_was_started_anew_is_old_then():
    a, b = pair()
    exchanges(a, b, 5)
    newest = b.protocol.edges.ledgers()
    meets(a, restarted(b, None, anew=1_790_000_000_000))
    late = restarted(b, newest, exchange=5, incarnation=9)
    meets(a, late)

    assert late.protocol.states.own
    assert a.protocol.neighbours["b"].state_lost


def test_nobody_is_said_to_be_started_anew_who_has_nothing_to_lose():
    a = Node("a", "b")
    b = Node("b", "a", incarnation=2)
    b.protocol.anew = 5
    greeted(a, b)

    assert "started_anew" not in a.kinds()


def test_a_checkpoint_of_before_reports_were_kept_remembers_what_was_settled():
    a, b = pair()
    exchanges(a, b, 6)
    ledgers = a.protocol.edges.ledgers()
    for saved in ledgers.values():
        del saved["heard"], saved["anew"]
    a_again, b_again = restarted(a, ledgers, exchange=6), restarted(b, None)
    meets(a_again, b_again)

    assert b_again.protocol.states.own
    assert not restarted(a, ledgers).protocol.neighbours["b"].ledger.heard


# ---- daemons in one process, pure averaging


VICTIM = "node-3"


def restore(network: Network, name: str, backup: Path | None) -> None:
    """Put a backup in the place of a node's state, as an administrator does; None: nothing is left."""
    old = network.states[name]
    network.states[name] = old.with_name(str(int(old.name) + 1))
    if backup is not None:
        shutil.copytree(backup, network.states[name])


async def lose_state(network: Network, how: str) -> Path:
    """Kill the victim in the middle of averaging, and start it from an empty folder or one of 20 rounds before.

    Returns:
        Its newest state.
    """
    backup = None
    network.start()
    await network.reached(4)
    if how == "restored":
        await network.kill(VICTIM)
        backup = shutil.copytree(network.states[VICTIM], network.place / "backup")
        network.start(VICTIM)
        await network.reached(24, [VICTIM])
    await network.kill(VICTIM)
    newest = network.states[VICTIM]
    restore(network, VICTIM, backup)
    network.start(VICTIM)
    assert await network.nodes[VICTIM].task == "state_lost"
    return newest


def details(network: Network, name: str, kind: str) -> list[str]:
    return [event["detail"] for event in read_run(network.states[name] / "run").events if event["event"] == kind]


@pytest.mark.no_cover
@pytest.mark.parametrize("how", first_fast(["restored", "deleted"]))
def test_a_node_that_lost_its_state_stops_and_goes_on_with_the_newest_to_the_true_mean(how, tmp_path, caplog):
    plan = averaging({"name": "ring"}, 6, seed=3)
    caplog.set_level("WARNING", "p2pfl")

    async def main():
        async with Network(plan, tmp_path, timeouts=TIMEOUTS) as network:
            newest = await lose_state(network, how)
            neighbours = network.neighbours(VICTIM)
            for told in details(network, VICTIM, "state_lost"):
                assert "remembers it after round" in told
                assert "--start-anew" in told
            assert network.summary(VICTIM)["stop_reason"] == "state_lost"
            assert {departure["kind"] for departure in network.summary(VICTIM)["departures"]} == {"state_lost"}
            await until(lambda: any("state_lost" in network.events(name) for name in neighbours))
            said = [record.getMessage() for record in caplog.records if "state_lost" in record.getMessage()]
            assert len(said) == sum(len(details(network, name, "state_lost")) for name in (VICTIM, *neighbours))
            for name in neighbours:
                status = network.nodes[name].daemon.status()["neighbours"][VICTIM]
                assert bool(status["state_lost"]) == ("state_lost" in network.events(name))

            restore(network, VICTIM, newest)
            network.start(VICTIM)
            assert set(await network.ended()) == {"converged"}
            assert drift(starts(plan), network.models()) < DRIFT
            assert any("state_restored" in network.events(name) for name in neighbours)
            for name in plan.names:
                assert "state_lost" not in {departure["kind"] for departure in network.summary(name)["departures"]}

    finish(main())


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.parametrize("how", first_fast(["deleted", "restored"]))
def test_a_node_that_is_started_anew_is_written_down_by_itself_and_by_its_neighbours(how, tmp_path):
    plan = averaging({"name": "ring"}, 6, seed=3)

    async def main():
        async with Network(plan, tmp_path, timeouts=TIMEOUTS) as network:
            await lose_state(network, how)
            restore(network, VICTIM, None)
            network.start(VICTIM, start_anew=True)
            assert set(await network.ended()) == {"converged"}
            for name in (VICTIM, *network.neighbours(VICTIM)):
                assert any(VICTIM in detail for detail in details(network, name, "started_anew")), name
                kinds = [departure["kind"] for departure in network.summary(name)["departures"]]
                assert "state_lost" in kinds
            return drift(starts(plan), network.models())

    assert finish(main()) > DRIFT, "the mean has moved, which is why it is written down"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["deleted", "restored"])
@pytest.mark.parametrize("pace", ["asynchronous", "pairwise"])
def test_lost_state_is_noticed_at_every_pace(pace, how, tmp_path):
    rule = {"algorithm": {"name": "ad-psgd"}} if pace == "pairwise" else {"pace": {"name": "asynchronous"}}
    plan = plan_of(task={"name": "synthetic-logistic"}, nodes=6, topology={"name": "ring"}, rounds=100, stop=None, **rule)

    def let_rounds_take(network, at_least_s):
        for running in network.nodes.values():
            running.daemon.node.timeouts = replace(TIMEOUTS, round_at_least_s=at_least_s)

    async def main():
        async with Network(plan, tmp_path, timeouts=replace(TIMEOUTS, round_at_least_s=0.1)) as network:
            await lose_state(network, how)
            assert all("remembers it after" in told for told in details(network, VICTIM, "state_lost"))
            let_rounds_take(network, 3600.0)  # nobody is at the end before the one that begins anew is there
            await until(lambda: any("state_lost" in network.events(name) for name in network.neighbours(VICTIM)))
            restore(network, VICTIM, None)
            network.start(VICTIM, start_anew=True)
            met = network.nodes[VICTIM].daemon.protocol.neighbours.values()
            await until(lambda: all(neighbour.session.is_open for neighbour in met))
            let_rounds_take(network, 0.01)
            assert set(await network.ended()) == {"rounds"}
            for name in (VICTIM, *network.neighbours(VICTIM)):
                assert "state_lost" in {departure["kind"] for departure in network.summary(name)["departures"]}

    finish(main())


# ---- what a checkpoint must hold, however rarely it was asked for


def rarely_written(every: int):
    return plan_of(
        task={"name": "averaging", "dimension": 5},
        nodes=6,
        topology={"name": "ring"},
        rounds=0,
        stop={"relative_consensus": 1e-6, "settle": 2000},
        checkpoint_every=every,
        seed=3,
    )


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.parametrize("seed", first_fast(range(6)))
def test_a_kill_at_any_moment_is_not_taken_for_lost_state_and_the_mean_stands_still(seed, tmp_path):
    chance, plan = random.Random(seed), rarely_written(1 + seed % 3 * 3 if seed else 7)

    async def main():
        async with Network(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            for _ in range(3):
                victim = chance.choice(plan.names)
                await network.reached(network.round(victim) + chance.randrange(1, 5), [victim])
                for _ in range(chance.randrange(200)):
                    await asyncio.sleep(0)
                await network.kill(victim)
                network.start(victim)
            assert set(await network.ended()) == {"converged"}
            assert drift(starts(plan), network.models()) < DRIFT
            assert not any({"state_lost", "started_anew"} & set(network.events(name)) for name in plan.names)

    finish(main())


def test_a_pause_loses_no_round_however_rarely_a_checkpoint_was_asked_for(tmp_path):
    plan = rarely_written(1000)

    async def main():
        async with Network(plan, tmp_path, timeouts=TIMEOUTS) as network:
            network.start()
            await network.reached(5)
            network.nodes[VICTIM].daemon.stop("by the test")
            assert await network.nodes[VICTIM].task == "paused"
            done = len(network.rows(VICTIM))
            network.start(VICTIM)
            await until(lambda: "resumed" in network.events(VICTIM))
            (event,) = (event for event in read_run(network.states[VICTIM] / "run").events if event["event"] == "resumed")
            assert event["round"] == done

    finish(main())


# ---- daemons in processes of their own


@pytest.mark.slow
@pytest.mark.parametrize("how", ["deleted", "restored"])
def test_an_administrator_is_told_at_both_ends_and_decides(how, tmp_path):
    plan = slow_ring(tmp_path, weight=0.03, tolerance=1e-3)
    neighbours = plan.neighbours(VICTIM)
    with Institutions(plan, tmp_path / "sites", deadline_floor_s=2.0, deadline_factor=3.0, round_at_least_s=0.03) as network:
        state, backup = network.state(VICTIM), tmp_path / "backup"
        network.start()
        wait_until(lambda: network.round(VICTIM) >= 3)
        shutil.copytree(state, backup, ignore=shutil.ignore_patterns("*.tmp", "lock", "status.url"))  # as a cron job does
        before = read_checkpoint(backup / CHECKPOINT)[1]["round"]
        wait_until(lambda: network.round(VICTIM) >= before + 20)
        assert network.end(VICTIM, signal.SIGKILL) != 0
        shutil.rmtree(state)
        if how == "restored":
            shutil.copytree(backup, state)
        network.start(VICTIM)

        assert network.wait(VICTIM) == 3
        assert "its state went back" in (tmp_path / "sites" / VICTIM / "node.log").read_text()
        assert [departure["kind"] for departure in network.summary(VICTIM)["departures"]].count("state_lost") >= 1
        assert not (state / "run" / "models").exists()
        wait_until(lambda: any("state_lost" in network.events(name) for name in neighbours))
        told = [name for name in neighbours if "state_lost" in network.events(name)]
        for name in told:
            log = (tmp_path / "sites" / name / "node.log").read_text()
            assert (
                len([line for line in log.splitlines() if "WARNING" in line and f"state_lost {VICTIM}: its state went back" in line]) == 1
            )
            seen = network.status(name)["neighbours"][VICTIM]
            assert (seen["link"], "now is" in seen["state_lost"]) == ("state lost", True)
        assert network.end(told[0], signal.SIGTERM) == 0  # what it has noticed outlives its process
        network.start(told[0])
        wait_until(lambda: network.status(told[0]) is not None)
        assert network.status(told[0])["neighbours"][VICTIM]["state_lost"]

        network.start(VICTIM, options=["--start-anew"])
        assert [network.wait(name) for name in plan.names] == [3] * len(plan.names)
        assert [network.summary(name)["stop_reason"] for name in plan.names] == ["converged"] * len(plan.names)
        for name in plan.names:
            assert "state_lost" in {departure["kind"] for departure in network.summary(name)["departures"]}, name
        assert [path.name for path in state.iterdir() if path.name.startswith("before-")]
