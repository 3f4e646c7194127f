"""Property: the same patients in any number of sites, however they are shared out, have the same figures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from study_tables import changed, made, write_study

from p2pfl.analyses import stats
from p2pfl.analyses.policy import Policy
from p2pfl.analyses.site_files import AnalysisSite, load_sites
from p2pfl.data.contract import Contract

NUM_ROWS, NUM_DRAWN = 600, 400

ANALYSES = {
    "linear": {"kind": "glm", "formula": "dose ~ poly(age, 2) * sex", "family": "gaussian"},
    "logistic": {"kind": "glm", "formula": "died ~ age + stage + spline(dose, 2, 5, 8)", "family": "binomial"},
    "poisson": {"kind": "glm", "formula": "visits ~ dose + sex + offset(log(days))", "family": "poisson"},
    "gamma": {"kind": "glm", "formula": "days ~ age + sex", "family": "gamma"},
    "negative binomial": {"kind": "glm", "formula": "visits ~ sex", "family": "negative-binomial"},
    "cox": {"kind": "cox", "formula": "Surv(days, died) ~ age + sex", "grid": 30},
    "cox, breslow": {"kind": "cox", "formula": "Surv(days, died) ~ dose", "grid": 60, "ties": "breslow"},
    "km": {"kind": "km", "formula": "Surv(days, died) ~ sex", "grid": 30},
    "log-rank": {"kind": "compare", "formula": "Surv(days, died) ~ stage", "grid": 30},
    "calibration": {"kind": "calibration", "formula": "died ~ age + sex"},
}

splits = {
    "seed": st.integers(0, 2**32 - 1),
    "num_sites": st.sampled_from([2, 3, 5, 13, 50]),  # two are there only without masks
    "is_even": st.booleans(),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Contract and table of all patients."""
    study = changed(made(NUM_ROWS, 1), visits=lambda row, place: str(int(row["visits"]) * (1 + place % 3)))
    contract, sites = write_study(tmp_path_factory.mktemp("study"), study)
    agreed = Contract.load(contract)
    return agreed, load_sites(sites, agreed)[0].table


def shared_out(table, seed, num_sites, *, is_even):
    """Some patients as one site, and the same ones in several, of which some may have none."""
    random = np.random.default_rng(seed)
    rows = random.permutation(NUM_ROWS)[:NUM_DRAWN]
    likely = np.full(num_sites, 1 / num_sites) if is_even else random.dirichlet(np.full(num_sites, 0.5))
    places = random.choice(num_sites, NUM_DRAWN, p=likely)
    alone = AnalysisSite(name="all", table=table.rows(rows.tolist()), policy=Policy(may_release=("site_estimates",)))
    policy = alone.policy  # a draw may leave all patients at one site
    return [alone], [
        AnalysisSite(name=f"s{site}", table=table.rows(rows[places == site].tolist()), policy=policy) for site in range(num_sites)
    ]


def hold(name, whole, seed, num_sites, *, is_even):
    contract, table = whole
    pooled, sites = shared_out(table, seed, num_sites, is_even=is_even)
    expected, found = (stats.run(ANALYSES[name], contract, each) for each in (pooled, sites))

    if name == "km":
        assert found.as_dict() == expected.as_dict()
    elif name == "log-rank":
        assert found.test.statistic == expected.test.statistic
    elif name == "calibration":
        for key in ("slope_bse", "brier", "scaled_brier"):
            assert getattr(found.facts, key) == pytest.approx(getattr(expected.facts, key), rel=1e-8)
        assert [each["events"] for each in found.records()] == [each["events"] for each in expected.records()]
    else:
        largest = np.maximum(np.abs(expected.params), expected.bse)
        assert (np.abs(found.params - expected.params) <= 1e-8 * largest).all()
        assert (np.abs(found.bse - expected.bse) <= 1e-8 * largest).all()


@pytest.mark.parametrize("name", ANALYSES)
@settings(deadline=None, max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**splits)
def test_the_split_into_sites_changes_no_figure(name, whole, seed, num_sites, is_even):
    hold(name, whole, seed, num_sites, is_even=is_even)


@pytest.mark.slow
@pytest.mark.parametrize("name", ANALYSES)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**splits)
def test_many_splits_into_sites_change_no_figure(name, whole, seed, num_sites, is_even):
    hold(name, whole, seed, num_sites, is_even=is_even)
