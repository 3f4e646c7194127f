"""Sums of an analysis: those that its spec foretells, exact, the same in any order, and within a secure sum's bounds."""

from __future__ import annotations

import os
from functools import reduce
from itertools import combinations, count, permutations

import numpy as np
import pytest
from study_tables import changed, made, write_study

from p2pfl.analyses.leading import STATISTICS_FORMAT, lead, total_of
from p2pfl.analyses.run import conversation, placed, run_analysis
from p2pfl.analyses.site_files import load_sites
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.sum_plan import planned_sums, question_of
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError
from p2pfl.privacy.fixed_point import added
from p2pfl.privacy.masks import KEY_BYTES, SessionMasks
from p2pfl.privacy.planned_sum import PlannedSum
from p2pfl.protocol.sum_terms import SumTerms
from p2pfl.statistics.sums import SumRequest

ANALYSES = {
    "describe": {"kind": "describe"},
    "describe groups": {"kind": "describe", "by": "sex"},
    "linear": {"kind": "glm", "formula": "dose ~ age + sex", "family": "gaussian"},
    "logistic": {"kind": "glm", "formula": "died ~ age + sex", "family": "binomial"},
    "without categories": {"kind": "glm", "formula": "visits ~ age + dose", "family": "poisson"},
    "curves": {"kind": "glm", "formula": "died ~ poly(age, 3) * sex + poly(visits, 1) + spline(dose, 2, 5, 8)", "family": "binomial"},
    "cox with curves": {"kind": "cox", "formula": "Surv(days, died) ~ poly(age, 2)", "grid": 50},
    "gamma": {"kind": "glm", "formula": "dose ~ age + sex", "family": "gamma"},
    "negative binomial": {"kind": "glm", "formula": "visits ~ dose", "family": "negative-binomial", "theta": 3.0},
    "negative binomial, theta estimated": {"kind": "glm", "formula": "visits ~ dose", "family": "negative-binomial"},
    "calibration": {"kind": "calibration", "formula": "died ~ age + dose"},
    "calibration with ends": {"kind": "calibration", "formula": "died ~ poly(age, 2)", "ends": [0.4, 0.6, 1]},
    "mixed": {"kind": "mixed", "formula": "dose ~ age + sex"},
    "cox": {"kind": "cox", "formula": "Surv(days, died) ~ age + sex"},
    "cox with one baseline": {"kind": "cox", "formula": "Surv(days, died) ~ age + sex", "grid": 50},
    "km": {"kind": "km", "formula": "Surv(days, died) ~ sex", "grid": 50},
    "log-rank": {"kind": "compare", "formula": "Surv(days, died) ~ sex"},
    "log-rank on a grid": {"kind": "compare", "formula": "Surv(days, died) ~ sex", "grid": 50},
    "meta": {"kind": "compare", "formula": "dose ~ age + sex", "family": "gaussian", "coefficient": "age"},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    contract, sites = write_study(tmp_path_factory.mktemp("study"), made())
    agreed = Contract.load(contract)
    return agreed, load_sites(sites, agreed)


def asked_sums(spec, contract, sites):
    """Statistic and shape of each sum that an analysis asks for, and its result."""
    asked, (analysis, rows_of) = [], conversation(spec, contract, len(sites))

    def noted():
        request = next(analysis)
        try:
            while True:
                asked.append((request.statistic, request.shape))
                request = analysis.send((yield request))
        except StopIteration as end:
            return end.value

    result = lead(noted(), [site.name for site in sites], [placed(rows_of(site.table), place) for place, site in enumerate(sites)])
    return asked, result


def has_room(planned, shape):
    return planned.shape == shape or (planned.may_be_shorter and planned.shape > shape)


@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_asks_for_the_sums_that_its_spec_foretells(name, study):
    contract, sites = study
    spec = AnalysisSpec.from_mapping(ANALYSES[name])
    asked, _ = asked_sums(spec, contract, sites)

    planned = planned_sums(spec, contract, len(sites))
    rest = iter(planned)
    texts = [(f": {statistic}", shape) for statistic, shape in asked]

    assert [each for each in texts if not any(plan.statistic.endswith(each[0]) and has_room(plan, each[1]) for plan in rest)] == []
    assert any(each.may_be_shorter for each in planned) == (spec.kind == "cox" and not spec.is_by_site)
    assert SumTerms(
        study="0" * 64,
        sums=tuple(
            PlannedSum(statistic=each.statistic, shape=each.shape, number_format=each.number_format, bound=each.bound) for each in planned
        ),
        participants=tuple(range(256)),
        names=tuple(f"n{k}" for k in range(256)),
        identities=tuple(f"{k:064x}" for k in range(256)),
        check=True,
    ).plan


def test_the_same_question_has_the_same_text_however_it_is_written():
    texts = ["died ~ age * sex", "died ~ (age+sex)^2"]
    written = [AnalysisSpec.from_mapping({**ANALYSES["logistic"], "formula": text, "patients_per_cell": 7}) for text in texts]
    others = [{**ANALYSES["logistic"], "formula": "died ~ age"}, {**ANALYSES["linear"], "formula": "died ~ age * sex"}]

    assert question_of(written[0]) == question_of(written[1])
    assert all(question_of(AnalysisSpec.from_mapping(each)) != question_of(written[0]) for each in others)


@pytest.mark.parametrize("name", ["linear", "cox with one baseline", "describe"])
def test_the_order_of_the_sites_changes_no_bit(name, study):
    contract, sites = study
    spec = AnalysisSpec.from_mapping(ANALYSES[name])

    found = [run_analysis(spec, contract, order).as_dict() for order in permutations(sites)]

    assert [each for each in found if each != found[0]] == []


def test_a_total_is_exact_and_rounded_once():
    values = [np.array([1e15, 2.0**-60, 0.1]), np.array([-1e15, 2.0**-60, 0.2]), np.array([3.0, 0.0, 0.3])]
    request = SumRequest(statistic="squares", shape=(3,), contribution=lambda own: own)

    total = total_of(request, ["a", "b", "c"], values)

    assert total[:2].tolist() == [3.0, 2.0**-59]
    assert np.array_equal(total, STATISTICS_FORMAT.decode(reduce(added, map(STATISTICS_FORMAT.encode, values[::-1]))))


@pytest.mark.parametrize(
    ("number", "sentence"),
    [(np.inf, "b: squares: a number of this site is not finite"), (1e20, "b: squares: a number of this site is beyond the agreed bound")],
)
def test_a_number_out_of_bounds_names_the_site_and_the_statistic(number, sentence):
    request = SumRequest(statistic="squares", shape=(1,), contribution=lambda own: own)
    with pytest.raises(ConfigError, match=sentence):
        total_of(request, ["a", "b"], [np.array([1.0]), np.array([number])])


@pytest.mark.parametrize("power", [-200, 200])
def test_units_of_any_size_lose_no_digit(power, tmp_path, study):
    scale = 2.0**power
    variables, outcome, rows = made()
    for name in ("age", "dose"):
        variables[name] = {**variables[name], "range": [each * scale for each in variables[name]["range"]]}
    larger = {name: lambda row, _, name=name: repr(float(row[name]) * scale) for name in ("age", "dose")}
    scaled = changed((variables, outcome, rows), **larger)
    contract = Contract.load(write_study(tmp_path, scaled)[0])
    sites = load_sites(sorted(tmp_path.glob("site-*.yaml")), contract)

    for asked in (ANALYSES["linear"], ANALYSES["meta"], ANALYSES["cox"]):
        spec = AnalysisSpec.from_mapping(asked)
        usual, found = run_analysis(spec, *study), run_analysis(spec, contract, sites)
        if asked["kind"] == "compare":
            assert found.meta.fixed == pytest.approx(usual.meta.fixed, rel=1e-12)
            assert found.meta.random_bse == pytest.approx(usual.meta.random_bse, rel=1e-12)
            continue
        factors = {"glm": [scale, 1.0, scale], "cox": [1 / scale, 1.0]}[asked["kind"]]
        assert found.params / usual.params == pytest.approx(factors, rel=1e-11)
        assert found.bse / usual.bse == pytest.approx(factors, rel=1e-11)
        assert found.pvalues == pytest.approx(usual.pvalues, rel=1e-9)
    told = run_analysis(AnalysisSpec.from_mapping({"kind": "describe", "variables": ["age"]}), contract, sites).as_dict()["variables"][0]
    same = run_analysis(AnalysisSpec.from_mapping({"kind": "describe", "variables": ["age"]}), *study).as_dict()["variables"][0]
    assert [told[key] / scale for key in ("mean", "sd", "q50")] == pytest.approx([same[key] for key in ("mean", "sd", "q50")], rel=1e-12)


@pytest.mark.parametrize("name", ["logistic", "cox with one baseline", "km", "meta"])
def test_sums_under_masks_that_cancel_give_the_same_bits(name, study):
    contract, sites = study
    spec = AnalysisSpec.from_mapping(ANALYSES[name])
    places = range(len(sites))
    keys = {frozenset(pair): os.urandom(KEY_BYTES) for pair in combinations(places, 2)}
    masks = [SessionMasks(me, {other: keys[frozenset((me, other))] for other in places if other != me}) for me in places]
    analysis, rows_of = conversation(spec, contract)
    rows = [rows_of(site.table) for site in sites]
    positions = count()

    def masked_total(request):
        position, sent = next(positions), []
        for own, mask in zip(rows, masks, strict=True):
            plain = STATISTICS_FORMAT.encode(request.contribution(own))
            sent.append(added(plain, mask.mask(position, plain.shape, f"{position}".encode())))
            assert not np.array_equal(sent[-1], plain)
        return STATISTICS_FORMAT.decode(reduce(added, sent))

    request, result = next(analysis), None
    while result is None:
        try:
            request = analysis.send(masked_total(request))
        except StopIteration as end:
            result = end.value

    assert result.as_dict() == run_analysis(spec, contract, sites).as_dict()
