"""Contracts and files of sites that try to run code, to read another file or table, or to select one patient: each is one sentence."""

import os
import sqlite3

import pytest
import yaml
from contracts import CONTENT, HEADER, ROWS

from p2pfl.data.check import accepted_table
from p2pfl.data.contract import Contract
from p2pfl.data.site_section import SiteSection
from p2pfl.data.table_reading import read_site_table
from p2pfl.errors import ConfigError

WORD = "Rumpelstilzchen"
PLAIN = "table: {file: table.csv, units: {glucose: mmol/l}}\n"

CONTRACTS = {
    "a tag that runs a command": ("name: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor for the tag"),
    "a tag that imports": ("name: !!python/module:os.path ''", "could not determine a constructor for the tag"),
    "a tag that includes a file": ("inputs: !include secret.txt", "could not determine a constructor for the tag '!include'"),
    "a query": ("query: SELECT * FROM secret", "a contract holds no query and no expression"),
    "an expression of a variable": (
        "variables: {age: {type: integer, unit: year, range: [18, 110], compute: \"__import__('os').system('touch ran')\"}}",
        "variables.age.compute = ",
    ),
    "a condition of a variable": (
        "variables: {age: {type: integer, unit: year, range: [18, 110], where: patient = 'p1'}}",
        "variables.age.where = ",
    ),
    "a filter of rows": ("filter: patient == 'p1'", "a contract holds no query and no expression"),
    "another file": ("table: {file: secret.txt}", "table.file = 'secret.txt': unknown key"),
    "another database": ("table: {sql: {url: 'sqlite:///other.db', query: SELECT 1}}", "table.sql = "),
    "a path as a name of a variable": ("variables: {../secret.txt: {type: id}}", "variables.../secret.txt: not a name"),
    "a function as a name of a variable": ("variables: {'system(1)': {type: id}}", "variables.system(1): not a name"),
    "a patient as an input": ("inputs: [patient]", "inputs: patient is of type id, which no model takes"),
    "a patient as an outcome": ("outcome: patient", "outcome: patient is of type id, which no model takes"),
    "one value as a range": ("variables: {age: {type: integer, unit: year, range: [60, 60]}}", "one value alone would select patients"),
    "one day as a range": (
        "variables: {admitted: {type: date, range: ['2020-02-29', '2020-02-29']}}",
        "one value alone would select patients",
    ),
    "a range that is computed": (
        "variables: {age: {type: integer, unit: year, range: [\"open('ran', 'w')\", 110]}}",
        "variables.age.range.0 = ",
    ),
    "a factor that is computed": (
        "variables: {glucose: {type: number, unit: mmol/l, range: [1, 60], convert: {mg/dl: {factor: '1/0'}}}}",
        "variables.glucose.convert.mg/dl.factor = '1/0': expected a number",
    ),
}
"""Lines that are put into the contract, in place of those with the same key, and what is said."""

