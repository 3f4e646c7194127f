"""Calibration over sites: figures of the pooled rows, groups that hide few patients, and sites of which none is shown."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from pooled import pooled, pooled_glm
from scipy.stats import mannwhitneyu
from statsmodels.genmod.families import Binomial
from statsmodels.stats.proportion import proportion_confint
from study_tables import changed, made, number, write_study

from commands import run_here
from p2pfl.analyses import stats
from p2pfl.analyses.policy import RefusedByPolicy
from p2pfl.errors import ConfigError
from p2pfl.inspector.statistics_page import statistics_page
from p2pfl.statistics.calibration import merged_groups

FORMULA = "died ~ age + dose + sex"


@pytest.fixture(scope="module")
def study():
    return made(600, 4)


@pytest.fixture(scope="module")
def files(study, tmp_path_factory):
    contract, sites = write_study(tmp_path_factory.mktemp("study"), study)
    return {"contract": contract, "sites": sites}


@pytest.fixture(scope="module")
def found(files):
    return stats.calibration(FORMULA, **files)


@pytest.fixture(scope="module")
def risks(study):
    """Outcomes, predicted risks and sites of the pooled rows."""
    table = pooled(study)
    columns = [np.ones(600), table["age"], table["dose"], (table["sex"] == "male") * 1.0]
    fit = pooled_glm(table["died"], columns, Binomial())
    return table["died"], fit.fittedvalues, np.array([row["site"] for row in study[2]]), fit


def test_groups_of_risk_are_those_of_the_pooled_rows(found, risks):
    died, risk, _, _ = risks
    rows = found.records()

    assert [rows[0]["from"], rows[-1]["to"]] == [0, 1]
    assert len(rows) <= 10
    assert sum(row["patients"] for row in rows) == 600
    for row in rows:
        inside = (risk > row["from"]) & (risk <= row["to"])
        low, high = proportion_confint(died[inside].sum(), inside.sum(), method="wilson")
        expected = {"predicted": risk[inside].mean(), "observed": died[inside].mean(), "low": low, "high": high}
        assert (row["patients"], row["events"]) == (inside.sum(), died[inside].sum())
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-8)
        assert row["patients"] >= 60


def test_scores_are_those_of_the_pooled_rows(found, risks):
    died, risk, sites, fit = risks
    predictor = np.log(risk / (1 - risk))
    large = pooled_glm(died, [np.ones(600)], Binomial(), offset=predictor)
    slope = pooled_glm(died, [np.ones(600), predictor], Binomial())
    pairs = [(predictor[here & (died == 1)], predictor[here & (died == 0)]) for here in (sites == name for name in np.unique(sites))]
    concordant = sum(mannwhitneyu(events, others).statistic for events, others in pairs)
    all_pairs = mannwhitneyu(predictor[died == 1], predictor[died == 0]).statistic / (died.sum() * (1 - died).sum())
    low, high = found.groups.auc_bounds()
    chi2 = fit.null_deviance - fit.deviance
    facts = found.facts

    assert (facts.intercept, facts.slope) == (pytest.approx(0, abs=1e-8), pytest.approx(1, abs=1e-8))
    assert (facts.intercept_bse, facts.slope_bse) == pytest.approx((large.bse[0], slope.bse[1]), rel=1e-8)
    assert facts.brier == pytest.approx(np.mean((died - risk) ** 2), rel=1e-9)
    assert facts.scaled_brier == pytest.approx(1 - facts.brier / np.var(died), rel=1e-9)
    assert facts.auc == pytest.approx(concordant / sum(len(events) * len(others) for events, others in pairs), rel=1e-12)
    assert low < all_pairs < high
    assert found.shrinkage == pytest.approx((chi2 - 3) / chi2, rel=1e-8)


def test_the_error_of_the_area_is_delongs(found, risks):
    died, risk, sites, _ = risks
    variance = num_pairs = 0
    for name in np.unique(sites):
        events, others = risk[(sites == name) & (died == 1)], risk[(sites == name) & (died == 0)]
        wins = (events[:, None] > others) + 0.5 * (events[:, None] == others)
        size = len(events) * len(others)
        variance += size**2 * (wins.mean(axis=1).var(ddof=1) / len(events) + wins.mean(axis=0).var(ddof=1) / len(others))
        num_pairs += size

    assert found.facts.auc_bse == pytest.approx(variance**0.5 / num_pairs, rel=1e-10)


def test_slopes_of_the_sites_are_combined_as_a_meta_analysis_of_their_own_fits(found, risks):
    died, risk, sites, _ = risks
    predictor = np.log(risk / (1 - risk))
    fits = [pooled_glm(died[here], [np.ones(here.sum()), predictor[here]], Binomial()) for here in (sites == s for s in np.unique(sites))]
    weights = np.array([1 / fit.bse[1] ** 2 for fit in fits])
    slopes = np.array([fit.params[1] for fit in fits])
    fixed = weights @ slopes / weights.sum()

    assert found.site_slopes.num_estimates == 4
    assert (found.site_slopes.fixed, found.site_slopes.fixed_bse) == pytest.approx((fixed, weights.sum() ** -0.5), rel=1e-7)
    assert found.site_slopes.q == pytest.approx(weights @ (slopes - fixed) ** 2, rel=1e-6)


def test_terminal_json_csv_and_page_show_the_groups(files, tmp_path, monkeypatch, capfd):
    ask = ["stats", "calibration", FORMULA, "--contract", files["contract"], *files["sites"]]
    code, out, err = run_here(*ask, "--csv", tmp_path / "out.csv", "--html", tmp_path / "page.html", monkeypatch=monkeypatch, capfd=capfd)
    told = json.loads(run_here(*ask, "--json", monkeypatch=monkeypatch, capfd=capfd)[1])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "slope to expect in new patients: 0.9262" in out
    assert [float(row["observed"]) for row in rows] == [each["observed"] for each in told["risk_groups"]]
    assert told["calibration"]["sites"]["slopes"]["estimates"] == 4
    assert [each["name"] for each in told["coefficients"]] == ["(Intercept)", "age", "dose", "sexmale"]
    assert page.count("<circle") == len(rows)
    assert "Observed and predicted risk" in page


def test_ends_of_the_cells_of_risk_can_be_agreed_on(files):
    found = stats.calibration(FORMULA, ends=[0.35, 0.5, 1], **files)

    assert [(row["from"], row["to"]) for row in found.records()] == [(0, 0.35), (0.35, 0.5), (0.5, 1)]
    for ends in ([0.1, 0.5], [0.5, 0.2, 1], [0.5, 2]):
        with pytest.raises(ConfigError, match="ends = "):
            stats.calibration(FORMULA, ends=ends, **files)


def test_groups_are_merged_until_they_hide_events_and_others():
    ends = np.array([0.1, 0.2, 0.3, 1.0])
    counts = np.array([[30.0, 6, 30, 8], [0, 2, 9, 6], [2, 1, 7.5, 6]])  # the second has few events, the last few others
    groups = merged_groups(counts, ends, 5)

    assert [groups.ends.tolist(), groups.patients.tolist(), groups.events.tolist()] == [[0.1, 1.0], [30, 44], [0, 17]]
    with pytest.raises(ConfigError, match="fewer than 5 patients have the event"):
        merged_groups(np.array([[30.0, 6], [0, 2], [2, 1]]), np.array([0.5, 1.0]), 5)


def test_a_number_as_outcome_is_held_against_the_floor_of_events_as_well(study, tmp_path):
    variables, outcome, rows = changed(study, died=lambda _, place: "1" if place % 200 == 7 else "0")
    contract, sites = write_study(tmp_path, ({**variables, "died": number(0, 1)}, outcome, rows))
    with pytest.raises(ConfigError, match="fewer than 5 patients have the event"):
        stats.calibration("died ~ dose", contract=contract, sites=sites)


def test_a_site_holds_the_floor_in_its_own_cells(files):
    with pytest.raises(RefusedByPolicy):
        stats.calibration("died ~ age", cells="site", **files)
    assert stats.calibration("died ~ age", cells="site", ends=[0.5, 1], **files).counts.num_patients == 600


def test_few_rows_left_out_are_not_counted_by_the_groups(study, tmp_path):
    contract, sites = write_study(tmp_path, changed(study, dose=lambda row, place: "" if place < 3 else row["dose"]))
    found = stats.calibration(FORMULA, contract=contract, sites=sites)

    assert {row["patients"] for row in found.records()} == {row["events"] for row in found.records()} == {None}
    assert found.as_dict()["patients"] is None


def test_numbers_of_a_calibration_count_among_those_that_are_released(study, tmp_path):
    few = study[0], study[1], study[2][:110]
    contract, sites = write_study(tmp_path, few)
    stats.glm("died ~ age", family="binomial", contract=contract, sites=sites)
    with pytest.raises(ConfigError, match="numbers about the same patients"):
        stats.calibration("died ~ age", contract=contract, sites=sites)


def test_an_outcome_of_another_kind_is_refused(files):
    with pytest.raises(ConfigError, match="an outcome of family binomial has numbers with range"):
        stats.calibration("dose ~ age", **files)
    with pytest.raises(ConfigError, match="calibration has one outcome"):
        stats.calibration("Surv(days, died) ~ age", **files)


def test_no_interval_tells_how_many_patients_a_group_has_where_they_are_not_counted(tmp_path):
    contract, sites = write_study(tmp_path, changed(made(600), age=lambda row, place: "" if place in (3, 9) else row["age"]))
    found = stats.calibration("died ~ age", contract=contract, sites=sites)

    assert found.counts.num_missing is None
    for row in found.records():
        assert [key for key, value in row.items() if value is None] == ["patients", "events", "observed", "low", "high"]
    assert "Observed against predicted risk" not in statistics_page(found.as_dict())
    assert " - " in found.summary()
