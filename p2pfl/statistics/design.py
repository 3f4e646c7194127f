"""Columns of a model over a site's table, made from a formula and the contract's factor levels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from p2pfl.errors import ConfigError
from p2pfl.statistics.formula import CURVES, FUNCTIONS, POLY, SPLINE, Formula, Term, Variable
from p2pfl.statistics.scale import INTERCEPT
from p2pfl.statistics.splines import natural_spline
from p2pfl.statistics.sums import Numbers

MOST_COLUMNS = 1000

_FUNCTIONS = {name: getattr(np, name) for name in FUNCTIONS}


@dataclass(frozen=True, kw_only=True, slots=True)
class DesignColumns:
    """A formula's columns over a table, all of whose factors have the levels of the contract."""

    names: tuple[str, ...]
    columns_MP: Numbers
    offsets_M: Numbers
    terms: tuple[Term, ...] = ()
    """Term of the formula that each column is of."""
    curves: tuple[Variable, ...] = ()
    """Polynomials and splines of the terms, each once."""
    inputs_MK: Numbers = field(default_factory=lambda: np.zeros((0, 0)))
    """Number that each curve is of, K of them."""
    powers: tuple[tuple[tuple[int, int], ...], ...] = ()
    """Place of a polynomial among the curves and its degree, for each column: the column lacks it as a factor, since its coefficients are
    agreed on later."""


def design(formula: Formula, table: Mapping[str, Numbers | Sequence[str]], levels: Mapping[str, Sequence[str]]) -> DesignColumns:
    """Make the columns of a model, as R codes them: the first level of a factor is the reference.

    Args:
        formula: of the model.
        table: by the name of a column, its numbers (M,), NaN where one is missing, or for a factor its texts, empty where one is missing.
        levels: of each factor, in the contract's order.

    Raises:
        ConfigError: a column that is not there, a level that is not in the contract, a function of a factor, or too many columns.
    """
    missing = [name for name in formula.columns if name not in table]
    if missing:
        raise ConfigError(f"no column {missing[0]!r} in the table: it has {', '.join(sorted(table))}")
    num_rows = len(table[formula.outcome[0]])
    names: list[str] = []
    columns: list[Numbers] = []
    terms: list[Term] = []
    powers: list[tuple[tuple[int, int], ...]] = []
    curves = tuple(dict.fromkeys(each for term in formula.terms for each in term if each.function in CURVES))
    known = {frozenset(term) for term in formula.terms}
    for term in formula.terms:
        coded = [_coded(each, table, levels, is_whole=frozenset(term) - {each} not in known) for each in term]
        if len(names) + math.prod(map(len, coded)) > MOST_COLUMNS:
            raise ConfigError(f"more than {MOST_COLUMNS:,} coefficients: leave variables out, or products of them")
        for choice in product(*coded):
            names.append(":".join(name for name, _, _ in choice) or INTERCEPT)
            terms.append(term)
            columns.append(np.prod([np.ones(num_rows), *(values for _, values, _ in choice)], axis=0))
            powers.append(tuple((curves.index(each), degree) for each, (_, _, degree) in zip(term, choice, strict=True) if degree))
    offsets = [_numbers(each, table, levels) for each in formula.offsets]
    return DesignColumns(
        names=tuple(names),
        columns_MP=np.stack(columns, axis=-1) if columns else np.zeros((num_rows, 0)),
        offsets_M=np.sum([np.zeros(num_rows), *offsets], axis=0),
        terms=tuple(terms),
        curves=curves,
        inputs_MK=np.stack([_numbers(Variable(each.column), table, levels) for each in curves], axis=-1)
        if curves
        else np.zeros((num_rows, 0)),
        powers=tuple(powers),
    )


def _coded(
    variable: Variable, table: Mapping[str, Numbers | Sequence[str]], levels: Mapping[str, Sequence[str]], *, is_whole: bool
) -> list[tuple[str, Numbers, int]]:
    """Columns of one variable, each with its name and the degree of a polynomial, which it lacks as a factor; 0: it lacks none.

    A number makes one, a factor one of each level but the first, which is left out if the rest of the term stands.
    """
    if variable.function in CURVES:
        return _curved(variable, _numbers(Variable(variable.column), table, levels))
    if variable.column not in levels:
        return [(str(variable), _numbers(variable, table, levels), 0)]
    if variable.function:
        raise ConfigError(f"{variable}: {variable.column} is a factor, and has no {variable.function}")
    texts = np.asarray(table[variable.column], dtype=str)
    unknown = sorted(set(texts.tolist()) - {*levels[variable.column], ""})
    if unknown:
        raise ConfigError(
            f"{variable.column}: {len(unknown)} values are none of the contract's levels {', '.join(levels[variable.column])}"
        )
    chosen = levels[variable.column][0 if is_whole else 1 :]
    return [(f"{variable.column}{level}", np.where(texts == "", np.nan, (texts == level) * 1.0), 0) for level in chosen]


def _curved(variable: Variable, values: Numbers) -> list[tuple[str, Numbers, int]]:
    """Columns of a curve, with R's names; those of a polynomial are 1, or NaN where the number is missing."""
    if variable.function == SPLINE:
        return [(f"{variable}{place}", column, 0) for place, column in enumerate(natural_spline(values, variable.numbers).T, start=1)]
    assert variable.function == POLY
    ones, degree = np.where(np.isnan(values), np.nan, 1.0), int(variable.numbers[0])
    return [(f"{variable}{place if degree > 1 else ''}", ones, place) for place in range(1, degree + 1)]


def _numbers(variable: Variable, table: Mapping[str, Numbers | Sequence[str]], levels: Mapping[str, Sequence[str]]) -> Numbers:
    if variable.column in levels:
        raise ConfigError(f"{variable}: {variable.column} is a factor, and a number is needed")
    values = np.asarray(table[variable.column], dtype=np.float64)
    if not variable.function:
        return values
    with np.errstate(all="ignore"):
        found = np.asarray(_FUNCTIONS[variable.function](values))
    if not np.isfinite(found[np.isfinite(values)]).all():
        raise ConfigError(f"{variable} is no number in some rows of this site")
    return found
