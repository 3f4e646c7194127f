import json
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from p2pfl.cli.topology import app
from p2pfl.errors import ConfigError, MissingExtraError, TopologyError
from p2pfl.topology import SMALL_GRAPHS, TOPOLOGIES, WEIGHTS, drawing, make_schedule
from thorough import first_fast

WIDTH = 80


@pytest.fixture
def run(monkeypatch):
    """The output of a command; its errors as main() would see them."""
    monkeypatch.setenv("COLUMNS", str(WIDTH))

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False).stdout

    return run


@pytest.fixture
def hospitals(tmp_path):
    path = tmp_path / "hospitals.yaml"
    path.write_text("# Three hospitals in a row.\nnodes: [bern, lyon, rome]\nedges: [[bern, lyon], [lyon, rome]]\n", encoding="utf-8")
    return path


def test_show_json_is_what_the_design_says(run):
    shown = json.loads(run("show", "ring", "--nodes", 8, "--json"))

    assert shown == {
        "name": "ring",
        "weights": "metropolis",
        "nodes": 8,
        "edges": 8,
        "degree": {"min": 2, "mean": 2.0, "max": 2},
        "diameter": 4,
        "lambda_2": pytest.approx(0.804737854, abs=1e-9),
        "lambda_min": pytest.approx(-1 / 3, abs=1e-12),
        "spectral_gap": pytest.approx(0.195262146, abs=1e-9),
        "rounds_to_1e-6": 64,
    }


def test_show_prints_a_table_that_fits(run):
    out = run("show", "torus", "-n", 64, "--weights", "lazy")

    assert "torus, lazy weights" in out
    assert "0.058579" in out
    assert max(map(len, out.splitlines())) <= WIDTH


def test_show_of_a_slow_graph_says_so(run):
    assert "Slow: a gap below 0.01" in run("show", "ring", "--nodes", 64)
    assert "Slow" not in run("show", "ring", "--nodes", 8)


def test_show_of_a_file(run, hospitals):
    shown = json.loads(run("show", hospitals, "--json"))

    assert shown["name"] == "hospitals"
    assert shown["nodes"] == 3


def test_a_directed_file_without_weights_is_shown_with_those_of_push_sum(run, tmp_path):
    (tmp_path / "net.yaml").write_text("directed: true\nnodes: [a, b, c]\nedges: [[a, b], [b, c], [c, a]]\n", encoding="utf-8")
    shown = json.loads(run("show", tmp_path / "net.yaml", "--json"))

    assert (shown["weights"], shown["edges"]) == ("push-sum", 3)


def test_a_directed_graph_keeps_its_weights_unless_told(run):
    assert json.loads(run("show", "exponential", "--json"))["weights"] == "given"
    with pytest.raises(TopologyError, match="weights = 'metropolis': topology exponential is directed"):
        run("show", "exponential", "--weights", "metropolis")


def test_options_stand_after_a_colon(run):
    shown = json.loads(run("show", "random-regular:degree=6", "--nodes", 32, "--json"))

    assert shown["degree"] == {"min": 6, "mean": 6.0, "max": 6}
    assert shown["spectral_gap"] == pytest.approx(0.353054, abs=5e-7)


def test_seed_chooses_among_random_graphs(run):
    gaps = [json.loads(run("show", "erdos-renyi", "--seed", seed, "--json"))["spectral_gap"] for seed in (0, 0, 1)]

    assert gaps[0] == gaps[1]
    assert gaps[0] != gaps[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "rign"], "did you mean ring"),
        (["show", "hypercube", "--nodes", "6"], "hypercube of 6 nodes: expected a power of two"),
        (["show", "petersen", "--nodes", "12"], "petersen has 10 nodes, not 12"),
        (["show", "ring", "--weights", "fast"], "weights = 'fast': expected one of metropolis"),
        (["show", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["show", "random-regular:6"], "'6' is not an option; write them as random-regular:degree=6,p=0.1"),
        (["show", "ring:seed=3"], "seed cannot stand after the colon; use --nodes and --seed"),
    ],
)
def test_what_was_asked_wrongly(run, arguments, message):
    with pytest.raises(ConfigError, match=message):
        run(*arguments)


def test_a_file_keeps_its_nodes(run, hospitals):
    with pytest.raises(ConfigError, match=r"--nodes = 5: .*hospitals.yaml has its own 3 nodes"):
        run("show", hospitals, "--nodes", 5)
    assert json.loads(run("show", hospitals, "--nodes", 3, "--json"))["nodes"] == 3


def test_compare_puts_the_best_first(run, hospitals):
    rows = json.loads(run("compare", "star", "ring", "petersen", "complete", hospitals, "torus", "--nodes", 16, "--json"))

    assert [(row["source"], row["nodes"]) for row in rows] == [
        ("complete", 16),
        ("petersen", 10),
        ("torus", 16),
        (str(hospitals), 3),
        ("star", 16),
        ("ring", 16),
    ]
    assert [row["rounds_to_1e-6"] for row in rows] == sorted(row["rounds_to_1e-6"] for row in rows)


