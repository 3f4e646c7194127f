"""Files of the nodes of a rehearsed analysis: tables, frozen rows and policies are found from where the nodes' files are."""

from __future__ import annotations

import shutil
import sqlite3
import stat
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from p2pfl.analyses.site_files import load_settings, load_sites
from p2pfl.data.cohort_files import freeze_cohort
from p2pfl.data.contract import Contract
from p2pfl.data.site_rows import examine_site_table
from p2pfl.experiment.loading import load_study
from p2pfl.governance.identity import Identity
from p2pfl.launcher.analysis_rehearsal import found_sites
from p2pfl.node.site import SiteFile
from p2pfl.yaml_files import dump_yaml, load_yaml

EXAMPLE = Path(__file__).parents[2] / "examples" / "statistics"


@pytest.fixture
def example(tmp_path):
    return Path(shutil.copytree(EXAMPLE, tmp_path / "statistics"))


def files_of_nodes(example, place):
    settings = [load_settings(example / name) for name in ("leipzig.yaml", "lyon.yaml", "leeds.yaml")]
    with ExitStack() as stack:
        return [each.folder / "site.yaml" for each in found_sites(settings, place, stack)]


def test_each_node_reads_the_table_and_the_policy_of_its_site(example, tmp_path):
    files = files_of_nodes(example, tmp_path / "nodes")
    contract = Contract.load(example / "contract.yaml")

    found, expected = load_sites(files, contract), load_sites(sorted(example.glob("l*.yaml")), contract)
    assert {each.name: each.table.patients for each in found} == {each.name: each.table.patients for each in expected}
    assert {each.name: each.policy for each in found} == {each.name: each.policy for each in expected}
    study = load_study(SiteFile.load(files[0]).study)
    for file in files:
        site = SiteFile.load(file)
        assert site.confirmed == study.digest
        assert Identity.load(site.keys).owns(study.member(site.member))


def test_frozen_rows_are_found_again(example, tmp_path):
    contract = Contract.load(example / "contract.yaml")
    settings = load_settings(example / "lyon.yaml")
    examined = examine_site_table(settings.section, contract)
    freeze_cohort(examined.table, contract, settings.section.cohort, settings.section.keys)
    with (example / "lyon.csv").open("a", encoding="latin-1") as file:
        file.write("71;70;masculin;7,1;0;11/07/2021;455;0\n")
    (lyon,) = [each for each in files_of_nodes(example, tmp_path / "nodes") if each.parent.name == "lyon"]
    (site,) = load_sites([lyon], contract)

    assert len(site.table.patients) == 70
    assert stat.S_IMODE((lyon.parent / "keys" / "cohort.key").stat().st_mode) == 0o600


def test_paths_of_a_database_are_right_from_the_nodes_file(example, tmp_path):
    pytest.importorskip("sqlalchemy")
    with closing(sqlite3.connect(example / "leeds.db")) as database:
        database.execute(
            "CREATE TABLE stroke (patient TEXT, age INT, sex TEXT, glucose REAL, treatment TEXT, admitted DATE, days INT, died INT)"
        )
        database.execute("INSERT INTO stroke VALUES ('7', 70, 'F', 120, '0', '2021-03-01', 30, 1)")
        database.commit()
    leeds = load_yaml(example / "leeds.yaml")
    leeds["table"] = {"sql": {"url": "sqlite:///leeds.db", "query": "SELECT * FROM stroke"}, "units": {"glucose": "mg/dl"}}
    (example / "leeds.yaml").write_text(dump_yaml(leeds))
    (file,) = [each for each in files_of_nodes(example, tmp_path / "nodes") if each.parent.name == "leeds"]
    (site,) = load_sites([file], Contract.load(example / "contract.yaml"))

    assert site.table.patients == ("7",)
