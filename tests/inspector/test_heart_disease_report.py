"""Every number of the heart-disease report, computed again from the saved models by numpy and scikit-learn alone."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve
from torch.nn import functional as F
from typer.testing import CliRunner

import p2pfl
from p2pfl.cli import app
from p2pfl.draws import batch_positions
from p2pfl.experiment.loading import load_experiment
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.runs.summary_fields import metric_heading

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("P2PFL_DATA" not in os.environ, reason="P2PFL_DATA is not set: no heart-disease files"),
]

EXAMPLE = Path(__file__).parents[2] / "examples" / "heart_disease.yaml"
HOSPITALS = ("cleveland", "hungary", "switzerland", "va")
Z = norm.ppf(0.975)
EXACT = 1e-12
ROUNDED = 5.1e-4  # three decimals


class Tables(HTMLParser):
    """The tables of a page under their headings, as lists of rows of texts, and its sentences."""

    def __init__(self, source):
        super().__init__()
        self.tables, self.sentences, self._heading, self._inside = {}, [], "", None
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self._inside = tag
        if tag == "table":
            self.tables.setdefault(self._heading, []).append([])
        elif tag == "tr":
            self.tables[self._heading][-1].append([])
        elif tag == "td":
            self.tables[self._heading][-1][-1].append("")

    def handle_data(self, data):
        if self._inside in ("h2", "h3"):
            self._heading = data
        elif self._inside == "td":
            self.tables[self._heading][-1][-1][-1] += data
        elif self._inside == "li":
            self.sentences.append(data)

    def handle_endtag(self, tag):
        self._inside = None

    def rows(self, heading):
        """Of the first table there, without its heads."""
        return [row for row in self.tables[heading][0] if row]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The run's folder, its page and its CSV tables."""
    pytest.importorskip("plotly")
    place = tmp_path_factory.mktemp("heart-disease")
    p2pfl.simulate(EXAMPLE, out=place / "run")
    for arguments in (["--html", str(place / "page.html")], ["--csv", str(place / "csv")]):
        assert CliRunner().invoke(app, ["inspect", str(place / "run"), *arguments]).exit_code == 0
    tables = {path.stem: list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) for path in (place / "csv").glob("*.csv")}
    return place / "run", (place / "page.html").read_text(encoding="utf-8"), tables


@pytest.fixture(scope="module")
def sites():
    """Each hospital's rows and groups."""
    return {site.name: site for site in load_sites(load_experiment(EXAMPLE)).sites}


@pytest.fixture(scope="module")
def models(made):
    """(weight, bias) of each, as saved, and the mean model."""
    found = {}
    for name in HOSPITALS:
        tensors = load_file(made[0] / "models" / f"{name}.safetensors")
        found[name] = (tensors["weight"][0], tensors["bias"][0])
    weights, biases = zip(*found.values(), strict=True)
    return {**found, "mean model": (np.mean(weights, axis=0), np.mean(biases))}


