"""Contract and analyses of a study: read from files, checked with each other, and found again by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
from study_tables import made, write_study

from p2pfl.analyses.agreed import AgreedAnalyses
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError
from p2pfl.governance.cohort_commitment import CohortCommitment
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.topology import make, weighted
from p2pfl.yaml_files import dump_yaml, load_yaml

RISK = {"kind": "glm", "formula": "died ~ age + sex", "family": "binomial"}


@pytest.fixture
def contract(tmp_path):
    return write_study(tmp_path, made(num_rows=3))[0]


def written(folder, **analyses):
    paths = []
    for name, asked in analyses.items():
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(dump_yaml(asked))
    return paths


def three_members(*cohorts):
    names = ["a", "b", "c"]
    cohorts = [*cohorts, None, None, None]
    cards = [Identity.new().card(name, f"tcp://{name}.example:1", cohort=cohorts[place]) for place, name in enumerate(names)]
    return Study.create({"name": "risk", "task": {"name": "averaging"}}, cards, weighted(make("path", 3), "metropolis").renamed(names))


def findings_of(action):
    with pytest.raises(ConfigError) as refused:
        action()
    return list(refused.value.findings)


def test_analyses_are_named_by_their_files_and_come_back_from_the_study(contract, tmp_path):
    agreed = AgreedAnalyses.load(contract, written(tmp_path, risk={**RISK, "contract": "contract.yaml"}, ages={"kind": "describe"}))
    back = AgreedAnalyses.of(agreed.added_to(three_members()), "study.yaml")

    assert list(agreed.specs) == ["risk", "ages"]
    assert agreed.specs["risk"] == AnalysisSpec.from_mapping(RISK)
    assert agreed.contract.digest == Contract.load(contract).digest
    assert back.contract.digest == agreed.contract.digest
    assert back.specs == agreed.specs
    assert AgreedAnalyses.of(three_members(), "study.yaml") is None


def test_all_faults_of_all_files_are_said_at_once(contract, tmp_path):
    other = load_yaml(contract)
    other["variables"]["age"]["range"] = [18, 111]
    (tmp_path / "other.yaml").write_text(dump_yaml(other))
    files = written(
        tmp_path,
        risk={**RISK, "formula": "died ~ weight"},
        strange={**RISK, "contract": "other.yaml"},
        **{"two words": RISK, "ages": {"kind": "describe"}},
    )
    (tmp_path / "sub").mkdir()
    found = findings_of(lambda: AgreedAnalyses.load(contract, [*files, *written(tmp_path / "sub", ages={"kind": "describe"})]))

    assert [finding.partition(".yaml: ")[2][:30] for finding in found] == [
        "formula: weight: no variable o",
        f"contract = '{tmp_path}/other.yaml'"[:30],
        "the analysis is called by the ",
        "another analysis is called age",
    ]


def test_common_rows_get_the_variables_of_all_analyses(contract, tmp_path):
    common = {**RISK, "formula": "died ~ age", "rows": "common"}
    files = written(tmp_path, risk=common, more={**RISK, "formula": "died ~ age + dose"}, sexes={**common, "common": ["sex"]})
    study = AgreedAnalyses.load(contract, files).added_to(three_members())
    agreed = AgreedAnalyses.of(study, "study.yaml")
    used = tuple(name for name in agreed.contract.variables if name in ("age", "sex", "dose", "died"))

    assert {name: spec.common for name, spec in agreed.specs.items()} == {"risk": used, "more": (), "sexes": used}
    assert study.analyses["risk"]["common"] == list(used)
    assert agreed.asked(str(files[0])) == agreed.asked("risk")
    (strange,) = written(tmp_path, strange={**common, "common": ["visits"]})
    assert "the study lists risk, more, sexes; a member cannot invent" in findings_of(lambda: agreed.asked(str(strange)))[0]


def changed(study, **keys):
    return Study.from_mapping({**study.as_dict(), **keys}, "x")


def test_a_study_that_leaves_something_to_its_reader_is_refused(contract, tmp_path):
    study = AgreedAnalyses.load(contract, written(tmp_path, risk=RISK)).added_to(three_members())
    short = {key: value for key, value in study.contract.items() if key != "rows"}

    for other, section in ((changed(study, contract=short), "contract"), (changed(study, analyses={"risk": RISK}), "analyses.risk")):
        (found,) = findings_of(lambda other=other: AgreedAnalyses.of(other, "study.yaml"))
        assert found.startswith(f"{section}: not as p2pfl study new writes it, in full and in one form")


def test_a_contract_or_an_analysis_that_cannot_be_is_said_with_its_key(contract, tmp_path):
    study = AgreedAnalyses.load(contract, written(tmp_path, risk=RISK)).added_to(three_members())
    risk = study.analyses["risk"]
    strange = {**study.contract, "query": "SELECT 1"}

    assert "contract.query = 'SELECT 1': unknown key" in findings_of(lambda: AgreedAnalyses.of(changed(study, contract=strange), "x"))[0]
    for name, value, said in (
        ("kind", "tree", "analyses.risk: kind = 'tree'"),
        ("formula", "died ~ weight", "analyses.risk: formula: weight: no"),
    ):
        other = changed(study, analyses={"risk": {**risk, name: value}})
        assert findings_of(lambda other=other: AgreedAnalyses.of(other, "x"))[0].startswith(said)


def test_a_cohort_that_was_frozen_under_another_contract_is_refused_with_its_member(contract):
    agreed = AgreedAnalyses.load(contract)
    cohort = CohortCommitment(contract=agreed.contract.digest, rows=3, patients=3, hmac="ab" * 32)
    (found,) = findings_of(lambda: agreed.added_to(three_members(cohort, replace(cohort, contract="00" * 32))))

    assert found.startswith("members: b has frozen its rows under another data contract than this study's; it needs p2pfl data freeze")
    assert agreed.added_to(three_members(cohort, cohort)).member("b").cohort == cohort


def test_an_analysis_is_found_by_its_name_or_as_a_file_with_the_same_content(contract, tmp_path):
    (path,) = written(tmp_path, risk={**RISK, "contract": "contract.yaml"})
    agreed = AgreedAnalyses.load(contract, [path])
    (same, invented) = written(tmp_path, copy={**RISK, "patients_per_cell": 5}, invented={**RISK, "formula": "died ~ age"})

    assert agreed.asked("risk") == agreed.asked(str(path)) == agreed.asked(str(same)) == agreed.specs["risk"]
    for other in ("sex", str(invented)):
        (found,) = findings_of(lambda other=other: agreed.asked(other))
        assert found.startswith(f"analysis = '{other[:20]}")
        assert found.endswith(": the study lists risk; a member cannot invent one while the network runs: agree on a new study that has it")
    assert AgreedAnalyses.load(contract).asked(str(invented)).formula == "died ~ age"


def test_a_file_that_names_another_contract_than_the_studys_is_refused(contract, tmp_path):
    other = load_yaml(contract)
    other["variables"]["age"]["range"] = [18, 111]
    (tmp_path / "other.yaml").write_text(dump_yaml(other))
    (path,) = written(tmp_path, risk={**RISK, "contract": "other.yaml"})
    (found,) = findings_of(lambda: AgreedAnalyses.load(contract).asked(str(path)))

    assert found.startswith(f"contract = '{tmp_path}"[:30])
    assert "not the study's contract, study; p2pfl study show STUDY --contract FILE writes that one" in found