SITES = {
    "a tag that runs a command": (
        "table: !!python/object/apply:os.system ['touch ran']\n",
        "could not determine a constructor for the tag",
    ),
    "a tag that includes a file": ("table: !include secret.txt\n", "could not determine a constructor for the tag '!include'"),
    "a command as a file": ("table: {file: '|touch ran', units: {glucose: mmol/l}}\n", "|touch ran: no such file"),
    "an address as a file": ("table: {file: 'http://127.0.0.1:9/table.csv', units: {glucose: mmol/l}}\n", "no such file"),
    "a device as a file": ("table: {file: /dev/zero, units: {glucose: mmol/l}}\n", "/dev/zero: is no plain file"),
    "a pipe as a file": ("table: {file: pipe, units: {glucose: mmol/l}}\n", "pipe: is no plain file"),
    "another file": (
        "table: {file: secret.txt, units: {glucose: mmol/l}}\n",
        "the header lacks admitted, age, died, glucose, patient, sex",
    ),
    "a column that is computed": (
        "table: {file: table.csv, units: {glucose: mmol/l}, columns: {age: \"__import__('os').system('touch ran')\"}}\n",
        "the header lacks __import__('os').system('touch ran')",
    ),
    "rows that are chosen": ("table: {file: table.csv, units: {glucose: mmol/l}, where: patient = 'p1'}\n", "table.where = "),
    "an address as Parquet": ("table: {parquet: 's3://bucket/table', units: {glucose: mmol/l}}\n", "no such file"),
    "a driver of its own": (
        "table: {sql: {url: 'sqlite+evil:///stays.db', query: SELECT 1}}\n",
        "sql.url: expected sqlite:///FILE or postgresql://USER@HOST:PORT/DATABASE",
    ),
    "a setting that attaches": (
        "table: {sql: {url: 'sqlite:///stays.db?vfs=evil', query: SELECT 1}}\n",
        "sql.url: expected sqlite:///FILE, without settings behind it",
    ),
    "another database": (
        "table: {sql: {url: 'sqlite:///stays.db', query: \"ATTACH 'other.db' AS x\"}, units: {glucose: mmol/l}}\n",
        "sql.query: expected one SELECT",
    ),
    "a second statement": (
        "table: {sql: {url: 'sqlite:///stays.db', query: 'SELECT 1; DROP TABLE secret'}, units: {glucose: mmol/l}}\n",
        "holds more than one statement",
    ),
    "code that is loaded": (
        "table: {sql: {url: 'sqlite:///stays.db', query: \"SELECT load_extension('./evil')\"}, units: {glucose: mmol/l}}\n",
        "does more than read tables",
    ),
    "a pragma as a table": (
        "table: {sql: {url: 'sqlite:///stays.db', query: SELECT * FROM pragma_writable_schema(1)}, units: {glucose: mmol/l}}\n",
        "does more than read tables",
    ),
    "a password file of others": (
        "table: {sql: {url: 'postgresql://a@127.0.0.1:9/b', query: SELECT 1, password_file: secret.txt}, units: {glucose: mmol/l}}\n",
        "others may use it; run: chmod 600",
    ),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a right contract and table, and with things that are nobody's business."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("\n".join([HEADER, *ROWS, ""]))
    (tmp_path / "secret.txt").write_text(WORD + "\n")
    (tmp_path / "secret.txt").chmod(0o644)
    (tmp_path / "site.yaml").write_text(PLAIN)
    (tmp_path / "contract.yaml").write_text(yaml.safe_dump(CONTENT))
    os.mkfifo(tmp_path / "pipe")
    for name in ("stays.db", "other.db"):
        database = sqlite3.connect(tmp_path / name)
        with database:
            database.execute("CREATE TABLE secret (word TEXT)")
            database.execute(f"INSERT INTO secret VALUES ('{WORD}')")
        database.close()
    return tmp_path


def read(folder):
    agreed = Contract.load(folder / "contract.yaml")
    section = SiteSection.load(folder / "site.yaml")
    return accepted_table(read_site_table(section.table, agreed, section.folder), agreed, section.table)


def refused(folder, sentence):
    """One sentence is said, nothing has run, and nothing has been read that is nobody's business."""
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(ConfigError) as error:
        read(folder)

    assert len(error.value.findings) == 1, error.value.findings
    assert sentence in str(error.value)
    assert WORD not in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_without_an_attempt_the_table_is_read(folder):
    assert read(folder).patients == ("p1", "p2", "p3")


@pytest.mark.parametrize(("line", "sentence"), CONTRACTS.values(), ids=CONTRACTS)
def test_a_contract_runs_nothing_and_reads_nothing(folder, line, sentence):
    key = line.partition(":")[0]
    rest = {name: value for name, value in CONTENT.items() if name != key}
    if key == "variables":  # the others stay as they are
        changed = yaml.safe_load(line)["variables"]
        line = yaml.safe_dump({"variables": {**CONTENT["variables"], **changed}})
    (folder / "contract.yaml").write_text(f"{yaml.safe_dump(rest)}{line}\n")

    refused(folder, sentence)


@pytest.mark.parametrize(("text", "sentence"), SITES.values(), ids=SITES)
def test_the_file_of_a_site_runs_nothing_and_reads_nothing_else(folder, text, sentence):
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("pyarrow")
    (folder / "site.yaml").write_text(text)

    refused(folder, sentence)
