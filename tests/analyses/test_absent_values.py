"""Sites that lack values: no complete row at all, or a variable that they do not have."""

from __future__ import annotations

import pytest
from study_tables import changed, made, write_study

from p2pfl.analyses import stats
from p2pfl.yaml_files import dump_yaml

ANALYSES = {
    "glm": lambda ask: stats.glm("died ~ age + dose", family="binomial", **ask).params,
    "cox": lambda ask: stats.cox("Surv(days, died) ~ age + dose", **ask).params,
    "cox on a grid": lambda ask: stats.cox("Surv(days, died) ~ age + dose", grid=50, **ask).params,
    "meta": lambda ask: stats.compare("age ~ dose", family="gaussian", coefficient="dose", **ask).meta.fixed,
}


@pytest.mark.parametrize("analysis", ANALYSES)
def test_a_site_without_a_complete_row_adds_nothing(analysis, tmp_path):
    study = changed(
        made(),
        age=lambda row, place: "" if row["site"] == "site-1" and place % 2 else row["age"],
        dose=lambda row, place: "" if row["site"] == "site-1" and not place % 2 else row["dose"],
    )
    contract, sites = write_study(tmp_path, study)

    found = ANALYSES[analysis]({"contract": contract, "sites": sites})

    assert found == pytest.approx(ANALYSES[analysis]({"contract": contract, "sites": [sites[0], sites[2]]}), rel=1e-10)


def test_an_indicator_says_at_which_sites_a_variable_is_absent(tmp_path):
    variables, outcome, rows = made()
    variables = {**variables, "dose": {**variables["dose"], "absent": "indicator", "absent_value": 3}}
    contract, sites = write_study(tmp_path, (variables, outcome, rows))
    table = tmp_path / "site-2.csv"
    table.write_text(table.read_text().replace("dose", "another", 1))
    sites[2].write_text(dump_yaml({"table": {"file": "site-2.csv", "absent": ["dose"]}}))

    found = stats.glm("died ~ dose + dose.absent", family="binomial", contract=contract, sites=sites)
    with_value = stats.glm("died ~ dose", family="binomial", contract=contract, sites=sites[:2])

    assert found.names == ("(Intercept)", "dose", "dose.absent")
    assert found.params[:2] == pytest.approx(with_value.params, rel=1e-8)


def test_a_site_of_few_patients_has_no_estimate_of_its_own(tmp_path):
    variables, outcome, rows = made()
    few = [row for row in rows if row["site"] != "site-1"] + [row for row in rows if row["site"] == "site-1"][:9]
    contract, sites = write_study(tmp_path, (variables, outcome, few), policy={"may_release": ["site_estimates"]})

    found = stats.compare("age ~ dose", family="gaussian", coefficient="dose", contract=contract, sites=sites)

    assert found.meta.num_estimates == 2
    assert [name for name, *_ in found.sites] == ["site-0", "site-2"]


def test_cells_of_time_that_are_merged_hide_every_group(tmp_path):
    contract, sites = write_study(tmp_path, made())

    table = stats.km("Surv(days, died) ~ stage", grid=1, contract=contract, sites=sites).table

    assert len(table.ends_T) > 3
    for counts in (table.events_TG, table.censored_TG, table.at_risk):
        assert not ((counts > 0) & (counts < 5)).any()
    assert (table.events_TG.sum(), table.censored_TG.sum()) == (
        sum(row["died"] == "1" for row in made()[2]),
        sum(row["died"] == "0" for row in made()[2]),
    )
