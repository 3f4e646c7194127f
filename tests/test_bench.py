"""What `make bench` calls a drop."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmarks_compare", BENCHMARKS / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)  # a benchmark takes all cores: tests after it would wait for each other's threads at each step
    sys.modules.pop("simulator", None)


def test_a_drop_of_more_than_15_percent_is_told_and_one_of_less_is_not(compare):
    recorded = {"a": 1.0, "b": 400.0, "c": 2.0}

    assert compare.dropped({"a": 0.851, "b": 341.0, "c": 3.0}, recorded) == []
    assert compare.dropped({"a": 0.849, "b": 300.0, "c": 2.0}, recorded) == ["a: 0.849, recorded 1 (-15%)", "b: 300, recorded 400 (-25%)"]
    assert compare.dropped({"a": 1.0, "b": 400.0}, recorded) == ["c: recorded, and not measured"]


def test_the_command_fails_on_a_drop_and_records_only_when_told_to(compare, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "RECORDED", tmp_path / "recorded.json")
    monkeypatch.setattr(compare, "measured", lambda: {"W1": 0.5})
    (tmp_path / "recorded.json").write_text('{"W1": 1.0}')
    monkeypatch.setattr(sys, "argv", ["compare.py"])
    with pytest.raises(SystemExit, match=r"slower than recorded:\nW1: 0\.5, recorded 1 \(-50%\)"):
        compare.main()
    monkeypatch.setattr(sys, "argv", ["compare.py", "--record"])
    compare.main()

    assert json.loads((tmp_path / "recorded.json").read_text()) == {"W1": 0.5}
    assert capsys.readouterr().out.splitlines() == ["W1: 0.5 (recorded 1)", "W1: 0.5 (recorded 0.5)"]


def test_only_ratios_to_the_limit_and_the_floor_are_measured_and_recorded(compare, monkeypatch):
    def side_by_side(ways, repeats):
        return {name: [float(len(name))] * repeats for name in ways}

    monkeypatch.setattr(compare.simulator, "interleaved", side_by_side)
    monkeypatch.setattr(compare.simulator.Data, "of", lambda workload, num_nodes: None)
    monkeypatch.setattr(compare.simulator, "CORES", 2)

    assert compare.measured() == {
        "W1 at 256 nodes, of the limit": 6 / 5,
        "W1 at 256 nodes, of the floor on as many cores": 6 / 5 / 2,
        "W2 at 10,000 nodes, of the limit": 6 / 5,
    }
    assert json.loads(compare.RECORDED.read_text()).keys() == compare.measured().keys()


def test_the_rates_of_small_rounds_are_compared_turn_by_turn():
    spec = importlib.util.spec_from_file_location("benchmarks_small_rounds", BENCHMARKS / "small_rounds.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def turn(kinds, **figures):
        return {kind: {"median_ms": 8.0, "rounds_per_s": 100.0, "processor_us": 3000.0} | figures for kind in kinds}

    this = [turn(["ring", "pair"]), turn(["ring", "pair"], rounds_per_s=150.0)]
    other = [turn(["ring", "pair"], median_ms=16.0), turn(["ring", "pair"], rounds_per_s=75.0, median_ms=32.0)]
    delayed = [turn(["proxied"], one_way_ms=0.25) | turn(["delayed"], median_ms=27.5, one_way_ms=20.5)]

    assert module.ratios_of(this, other) == {
        "ring.rounds_per_s": 1.5,
        "ring.processor_us": 1.0,
        "pair.median_ms": 0.375,
        "pair.processor_us": 1.0,
    }
    found = module.figures_of(delayed)
    assert [found[name] for name in ("delay_adds_ms", "delay_costs_ms")] == [20.25, 19.5]
