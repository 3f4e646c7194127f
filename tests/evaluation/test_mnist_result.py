"""benchmarks/mnist.py, and that docs/algorithms.md shows what it finds."""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif("P2PFL_DATA" not in os.environ, reason="P2PFL_DATA is not set: no MNIST files")


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmarks_mnist", ROOT / "benchmarks" / "mnist.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def documented(mark):
    """Lines of the table of that mark in docs/algorithms.md, by (algorithm, topology) and column."""
    section = (ROOT / "docs" / "algorithms.md").read_text().split("## MNIST at sixteen sites")[1]
    table = section.split(f"\n<!-- {mark} -->\n")[1].split("\n\n")[0]
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {(line[0], line[1]): dict(zip(head, line, strict=True)) for line in lines}


@pytest.mark.slow
def test_quick_runs_every_step_and_what_is_kept_is_not_run_again(benchmark, tmp_path, monkeypatch):
    rows = benchmark.BYTES_ROWS[2:]
    lines = benchmark.Bench(tmp_path / "new" / "runs.jsonl", quick=True).table(rows, benchmark.MANY_EXCHANGES)
    monkeypatch.delattr(benchmark, "measured")
    again = benchmark.Bench(tmp_path / "new" / "runs.jsonl", quick=True).table(rows, benchmark.MANY_EXCHANGES)

    assert lines == again
    assert len(lines[0]["seeds"][0]) == len(benchmark.COLUMNS)
    assert benchmark.markdown(lines).splitlines()[2].startswith("| choco, top-k of 1 % | ring | lr 0.2 | 0.")


def test_a_choice_walks_up_and_down_until_nothing_beside_it_is_better(benchmark, monkeypatch):
    bench, tried = benchmark.Bench(None, quick=False), []

    def figures(content):
        assert (content["validation"], content["seed"]) == (0.2, 1000)
        tried.append(content["optimizer"]["lr"])
        return [1.0, -abs(tried[-1] - 0.7), 1.0, 0.0, 0.0]

    monkeypatch.setattr(bench, "figures", figures)
    row = benchmark.Row(label="dpsgd", algorithm={"name": "dpsgd"})

    assert bench.choose(row, benchmark.FEW_EXCHANGES, {"algorithm.gamma": 0.5}) == {"algorithm.gamma": 0.5, "optimizer.lr": 0.8}
    assert sorted(set(tried)) == [0.1, 0.2, 0.4, 0.8, 1.6]


def test_what_is_documented_of_compressors_is_what_was_asked_of_them():
    """The runs themselves take an hour: `benchmarks/mnist.py` makes them."""
    lines = documented("bytes")
    for column in ("accuracy, mean model", "accuracy, own models"):
        plain, int8, top_k = (float(line[column].split(" ± ")[0]) for line in lines.values())

        assert plain - int8 <= 0.005
        assert plain - top_k <= 0.015
    assert [float(line["of the first row's"]) for line in lines.values()] == [1.0, 0.2602, 0.0227]


@pytest.mark.slow
def test_bytes_are_within_what_was_asked_of_them(benchmark):
    bench = benchmark.Bench(None, quick=True)
    (plain,), (int8,), (top_k,) = (line["seeds"] for line in bench.table(benchmark.BYTES_ROWS, benchmark.MANY_EXCHANGES))

    # payloads: 7,946 numbers of 4 bytes; as many bytes and 32 scales; 79 places of 2 bytes and 79 numbers. The rest are headers
    assert 7_946 * 4 * 32 * 2 / 1e6 < plain[-1] < 7_946 * 4 * 32 * 2 / 1e6 * 1.01
    assert (7_946 + 32 * 4) / (4 * 7_946) < int8[-1] / plain[-1] <= 0.27
    assert 79 * 6 / (4 * 7_946) < top_k[-1] / plain[-1] <= 0.03


@pytest.mark.slow
def test_a_cheap_row_is_as_documented(benchmark):
    """Not the cheapest: with its learning rate a seed diverges on one processor and not on another, as the page says."""
    line = documented("alpha 0.1")["dpsgd", "ring"]
    row = next(row for row in benchmark.GRAPH_ROWS if (row.label, row.topology) == ("dpsgd", "ring"))
    choice = {"optimizer.lr": float(line["chosen"].removeprefix("lr "))}
    found = [benchmark.measured(row.experiment(benchmark.FEW_EXCHANGES, seed, choice)) for seed in benchmark.SEEDS]

    for column, values in zip(benchmark.COLUMNS[:3], zip(*found, strict=True), strict=False):
        mean, deviation = map(float, line[column].split(" ± "))
        # another processor adds up in another order, and a thousand steps make of that what another seed would
        assert statistics.fmean(values) == pytest.approx(mean, abs=3 * deviation + 5e-5), column