def test_compare_prints_a_table_that_fits(run, hospitals):
    lines = run("compare", "ring", "small-world:degree=4,p=0.2", hospitals, "--nodes", 1000).splitlines()

    assert lines[0].split() == ["graph", "nodes", "links", "degree", "gap", "rounds", "exact", "MB"]
    assert lines[1].split()[0] == "hospitals.yaml"
    assert next(line for line in lines if line.startswith("ring")).split() == [
        "ring",
        "1,000",
        "1,000",
        "2",
        "1.316e-05",
        "1,049,850",
        "-",
        "8,398,800",
    ]
    assert max(map(len, lines)) <= WIDTH


def test_compare_finds_all_faults_at_once(run):
    with pytest.raises(ConfigError) as caught:
        run("compare", "ring", "torrus", "hypercube", "--nodes", 6)

    assert [finding.split(":")[0] for finding in caught.value.findings] == ["torrus", "hypercube"]


def test_list_names_everything(run, hospitals, monkeypatch):
    (hospitals.parent / "topologies").mkdir()
    hospitals.rename(hospitals.parent / "topologies" / "hospitals.yaml")
    monkeypatch.chdir(hospitals.parent)
    listed = json.loads(run("list", "--json"))
    table = run("list")

    assert {*listed["generated"], *listed["small"]} == set(TOPOLOGIES)
    assert listed["small"] == list(SMALL_GRAPHS)
    assert list(listed["weights"]) == list(WEIGHTS)
    assert listed["generated"]["random-regular"].endswith("Options: degree.")
    assert listed["files"] == {"topologies/hospitals.yaml": "Three hospitals in a row."}
    assert all(name in table for name in (*listed["generated"], *WEIGHTS, "karate-club", "topologies/hospitals.yaml"))
    assert max(map(len, table.splitlines())) <= WIDTH


@pytest.mark.parametrize("command", ["list", "show", "compare", "advise"])
def test_help_has_an_example(run, command):
    assert f"Example: p2pfl topology {command}" in run(command, "--help")


@pytest.mark.parametrize("source", first_fast(["hospitals", "star", "exponential", "karate-club", "grid"]))
def test_show_draws_a_picture(run, tmp_path, hospitals, source):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    run("show", hospitals if source == "hospitals" else source, "--plot", picture)

    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_large_graph_is_drawn_without_its_nodes(run, tmp_path):
    pytest.importorskip("matplotlib")
    run("show", "ring", "--nodes", 2000, "--plot", tmp_path / "ring.svg")

    assert (tmp_path / "ring.svg").stat().st_size < 100_000


def test_compare_draws_a_picture(run, tmp_path):
    pytest.importorskip("matplotlib")
    run("compare", "ring", "complete", "star", "--plot", tmp_path / "decay.svg")

    assert "<svg" in (tmp_path / "decay.svg").read_text(encoding="utf-8")


def test_a_picture_of_an_unknown_kind(run, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match=r"--plot .*picture.doc: Format 'doc' is not supported"):
        run("show", "ring", "--plot", tmp_path / "picture.doc")


