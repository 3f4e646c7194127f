"""A site's rows from its file: all of an accepted table, or those that are frozen, whatever kind of table they come from."""

import pytest
import yaml
from contracts import CONTENT, HEADER, ROWS

from p2pfl.data.cohort_files import freeze_cohort
from p2pfl.data.site_rows import examine_site_table, site_rows
from p2pfl.data.site_section import SiteSection
from p2pfl.errors import ConfigError, DataError


@pytest.fixture
def section(tmp_path):
    """Write a site's file, and read it."""
    (tmp_path / "contract.yaml").write_text(yaml.safe_dump(CONTENT))

    def load(rows=ROWS, **said):
        (tmp_path / "table.csv").write_text("\n".join([HEADER, *rows, ""]))
        own = {"table": {"file": "table.csv", "units": {"glucose": "mmol/l"}}, "contract": "contract.yaml", **said}
        (tmp_path / "site.yaml").write_text(yaml.safe_dump(own))
        return SiteSection.load(tmp_path / "site.yaml")

    return load


def test_without_a_freeze_all_rows_count(section, tmp_path):
    agreed, rows = site_rows(section())

    assert (agreed.name, rows.patients) == ("stroke-registry", ("p1", "p2", "p3"))
    with pytest.raises(ConfigError, match="contract: required, but missing"):
        site_rows(section(contract=None))
    assert site_rows(section(contract=None), tmp_path / "contract.yaml")[1].patients == rows.patients


def test_frozen_rows_alone_count_and_changed_ones_are_refused(section):
    found = examine_site_table(section())
    freeze_cohort(found.table, found.contract, found.section.cohort, found.section.keys)

    assert site_rows(section(["p0,40,5,M,2022-12-24,0", *reversed(ROWS)]))[1].patients == ("p1", "p2", "p3")
    with pytest.raises(DataError, match=r"cohort\.json: of 3 frozen rows 1 has changed: restore them"):
        site_rows(section([ROWS[0].replace("60", "61"), *ROWS[1:]]))
    with pytest.raises(DataError, match="sex: a text that is no category's code: 1 row, refused"):
        site_rows(section([ROWS[0].replace("F", "x"), *ROWS[1:]]))


def test_the_same_rows_from_another_kind_of_table_are_as_frozen(section, tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    found = examine_site_table(section())
    freeze_cohort(found.table, found.contract, found.section.cohort, found.section.keys)
    columns = {
        "patient": ["p3", "p2", "p1"],
        "age": [None, 71, 60],
        "glucose": [None, 7.0, 5.5],
        "sex": ["2", "M", "F"],
        "admitted": ["2022-12-01", "2021-03-09", "2020-02-29"],
        "died": [0, 1, 0],
    }
    parquet.write_table(pa.table(columns), tmp_path / "table.parquet")

    _, rows = site_rows(section(table={"parquet": "table.parquet", "units": {"glucose": "mmol/l"}}))

    assert rows.patients == ("p1", "p2", "p3")


def test_paths_are_beside_the_file_or_beside_its_state(section, tmp_path):
    plain = section()
    assert (plain.cohort, plain.keys) == (tmp_path / "cohort.json", tmp_path / "keys")
    moved = section(state="/var/lib/p2pfl/state", keys="own/keys", cohort=None)
    assert (str(moved.cohort), moved.keys) == ("/var/lib/p2pfl/cohort.json", tmp_path / "own" / "keys")
    assert section(state="/var/lib/p2pfl/state", cohort="rows.json").cohort == tmp_path / "rows.json"


def test_a_nodes_other_keys_are_left_to_the_node(section):
    assert section(member="hungary", study="study.yaml", threads=2).contract is not None
    with pytest.raises(ConfigError, match=r"threads = 2: unknown key"):
        section(threads=2)
