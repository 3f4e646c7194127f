"""A site's own contract and frozen rows against those of its study and its card, at `node start`, `stats together` and `doctor`."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from test_own_analysis import LOGISTIC, Institutions

from commands import run_here
from p2pfl.analyses import stats
from p2pfl.analyses.agreed import AgreedAnalyses
from p2pfl.data.cohort_files import freeze_cohort
from p2pfl.data.site_rows import examine_site_table
from p2pfl.data.site_section import SiteSection
from p2pfl.errors import ConfigError, MembersMissing
from p2pfl.experiment.loading import load_study
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.node.doctor.examination import Examination, Fact, Finding
from p2pfl.node.doctor.table import check_table
from p2pfl.node.own_analysis import analyse_together
from p2pfl.node.own_sums import memory_of
from p2pfl.node.own_table import check_own_table
from p2pfl.node.site import SiteFile
from p2pfl.node.start import start
from p2pfl.yaml_files import dump_yaml, load_yaml


class Agreed(Institutions):
    """Three members whose study has the contract, and analyses by name; all have frozen their rows but those in *unfrozen*."""

    def agree(self, unfrozen=(), **analyses):
        study, cards = load_study(self.folder / "study.yaml"), []
        for place, card in enumerate(study.members):
            cohort = None if place in unfrozen else self.freeze(place)
            identity = Identity.load(self.sites[place].parent / "keys")
            cards.append(identity.card(card.name, card.address, card.samples, card.moments, cohort=cohort).as_dict())
        files = [self.written(asked, f"{name}.yaml") for name, asked in analyses.items()]
        study = Study.from_mapping({**study.as_dict(), "members": cards}, "study.yaml")
        study = AgreedAnalyses.load(self.contract, files).added_to(study)
        (self.folder / "study.yaml").write_text(dump_yaml(study.as_dict()))
        for place in range(3):
            self.change(place, confirmed=study.digest)
        return study

    def freeze(self, place):
        found = examine_site_table(self.section(place), self.contract)
        return freeze_cohort(found.table, found.contract, found.section.cohort, found.section.keys).commitment

    def section(self, place):
        return SiteSection.load(self.sites[place])

    def rows(self, place, change):
        path = self.sites[place].with_name("registry.csv")
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    def check(self, place):
        site = SiteFile.load(self.sites[place])
        check_own_table(site, load_study(site.study), self.sites[place])


@pytest.fixture
def agreed(tmp_path):
    with ExitStack() as stack:
        yield Agreed(tmp_path, stack)


def later_row(lines):
    return [*lines, lines[1].replace("p0,", "p999,").replace("p1,", "p999,")]


def changed_row(lines):
    fields = lines[1].split(",")
    return [lines[0], ",".join([fields[0], "44.5", *fields[2:]]), *lines[2:]]


def another_contract(agreed, place):
    other = load_yaml(agreed.contract)
    other["variables"]["age"]["range"] = [18, 111]
    (agreed.folder / "other.yaml").write_text(dump_yaml(other))
    agreed.change(place, contract=str(agreed.folder / "other.yaml"))


def frozen_anew(agreed, place):
    agreed.section(place).cohort.unlink()
    agreed.rows(place, changed_row)
    agreed.freeze(place)


FAULTS = {
    "changed row": (lambda agreed: agreed.rows(0, changed_row), "cohort.json: of 80 frozen rows 1 has changed: restore them"),
    "row gone": (lambda agreed: agreed.rows(0, lambda lines: lines[:-1]), "cohort.json: of 80 frozen rows 1 has gone: restore them"),
    "other rows frozen": (
        lambda agreed: frozen_anew(agreed, 0),
        "cohort.json: other rows are frozen here, and the card of node-0 is bound",
    ),
    "nothing frozen": (
        lambda agreed: agreed.section(0).cohort.unlink(),
        "cohort.json: no such file, and the card of node-0 is bound to 80",
    ),
    "another contract": (lambda agreed: another_contract(agreed, 0), "not the study's contract, study; p2pfl study show STUDY --contract"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_neither_a_node_nor_an_analysis_starts_on_other_rows_than_agreed(name, agreed):
    change, said = FAULTS[name]
    agreed.agree(risk=LOGISTIC)
    agreed.check(0)
    change(agreed)

    for action in (lambda: start(agreed.sites[0]), lambda: analyse_together("risk", agreed.sites[0])):
        with pytest.raises(ConfigError) as refused:
            action()
        assert len(refused.value.findings) == 1
        assert said in str(refused.value)
    assert not memory_of(SiteFile.load(agreed.sites[0])).exists()
    assert not (agreed.sites[0].parent / "state" / "run").exists()
    agreed.check(1)


def test_a_changed_row_is_exit_code_2_at_both_commands(agreed, monkeypatch, capfd):
    agreed.agree(risk=LOGISTIC)
    agreed.rows(1, changed_row)

    for command in (("node", "start", agreed.sites[1]), ("stats", "together", "risk", agreed.sites[1])):
        code, out, said = run_here(*command, monkeypatch=monkeypatch, capfd=capfd)
        assert (code, out) == (2, "")
        assert "of 80 frozen rows 1 has changed" in said
        assert "44.5" not in said


def test_a_site_whose_card_is_bound_needs_its_table(agreed):
    agreed.agree()
    content = load_yaml(agreed.sites[0])
    agreed.sites[0].write_text(dump_yaml({key: value for key, value in content.items() if key != "table"}))

    with pytest.raises(ConfigError, match="table: required, but missing: the card of node-0 is bound to 80 frozen rows of 80 patients"):
        start(agreed.sites[0])


def test_a_table_that_nobody_has_frozen_is_not_read_when_a_node_starts(agreed):
    agreed.agree(unfrozen=[0])
    agreed.sites[0].with_name("registry.csv").unlink()
    agreed.check(0)


def test_later_rows_are_left_out(agreed):
    agreed.agree()
    agreed.rows(0, later_row)
    agreed.check(0)


@pytest.mark.slow
def test_a_node_starts_with_later_rows(agreed):
    agreed.agree()
    agreed.rows(0, later_row)

    with pytest.raises(MembersMissing):
        start(agreed.sites[0], start_within_s=0.05)


def test_an_analysis_of_the_study_runs_by_its_name_over_the_frozen_rows(agreed):
    agreed.agree(risk=LOGISTIC)
    expected = stats.run(LOGISTIC, agreed.contract, agreed.sites)
    agreed.rows(0, later_row)
    found = agreed.found("risk")

    assert [each.as_dict() for each in found] == [expected.as_dict()] * 3, found
    assert found[0].counts.num_patients == 240


def test_an_analysis_that_the_study_does_not_list_is_refused_before_anybody_hears_of_it(agreed):
    agreed.agree(risk=LOGISTIC)
    invented = agreed.written({**LOGISTIC, "formula": "died ~ age"}, "invented.yaml")

    for asked in ("invented", invented):
        with pytest.raises(ConfigError, match="the study lists risk; a member cannot invent one while the network runs"):
            analyse_together(asked, agreed.sites[0])
    assert not memory_of(SiteFile.load(agreed.sites[0])).exists()


def test_where_the_study_lists_none_members_agree_on_a_file(agreed):
    agreed.agree()
    found = agreed.found(agreed.written(LOGISTIC))

    assert [each.counts.num_patients for each in found] == [240] * 3


def noted(agreed, place):
    site = SiteFile.load(agreed.sites[place])
    return list(check_table(Examination(path=agreed.sites[place], site=site, study=load_study(site.study))))


def test_the_doctor_says_the_same_beforehand(agreed):
    agreed.agree()
    (fact,) = noted(agreed, 0)
    assert isinstance(fact, Fact)
    assert fact.said == "80 rows follow the contract study; 80 are frozen and as they were, 0 came later"

    for change, said in FAULTS.values():
        before = {
            path: path.read_bytes() for path in (agreed.sites[0], agreed.sites[0].with_name("registry.csv"), agreed.section(0).cohort)
        }
        change(agreed)
        (finding,) = noted(agreed, 0)
        assert isinstance(finding, Finding)
        assert said in finding.fault
        for path, content in before.items():
            path.write_bytes(content)
