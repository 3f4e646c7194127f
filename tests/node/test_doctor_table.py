"""`p2pfl doctor` holds a site's table against the data contract, where site.yaml names both."""

import pytest
import yaml
from contracts import CONTENT, HEADER, ROWS

from p2pfl.data.cohort_files import freeze_cohort
from p2pfl.data.site_rows import examine_site_table
from p2pfl.data.site_section import SiteSection
from p2pfl.node.doctor.examination import Examination, Fact
from p2pfl.node.doctor.table import check_table
from p2pfl.node.site import SiteFile

TABLE = {"table": {"file": "table.csv", "units": {"glucose": "mmol/l"}}, "contract": "contract.yaml"}


@pytest.fixture
def noted(tmp_path):
    """Examine a site with these keys and rows."""
    (tmp_path / "contract.yaml").write_text(yaml.safe_dump(CONTENT))
    path = tmp_path / "site.yaml"

    def look(rows=ROWS, said=TABLE):
        (tmp_path / "table.csv").write_text("\n".join([HEADER, *rows, ""]))
        path.write_text(yaml.safe_dump({"member": "hungary", "study": "study.yaml", **said}))
        return list(check_table(Examination(path=path, site=SiteFile.load(path))))

    return look


@pytest.mark.parametrize("said", [{}, {"contract": "contract.yaml"}, {"table": TABLE["table"]}])
def test_a_site_without_a_contract_or_a_table_is_not_looked_at(noted, said):
    assert noted(said=said) == []


def test_a_table_as_agreed_is_a_fact_with_its_frozen_rows(noted, tmp_path):
    (found,) = noted()

    assert isinstance(found, Fact)
    assert found.said == "3 rows follow the contract stroke-registry"
    examined = examine_site_table(SiteSection.load(tmp_path / "site.yaml"))
    freeze_cohort(examined.table, examined.contract, examined.section.cohort, examined.section.keys)
    assert noted([*ROWS, "p9,40,5,M,2022-12-24,0"])[0].said.endswith("; 3 are frozen and as they were, 1 came later")
    (changed,) = noted(ROWS[:2])
    assert "of 3 frozen rows 1 has gone" in changed.fault
    assert len(changed.remedy.split()) > 3


def test_each_refusal_is_a_finding_with_its_remedy(noted):
    found = noted(["p1,171,<5,F,2020-02-29,0"])

    assert [(each.fault, each.remedy) for each in found] == [
        (
            "age: outside of 18 to 110 year; is it in year at this site?: 1 row, refused",
            "correct the values, or ask the others to agree on a wider range",
        ),
        (
            "glucose: a limit such as <5 is no number: agree what stands for it, and write that: 1 row, refused",
            "mend the table, or what `table` in site.yaml says of it; p2pfl data check shows the same",
        ),
    ]


def test_a_table_that_cannot_be_read_is_a_finding(noted):
    (found,) = noted(said={**TABLE, "table": {**TABLE["table"], "file": "gone.csv"}})

    assert found.fault.endswith("gone.csv: no such file")
    assert "p2pfl data check" in found.remedy
