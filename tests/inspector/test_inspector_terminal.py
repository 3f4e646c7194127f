"""The page of `p2pfl inspect`, from run folders made by hand."""

from __future__ import annotations

import io
import json
import math
import re
from functools import partial

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from p2pfl.cli.inspect import inspect
from p2pfl.errors import ConfigError
from p2pfl.inspector.cells import hospital_table, ranges_text
from p2pfl.inspector.chart import log_chart
from p2pfl.inspector.convergence import convergence
from p2pfl.inspector.terminal import follow, print_page
from p2pfl.inspector.verdict import certificate, verdict
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run
from p2pfl.runs.summary_fields import statistics

FIVE = ("basel", "bern", "geneva", "lausanne", "zurich")
RATE = (1 + 2 * math.cos(2 * math.pi / 5)) / 3  # of a ring of 5


def summary_of(nodes=FIVE, *, stop_reason="converged", alone=0.962, **others):
    """Network AUROC rises by 0.01 from node to node, from 0.955."""
    network = {node: 0.955 + 0.01 * number for number, node in enumerate(nodes)}
    return {
        "experiment": "breast-cancer",
        "engine": "daemons",
        "nodes": len(nodes),
        "rounds": 14,
        "stop_reason": stop_reason,
        "consensus_distance": 3e-4,
        "relative_consensus": 1.5e-4,
        "metrics": {"balanced_accuracy": statistics(dict.fromkeys(nodes, 0.9)), "auroc": statistics(network)},
        "mean_model": {"balanced_accuracy": 0.9, "auroc": 0.987},
        "baselines": {
            "local": {"auroc": statistics(dict.fromkeys(nodes, alone))},
            "pooled": {"auroc": statistics({n: v + 0.003 for n, v in network.items()})},
        },
        "bytes_sent": 543210,
        "seconds": {"total": 7.8},
        **others,
    }


def make_run(path, *, nodes=FIVE, training=8, settling=6, summary=None, exact=True, skips=(), events=()):
    """A run that trains at distance 0.3 and then contracts as a ring of 5 does.

    Args:
        skips: (round, who, by whom).
    """
    experiment = {"name": "breast-cancer", "topology": {"name": "ring"}, "stop": {"relative_consensus": 1e-3}, "dtype": "float32"}
    graph = {"nodes": list(nodes), "edges": [], "lambda_2": RATE, "lambda_min": -0.206, "laplacian_lambda_2": 1.381966}
    folder = RunFolder.create(path, experiment, topology=graph, engine="daemons")
    for number in range(training + settling):
        kind = "train" if number < training else "settle"
        distance = 0.3 * RATE ** max(0, number - training) if len(nodes) > 1 else 0.0
        folder.append_round(
            {
                "round": number,
                "kind": kind,
                "nodes": len(nodes),
                "loss": 0.5 if kind == "train" else None,
                "bound_low": distance / 2,
                "bound_high": distance * 2,
                "rms_norm": 2.0,
                "consensus_distance": distance if exact else None,
                "bytes_sent": 12345,
                "seconds": {"train": 0.012, "wait": 0.003, "mix": 0.0004, "evaluate": 1.5},
            }
        )
        for place, node in enumerate(nodes):
            folder.append_node(
                {
                    "round": number,
                    "node": node,
                    "kind": kind,
                    "disagreement": distance**2 * place,
                    "norm": 2.0,
                    "skipped": [who for when, who, by in skips if by == node and when == number],
                }
            )
    for event in events:
        folder.append_event(event)
    if summary is not None:
        folder.write_summary(summary)
    return path


