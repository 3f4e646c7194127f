"""The dashboard of examples/grafana asks for what a node really tells."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import pytest

from p2pfl.node.prometheus import exposition
from p2pfl.yaml_files import load_yaml

GRAFANA = Path(__file__).parents[2] / "examples" / "grafana"
DASHBOARD = json.loads((GRAFANA / "p2pfl.json").read_text(encoding="utf-8"))
PANELS = DASHBOARD["panels"]
SCRAPED = {"job", "instance"}  # labels that Prometheus adds

STATUS = {
    "member": "basel",
    **dict.fromkeys(
        ("version", "closing", "last_round_time", "round", "rounds", "exchange", "agreed_for", "disagreement", "loss", "bytes_sent"), 1
    ),
    "metrics": {"auroc": 0.9},
    "refused": {"wrong_digest": 2},
    "neighbours": {
        "bern": {
            "greeted": True,
            "last_seen_s_ago": 0.25,
            "exchange": 3,
            "skipped": True,
            "left": False,
            "link": "up",
            "link_events": {"connected": 1},
            "refused": {"stale_round": 1},
        }
    },
}


@pytest.fixture(scope="module")
def told():
    """The labels of each metric that a node gives."""
    parser = pytest.importorskip("prometheus_client.parser")
    families = parser.text_string_to_metric_families(exposition(STATUS).decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def queries():
    """(panel, expression, legend) of each target, and of each variable."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"], target["legendFormat"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"], ""


def test_every_metric_asked_for_is_one_that_a_node_gives(told):
    for title, expression, legend in queries():
        names = re.findall(r"p2pfl_\w+", expression)
        assert names, title
        assert set(names) <= told.keys(), title
        labels = set().union(*(told[name] for name in names)) | SCRAPED
        for matchers in re.findall(r"\{(.*?)\}", expression):
            assert set(re.findall(r"(\w+)\s*=~?", matchers)) <= labels, title
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= labels, title


def test_what_a_node_gives_is_looked_at(told):
    asked = {name for _, expression, _ in queries() for name in re.findall(r"p2pfl_\w+", expression)}

    assert {name for name in told if name.startswith("p2pfl_")} == asked


def test_counters_are_asked_for_their_rate_and_nothing_else_is():
    for title, expression, _ in queries():
        for counter in re.findall(r"p2pfl_\w+_total", expression):
            assert re.search(rf"(rate|increase)\({counter}\{{.*?\}}\[\$__rate_interval\]\)", expression), title
        assert ("[$__rate_interval]" in expression) == ("_total" in expression), title


def test_panels_have_numbers_and_places_of_their_own():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS) >= 8
    for one, other in combinations([panel["gridPos"] for panel in PANELS], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in PANELS)


def test_which_prometheus_is_asked_is_left_to_the_reader():
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    asked = [panel["datasource"] for panel in PANELS] + [target["datasource"] for panel in PANELS for target in panel["targets"]]
    used = set(re.findall(r"\$(\w+)", " ".join(expression for _, expression, _ in queries()))) - {"__rate_interval"}

    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in asked)
    assert used == variables.keys() - {"datasource"}
    assert DASHBOARD["schemaVersion"] >= 39


def test_brackets_are_closed():
    for title, expression, _ in queries():
        for opened, closed in ("()", "{}", "[]"):
            assert expression.count(opened) == expression.count(closed), title


def test_the_scrape_example_asks_this_machines_own_node():
    [job] = load_yaml(GRAFANA / "prometheus.yml")["scrape_configs"]

    assert "metrics_path" not in job  # /metrics is Prometheus's own default
    assert job["authorization"].keys() == {"credentials_file"}  # Bearer is its default; the node answers nobody without
    assert [target.partition(":")[0] for group in job["static_configs"] for target in group["targets"]] == ["127.0.0.1"]
