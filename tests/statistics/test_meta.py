"""Meta-analysis over sites: the figures of their own fits, from sums alone."""

from __future__ import annotations

import numpy as np
import pytest
from inference_data import numbers, sites, table

from p2pfl.errors import ConfigError
from p2pfl.statistics.design import design
from p2pfl.statistics.families import FAMILIES
from p2pfl.statistics.formula import parse_formula
from p2pfl.statistics.glm import DesignRows, fit_glm
from p2pfl.statistics.meta import Estimate, meta_analysis
from p2pfl.statistics.sums import analyse


def own_estimate(rows):
    """A site's estimate of the effect of sex on the length of stay, by its own rows."""
    columns = {
        "los": numbers(rows, "los"),
        "lab": numbers(rows, "lab"),
        "age": [row["age"] for row in rows],
        "sex": [row["sex"] for row in rows],
    }
    found = design(parse_formula("los ~ age + sex + lab"), columns, {"age": ["middle", "old", "young"], "sex": ["F", "M"]})
    own = DesignRows(columns_MP=found.columns_MP, outcomes_M=columns["los"], offsets_M=found.offsets_M, weights_M=np.ones(len(rows)))
    fit = analyse(fit_glm(found.names, FAMILIES["gaussian"]), [own])
    place = found.names.index("sexM")
    return Estimate(value=float(fit.params[place]), variance=float(fit.bse[place] ** 2))


def test_figures_are_those_of_the_sites_own_fits():
    rows = table("los.csv")
    found = analyse(meta_analysis(), [own_estimate([rows[k] for k in at]) for at in sites(rows, "site")])

    assert (found.fixed, found.fixed_bse) == pytest.approx((0.4347091192, 0.2559161448), rel=0, abs=6e-11)
    assert (found.q, found.q_pvalue, found.i_squared) == pytest.approx((3.0054989535, 0.2225175116, 0.3345530872), rel=0, abs=6e-11)
    assert found.tau_squared == pytest.approx(0.1132093677, rel=0, abs=6e-11)
    assert (found.random, found.random_bse) == pytest.approx((0.4174883829, 0.3328704344), rel=0, abs=6e-11)


def test_estimates_that_agree_have_no_heterogeneity():
    found = analyse(meta_analysis(), [Estimate(value=2.0, variance=0.5), None, Estimate(value=2.0, variance=0.25)])
    assert (found.num_estimates, found.fixed, found.q, found.i_squared, found.tau_squared) == (2, 2.0, 0.0, 0.0, 0.0)
    assert (found.random, found.random_bse) == (found.fixed, found.fixed_bse)


def test_one_estimate_is_refused():
    with pytest.raises(ConfigError, match="1 site has an estimate"):
        analyse(meta_analysis(), [None, Estimate(value=2.0, variance=0.5)])


@pytest.mark.parametrize(("value", "variance"), [(np.nan, 1.0), (1.0, 0.0), (1.0, np.inf)])
def test_an_estimate_that_is_none_is_refused(value, variance):
    with pytest.raises(ConfigError, match="no finite number"):
        Estimate(value=value, variance=variance)
