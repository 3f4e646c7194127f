"""Pooled rows of a made-up study as an oracle reads them, and models of statsmodels with tight settings."""

from __future__ import annotations

import numpy as np
from statsmodels.genmod.generalized_linear_model import GLM


def pooled(study):
    """Columns of all rows in one table: numbers as floats, others as texts."""
    variables, _, rows = study
    return {
        name: np.array([float(row[name]) if row[name] else np.nan for row in rows])
        if variables[name]["type"] in ("number", "integer")
        else np.array([row[name] for row in rows])
        for name in variables
    }


def pooled_glm(outcomes, columns, family, **options):
    """A model of statsmodels; its usual settings leave standard errors wrong by 1e-7."""
    return GLM(outcomes, np.column_stack(columns), family=family, **options).fit(tol=1e-14, maxiter=200)


def assert_same(found, params, errors):
    """Hold coefficients and errors against an oracle's, within 1e-8 of the larger one of both."""
    params, errors = np.asarray(params), np.asarray(errors)
    assert found.params.shape == params.shape
    largest = np.maximum(np.abs(params), errors)
    assert (np.abs(found.params - params) <= 1e-8 * largest).all(), (found.params, params)
    assert (np.abs(found.bse - errors) <= 1e-8 * largest).all(), (found.bse, errors)
