"""The ways in which a run that ended was not as agreed, from its events to its exit code."""

from __future__ import annotations

from p2pfl.departures import Departure, departure_rows, departures_in, departures_of_events, exit_code_of


def event(node: str, kind: str, detail: str = "", number: int = 0) -> dict[str, object]:
    return {"round": number, "node": node, "event": kind, "detail": detail}


def test_ordinary_events_are_no_departures():
    ordinary = ["started", "resumed", "paused", "died", "agreed", "skipped", "returned", "link_down", "alone"]

    assert departures_of_events(event("a", kind) for kind in ordinary) == []


def test_events_of_one_kind_are_one_sentence_that_names_the_nodes():
    events = [event(f"h{number % 7}", "diverged", f"round {number}: why", number) for number in range(14)]

    assert departures_of_events(events) == [
        Departure(
            kind="non_finite",
            detail="h0, h1, h2, h3, h4 and 2 more: training became non-finite and was rolled back (14 times, first round 0: why)",
        )
    ]


def test_state_that_was_restored_after_all_is_no_departure():
    lost = event("a", "state_lost", "b: its state went back: it was after round 9, and now is after round 3")
    other = event("a", "state_lost", "c: its state went back")

    assert departures_of_events([lost, event("a", "state_restored", "b: its state is again that of after round 9")]) == []
    assert len(departures_of_events([lost, event("d", "state_restored", "b: its state is again that of after round 9")])) == 1
    assert len(departures_of_events([lost, other, event("a", "state_restored", "b: again")])) == 1


def test_what_several_nodes_say_alike_is_said_once():
    events = [event("a", "held", "without d"), event("b", "held", "without d"), event("c", "state_lost", "of b")]

    assert departures_of_events(events) == [
        Departure(kind="rounds_missed", detail="a, b: without d"),
        Departure(kind="state_lost", detail="c: of b"),
    ]


def test_a_flood_is_summed_up():
    found = departures_of_events(event("a", "state_lost", f"time {number}") for number in range(100))

    assert len(found) == 21
    assert found[-1].detail == "80 more of the kind state_lost, which events.jsonl holds"


def test_the_exit_code_is_3_exactly_where_a_departure_is_listed():
    rows = departure_rows([Departure(kind="non_finite", detail="a")] * 2)

    assert rows == [{"kind": "non_finite", "detail": "a"}]
    assert exit_code_of({"departures": rows}) == 3
    assert departures_in({"departures": rows}) == ["a"]
    assert exit_code_of({"departures": []}) == exit_code_of({}) == exit_code_of(None) == 0
