"""The sums that an analysis may ask for, from its spec and the contract alone: what nodes agree on before the first one.

A conversation asks for these sums in this order, and may end early or leave some out: an iteration that is not needed, a variable of which
too few patients have a value. Where cells of time are merged on totals, the sums after that have room for all, and zeros at the end.

Shapes: P columns, T cells of time, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator

from p2pfl.analyses.calibration import model_spec, sums_of_calibration
from p2pfl.analyses.curved_terms import sums_of_curves
from p2pfl.analyses.descriptions import Groups, grid_of, values_of
from p2pfl.analyses.leading import STATISTICS_FORMAT, bound_of
from p2pfl.analyses.rows import CrossTable, ModelColumns, groups_of
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.variables import cell_labels, is_survival
from p2pfl.data.contract import Contract
from p2pfl.privacy.planned_sum import PlannedSum
from p2pfl.statistics.families import FAMILIES, NEGATIVE_BINOMIAL
from p2pfl.statistics.formula import Formula
from p2pfl.statistics.mixed import SUMMARIES
from p2pfl.statistics.newton import MOST_ITERATIONS
from p2pfl.statistics.scale import MEANS, SQUARES

_Shape = tuple[int, ...]
_META_SUMS = 3
_OF_CELLS = "partial likelihood"
"""Beginning of the statistics that have numbers for each cell of time, where one baseline is common to all sites."""


def planned_sums(spec: AnalysisSpec, contract: Contract, num_sites: int = 1) -> tuple[PlannedSum, ...]:
    """Sums that an analysis may ask for, in their order. The statistic of each ends in ": " and the name that the analysis gives it.

    Args:
        spec: checked against the contract.
        contract: of all sites.
        num_sites: sites that add numbers, each of which has a place in the summaries that a mixed model takes.
    """
    question = "; ".join(question_of(spec))  # names of variables and formulae have no semicolon
    return tuple(
        PlannedSum(
            statistic=f"{question}: {statistic}",
            shape=shape,
            number_format=STATISTICS_FORMAT,
            bound=bound_of(statistic),
            may_be_shorter=statistic.startswith(_OF_CELLS) and not spec.is_by_site,
        )
        for statistic, shape in _sums(spec, contract, num_sites)
    )


def question_of(spec: AnalysisSpec) -> list[str]:
    """Canonical texts of what an analysis asks, without floors, intervals and other choices that change no sum."""
    of_rows = [f"rows with {', '.join(spec.common)}"] if spec.rows == "common" else []
    if spec.kind == "describe":
        return ["describe", *of_rows]  # the statistics name the groups
    time = [] if spec.is_by_site or not is_survival(spec.parsed) else [f"grid {spec.grid!r} {list(spec.ends)!r}"]
    theta = [] if spec.theta is None else [f"theta {spec.theta!r}"]
    risks = [f"risks {list(spec.ends)!r}"] if spec.kind == "calibration" and spec.ends else []
    return [spec.kind, formula_text(spec.parsed), *([spec.family] if spec.family else []), *theta, *time, *risks, *of_rows]


def formula_text(formula: Formula) -> str:
    """A formula in one form, however it was written."""
    right = [":".join(map(str, term)) or "1" for term in formula.terms] + [f"offset({each})" for each in formula.offsets]
    left = formula.outcome[0] if not is_survival(formula) else f"Surv({', '.join(formula.outcome)})"
    return f"{left} ~ {' + '.join(right)}"


def _sums(spec: AnalysisSpec, contract: Contract, num_sites: int) -> Iterator[tuple[str, _Shape]]:
    if spec.kind == "describe":
        yield from _of_descriptions(spec, contract)
        return
    if spec.kind == "calibration":
        yield from _sums(model_spec(spec), contract, num_sites)
        yield from sums_of_calibration(spec)
        return
    yield "patients and rows", (3,)
    is_gridded = is_survival(spec.parsed) and not spec.is_by_site
    if (table := CrossTable.of(spec, contract)).names and (spec.kind in ("glm", "cox", "mixed") or not is_gridded) and spec.kind != "km":
        yield f"cross table of {', '.join(table.names)}", (table.num_cells,)
    if spec.kind in ("glm", "cox", "mixed"):
        yield from sums_of_curves(ModelColumns.of(spec, contract).curves)
    if is_gridded:
        num_groups = 1 if spec.kind == "cox" else len(groups_of(spec, contract)[1])
        yield "counts by cell of time", (2, len(spec.time_cells(contract)), num_groups)
    if spec.kind in ("glm", "cox"):
        yield from _of_models(spec, contract)
    elif spec.kind == "mixed":
        size = len(ModelColumns.of(spec, contract).names) + 1  # the outcome is one more column
        yield MEANS, (1 + size,)
        yield SQUARES, (size,)
        yield SUMMARIES, (num_sites, size * (size + 1) // 2)
    elif spec.kind == "compare" and not is_survival(spec.parsed):
        yield from [("weighted estimates", (5,))] * _META_SUMS
    elif spec.kind == "compare" and not is_gridded:
        num_groups = len(groups_of(spec, contract)[1])
        yield "observed and expected events", (2 + num_groups, num_groups)


def _of_models(spec: AnalysisSpec, contract: Contract) -> Iterator[tuple[str, _Shape]]:
    size = len(ModelColumns.of(spec, contract).names)
    triangle = size * (size + 1) // 2
    yield MEANS, (1 + size,)
    yield SQUARES, (size,)
    if spec.kind == "glm" and spec.family == NEGATIVE_BINOMIAL and spec.theta is None:
        yield "missing rows and sum of the outcomes", (3,)
        iteration, numbers = "information, score and theta", triangle + size + 4
    elif spec.kind == "glm":
        yield "missing rows and saturated log-likelihood", (3,)
        has_pearson = spec.family in FAMILIES and FAMILIES[spec.family].has_pearson
        iteration, numbers = "information, score and deviance", triangle + size + 1 + has_pearson
    else:
        yield "events", (1,)
        iteration = _OF_CELLS
        numbers = 1 + size + triangle if spec.is_by_site else len(spec.time_cells(contract)) * (2 + size + 2 * (1 + size + triangle))
    yield from ((f"{iteration}, iteration {number}", (numbers,)) for number in range(MOST_ITERATIONS + 2))


def _of_descriptions(spec: AnalysisSpec, contract: Contract) -> Iterator[tuple[str, _Shape]]:
    names, groups = spec.described(contract), Groups.of(spec, contract)
    num_groups = len(groups.labels)
    yield groups.named(values_of(names)), (len(names), 2, num_groups)
    for name in names:
        labels = cell_labels(name, contract)
        if labels is not None:
            yield f"counts of {groups.named(name)}", (len(labels) + 1, num_groups)
            continue
        for group in range(num_groups):
            yield f"{groups.named(name, group)}: number, mean and cells", (3 + len(grid_of(contract.variables[name])) - 1,)
            yield f"{groups.named(name, group)}: squares around the mean", (1,)