def test_a_picture_in_a_folder_that_is_not_there(run, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
        run("show", "ring", "--plot", tmp_path / "none" / "picture.png")


def test_without_matplotlib_the_extra_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(MissingExtraError, match=r"pip install 'p2pfl-mesh\[plot\]'"):
        run("show", "ring", "--plot", tmp_path / "ring.png")


def test_what_lies_in_topologies_and_is_no_text_does_not_stop_the_list(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "topologies" / "folder.yaml").mkdir(parents=True)
    (tmp_path / "topologies" / "bytes.yaml").write_bytes(b"# Caf\xe9\n")

    assert json.loads(run("list", "--json"))["files"] == {"topologies/bytes.yaml": "Caf\N{REPLACEMENT CHARACTER}"}


def test_graphs_that_change_stand_beside_those_that_do_not(run):
    rows = json.loads(run("compare", "ring", "base-2", "one-peer-exponential", "base-5", "--nodes", 25, "--json"))

    assert [row["source"] for row in rows] == ["base-5", "base-2", "one-peer-exponential", "ring"]
    assert [row["exact_after"] for row in rows] == [2, 9, None, None]
    assert rows[0]["rounds_to_1e-6"] == 2
    assert rows[3]["megabytes_to_1e-6"] == pytest.approx(653 * 2 * 4)


def test_show_says_when_the_mean_is_exact(run):
    assert json.loads(run("show", "base-3", "--nodes", 25, "--json"))["exact_after"] == 6
    assert "exact mean after  6 rounds" in run("show", "base-3", "--nodes", 25)
    assert "never: random" in run("show", "el-oracle:degree=4", "--nodes", 8)
    assert "base-3" in run("list")


@pytest.fixture
def figure(monkeypatch):
    """The figure that a command would write."""
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(drawing, "_save", lambda figure, path: drawn.append(figure))
    return drawn


def decay_of(figure):
    """Label of each curve to its last point, and all points."""
    (axes,) = (axes for axes in figure.axes if axes.get_lines())
    return {line.get_label(): np.stack(line.get_data()).T for line in axes.get_lines()}


def product_left(schedule, rounds):
    whole = np.eye(schedule.num_nodes) - 1 / schedule.num_nodes
    for number in range(rounds):
        whole = schedule.at(number).mixing_matrix().toarray() @ whole
    return np.linalg.norm(whole, 2)


def test_a_graph_that_changes_is_drawn_round_by_round_with_what_its_product_leaves(run, figure):
    run("show", "matcha:budget=0.4", "--nodes", 6, "--seed", 3, "--plot", "x.png")
    made = make_schedule("matcha", 6, budget=0.4, seed=3)
    titles = [axes.get_title() for axes in figure[0].axes]
    ((label, curve),) = decay_of(figure[0]).items()

    assert titles[:6] == [f"round {number}" for number in range(6)]
    assert label == f"matcha: {len(curve) - 1} rounds"
    for number in (0, 1, 5, 20):
        assert curve[number] == pytest.approx([number, product_left(made, number)], rel=1e-9)
    assert curve[-1, 1] == 1e-6
    assert product_left(made, len(curve) - 1) <= 1e-6 < product_left(made, len(curve) - 2)


def test_an_exact_schedule_shows_its_rounds_and_ends_with_the_last(run, figure):
    run("show", "base-2", "--nodes", 12, "--plot", "x.png")

    assert [axes.get_title() for axes in figure[0].axes if axes.get_title().startswith("round")] == [f"round {r}" for r in range(5)]
    (curve,) = decay_of(figure[0]).values()
    assert curve[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_comparison_draws_every_graph_and_every_curve(run, figure, hospitals):
    run("compare", "ring", "base-2", "matcha", hospitals, "one-peer-exponential", "star", "--nodes", 8, "--plot", "x.png")
    titles = [axes.get_title() for axes in figure[0].axes if axes.get_title()]

    assert titles == [
        "base-2\n8 nodes, 12 links",
        "one-peer-exponential\n8 nodes, 24 links",
        "hospitals.yaml\n3 nodes, 2 links",
        "ring\n8 nodes, 8 links",
        "matcha\n8 nodes, 8 links",
        "star\n8 nodes, 7 links",
        "until a millionth of the disagreement is left",
    ]
    curves = decay_of(figure[0])
    assert list(curves)[:3] == ["base-2: 3 rounds", "one-peer-exponential: 3 rounds", "hospitals.yaml: 35 rounds"]
    ring = curves["ring: 64 rounds"]
    assert ring[100] == pytest.approx([ring[100, 0], 0.804737854 ** ring[100, 0]], rel=1e-6)


@pytest.mark.parametrize(
    "source", first_fast(["one-peer-exponential", "matcha:base=karate-club", "el-local:degree=2", "hyper-hypercube:degree=15"])
)
def test_pictures_of_graphs_that_change_can_be_written(run, tmp_path, source):
    pytest.importorskip("matplotlib")
    run("show", source, "--plot", tmp_path / "show.png")
    run("compare", source, "ring", "--plot", tmp_path / "compare.svg")

    assert (tmp_path / "show.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "compare.svg").read_text(encoding="utf-8")


def test_show_of_matcha_says_what_it_does(run):
    shown = json.loads(run("show", "matcha:base=karate-club,budget=0.3", "--json"))
    table = run("show", "matcha:base={name: random-regular, degree: 3},budget=.25", "--nodes", 8)

    assert (shown["nodes"], shown["edges"], shown["base"], shown["matchings"]) == (34, 78, "karate-club", 17)
    assert sum(shown["probabilities"]) == pytest.approx(0.3 * 17, abs=1e-6)
    assert shown["squared_left"] == pytest.approx(0.907323, abs=1e-6)
    assert "of random-regular" in table
    assert max(map(len, table.splitlines())) <= WIDTH


def test_a_base_may_be_a_file_with_its_own_number_of_nodes(run, hospitals):
    rows = json.loads(run("compare", f"matchings:base={hospitals}", "ring", "--nodes", 9, "--json"))

    assert {row["source"]: row["nodes"] for row in rows} == {f"matchings:base={hospitals}": 3, "ring": 9}
    with pytest.raises(ConfigError, match=r"--nodes = 9: .* has its own 3 nodes"):
        run("show", f"matcha:base={hospitals}", "--nodes", 9)
