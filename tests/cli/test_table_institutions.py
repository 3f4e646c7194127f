"""Three institutions train on tables of three kinds by one contract: separate site files, real daemons, and no Python."""

from __future__ import annotations

import csv
import json
import sqlite3
from contextlib import ExitStack

import pytest
import torch
from clinic_tables import NAMES, patients, write_clinics

from commands import run_here, start_command
from p2pfl.evaluation.results import Run
from p2pfl.simulator import simulate
from p2pfl.transports import reserve_port
from p2pfl.yaml_files import dump_yaml, load_yaml

DEADLINE_S = 300


@pytest.fixture
def p2pfl(monkeypatch, capfd):
    def run(*arguments, code=0):
        found, out, err = run_here(*arguments, monkeypatch=monkeypatch, capfd=capfd)
        assert found == code, err
        return out if code == 0 else err

    return run


@pytest.fixture
def members(tmp_path, p2pfl):
    """Site files of three members that have joined a study of a table task; none of them says where its table is."""
    experiment = write_clinics(tmp_path)
    p2pfl("data", "prepare", experiment)
    with ExitStack() as ports:
        for name in NAMES:
            address = ports.enter_context(reserve_port()).address
            p2pfl("keys", "new", "--name", name, "--out", tmp_path / name / "keys", "--address", address)
        cards = [option for name in NAMES for option in ("--card", tmp_path / name / "keys" / "card.yaml")]
        digest = json.loads(p2pfl("study", "new", experiment, *cards, "--out", tmp_path / "study.yaml", "--json"))["digest"]
        for name in NAMES:
            keys, out = tmp_path / name / "keys", tmp_path / name / "node.yaml"
            p2pfl("study", "join", tmp_path / "study.yaml", "--keys", keys, "--confirm", digest, "--out", out)
        yield {name: tmp_path / name / "node.yaml" for name in NAMES}


def set_keys(path, **keys):
    path.write_text(dump_yaml({**load_yaml(path), **keys}))


def say_tables(members):
    """Basel has a Parquet file, Bern a CSV file of its own kind, Genf a database."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("sqlalchemy")
    pq.write_table(pa.Table.from_pylist(patients("basel")), members["basel"].parent / "table.parquet")
    set_keys(members["basel"], table={"parquet": "table.parquet", "units": {"glucose": "mmol/l"}})
    set_keys(members["bern"], table=load_yaml(members["bern"].parent / "site.yaml")["table"])
    rows = list(csv.reader((members["genf"].parent / "table.csv").read_text(encoding="utf-8").splitlines()))
    with sqlite3.connect(members["genf"].parent / "clinic.db") as database:
        database.execute(f"CREATE TABLE stay ({', '.join(rows[0])})")
        database.executemany(f"INSERT INTO stay VALUES ({', '.join('?' * len(rows[0]))})", rows[1:])
    database.close()
    sql = {"url": "sqlite:///clinic.db", "query": "SELECT * FROM stay"}
    set_keys(members["genf"], table={"sql": sql, "units": {"glucose": "mmol/l"}})


@pytest.mark.slow
def test_nodes_train_on_csv_parquet_and_sql_and_equal_the_simulation(members, tmp_path, p2pfl):
    say_tables(members)
    with ExitStack() as processes:
        nodes = {name: processes.enter_context(start_command("node", "start", path, cwd=path.parent)) for name, path in members.items()}
        try:
            said = {name: node.communicate(timeout=DEADLINE_S) for name, node in nodes.items()}
        finally:
            for node in nodes.values():
                node.kill()
    assert {name: node.returncode for name, node in nodes.items()} == dict.fromkeys(NAMES, 0), said
    simulated = simulate(tmp_path / "stroke.yaml", out=tmp_path / "simulated")
    runs = {name: path.parent / "state" / "run" for name, path in members.items()}

    for name, run in runs.items():
        torch.testing.assert_close(Run(run).models[name], simulated.models[name], atol=1e-6, rtol=1e-6)
    # the folder of a node's run and a file of new rows are enough
    predicted = p2pfl("predict", runs["genf"], members["bern"].parent / "site.yaml", "--node", "genf").splitlines()
    assert predicted == p2pfl("predict", tmp_path / "simulated", members["bern"].parent / "site.yaml", "--node", "genf").splitlines()
    assert len(predicted) == 80
    # no id and no file of another member is in what a node has written down
    texts = [path.read_bytes() for run in runs.values() for path in run.rglob("*") if path.is_file()]
    assert not [text for text in texts if b"basel-1" in text]


def test_a_node_without_a_table_says_so_in_one_sentence(members, p2pfl):
    said = p2pfl("node", "start", members["basel"], code=2)

    assert said == f"p2pfl: {members['basel']}: table: required, but missing, such as {{file: registry.csv}}\n"
    assert not (members["basel"].parent / "state").exists()


def test_a_node_holds_its_table_against_the_studys_contract(members, p2pfl):
    rows = (members["genf"].parent / "table.csv").read_text().replace(",F,", ",X,")
    (members["genf"].parent / "table.csv").write_text(rows)
    set_keys(members["genf"], table={"file": "table.csv", "units": {"glucose": "mmol/l"}})
    said = p2pfl("node", "start", members["genf"], code=2)

    assert "table.csv: sex: a text that is no category's code:" in said
    assert "X" not in said.partition("table.csv")[2]


def test_a_contract_of_the_sites_own_that_is_another_one_is_refused(members, p2pfl):
    content = load_yaml(members["bern"].parents[1] / "contract.yaml")
    (members["bern"].parent / "other.yaml").write_text(dump_yaml({**content, "name": "another"}))
    set_keys(members["bern"], table=load_yaml(members["bern"].parent / "site.yaml")["table"], contract="other.yaml")

    assert "it is not the contract of the study: take that one, or say none" in p2pfl("node", "start", members["bern"], code=2)