def printed(path, *, width=80, encoding="utf-8", terminal=False):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_page(read_run(path), Console(file=stream, width=width, force_terminal=terminal, highlight=False, legacy_windows=False))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def table(summary, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(hospital_table(summary))
    return [line.split() for line in console.file.getvalue().splitlines()]


def sentences(path):
    run = read_run(path)
    return verdict(run, convergence(run))


@pytest.fixture
def finished(tmp_path):
    events = [{"round": 10, "node": "geneva", "event": "resumed", "detail": "from round 9"}]
    events += [{"round": 14, "node": node, "event": "stopped", "detail": "agreed"} for node in FIVE]
    return make_run(
        tmp_path / "run",
        summary=summary_of(),
        skips=[(4, "geneva", "basel"), (5, "geneva", "basel"), (7, "geneva", "basel")],
        events=events,
    )


def test_the_page_of_a_finished_run_says_all_of_it(finished):
    page = printed(finished)

    assert "breast-cancer: converged" in page
    assert "daemons; 5 nodes, ring; 14 rounds, 6 of them mixing only; 7.8 s" in page
    assert re.search(r"rate a round, fitted +0\.539345", page)
    assert re.search(r"rate a round, predicted +0\.539345", page)
    assert "geneva  basel       3      4-5, 7" in page
    assert "10     resumed  geneva" in page
    assert "14     stopped  basel, bern, geneva and 2 more  agreed" in page
    assert "training     8       12.3 kB  12 ms  3 ms  0.4 ms  1.5 s" in page
    assert "543 kB sent in all" in page
    assert "Furthest" not in page


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_line_is_longer_than_80_columns(tmp_path, encoding, terminal):
    long = tuple(f"university-hospital-of-a-town-with-a-long-name-{i}" for i in range(5))
    events = [{"round": 3, "node": long[0], "event": "refused", "detail": "wrong_study: " + "a1b2" * 40}]
    path = make_run(
        tmp_path / "run", nodes=long, summary=summary_of(long, stop_reason="rounds"), skips=[(2, long[1], long[0])], events=events
    )

    lines = [Console(width=999).render_str(line) for line in printed(path, encoding=encoding).splitlines()]

    assert max(len(line.plain) for line in lines) <= 80


def test_piped_output_has_no_escape_codes_and_a_terminal_has_colours(finished):
    assert "\x1b" not in printed(finished)
    assert "\x1b[" in printed(finished, terminal=True)


def test_a_terminal_without_utf_8_gets_ascii(finished):
    page = printed(finished, encoding="ascii")

    assert page.isascii()
    assert "* disagreement (before mixing)   . spectral bound" in page


def test_a_run_in_progress_shows_what_there_is(tmp_path):
    page = printed(make_run(tmp_path / "run", settling=2))

    assert "breast-cancer: running (last record " in page
    assert re.search(r"rate a round, fitted +none: 2 of at least 3 mixing rounds lie", page)
    assert "Hospital by hospital" not in page
    assert "zurich    40%" in page


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    page = printed(make_run(tmp_path / "run", training=0, settling=0))

    assert "No round is recorded yet." in page


def test_a_row_that_is_being_written_does_not_disturb(tmp_path):
    path = make_run(tmp_path / "run", settling=3)
    whole = printed(path)
    for name in ("rounds.jsonl", "nodes.jsonl", "events.jsonl"):
        with (path / name).open("a") as file:
            file.write('{"round": 11, "kin')

    assert printed(path) == whole


def test_daemons_rows_are_shown_by_their_bounds(tmp_path):
    page = printed(make_run(tmp_path / "run", exact=False))

    assert "disagreement (before mixing), upper bound" in page
    assert re.search(r"disagreement \(before mixing\) +at most 2\.738e-02 \(bounds 6\.85e-03 to 2\.74e-02\)", page)
    assert "consensus distance" not in page


def test_one_node_alone_has_a_page(tmp_path):
    page = printed(make_run(tmp_path / "run", nodes=("basel",), summary=summary_of(("basel",))))

    assert "1 node, ring" in page
    assert "Furthest" not in page


def test_names_and_details_from_strangers_are_not_read_as_markup_or_control(tmp_path):
    events = [{"round": 1, "node": "[bold]x", "event": "refused", "detail": "\x1b[2J[/red] name\r\n"}]
    page = printed(make_run(tmp_path / "run", events=events))

    assert "[bold]x" in page
    assert "?[2J[/red] name??" in page
    assert "\x1b" not in page


def test_metrics_that_do_not_fit_beside_each_other_stand_one_below_the_other_and_fold_no_name():
    nodes = ("a-name-of-20-letters", "another")
    of_all = statistics(dict.fromkeys(nodes, 0.9))
    baselines = {kind: {"auroc": of_all, "balanced_accuracy": of_all} for kind in ("local", "pooled")}
    summary = summary_of(nodes, baselines=baselines)
    texts = {}
    for width in (80, 120):
        console = Console(file=io.StringIO(), width=width)
        console.print(hospital_table(summary))
        texts[width] = console.file.getvalue()

    assert [text.count("a-name-of-20-letters") for text in texts.values()] == [2, 1]
    assert max(map(len, texts[80].splitlines())) <= 80


def test_hospital_by_hospital_shows_alone_network_pooled_and_gain():
    rows = {row[0]: row[1:] for row in table(summary_of()) if row}

    assert rows["basel"][:4] == ["0.962", "0.955", "0.958", "-0.007"]
    assert rows["zurich"][:4] == ["0.962", "0.995", "0.998", "+0.033"]
    assert rows["auroc"] == ["better", "accuracy"]  # the primary metric comes first, though the summary has it last
    assert ["mean", "0.962", "0.975", "0.978", "+0.013", "0.900"] in table(summary_of())
    assert ["mean", "model", "0.987", "0.900"] in table(summary_of())


def test_baselines_that_were_not_computed_have_no_column():
    rows = table(summary_of(baselines={"local": None, "pooled": None}, mean_model=None))

    assert ["node", "network", "network"] in rows
    assert ["basel", "0.955", "0.900"] in rows
    assert not any(row[:2] == ["mean", "model"] for row in rows)


def test_an_undefined_metric_is_a_dash():
    summary = summary_of()
    summary["metrics"] = {"auroc": statistics({"basel": 0.9, "bern": None})}
    rows = table(summary)

    assert ["bern", "0.962", "-", "0.968", "-"] in rows
    assert ["basel", "0.962", "0.900", "0.958", "-0.062"] in rows


def test_of_many_nodes_the_two_ends_are_shown():
    nodes = [f"node-{i:03d}" for i in range(60)]
    names = [row[0] for row in table(summary_of(nodes)) if row and row[0].startswith("node-")]

    assert names == nodes[:10] + nodes[-10:]
    assert ["(40", "more)"] in table(summary_of(nodes))


def test_above_a_thousand_nodes_the_means_remain():
    nodes = [f"node-{i:04d}" for i in range(1001)]

    assert not any(row and row[0].startswith("node-") for row in table(summary_of(nodes)))
    assert any(row[:1] == ["mean"] for row in table(summary_of(nodes)))


def test_the_verdict_says_for_whom_it_was_worth_it(finished):
    assert sentences(finished) == [
        "It has converged: the nodes agreed to stop after 14 rounds, and the models' consensus distance is 1.5e-04 of their size.",
        "By auroc, 4 of 5 sites are better off than alone (most of all zurich, +0.033); 1 is worse off: basel -0.007.",
        "On average the network does 0.003 worse than one model trained on all data pooled.",
    ]


def test_the_certificate_is_that_of_the_last_round_without_a_missed_message(tmp_path):
    run = read_run(make_run(tmp_path / "run", summary=summary_of()))
    whole = certificate(run, convergence(run))
    run.rounds[-1]["bound_low"] = run.rounds[-1]["bound_high"] = None
    before = certificate(run, convergence(run))
    for row in run.rounds:
        row["bound_high"] = row["bound_low"]

    assert whole == (
        "In round 13 the disagreement was certainly between 6.8e-03 and 2.7e-02, which is 3.4e-03 to 1.4e-02 of their size; "
        "wanted is 1.0e-03."
    )
    assert before.startswith("In round 12 the disagreement was certainly between 1.3e-02 and 5.1e-02")
    assert before.endswith("Since then messages were missed, and nothing is certified.")
    assert certificate(run, convergence(run)).startswith(
        "In round 12 the disagreement was certainly 1.3e-02, which is 6.3e-03 of their size"
    )
    for row in run.rounds:
        row["bound_high"] = None
    assert certificate(run, convergence(run)).startswith("The nodes' records certify no distance")


def test_the_verdict_turns_round_where_lower_is_better(tmp_path):
    summary = summary_of(
        metrics={"log_loss": statistics({"basel": 0.1, "bern": 0.3})},
        baselines={"local": {"log_loss": statistics({"basel": 0.2, "bern": 0.2})}, "pooled": {"log_loss": statistics({"basel": 0.1})}},
    )

    assert sentences(make_run(tmp_path / "run", summary=summary))[1:] == [
        "By log_loss (lower is better), 1 of 2 sites is better off than alone (most of all basel, +0.100); 1 is worse off: bern -0.100.",
        "On average the network does 0.100 worse than one model trained on all data pooled.",
    ]


def test_the_verdict_says_where_it_is_stuck(tmp_path):
    path = make_run(tmp_path / "run", summary=summary_of(stop_reason="rounds", relative_consensus=0.02), skips=[(3, "bern", "basel")])

    assert sentences(path)[:3] == [
        "It has not converged: it ended after 14 rounds, and the models' consensus distance is 2.0e-02 of their size.",
        "zurich is furthest from its neighbours, with 40% of the disagreement left.",
        "The slowest link is basel - bern: 1 of 28 messages over it were missed in rounds 0-13.",
    ]


def test_the_verdict_of_a_run_in_progress_foresees_its_end(tmp_path):
    first = sentences(make_run(tmp_path / "run"))[0]

    assert first.startswith("Not done: in round 13 the disagreement is 6.8e-03 of the models' size, wanted is 1.0e-03.")
    assert first.endswith("About 4 more rounds of mixing will do at this rate, some 6 seconds.")


def test_a_geometric_decay_is_a_straight_line_from_corner_to_corner():
    lines = log_chart([0, 1, 2, 3], [1.0, 1e-1, 1e-2, 1e-3], [None] * 4, width=13, height=4, ascii_only=True)

    assert lines == [
        "  1e+00 |*",
        "        | *",
        "  1e-02 |  *",
        "        |   *",
        "        +----",
        "         0  3",
    ]


@pytest.mark.parametrize("curve", [[], [1.0], [1.0, None], [1.0, 0.0]])
def test_fewer_than_two_points_make_no_chart(curve):
    assert log_chart(list(range(len(curve))), curve, [None] * len(curve)) == []


@pytest.fixture
def command():
    app = typer.Typer()
    app.command()(inspect)
    return lambda *arguments, **options: CliRunner().invoke(app, [str(a) for a in arguments], **options)


def test_the_command_prints_the_page(finished, command):
    result = command(finished)

    assert result.exit_code == 0
    assert "breast-cancer: converged" in result.stdout
    assert "\x1b" not in result.stdout


def test_json_is_one_object_and_nothing_else(tmp_path, command):
    path = make_run(tmp_path / "run")
    document = json.loads(command(path, "--json").stdout)

    assert list(document) == [
        "experiment",
        "state",
        "nodes",
        "engine",
        "rounds",
        "utilisation",
        "bottleneck",
        "convergence",
        "reached",
        "summary",
    ]
    assert (document["experiment"], document["engine"], document["summary"]) == ("breast-cancer", "daemons", None)
    assert len(document["rounds"]) == 14
    assert document["convergence"]["fitted_rate"] == pytest.approx(RATE, abs=1e-9)


def test_a_folder_without_a_run_is_the_users_fault(tmp_path, command):
    assert isinstance(command(tmp_path / "nowhere").exception, ConfigError)


def test_help_has_an_example(command):
    assert "p2pfl inspect runs/breast-cancer" in command("--help").stdout


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ([4, 5, 6, 9], "4-6, 9"),
        ([9], "9"),
        ([1, 2], "1-2"),
        ([1, 3], "1, 3"),
        ([1, 3, 5], "1, 3, 5"),
        ([1, 3, 5, 7, 8, 9], "every 2nd of 1-7, 8-9"),
        ([0, 10, 20, 30, 31], "every 10th of 0-30, 31"),
        ([number * number for number in range(3, 20)], "9, 16, 25, 36, 49, 64, 81, 100, 121, 144, 169, 196 and 5 more"),
        ([], ""),
    ],
)
def test_rounds_are_said_shortly(rounds, said):
    assert ranges_text(rounds) == said


def test_a_live_page_goes_on_until_the_run_has_ended(tmp_path):
    place, looks = make_run(tmp_path / "run"), []
    stream = io.StringIO()
    console = Console(file=stream, width=80, height=24, force_terminal=True, legacy_windows=False)

    def pause(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            RunFolder.open(place).write_summary(summary_of())

    run = follow(partial(read_run, place), console, every_s=0.5, pause=pause)

    assert looks == [0.5] * 3
    assert run.summary["stop_reason"] == "converged"
    shown = stream.getvalue()
    assert "\x1b[?1049h" in shown  # another screen, which is left again
    assert shown.endswith("\x1b[?1049l")
    assert shown.index("In short") < shown.index("Agreement")


def test_what_is_no_terminal_gets_nothing_before_the_end(tmp_path):
    place, stream = make_run(tmp_path / "run"), io.StringIO()

    def pause(_):
        RunFolder.open(place).write_summary(summary_of())

    follow(partial(read_run, place), Console(file=stream, width=80), every_s=0.5, pause=pause)

    assert stream.getvalue() == ""