@pytest.fixture(scope="module")
def alone(sites):
    """Each hospital's model after the same 1,500 steps of torch's own Adam on its own rows."""
    experiment, found = load_experiment(EXAMPLE), {}
    start = make_plan(experiment, load_sites(experiment)).model
    for number, name in enumerate(HOSPITALS):
        inputs, targets = sites[name].train
        model = deepcopy(start)
        optimizer = torch.optim.Adam(model.parameters(), weight_decay=3.0, foreach=False)
        batches = batch_positions(42, torch.tensor([number]), torch.tensor([len(inputs)]), 0, 1500, 4)[0]
        for step, rows in enumerate(batches):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * (step // 100) / 15)) / 2
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
        found[name] = tuple(parameter.detach().numpy().ravel() for parameter in model.parameters())
    return found


def scores(model, site):
    weight, bias = model
    return site.test[0].numpy().astype(np.float64) @ weight + bias


def classes(site):
    return site.test[1].numpy().ravel()


def structural(outputs, positive):
    """DeLong's components, from the matrix of all pairs."""
    pairs = (np.sign(outputs[positive][:, None] - outputs[~positive][None]) + 1) / 2
    return pairs.mean(axis=1), pairs.mean(axis=0)


def shared(one, other):
    return sum(np.cov(a, b)[0, 1] / len(a) for a, b in zip(one, other, strict=True) if len(a) > 1)


def wilson(share, number):
    centre, reach = share + Z**2 / (2 * number), Z * math.sqrt(share * (1 - share) / number + Z**2 / (4 * number**2))
    return (centre - reach) / (1 + Z**2 / number), (centre + reach) / (1 + Z**2 / number)


def interval(outputs, targets):
    positive = targets > 0
    parts = structural(outputs, positive)
    area, variance, rarer = parts[0].mean(), shared(parts, parts), min(positive.sum(), (~positive).sum())
    if variance == 0 or rarer == 1 or not 0 < area < 1:
        return wilson(area, rarer)
    logit, reach = math.log(area / (1 - area)), Z * math.sqrt(variance) / (area * (1 - area))
    return tuple(1 / (1 + math.exp(-(logit + sign * reach))) for sign in (-1, 1))


def paired(first, second, targets):
    positive = targets > 0
    one, other = structural(first, positive), structural(second, positive)
    both = shared(one, one) * shared(other, other)
    common = shared(one, other) / math.sqrt(both) if both else 0.0
    (low, high), (other_low, other_high) = interval(first, targets), interval(second, targets)
    area, other_area = one[0].mean(), other[0].mean()
    down, up = (area - low, other_high - other_area), (high - area, other_area - other_low)
    below, above = (math.sqrt(max(a * a + b * b - 2 * common * a * b, 0)) for a, b in (down, up))
    return area - other_area - below, area - other_area + above


def shown(text):
    """The numbers of a cell such as "+0.010 [-0.030, +0.050]"."""
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", text)]


def as_recorded(row, *keys):
    return [float(row[key]) if row[key] else None for key in keys]


def test_the_matrix_of_models_and_sites(made, sites, models):
    _, page, tables = made
    rows = {(row["model"], row["site"]): row for row in tables["cross_site"]}
    drawn = json.loads(re.search(r'"z":(\[\[.*?\]\])', page)[1])
    table = {row[0]: row for row in Tables(page).rows("Every model at every site")}

    assert len(rows) == 5 * 4
    for number, model in enumerate([*HOSPITALS, "mean model"]):
        for place, name in enumerate(HOSPITALS):
            outputs, targets = scores(models[model], sites[name]), classes(sites[name])
            area, ends = roc_auc_score(targets, outputs), interval(outputs, targets)
            found = as_recorded(rows[model, name], "value", "low", "high")
            assert found == pytest.approx([area, *ends], abs=1e-9)
            assert drawn[number][place] == pytest.approx(area, abs=EXACT)
            assert rows[model, name]["rows"] == table[name][1] == str(len(targets))
            if model in (name, "mean model"):
                assert shown(table[name][4 if model == "mean model" else 3]) == pytest.approx([area, *ends], abs=ROUNDED)


def test_every_metric_of_the_network(made, sites, models):
    rows = {(row["node"], row["metric"]): row for row in made[2]["sites"]}
    page = Tables(made[1])

    for name in HOSPITALS:
        outputs, targets = scores(models[name], sites[name]), classes(sites[name])
        probabilities = 1 / (1 + np.exp(-outputs))
        right = (outputs > 0) == (targets > 0)
        expected = {
            "auroc": roc_auc_score(targets, outputs),
            "accuracy": right.mean(),
            "balanced_accuracy": (right[targets > 0].mean() + right[targets == 0].mean()) / 2,
            "log_loss": -np.log(np.where(targets > 0, probabilities, 1 - probabilities)).mean(),
        }
        for metric, value in expected.items():
            assert float(rows[name, metric]["network"]) == pytest.approx(value, abs=1e-6)  # outputs are float32 in the run
            [row] = [row for row in page.rows(metric_heading(metric)) if row[0] == name]
            assert float(row[2]) == pytest.approx(value, abs=ROUNDED)


def test_the_mean_model_on_all_rows_together(made, sites, models):
    outputs = np.concatenate([scores(models["mean model"], site) for site in sites.values()])
    targets = np.concatenate([classes(site) for site in sites.values()])
    area = roc_auc_score(targets, outputs)

    assert json.loads((made[0] / "summary.json").read_text())["mean_model"]["auroc"] == pytest.approx(area, abs=EXACT)
    assert f"The mean model, on all test rows together: {area:.3f}." in made[1]


def test_what_each_hospital_gains(made, sites, models, alone):
    rows = {row["site"]: row for row in made[2]["worth"]}
    page = Tables(made[1])

    assert set(rows) == set(HOSPITALS)
    for name in HOSPITALS:
        network, before, targets = scores(models[name], sites[name]), scores(alone[name], sites[name]), classes(sites[name])
        areas = [roc_auc_score(targets, before), roc_auc_score(targets, network)]
        expected = [*areas, areas[1] - areas[0], *paired(network, before, targets)]
        columns = ("alone", "network", "better_by", "better_by_low", "better_by_high")
        assert as_recorded(rows[name], *columns) == pytest.approx(expected, abs=1e-9)
        [row] = [row for row in page.rows("auroc") if row[0] == name]
        assert [float(row[1]), float(row[2]), *shown(row[4])] == pytest.approx(expected, abs=ROUNDED)
        [sentence] = [each for each in page.sentences if each.startswith((f"{name}:", f"{name} gains", f"{name} loses"))]
        assert shown(sentence) == pytest.approx([abs(value) if "sure" in sentence else value for value in expected[2:]], abs=ROUNDED)


def test_groups_of_patients(made, sites, models):
    rows = {(row["site"], row["attribute"], row["group"]): row for row in made[2]["subgroups"]}
    page = {tuple(row[:3]): row for row in Tables(made[1]).rows("For whom: subgroups")}
    expected = {}
    for name, site in sites.items():
        by_model = {name: scores(models[name], site), "": scores(models["mean model"], site)}
        for attribute, values in site.groups.items():
            for group in sorted({str(value) for value in values}):
                here = np.array([str(value) == group for value in values])
                for where, outputs in by_model.items():
                    before = expected.get((where, attribute, group), (np.zeros(0), np.zeros(0)))
                    parts = (outputs[here], classes(site)[here])
                    expected[where, attribute, group] = tuple(np.concatenate(both) for both in zip(before, parts, strict=True))

    assert set(rows) == set(expected)
    for (where, attribute, group), (outputs, targets) in expected.items():
        row, cells = rows[where, attribute, group], page[where or "all sites", attribute, group]
        if len(targets) < 10:
            assert {row[key] for key in row.keys() - {"site", "attribute", "group"}} == {""}
            assert cells[3:] == ["fewer than 10", "-", "-", "-"]
            continue
        probabilities = 1 / (1 + np.exp(-outputs))
        error = sum(
            abs((probabilities[inside] - targets[inside]).sum()) / len(targets)
            for inside in (np.minimum((probabilities * 10).astype(int), 9) == number for number in range(10))
        )
        figures = [None] * 4
        if len(set(targets)) > 1:
            false_alarms, found, _ = roc_curve(targets, outputs, drop_intermediate=False)
            figures = [roc_auc_score(targets, outputs), *interval(outputs, targets), found[false_alarms <= 0.1].max()]
        assert row["rows"] == cells[3] == str(len(targets))
        assert as_recorded(row, "auroc", "auroc_low", "auroc_high", "sensitivity") == pytest.approx(figures, abs=1e-9)
        assert float(row["calibration_error"]) == pytest.approx(error, abs=1e-6)
        defined = [figure for figure in figures if figure is not None]
        assert shown(" ".join(cells[4:])) == pytest.approx([*defined, error], abs=ROUNDED)
