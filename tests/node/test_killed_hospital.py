"""A hospital that was killed is nowhere called well, and nothing is said about it that no record tells."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from killed_hospital import EIGHT, KILLED, NEIGHBOURS, Course, asked, calls_well, network_row, node_rows, own_folder, printed, whole_folder
from p2pfl.cli import node as node_cli
from p2pfl.inspector import sections
from p2pfl.inspector.convergence import convergence
from p2pfl.inspector.health import node_health
from p2pfl.inspector.link_health import edge_health, slowest_edge
from p2pfl.inspector.outages import incidents, no_incidents, outages
from p2pfl.inspector.report import report
from p2pfl.inspector.run_state import banner, member_of, run_state
from p2pfl.inspector.verdict import verdict
from p2pfl.runs.records import read_run

DEADLINE_S = 60.0
MINUTE = 60.0
AWAY = Course()
JUST_KILLED = Course(last=40)
"""Its neighbours still wait for it: nobody has gone on without it yet."""
BACK = Course(last=700, killed=165, back=500)
FAR = "hospital-0"


def whole(path, course=AWAY, **options):
    return read_run(whole_folder(path, course, **options).path)


def own(path, me=FAR, course=AWAY, **options):
    return read_run(own_folder(path, course, me, **options).path)


def views(tmp_path):
    """What each institution and each folder has, some time after the kill and at once."""
    return {
        "up": whole(tmp_path / "up"),
        "up without the event": whole(tmp_path / "quiet", died=False),
        "from afar": own(tmp_path / "far"),
        "its neighbour's": own(tmp_path / "near", NEIGHBOURS[0]),
        "its neighbour's, just killed": own(tmp_path / "just", NEIGHBOURS[0], JUST_KILLED),
        "a folder of before": own(tmp_path / "before", FAR, named=False),
        "asked": asked(tmp_path / "asked", AWAY, FAR),
        "asked its neighbour": asked(tmp_path / "asked-near", AWAY, NEIGHBOURS[1]),
    }


@pytest.mark.no_cover
def test_nowhere_is_it_called_well(tmp_path):
    pytest.importorskip("plotly")
    for name, run in views(tmp_path).items():
        health = node_health(run)[KILLED]

        assert health.state in ("lost", "unknown"), name
        for text in (printed(run), printed(run, is_live=True), report(run), sections.node_states(node_health(run))):
            assert KILLED in text, name
            assert not calls_well(text), name


def test_its_own_folder_calls_it_unknown_once_it_has_fallen_silent(tmp_path):
    run = own(tmp_path / "run", KILLED, JUST_KILLED)
    health = node_health(run, run.written_s + 12 * MINUTE)[KILLED]

    assert (health.state, health.why) == ("unknown", "No record for 12 min, probably stopped.")
    assert node_health(run, run.written_s + 2)[KILLED].state == "well"


def test_its_own_folder_calls_it_lost_at_once_where_its_process_is_gone(tmp_path):
    pytest.importorskip("plotly")
    run = replace(own(tmp_path / "run", KILLED, JUST_KILLED), process="gone")
    health = node_health(run, run.written_s + 2)

    assert (health[KILLED].state, health["hospital-1"].state) == ("lost", "unknown")
    assert health[KILLED].why == "Stopped: its process ended without a word, as one that is killed (last record 2 s ago)."
    assert run_state(run, run.written_s + 2).kind == "silent"
    assert {edge.state for ends, edge in edge_health(run).items() if KILLED in ends} == {"lost"}
    for text in (printed(run, width=120), printed(run, is_live=True, width=120), report(run)):
        assert "its process ended without a word" in text
        assert not calls_well(text)
        assert "running (" not in text


def test_a_simulation_whose_process_is_gone_is_not_running(tmp_path):
    run = replace(whole(tmp_path / "run", JUST_KILLED, died=False), process="gone")

    assert run_state(run, run.written_s + 2).kind == "silent"
    assert {health.state for health in node_health(run, run.written_s + 2).values()} == {"unknown"}


def test_where_its_process_cannot_be_seen_it_is_unknown_and_not_well(tmp_path):
    run = replace(own(tmp_path / "run", KILLED, JUST_KILLED), process=None)
    health = node_health(run, run.written_s + 2)[KILLED]

    assert (health.state, health.why) == ("unknown", "Last record 2 s ago; whether it still runs cannot be seen from here.")
    assert run_state(run, run.written_s + 2).kind == "unknown"
    assert run_state(run, run.written_s + 12 * MINUTE).kind == "silent"


def test_a_process_that_a_signal_has_stopped_is_not_running(tmp_path):
    run = replace(own(tmp_path / "run", KILLED, JUST_KILLED), process="stopped")

    assert run_state(run, run.written_s + 2).sentence == "standing still: a signal has stopped its process (last record 2 s ago)"
    assert node_health(run, run.written_s + 2)[KILLED].state == "unknown"


def test_others_are_unknown_in_one_institutions_folder_with_the_last_that_was_heard(tmp_path):
    nodes = node_health(own(tmp_path / "run"))

    assert {name for name, health in nodes.items() if health.state == "unknown"} == set(EIGHT) - {FAR}
    assert nodes[KILLED].why == "No report from this site here. hospital-0 last had its record of round 40."
    assert nodes["hospital-1"].why == "No report from this site here. hospital-0 last had its record of round 55."
    assert nodes[FAR].state == "well"


def test_a_record_that_is_too_old_says_nothing_of_now(tmp_path):
    run = asked(tmp_path / "run", JUST_KILLED, FAR)
    rows = [row | {"age_s": 42.0} if row["node"] == KILLED and "age_s" in row else row for row in run.nodes]
    health = node_health(replace(run, nodes=rows))[KILLED]

    assert health.state == "unknown"
    assert health.why.endswith("Last heard of 42 s ago.")


def test_the_folder_says_whose_it_is(tmp_path):
    runs = views(tmp_path)

    assert banner(runs["up"]) == ""
    assert banner(runs["from afar"]).startswith("You see hospital-0 and what it heard. For the whole network open ")
    assert (member_of(runs["a folder of before"]), member_of(runs["up without the event"])) == (FAR, None)
    assert banner(runs["asked"]) == "You see the network as hospital-0 has heard of it."
    assert banner(runs["from afar"])[:40] in printed(runs["from afar"])


def test_node_status_names_it(tmp_path, capsys):
    whole_folder(tmp_path / "run", AWAY)
    run = asked(tmp_path / "asked", AWAY, FAR)
    rows = [row for row in run.nodes if "age_s" in row]
    network = {"rows": rows, "not_heard_of": [], "certificate": None, "every": 1, "bytes_sent": 0}
    node_cli._network_status(Console(width=200), network, tmp_path, FAR)
    told = capsys.readouterr().out

    assert "hospital-5 is lost: Every neighbour that can tell goes on without it after round 40. Last heard of 75 s ago." in told
    assert not calls_well(told)


def test_there_is_no_all_clear_without_records_of_all_nodes(tmp_path):
    for name, run in views(tmp_path).items():
        texts = printed(run), sections.events(run), sections.link_states(run, edge_health(run))

        assert not any("Every message came in time." in text or "Nothing out of the ordinary" in text for text in texts), name
    healthy = whole(tmp_path / "healthy", JUST_KILLED, died=False, summary={"stop_reason": "rounds", "rounds": 41})
    assert no_incidents(healthy) == "Nothing out of the ordinary has happened."
    assert "Every message came in time." in printed(healthy)
    assert no_incidents(own(tmp_path / "own")) == (
        "hospital-0 has recorded nothing out of the ordinary. Events of other sites are kept there; this view has none."
    )


def test_events_come_from_the_rows_and_have_times_where_a_neighbour_wrote_them(tmp_path):
    near = incidents(own(tmp_path / "near", NEIGHBOURS[0], BACK))
    rows = incidents(whole(tmp_path / "up", BACK, died=False))

    assert [(event["round"], event["event"], event["node"]) for event in rows] == [
        (166, "stopped answering", KILLED),
        (500, "is back", KILLED),
    ]
    assert [(event["time"][11:16], event["event"]) for event in near] == [("01:48", "stopped answering"), ("02:02", "is back")]
    asking = asked(tmp_path / "asked", AWAY, FAR)
    [stopped] = incidents(asking, now_s=1_000_000_075.0)
    assert stopped["time"] == "2001-09-09T01:46:40+00:00"


def test_an_outage_is_the_nodes_and_not_its_links(tmp_path):
    run = whole(tmp_path / "run", BACK, died=False)
    edges = edge_health(run)
    [outage] = outages(run).found

    assert (outage.node, outage.first, outage.last, outage.kind, outage.is_over) == (KILLED, 166, 499, "offline", True)
    assert {edge.state for edge in edges.values()} == {"well"}
    assert edges[frozenset((KILLED, NEIGHBOURS[0]))].why == (
        "Every message came in time, except while hospital-5 was away in rounds 166-499."
    )
    assert slowest_edge(edges) is None
    assert "hospital-5 was offline in rounds 166-499." in verdict(run, convergence(run))


def test_who_works_but_comes_too_late_for_everybody_was_late_and_its_links_are_well(tmp_path):
    rows = [
        row | {"skipped": [KILLED]} if row["round"] in (10, 11) and row["node"] in NEIGHBOURS else row for row in node_rows(JUST_KILLED)
    ]
    run = replace(whole(tmp_path / "run", JUST_KILLED, died=False), nodes=rows)

    assert [outage.sentence for outage in outages(run).found] == ["hospital-5 was too late for all its neighbours in rounds 10-11."]
    assert {edge.state for edge in edge_health(run).values()} == {"well"}


def test_who_goes_on_cut_off_from_all_its_neighbours_was_offline(tmp_path):
    cut = {KILLED: list(NEIGHBOURS), NEIGHBOURS[0]: [KILLED], NEIGHBOURS[1]: [KILLED]}
    rows = [
        row | {"skipped": cut[row["node"]]} if row["round"] in (10, 11) and row["node"] in cut else row for row in node_rows(JUST_KILLED)
    ]
    run = replace(whole(tmp_path / "run", JUST_KILLED, died=False), nodes=rows)

    assert [outage.sentence for outage in outages(run).found] == ["hospital-5 was offline in rounds 10-11."]
    assert {edge.state for edge in edge_health(run).values()} == {"well"}


def test_one_institution_cannot_tell_a_neighbour_from_the_link(tmp_path):
    run = own(tmp_path / "run", NEIGHBOURS[0], BACK)

    assert [outage.sentence for outage in outages(run).found] == ["hospital-4 went on without hospital-5 in rounds 166-499."]


def paused(run, at="2026-01-01T02:08:00.000Z"):
    event = {"time": at, "round": 40, "node": FAR, "event": "paused", "detail": "by SIGTERM"}
    return replace(run, events=[*run.events, event])


def test_running_paused_silent_and_finished_are_told_apart(tmp_path):
    run = own(tmp_path / "run")

    assert run_state(run, run.written_s + 2).sentence == "running (last record 2 s ago)"
    assert run_state(run, run.written_s + 12 * MINUTE).sentence == "no record for 12 min, probably stopped"
    assert run_state(paused(run)).sentence == "paused by SIGTERM at 02:08:00 UTC on 01 Jan 2026"
    ended = replace(paused(run), summary={"stop_reason": "rounds", "rounds": 61})
    assert (run_state(ended).kind, run_state(ended).sentence) == ("finished", "ended at its last round")


def test_a_run_that_was_started_again_is_not_paused(tmp_path):
    run = paused(own(tmp_path / "run"))
    resumed = {"time": "2026-01-01T02:30:00.000Z", "round": 40, "node": FAR, "event": "resumed", "detail": ""}

    assert run_state(replace(run, events=[*run.events, resumed])).kind == "running"


def interrupted(run, *later):
    kinds = [(FAR, "died", "killed by signal 9"), ("p2pfl up", "interrupted", "by SIGINT"), *later]
    rows = [{"time": "2026-01-01T02:08:00.000Z", "round": 40, "node": who, "event": kind, "detail": why} for who, kind, why in kinds]
    return replace(paused(run), events=[*run.events, *rows])


def test_a_run_that_was_interrupted_is_paused_whoever_died_before_or_had_ended(tmp_path):
    run = whole(tmp_path / "run", died=False)

    assert run_state(interrupted(run)).sentence == "paused by SIGINT at 02:08:00 UTC on 01 Jan 2026"
    assert run_state(interrupted(run)).kind == "paused"
    assert run_state(interrupted(run, (FAR, "resumed", ""))).kind != "paused"
    assert run_state(interrupted(run, (FAR, "died", "exit code 1"))).kind != "paused"


def test_long_rounds_are_waited_for(tmp_path):
    run = own(tmp_path / "run")
    slow = replace(run, rounds=[row | {"seconds": {"train": 600.0}} for row in run.rounds])

    assert run_state(slow, run.written_s + 50 * MINUTE).kind == "running"
    assert run_state(slow, run.written_s + 101 * MINUTE).kind == "silent"


def test_paused_and_silent_runs_call_nobody_well(tmp_path):
    run = whole(tmp_path / "run", died=False)
    states = {health.state for health in node_health(run, run.written_s + 12 * MINUTE).values()}

    assert states == {"unknown", "lost"}
    assert "well" not in {health.state for health in node_health(paused(own(tmp_path / "own"))).values()}


DEPARTED = {
    "stop_reason": "rounds",
    "rounds": 61,
    "departures": [
        {"kind": "members_missing", "detail": "hospital-5 made 41 of 61 rounds"},
        {"kind": "rounds_missed", "detail": "20 held"},
    ],
}


def test_what_ended_not_as_agreed_is_said_first_everywhere(tmp_path):
    pytest.importorskip("plotly")
    run = whole(tmp_path / "run", summary=DEPARTED)
    said = "ended, and not as agreed: hospital-5 made 41 of 61 rounds; 20 held"

    assert verdict(run, convergence(run))[0] == f"It {said}."
    assert printed(run, width=120).splitlines()[0] == f"eight hospitals: {said}"
    html = report(run)
    assert f'<p class="bad"><strong>It {said}.</strong></p>' in html
    assert said in sections.facts(run)


def test_who_died_and_stayed_away_has_not_finished(tmp_path):
    nodes = node_health(whole(tmp_path / "run", summary=DEPARTED))

    assert {name for name, health in nodes.items() if health.state == "finished"} == set(EIGHT) - {KILLED}
    assert nodes[KILLED].why == "It died after round 40 (killed by signal 9) and has not come back; the run has ended without it."


def test_at_the_end_of_its_own_run_an_institution_knows_of_those_alone_that_it_heard(tmp_path):
    folder = own_folder(tmp_path / "run", AWAY, FAR)
    for number in range(AWAY.last - 4, AWAY.last + 1):
        folder.append_network(network_row(AWAY, number))
    folder.write_summary({"stop_reason": "rounds", "rounds": 61})
    nodes = node_health(read_run(folder.path))

    assert nodes[KILLED].state == "unknown"
    assert nodes["hospital-1"].why == "hospital-0 had its record of the last round."


# ---- paused, and not late, lost or dead


def pausing(run, by=NEIGHBOURS[0], *later, number=41):
    rows = [
        {"time": f"2026-01-01T01:48:0{place}.000Z", "round": number, "node": by, "event": kind, "detail": f"{KILLED} {what}"}
        for place, (kind, what) in enumerate([("left", "is pausing"), *later])
    ]
    return replace(run, events=[*rows, *run.events])


def test_who_said_that_it_pauses_is_paused_and_neither_late_nor_lost(tmp_path):
    pytest.importorskip("plotly")
    run = pausing(own(tmp_path / "run", NEIGHBOURS[0]))
    health, edges = node_health(run), edge_health(run)

    assert health[KILLED].state == "paused"
    assert health[KILLED].why == "It said to hospital-4 at 01:48:00 UTC on 01 Jan 2026 that it pauses, and is not back yet."
    assert edges[frozenset((KILLED, NEIGHBOURS[0]))].state == "paused"
    assert edges[frozenset((KILLED, NEIGHBOURS[0]))].why == "hospital-5 has paused."
    assert "stopped answering" not in {event["event"] for event in incidents(run)}
    assert "paused" in {event["event"] for event in incidents(run) if event["node"] == KILLED}
    for text in (printed(run, is_live=True, width=120), report(run), sections.node_states(health)):
        assert "paused" in text
        assert f"{KILLED} is lost" not in text
        assert not calls_well(text)


@pytest.mark.parametrize("later", [("greeted", "at exchange 43"), ("returned", "is back at exchange 43"), ("left", "has finished")])
def test_who_came_back_or_finished_is_not_paused_any_more(tmp_path, later):
    assert node_health(pausing(own(tmp_path / "run", NEIGHBOURS[0]), NEIGHBOURS[0], later))[KILLED].state != "paused"


def test_a_node_that_made_rounds_after_its_pause_is_not_paused(tmp_path):
    run = pausing(whole(tmp_path / "run", BACK, died=False), number=166)

    assert node_health(run)[KILLED].state == "well"
    assert [event["event"] for event in incidents(run) if event["node"] == KILLED] == ["paused", "is back"]


def test_a_node_that_is_asked_tells_that_its_neighbour_paused(tmp_path):
    run = asked(tmp_path / "run", AWAY, FAR)
    rows = [row | {"state": "paused"} if row["node"] == KILLED and "state" in row else row for row in run.nodes]
    health = node_health(replace(run, nodes=rows))[KILLED]

    assert (health.state, health.why[:48]) == ("paused", "It said that it pauses, and is not back yet. Las")


def test_a_paused_network_has_paused_nodes_and_one_that_ended_without_a_paused_one_says_so(tmp_path):
    pause = {"time": "2026-01-01T02:08:00.000Z", "round": 41, "node": KILLED, "event": "paused", "detail": "by SIGTERM"}
    run = whole(tmp_path / "run", died=False, summary=DEPARTED)
    health = node_health(replace(run, events=[pause]))[KILLED]

    assert (health.state, health.why) == (
        "paused",
        "It paused by SIGTERM at 02:08:00 UTC on 01 Jan 2026; the run has ended without it.",
    )
    assert node_health(paused(own(tmp_path / "own")))[FAR].state == "paused"


# ---- a late start


def started_without(run):
    event = {"time": "2026-01-01T01:00:00.000Z", "round": 0, "node": NEIGHBOURS[0], "event": "started_without"}
    return replace(run, events=[event | {"detail": f"{KILLED}: 7 of 8 members were ready"}, *run.events])


@pytest.mark.parametrize("folder", ["up", "near"])
def test_who_was_not_there_at_the_start_has_not_started_and_no_link_is_blamed(tmp_path, folder):
    def read(place, course):
        path = tmp_path / place
        return started_without(whole(path, course, died=False) if folder == "up" else own(path, NEIGHBOURS[0], course))

    link = frozenset((KILLED, NEIGHBOURS[0]))
    never, late = read("never", Course(killed=-1)), read("late", Course(killed=-1, back=20))

    assert node_health(never)[KILLED].why == "The network started without it, and it has not come yet."
    assert node_health(never)[KILLED].state == "has not trained"
    assert (edge_health(never)[link].state, edge_health(never)[link].why) == ("unknown", "hospital-5 has not started.")
    assert edge_health(late)[link].missed == edge_health(late)[link].missed_ever == 0
    assert slowest_edge(edge_health(late)) is None
    assert [event["event"] for event in incidents(late) if event["node"] == KILLED] == ["not started", "has come"]
    assert "hospital-5 started late: the others made rounds 0-19 without it." in [event["detail"] for event in incidents(late)]


def test_who_comes_late_itself_blames_none_of_its_neighbours(tmp_path):
    run = own(tmp_path / "run", NEIGHBOURS[0], JUST_KILLED)
    rows = [row | {"skipped": ["hospital-3", KILLED] if row["round"] == 30 else []} for row in run.nodes if row["round"] >= 30]
    jump = {"time": "2026-01-01T01:00:00.000Z", "round": 0, "node": NEIGHBOURS[0], "event": "jumped", "detail": "from exchange 0 to 30"}
    late = replace(run, nodes=rows, events=[*run.events, jump])

    assert outages(late).found == []
    assert {edge.missed for edge in edge_health(late).values()} == {0}
    assert [outage.first for outage in outages(replace(run, nodes=rows)).found] == [30, 30]


def test_node_status_before_the_start_says_nothing_of_a_network_that_nobody_has_heard_of(tmp_path, capsys):
    whole_folder(tmp_path / "run", AWAY)
    network = {"rows": [], "not_heard_of": list(EIGHT), "certificate": None, "every": 1, "bytes_sent": 0}
    node_cli._network_status(Console(width=200), network, tmp_path, FAR)
    told = capsys.readouterr().out

    assert "it has heard of 1 of 8 members" in told
    assert f"{FAR} is" not in told
    assert f"never of {FAR}" not in told


# ---- one number for one thing


def test_the_caption_has_the_figure_of_the_summary(tmp_path):
    pytest.importorskip("plotly")
    run = whole(tmp_path / "run", JUST_KILLED, died=False, summary={"stop_reason": "rounds", "rounds": 41, "relative_consensus": 3e-6})
    html = report(run)

    assert "the models&#x27; consensus distance is 3.0e-06 of their size" in html
    assert "consensus distance (after mixing) in the end 3.0e-06 of the models&#x27; size" in html
