"""How every node and link is, from rows made by hand."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from p2pfl.inspector.health import node_health
from p2pfl.inspector.link_health import edge_health, in_need, link_name, slowest_edge
from p2pfl.inspector.terminal import print_page
from p2pfl.runs.records import RunRecords

FIVE = ("a", "b", "c", "d", "e")
RING = [[i, (i + step) % 5, 1 / 3] for i in range(5) for step in (1, 4)]


def row(node, number, skipped=(), **others):
    return {"round": number, "node": node, "kind": "train", "skipped": list(skipped), **others}


def run_of(rows, *, events=(), summary=None, names=FIVE, edges=RING):
    graph = {"nodes": list(names), "edges": edges}
    return RunRecords(experiment={}, environment={}, topology=graph, rounds=[], nodes=list(rows), events=list(events), summary=summary)


def all_at(number, but=()):
    return [row(name, t) for t in range(number + 1) for name in FIVE if name not in but]


def died(node, number):
    return {"time": "2026-01-01T00:00:00Z", "round": number, "node": node, "event": "died", "detail": "killed by signal 9"}


def states(run):
    return {name: health.state for name, health in node_health(run).items()}


def test_nodes_that_come_in_time_are_well_in_the_order_of_the_graph():
    assert list(states(run_of(all_at(3))).items()) == [(name, "well") for name in FIVE]


def test_who_has_died_is_lost_and_it_is_said_of_what():
    health = node_health(run_of(all_at(3), events=[died("c", 3)]))["c"]

    assert health.state == "lost"
    assert health.why == "It died after round 3 (killed by signal 9) and has not come back yet."
    assert health.round == 3


def test_who_has_died_before_its_first_round_is_lost():
    assert states(run_of(all_at(2, but="c"), events=[died("c", 0)]))["c"] == "lost"


def test_who_has_recorded_a_round_since_it_died_is_well():
    assert states(run_of([*all_at(3), row("c", 5)], events=[died("c", 3)]))["c"] == "well"


def test_who_is_still_skipped_after_it_came_back_is_late():
    rows = [*all_at(3), row("b", 6, skipped="c"), row("c", 6)]

    assert states(run_of(rows, events=[died("c", 3)]))["c"] == "late"


def test_whom_one_neighbour_skips_is_late():
    health = node_health(run_of([*all_at(3), row("b", 4, skipped="c"), row("d", 4), row("c", 4)]))["c"]

    assert (health.state, health.why) == ("late", "In the newest round b went on without it.")


def test_whom_all_neighbours_skip_while_they_go_on_is_lost():
    rows = [*all_at(3), row("b", 4, skipped="c"), row("d", 4, skipped="c")]

    assert states(run_of(rows)) == {"a": "well", "b": "well", "c": "lost", "d": "well", "e": "well"}


def test_whom_all_neighbours_skip_but_who_keeps_up_is_late():
    rows = [*all_at(3), row("b", 4, skipped="c"), row("d", 4, skipped="c"), row("c", 4)]

    assert states(run_of(rows))["c"] == "late"


def test_a_neighbour_that_still_waits_is_a_reason_for_hope():
    """d has not ended its round without c."""
    assert states(run_of([*all_at(3), row("b", 4, skipped="c")]))["c"] == "late"


def test_two_lost_neighbours_do_not_vouch_for_each_other():
    rows = [*all_at(3), row("b", 5, skipped="c"), row("a", 5), row("e", 5, skipped="d")]

    assert states(run_of(rows)) == {"a": "well", "b": "well", "c": "lost", "d": "lost", "e": "well"}


def test_what_the_dead_said_last_does_not_count():
    rows = [*all_at(3), row("c", 4, skipped="d"), *[row(name, 5) for name in "abde"]]

    assert states(run_of(rows, events=[died("c", 4)])) == {"a": "well", "b": "well", "c": "lost", "d": "well", "e": "well"}


def test_what_somebody_far_behind_said_does_not_count():
    rows = [*all_at(3), row("b", 4, skipped="c"), row("c", 6)]

    assert states(run_of(rows))["c"] == "well"
    assert edge_health(run_of(rows))[frozenset("bc")].state == "well"  # c was away, the link was not


def test_once_the_run_has_ended_everybody_has_finished():
    run = run_of([*all_at(3), row("b", 3, skipped="c")], summary={"stop_reason": "rounds"})

    assert set(states(run).values()) == {"finished"}
    assert {edge.state for edge in edge_health(run).values()} == {"well", "slow"}


def test_where_members_were_missing_at_the_start_nobody_has_finished():
    run = run_of(
        [], summary={"stop_reason": "members_missing", "rounds": 0, "metrics": {"accuracy": {"per_node": {"a": None}, "mean": None}}}
    )
    stream = io.StringIO()
    print_page(run, Console(file=stream, width=100))
    shown = stream.getvalue()

    assert set(states(run).values()) == {"has not trained"}
    assert "5 have not trained" in shown
    assert "finished" not in shown
    assert "Hospital by hospital" not in shown


def test_who_died_and_stayed_away_has_not_finished_when_the_run_ends():
    run = run_of([*all_at(3), *[row(name, 4, skipped="c" if name in "bd" else "") for name in "abde"]], summary={"stop_reason": "rounds"})

    assert states(run) == {"a": "finished", "b": "finished", "c": "lost", "d": "finished", "e": "finished"}
    assert node_health(run)["c"].why == "Its last record is of round 3; the run has ended without it, after round 4."


def test_a_node_says_itself_that_it_has_finished_and_how_old_that_is():
    health = node_health(run_of([row("a", 3, state="finished", age_s=31.4), row("b", 3, state="running", age_s=0.5)]))

    assert (health["a"].state, health["a"].why) == ("finished", "It has finished. Last heard of 31 s ago.")
    assert (health["b"].state, health["b"].why) == ("well", "Nobody goes on without it.")


def test_of_whom_nothing_is_recorded_nothing_is_known():
    health = node_health(run_of(all_at(3, but="c")))["c"]

    assert (health.state, health.why) == ("unknown", "No report from this site here.")


def test_links_without_a_missed_message_are_well():
    edges = edge_health(run_of(all_at(3)))

    assert {link_name(ends): edge.state for ends, edge in edges.items()} == dict.fromkeys(
        ("a - b", "a - e", "b - c", "c - d", "d - e"), "well"
    )
    assert slowest_edge(edges) is None


def test_a_link_that_missed_more_than_a_fiftieth_is_slow_and_the_worst_is_named():
    skips = {("a", 0): "b", ("a", 1): "b", ("b", 1): "a", ("d", 1): "c"}
    edges = edge_health(run_of([row(name, t, skips.get((name, t), "")) for t in range(4) for name in FIVE]))
    worst = edges[frozenset("ab")]

    assert (worst.state, worst.missed, worst.expected, worst.fraction) == ("slow", 3, 8, 3 / 8)
    assert worst.why == "3 of 8 messages over it were missed in rounds 0-3."
    assert slowest_edge(edges) == frozenset("ab")
    assert [link_name(ends) for ends, _ in in_need(edges)] == ["a - b", "c - d"]


def test_one_missed_message_of_a_hundred_is_a_note_and_no_slow_link():
    edge = edge_health(run_of([row(name, t, "b" if (name, t) == ("a", 130) else "") for t in range(150) for name in FIVE]))[frozenset("ab")]

    assert (edge.state, edge.missed, edge.expected) == ("well", 1, 100)
    assert edge.why == "1 of 100 messages over it were missed in rounds 100-149, 1 in all."


def test_what_was_missed_before_the_window_is_a_note():
    skips = {("a", t): "b" for t in range(20)}
    edges = edge_health(run_of([row(name, t, skips.get((name, t), "")) for t in range(100) for name in FIVE]))

    assert edges[frozenset("ab")].why == "0 of 100 messages over it were missed in rounds 50-99, 20 in all."
    assert slowest_edge(edges) is None


def test_a_link_is_lost_while_one_end_goes_on_without_the_other():
    edges = edge_health(run_of([*all_at(3), row("a", 4, skipped="b"), row("b", 4)]))

    assert edges[frozenset("ab")].state == "lost"
    assert edges[frozenset("ab")].why == "a went on without b in round 4."
    assert [link_name(ends) for ends, _ in in_need(edges)] == ["a - b"]


def test_what_is_lost_stands_before_what_is_slow():
    skips = {("c", 0): "d", ("c", 1): "d", ("a", 2): "b"}
    rows = [row(name, t, skips.get((name, t), "")) for t in range(3) for name in FIVE]

    assert [link_name(ends) for ends, _ in in_need(edge_health(run_of(rows)))] == ["a - b", "c - d"]


def test_all_links_of_a_lost_node_are_lost():
    edges = edge_health(run_of(all_at(3), events=[died("c", 3)]))

    assert [(link_name(ends), edge.why) for ends, edge in in_need(edges)] == [
        ("b - c", "c cannot be reached."),
        ("c - d", "c cannot be reached."),
    ]


def test_where_the_graph_changes_links_are_known_by_what_failed():
    edges = edge_health(run_of([row("a", 0, "d"), row("d", 0), row("a", 1), row("d", 1)], edges=[]))

    assert {link_name(ends): edge.state for ends, edge in edges.items()} == {"a - d": "slow"}


@pytest.mark.no_cover
def test_thousands_of_nodes_take_no_time():
    names = [f"n{i}" for i in range(5000)]
    edges = [[i, (i + step) % 5000, 0.1] for i in range(5000) for step in range(1, 11)]
    rows = [row(name, 1, [names[i - 1]]) for i, name in enumerate(names)]
    run = run_of(rows, names=names, edges=edges)
    began_s = time.process_time()  # this process's own: the machine may be busy
    found = edge_health(run, node_health(run))

    assert len(found) == 50_000
    assert time.process_time() - began_s < 10  # a second; by pairs of nodes it would take minutes


@pytest.mark.parametrize("width", [80, 60])
def test_the_terminals_page_marks_links(width):
    names = [f"university-hospital-{name}" for name in FIVE]
    skips = {0: (names[3], names[4]), 2: (names[0], names[1])}
    rows = [row(name, t, [skips[t][1]] if t in skips and skips[t][0] == name else []) for t in range(3) for name in names]
    stream = io.StringIO()
    print_page(run_of(rows, names=names), Console(file=stream, width=width))
    page = stream.getvalue()

    assert "\nLinks\n" in page
    assert "lost" in page[page.index("Links") :]
    assert "slow" in page[page.index("Links") :]
    assert max(map(len, page.splitlines())) <= width
