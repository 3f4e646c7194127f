"""A contract is read whole, or refused with all that is wrong in it; its digest is one for one meaning."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from contracts import CONTENT, content, contract, site
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.data.contract import Contract
from p2pfl.data.table_format import SiteTable, TableFormat
from p2pfl.errors import ConfigError
from p2pfl.governance.encoding import grouped
from p2pfl.yaml_files import parse_yaml

NAMES = "patient, age, glucose, sex, admitted, died"


def findings_of(raw):
    with pytest.raises(ConfigError) as caught:
        Contract.from_mapping(raw, "contract.yaml")
    return list(caught.value.findings)


@pytest.mark.parametrize("number", [10**400, -(10**400), 1e308, 0])
@pytest.mark.parametrize("key", ["range", "absent_value", "convert__mg/dl__factor", "missing"])
def test_numbers_of_any_size_are_a_contract_or_a_finding(number, key):
    value = [0, number] if key in ("range", "missing") else number
    try:
        contract(**{f"variables__glucose__{key}": value})
    except ConfigError as error:
        assert error.findings  # noqa: PT017


def test_a_contract_is_read_from_its_file(tmp_path):
    path = tmp_path / "contract.yaml"
    path.write_text(yaml.safe_dump(CONTENT, sort_keys=False))

    read = Contract.load(path)

    assert read == contract()
    assert (read.outcome, read.missing, read.variables["died"].unit) == (("died",), ("NA", "-9"), "1")
    assert (read.levels, read.variables["sex"].categories[0].codes) == ({"sex": ("female", "male")}, ("F", "2"))
    assert read.variables["admitted"].range == (16436.0, 20818.0)
    assert read.variables["glucose"].convert["mg/dl"].factor == 0.0555


def test_what_is_written_out_is_the_same_contract():
    again = Contract.from_mapping(contract().as_dict(), "contract.yaml")

    assert (again, again.digest) == (contract(), contract().digest)


def test_the_digest_is_of_the_meaning():
    reordered = copy.deepcopy(CONTENT)
    reordered["variables"] = dict(reversed(reordered["variables"].items()))
    other_levels = content(variables__sex__categories={"male": ["M", 1], "female": ["F", 2]})

    assert Contract.from_mapping(reordered, "x").digest == contract().digest
    assert Contract.from_mapping(other_levels, "x").digest != contract().digest
    assert contract(variables__age__out_of_range="refuse").digest == contract().digest
    assert contract(variables__age__out_of_range="missing").digest != contract().digest
    assert contract(variables__age__range=[18, 111]).digest != contract().digest


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"variables__age__range": None}, "variables.age.range: required for a variable of type integer, such as [least, largest]"),
        ({"variables__age__unit": None}, 'variables.age.unit: required for a variable of type integer, such as "1" for a count'),
        (
            {"variables__age__range": [110, 18]},
            "variables.age.range = [110.0, 18.0]: the least value comes first, and is smaller: one value alone would select patients",
        ),
        ({"variables__age__range": [0.5, 18]}, "variables.age.range = [0.5, 18.0]: expected whole numbers for type integer"),
        ({"variables__age__range": [0, float("inf")]}, "variables.age.range.1 = inf: expected a finite number"),
        ({"variables__age__type": "float"}, "variables.age.type = 'float': one of 'number', 'integer', 'category', 'date' or 'id'"),
        (
            {"variables__age__out_of_range": "clip"},
            "variables.age.out_of_range = 'clip': one of 'refuse' or 'missing'",
        ),
        (
            {"variables__age__categories": ["old"]},
            "variables.age.categories: a variable of type integer has none; leave it out, or is it of type category?",
        ),
        (
            {"variables__sex__unit": "kg"},
            "variables.sex.unit: a variable of type category has none; leave it out, or is it of type number or integer?",
        ),
        ({"variables__sex__categories": {"f": [True]}}, "variables.sex.categories.f.0 = true: expected a text: write it in quotes"),
        ({"variables__sex__categories": {True: ["y"]}}, "variables.sex.categories.0 = true: expected a text: write it in quotes"),
        ({"variables__sex__categories": {"f": [1.5]}}, "variables.sex.categories.f.0 = 1.5: expected a text: write it in quotes"),
        (
            {"variables__sex__categories": {"f": []}},
            "variables.sex.categories.f = []: expected at least one code that is not empty, or nothing for the label itself",
        ),
        ({"variables__sex__categories": ["f", "f"]}, "variables.sex.categories: the label 'f' is given 2 times; expected once"),
        (
            {"variables__sex__categories": {"f": ["1"], "m": [1]}},
            "variables.sex.categories: the code '1' is given more than once (f, m); expected once",
        ),
        (
            {"variables__sex__categories": {"f": ["F"], "u": ["NA"]}},
            "variables.sex.categories.u: the code 'NA' stands for missing as well; expected one of both",
        ),
        ({"variables__sex__unseen": "category"}, "variables.sex.unseen_category = null: expected one of female, male"),
        (
            {"variables__sex__unseen_category": "male"},
            "variables.sex.unseen_category = 'male': it counts only with unseen: category",
        ),
        (
            {"variables__age__missing": [99]},
            "variables.age.missing: '99' is a value within the range in year, and true values would be lost; expected another code",
        ),
        (
            {"variables__glucose__missing": [999]},
            "variables.glucose.missing: '999' is a value within the range in mg/dl, and true values would be lost; expected another code",
        ),
        ({"variables__age__missing": [None]}, "variables.age.missing.0 = null: expected a text: write it in quotes"),
        (
            {"variables__age__range": [41, 41]},
            "variables.age.range = [41.0, 41.0]: the least value comes first, and is smaller: one value alone would select patients",
        ),
        (
            {"variables__admitted__missing": ["2020-01-01"]},
            "variables.admitted.missing: '2020-01-01' is a value within the range, and true values would be lost; expected another code",
        ),
        (
            {"variables__age__unit": 10**5000},
            "variables.age.unit = a whole number of more than 60 digits: expected a text: write it in quotes",
        ),
        (
            {"variables__age__range": [0, 1e16]},
            "variables.age.range = [0.0, 1e+16]: whole numbers beyond 2^53 lose digits; is it of type id?",
        ),
        ({"name": "a\x1b[2J"}, "name = 'a\\x1b[2J': a text with a character that cannot be seen; expected one line of plain text"),
        (
            {"variables__sex__description": "a\nb"},
            "variables.sex.description = 'a\\nb': a text with a character that cannot be seen; expected one line of plain text",
        ),
        ({"missing": "NA"}, "missing = 'NA': expected a list"),
        ({"missing": [" NA"]}, "missing.0 = ' NA': spaces around it are not read from a table either; leave them out"),
        (
            {"variables__glucose__convert": {"mg/dl": {"factor": 0}}},
            "variables.glucose.convert.mg/dl.factor = 0: every value would become the offset",
        ),
        (
            {"variables__glucose__convert": {"mmol/l": {"factor": 1}}},
            "variables.glucose.convert.mmol/l: it is the agreed unit itself; leave it out",
        ),
        (
            {"variables__age__convert": {"month": {"factor": 0.0833}}},
            "variables.age.convert.month: whole numbers would not stay whole; expected a whole factor and offset, or type number",
        ),
        ({"variables__glucose__convert": {"mg/dl": {}}}, "variables.glucose.convert.mg/dl.factor: required, but missing"),
        (
            {"variables__glucose__convert": {"mg/dl": "x / 18"}},
            "variables.glucose.convert.mg/dl = 'x / 18': expected a mapping (key: value)",
        ),
        ({"variables__glucose__absent_value": 61}, "variables.glucose.absent_value = 61.0: outside of the range"),
        ({"variables__glucose__absent_value": "six"}, "variables.glucose.absent_value = 'six': expected a number"),
        (
            {"variables__glucose__absent_value": None},
            "variables.glucose.absent_value: required, as absent is indicator: the value that all rows of such a site take",
        ),
        ({"variables__age__absent_value": 60}, "variables.age.absent_value = 60.0: it counts only with absent: value or indicator"),
        (
            {"variables__admitted__range": ["1.1.2015", "2026-12-31"]},
            "variables.admitted.range.0 = '1.1.2015': expected a date such as 2026-03-09",
        ),
        (
            {"variables__admitted__range": ["2015-02-30", "2026-12-31"]},
            "variables.admitted.range.0 = '2015-02-30': expected a date such as 2026-03-09",
        ),
        (
            {"patient": "patients"},
            f"patient = 'patients': no variable of the contract; did you mean patient? expected one of {NAMES}",
        ),
        ({"patient": "age"}, "patient = 'age': the variable is of type integer; expected type id"),
        ({"inputs": ["patient"]}, "inputs: patient is of type id, which no model takes"),
        ({"inputs": ["age", "age"]}, "inputs: age is given twice"),
        ({"inputs": ["died"]}, "inputs: died is the outcome as well; expected one of both"),
        ({"outcome": ["age", "died", "sex"]}, "outcome = ['age', 'died', 'sex']: expected one variable, or a time and an event"),
        ({"name": None}, "name: required, but missing"),
        ({"variables": None}, "variables: required, but missing"),
        ({"variables": {}}, "variables = {}: expected at least one name with its type, such as age: {type: integer}"),
        ({"variables__age": 7}, "variables.age = 7: expected a mapping (key: value), such as {type: integer}"),
        ({"table__thousands": "point"}, "table.thousands = 'point': it is the decimal sign as well; expected another one, or none"),
        ({"table": {"thousands": "point"}}, "table.thousands = 'point': say table.decimal as well"),
        ({"schema": 2}, "schema = 2: one of 1"),
        ({"rows": "many"}, "rows = 'many': one of 'one-per-patient' or 'several-per-patient'"),
    ],
)
def test_a_faulty_contract_is_refused_with_place_value_and_remedy(changes, finding):
    assert finding in findings_of(content(**changes))


def test_all_faults_come_at_once():
    found = findings_of(
        content(patient="x", inputs=["y"], variables__age__range=[5, 1], variables__sex__typ="id", name=3, missing=["NA", True])
    )

    assert [finding.partition(" = ")[0].partition(":")[0] for finding in found] == [
        "variables.sex.typ", "missing.1", "name", "variables.age.range",
    ]  # fmt: skip
    assert len(findings_of(content(patient="x", inputs=["y"], variables__age__range=[5, 1]))) == 3


@pytest.mark.parametrize("name", ["Surv", "log", "1st", "a b", "a;b", "", "x" * 65, "älter", "__import__('os')"])
def test_names_that_no_formula_can_say_are_refused(name):
    variables = {**CONTENT["variables"], name: {"type": "id"}}

    assert len(findings_of(content(variables=variables))) == 1


@pytest.mark.parametrize("key", ["query", "sql", "expression", "where", "python"])
@pytest.mark.parametrize("place", ["", "variables__age__"])
def test_a_contract_holds_no_query_and_no_expression(key, place):
    (found,) = findings_of(content(**{f"{place}{key}": "select 1"}))

    assert "unknown key" in found
    assert found.endswith("; a contract holds no query and no expression")


@pytest.mark.parametrize(
    "text",
    [
        "name: !!python/object/apply:os.system [touch ran]",
        "name: !!python/name:os.system",
        "variables: !include other.yaml",
        "variables: !!python/object/new:type [x]",
        "name: a\n--- \nname: b",
        "name: &a [*a]",
        "patient: {query: select * from patients}",
        "outcome: died if age == 41 else 0",
        "variables: {age: {type: integer, unit: year, range: age == 41}}",
        "variables: {age: {type: integer, unit: year, range: [41, 41]}}",
        "variables: {age: {type: eval, range: [0, 1]}}",
        "variables: {x: {type: number, unit: a, range: [0, 1], convert: {b: {factor: __import__('os').system('touch ran')}}}}",
        "variables: {x: {type: category, categories: 'select sex from patients'}}",
        "variables: {x: {type: category, categories: [{lambda: 1}]}}",
        "table: {file: /etc/passwd}",
        "table: {encoding: idna}",
    ],
)
def test_contracts_that_would_run_or_read_or_select_are_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "contract.yaml").write_text(text)

    with pytest.raises(ConfigError):
        Contract.load("contract.yaml")

    assert [each.name for each in tmp_path.iterdir()] == ["contract.yaml"]


def test_the_value_of_an_absent_date_is_kept():
    agreed = contract(variables__admitted__absent="value", variables__admitted__absent_value="2020-01-01")

    assert agreed.variables["admitted"].absent_value == 18262.0
    assert Contract.from_mapping(agreed.as_dict(), "x") == agreed


def test_the_contract_and_the_site_of_the_page_are_right():
    page = (Path(__file__).parents[2] / "docs" / "data-contract.md").read_text(encoding="utf-8")
    written, said, queried = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)

    assert Contract.from_mapping(parse_yaml(written, "page"), "page").variables["age"] == contract().variables["age"]
    digest = grouped(Contract.from_mapping(parse_yaml(written, "page"), "page").digest)
    assert digest in " ".join(page.split())
    own = SiteTable.from_mapping(parse_yaml(said, "page")["table"], "page")
    by_query = SiteTable.from_mapping(parse_yaml(queried, "page")["table"], "page")
    for each in (own, by_query):
        assert list(Contract.from_mapping(parse_yaml(written, "page"), "page").faults_of_site(each)) == []


@given(text=st.text(alphabet="aÄ1.,;:-_'\"\\#{}[]%@!=~ß漢", min_size=1))
@settings(max_examples=50, deadline=None)
def test_a_code_is_a_text_that_is_kept_as_it_is(text):
    agreed = contract(missing=[], variables__sex__categories={"label": [text, text + "x"]})

    assert agreed.variables["sex"].categories[0].codes == (text, text + "x")
    assert Contract.from_mapping(agreed.as_dict(), "x") == agreed


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text("aé1 "),
        lambda x: st.lists(x) | st.dictionaries(st.text("a1 "), x),
    )
)
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize(
    "key", ["variables", "variables__sex", "variables__sex__categories", "variables__glucose__convert", "missing", "table"]
)
def test_any_value_anywhere_is_a_contract_or_a_finding(key, value):
    if value is None:
        value = [None]
    try:
        Contract.from_mapping(content(**{key: value}), "contract.yaml")
    except ConfigError as error:
        assert error.findings  # noqa: PT017


def test_a_site_says_its_units_and_format():
    own = site(separator="semicolon", columns={"age": "Alter (Jahre)", "sex": 3})

    assert own.format == TableFormat(separator="semicolon")
    assert list(contract().faults_of_site(own)) == []
    assert contract().table.overridden(own.format) == TableFormat(separator="semicolon", decimal="point")


@pytest.mark.parametrize(
    ("said", "finding"),
    [
        ({"units": {}}, "units.glucose: required, but missing: sites have it in different units; expected one of mmol/l, mg/dl"),
        ({"units": {"glucose": "g/l"}}, "units.glucose = 'g/l': the contract has no conversion for it; expected one of mmol/l, mg/dl"),
        ({"units": {"glucose": "mg/dl", "sex": "kg"}}, "units.sex = 'kg': a variable of type category has no unit"),
        (
            {"columns": {"agee": "x"}},
            f"columns.agee: no variable of the contract; did you mean age? expected one of {NAMES}",
        ),
        ({"absent": ["age"]}, "absent: age: the contract refuses a site without it"),
        ({"absent": ["glucose"]}, "absent: glucose has a column or a unit here as well; expected one of both"),
        ({"thousands": "point"}, "table.thousands = 'point': it is the decimal sign as well; expected another one, or none"),
    ],
)
def test_a_site_that_says_what_the_contract_has_not_is_refused(said, finding):
    assert finding in list(contract().faults_of_site(site(**said)))


def test_a_sites_section_has_all_its_faults_at_once():
    raw = {"fil": "x", "encoding": "utf8", "columns": {"age": 0}, "format": {}}

    with pytest.raises(ConfigError) as caught:
        SiteTable.from_mapping(raw, "site.yaml, table")

    assert [finding.split(":")[0].split(" = ")[0] for finding in caught.value.findings] == ["format", "encoding", "file", "fil"]
