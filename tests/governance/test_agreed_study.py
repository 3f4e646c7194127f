"""A study with a data contract and analyses: both are under its digest, and a study without them is what it always was."""

from __future__ import annotations

import copy

import pytest
from test_study import IDENTITIES, NAMES, card, changed_value, faults_of, leaves, mapping, resigned, study, study_digest

from p2pfl.errors import ConfigError
from p2pfl.governance.card import Card
from p2pfl.governance.cohort_commitment import CohortCommitment
from p2pfl.governance.encoding import canonical
from p2pfl.governance.study import Study

CONTRACT = {"schema": 1, "name": "registry", "variables": {"age": {"type": "number", "range": [18.0, 110.0]}}}
ANALYSES = {"ages": {"kind": "describe", "patients_per_cell": 5}, "risk": {"kind": "glm", "formula": "died ~ age"}}
COHORT = CohortCommitment(contract="a1" * 32, rows=412, patients=400, hmac="b2" * 32)


def agreed():
    return study().with_contract(CONTRACT, ANALYSES)


def test_a_study_without_a_contract_has_the_canonical_form_that_it_always_had():
    keys = {"schema", "experiment", "members", "graph"}

    assert set(mapping()) == keys
    assert canonical({key: agreed().as_dict()[key] for key in keys}) == canonical(mapping())


def test_contract_and_analyses_are_in_the_studys_file_in_full():
    made = agreed()

    assert (made.as_dict()["contract"], made.as_dict()["analyses"]) == (CONTRACT, ANALYSES)
    assert Study.from_mapping(made.as_dict(), "x") == made
    assert "analyses" not in study().with_contract(CONTRACT, {}).as_dict()
    assert len({study().digest, study().with_contract(CONTRACT, {}).digest, made.digest}) == 3


@pytest.mark.parametrize("section", ["contract", "analyses"])
def test_nothing_of_contract_or_analyses_can_be_changed_unseen(section):
    original = agreed().as_dict()
    paths = list(leaves(original[section]))

    assert len(paths) >= 4
    for path, value in paths:
        content = copy.deepcopy(original)
        inner = content[section]
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = changed_value(value)

        assert study_digest(content) != study_digest(original), path


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"analyses": ANALYSES}, "contract: required, but missing: the table that the analyses are about"),
        ({"contract": CONTRACT, "analyses": {}}, "analyses = {}: expected at least one; leave the key out where the study lists none"),
        (
            {"contract": CONTRACT, "analyses": {"-x": {}}},
            "analyses: the name '-x': expected 1 to 64 of A-Z a-z 0-9 . _ -, not starting with",
        ),
        ({"contract": {"name": {1, 2}}}, "contract.name = {1, 2}: expected a number, a text, true, false"),
        ({"contract": CONTRACT, "analyses": {"a": {"grid": float("inf")}}}, "analyses.a.grid = inf: expected a finite number"),
        ({"contract": 5}, "contract = 5: expected a mapping"),
    ],
)
def test_what_cannot_be_is_one_sentence(changes, fault):
    (found,) = faults_of({**mapping(), **changes})

    assert found.startswith(fault)


def test_a_cohort_is_on_the_card_under_its_signature():
    bound = IDENTITIES["va"].card("va", "tcp://va.example:7700", 100, cohort=COHORT)
    content = resigned(mapping(), "va")
    content["members"] = [bound.as_dict() if member["name"] == "va" else member for member in content["members"]]

    assert Card.from_mapping(bound.as_dict(), "card").cohort == COHORT
    assert bound.as_dict()["cohort"] == {"contract": "a1" * 32, "rows": 412, "patients": 400, "hmac": "b2" * 32}
    assert Study.from_mapping(content, "x").member("va").cohort == COHORT
    for key, value in {"rows": 411, "hmac": "b3" * 32}.items():
        with pytest.raises(ConfigError, match="signature"):
            Card.from_mapping({**bound.as_dict(), "cohort": {**COHORT.as_dict(), key: value}}, "card")
    with pytest.raises(ConfigError, match="signature"):
        Card.from_mapping({key: value for key, value in bound.as_dict().items() if key != "cohort"}, "card")


def test_a_card_without_a_cohort_has_the_form_that_it_always_had():
    assert [key for name in NAMES for key in card(name).as_dict() if key == "cohort"] == []


@pytest.mark.parametrize("changes", [{"hmac": "xyz"}, {"rows": -1}, {"more": 1}])
def test_a_cohort_that_cannot_be_is_refused(changes):
    with pytest.raises(ConfigError, match=r"cohort\."):
        Card.from_mapping({**card("va").as_dict(), "cohort": {**COHORT.as_dict(), **changes}}, "card")
