"""The tie between two studies: who is the same member, who must be asked first, and that studies without a tie are as they were."""

from __future__ import annotations

import pytest
from test_study import EXPERIMENT, IDENTITIES, card, faults_of, mapping, study

from p2pfl.errors import ConfigError
from p2pfl.governance.continuation import Continuation, changed_experiment, faults_of_rows, is_divided_anew
from p2pfl.governance.encoding import grouped
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study

OLD = study()


def tied(cards, new_keys=()):
    return Continuation.of(OLD.digest, OLD.members, cards, new_keys)


def findings_of(cards, new_keys=()):
    with pytest.raises(ConfigError) as caught:
        tied(cards, new_keys)
    return list(caught.value.findings)


def with_key_of(key, name):
    """The card of somebody who has a member's name and another one's keys."""
    return IDENTITIES[key].card(name, f"tcp://{name}.example:7700", 100)


def test_a_member_is_the_same_by_its_key_wherever_it_is_and_whatever_it_is_called():
    moved, renamed = card("hungary", address="tcp://elsewhere.example:1"), with_key_of("va", "richmond")

    found = tied([card("cleveland"), moved, renamed, card("stranger")])

    assert found == Continuation(study=OLD.digest, members={"cleveland": "cleveland", "hungary": "hungary", "richmond": "va"})
    assert dict(found.sentences(["richmond", "stranger"])) == {
        "richmond": "goes on from its model as va",
        "stranger": "is new, and begins as the study says",
    }


def test_a_name_with_another_key_is_somebody_else_until_somebody_has_asked():
    other = Identity.new().card("va", None, 100)

    (finding,) = findings_of([card("cleveland"), other])
    assert finding.startswith("members: va has another key than in the study that is continued: ask va by a number that you knew before")
    assert grouped(other.fingerprint) in finding
    assert "--new-key va" in finding
    agreed = tied([card("cleveland"), other], ["va"])
    assert (agreed.members, agreed.new_keys) == ({"cleveland": "cleveland", "va": "va"}, ("va",))
    assert dict(agreed.sentences(["va"])) == {"va": "goes on from its model, with a new key"}


def test_new_keys_that_nobody_has_are_refused():
    assert findings_of([card("cleveland"), card("stranger")], ["cleveland", "stranger", "nobody"]) == [
        "--new-key cleveland: its key is that of the study that is continued",
        "--new-key nobody: no such member of both studies",
        "--new-key stranger: no such member of both studies",
    ]


def test_a_name_whose_own_member_goes_on_under_another_one_is_refused():
    findings = findings_of([with_key_of("va", "richmond"), Identity.new().card("va", None, 100)], ["va"])

    assert findings == ["members: va has the name of a member whose key richmond has now: give one of them another name"]


def test_a_study_of_new_members_alone_continues_nothing():
    (finding,) = findings_of([card("stranger")])

    assert finding == (
        "--continues: none of its members (cleveland, hungary, switzerland, va) is in this study, so there is nothing to continue"
    )


def test_a_study_without_a_tie_keeps_its_content_and_one_with_it_has_another_digest(tmp_path):
    new = OLD.with_continuation(Continuation(study="ab" * 32, members={"va": "va"}))
    new.save(tmp_path / "study.yaml")

    assert "continues" not in OLD.as_dict()
    assert new.as_dict() == {**OLD.as_dict(), "continues": {"study": "ab" * 32, "members": {"va": "va"}}}
    assert new.digest != OLD.digest
    assert Study.read(tmp_path / "study.yaml") == new


@pytest.mark.parametrize(
    ("tie", "told"),
    [
        ({"study": "ab"}, "continues.study"),
        ({"study": "ab" * 32, "round": 3}, "continues.round"),
        ({"study": "ab" * 32, "members": {"basel": "basel"}}, "continues.members: 'basel' has no card"),
        ({"study": "ab" * 32, "members": {"va": "../va"}}, "continues.members"),
        (
            {"study": "ab" * 32, "members": {"va": "va", "hungary": "va"}},
            "continues.members: 'va' of the older study goes on as 2 members; expected one",
        ),
        ({"study": "ab" * 32, "new_keys": ["va"]}, "continues.new_keys: 'va' is not in continues.members"),
    ],
)
def test_a_tie_that_cannot_be_is_refused(tie, told):
    (finding,) = faults_of({**mapping(), "continues": tie})

    assert finding.startswith(told)


def test_what_is_different_from_the_older_experiment_is_found():
    new = {**EXPERIMENT, "rounds": 30, "nodes": 4}

    assert changed_experiment(EXPERIMENT, new) == [("nodes", None, 4), ("rounds", 15, 30)]
    assert changed_experiment(EXPERIMENT, EXPERIMENT) == faults_of_rows(EXPERIMENT, new) == []
    assert not is_divided_anew(EXPERIMENT, new)
    assert is_divided_anew({**EXPERIMENT, "nodes": 3}, new)


@pytest.mark.parametrize("key", ["seed", "validation"])
def test_rows_that_a_model_has_trained_on_are_not_held_out_later(key):
    (finding,) = faults_of_rows({**EXPERIMENT, key: 0.25}, {**EXPERIMENT, key: 0.5})

    assert finding.startswith(f"{key} = 0.5: 0.25 in the study that is continued; the rows that are held out follow from it")
