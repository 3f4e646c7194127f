"""`p2pfl data check` and `freeze`: a report that shows no patient, example rows on a terminal alone, rows that stay as they are frozen."""

import json
import stat

import pytest
import yaml
from contracts import CONTENT, HEADER, ROWS, contract

from commands import run_here
from terminals import Terminal

BAD_ROWS = ["p1,60,5.5,F,2020-02-29,0", "p2,711,7,diverse,2021-03-09,1", "p2,,<5,x,09.03.2021,0"]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder with a site's file, a contract and a table, which is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "contract.yaml").write_text(yaml.safe_dump(CONTENT))
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"table": {"file": "table.csv", "units": {"glucose": "mmol/l"}}}))
    write_rows(tmp_path, *ROWS)
    return tmp_path


def write_rows(folder, *rows):
    (folder / "table.csv").write_text("\n".join([HEADER, *rows, ""]))


@pytest.fixture
def data(monkeypatch, capfd):
    def run(command, *arguments, agreed=("--contract", "contract.yaml")):
        return run_here("data", command, "site.yaml", *agreed, *arguments, monkeypatch=monkeypatch, capfd=capfd)

    return run


def test_a_table_as_agreed_is_accepted(site, data):
    code, out, err = data("check")

    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "accepted"
    assert "rows       3, 3 patients" in out
    assert "missing    age 1, glucose 1" in out


def test_every_finding_has_column_rule_count_and_remedy_and_no_value(site, data):
    write_rows(site, *BAD_ROWS)

    code, out, err = data("check")

    assert (code, err) == (2, "")
    for rule in (
        "bad  age: outside of 18 to 110 year: 1 row, refused\n     → correct the values, or ask the others to agree on a wider range",
        "bad  sex: a text that is no category's code: 2 rows, refused\n     → write a code of the contract, or ask the others",
        "bad  admitted: a date that is not written as 2026-03-09, and nobody has said its",
        "bad  patient: more than one row of a patient",
        "     → keep one row of each patient, or agree on rows: several-per-patient",
    ):
        assert rule in out
    assert out.splitlines()[-1] == "refused: 5 findings"
    assert all(len(line) <= 80 for line in out.splitlines() if str(site) not in line)
    assert not [text for text in ("711", "diverse", "09.03.2021", "p2", "<5,") if text in out.replace(str(site), "")]


def test_json_has_the_same_findings(site, data):
    write_rows(site, *BAD_ROWS)

    code, out, _ = data("check", "--json")

    said = json.loads(out)
    assert (code, said["accepted"], said["num_rows"], said["num_patients"]) == (2, False, 3, 2)
    assert said["contract"]["digest"] == contract().digest
    assert {each["column"]: each["count"] for each in said["violations"]} == {"age": 1, "glucose": 1, "sex": 2, "admitted": 1, "patient": 1}
    assert all(each["effect"] == "refused" for each in said["violations"])
    assert "diverse" not in out


def test_rows_are_shown_on_a_terminal_and_nowhere_else(site, data):
    write_rows(site, *BAD_ROWS)

    code, out, err = data("check", "--rows")
    assert (code, out) == (2, "")
    assert "--rows: it shows patients' values, and is for a terminal alone" in err
    assert data("check", "--rows", "--json")[:2] == (2, "")

    with Terminal("data", "check", site / "site.yaml", "--contract", site / "contract.yaml", "--rows", columns=100) as terminal:
        terminal.to_its_end()
    shown = "\n".join(terminal.printed)
    assert "line 3  sex = 'diverse': a text that is no category's code" in shown
    assert "line 4  patient = 'p2': more than one row of a patient" in shown


def test_the_contract_is_named_by_the_option_or_by_the_file(site, data):
    code, _, err = data("check", agreed=())
    assert (code, err) == (2, "p2pfl: site.yaml: contract: required, but missing: the file of the data contract, or say --contract FILE\n")

    content = yaml.safe_load((site / "site.yaml").read_text())
    (site / "site.yaml").write_text(yaml.safe_dump({**content, "contract": "contract.yaml"}))

    assert data("check", agreed=())[0] == 0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, "table: required, but missing, such as {file: registry.csv}"),
        ({"tabel": {"file": "table.csv"}}, "tabel = {'file': 'table.csv'}: unknown key, did you mean table?"),
        ({"table": "table.csv"}, "table: expected a mapping (key: value), such as {file: registry.csv}"),
        ({"table": {"file": "table.csv", "unit": {}}}, "table.unit = {}: unknown key, did you mean units?"),
        ({"table": {"file": "~nobody-at-all/x.csv"}}, "no account has this home folder"),
        ({"table": {"file": "gone.csv", "units": {"glucose": "mmol/l"}}}, "gone.csv: no such file"),
        (
            {"table": {"file": "table.csv", "units": {"glucose": "g"}}},
            "site.yaml, table: units.glucose = 'g': the contract has no conversion",
        ),
        ({"table": {"file": "."}, "units": 1}, "units = 1: unknown key"),
        ({"table": {"file": "table.csv"}, "cohort": 7}, "cohort = 7: expected a path"),
    ],
)
def test_a_faulty_file_of_a_site_is_one_sentence(site, data, content, sentence):
    (site / "site.yaml").write_text(yaml.safe_dump(content) if content else "keys: keys\n")

    code, out, err = data("check")

    assert (code, out) == (2, "")
    assert sentence in err


def test_frozen_rows_stay_and_later_ones_are_left_out(site, data):
    code, out, err = data("freeze")

    assert (code, err) == (0, "")
    assert out.startswith("frozen      3 rows of 3 patients\ncommitment  ")
    key, file = site / "keys" / "cohort.key", site / "cohort.json"
    assert (stat.S_IMODE(key.stat().st_mode), stat.S_IMODE(file.stat().st_mode)) == (0o600, 0o600)
    assert key.read_text().strip() not in out
    assert "which binds the site to these rows: p2pfl keys card --cohort site.yaml" in out
    write_rows(site, *reversed(ROWS), "p9,40,5,M,2022-12-24,0")

    code, out, _ = data("check")

    assert code == 0
    assert "frozen     3 rows, as frozen; 1 later row left out" in out
    said = json.loads(data("check", "--json")[1])["cohort"]
    assert (said["rows"], said["later"]) == (3, 1)


def test_changed_rows_are_refused_with_counts_and_no_id(site, data):
    data("freeze")
    write_rows(site, ROWS[0].replace("60", "61"), ROWS[1])

    code, out, err = data("check")

    assert (code, err) == (2, "")
    assert "of 3 frozen rows 1 has changed and 1 has gone: restore them" in " ".join(out.split())
    assert "p1" not in out.replace(str(site), "")
    assert json.loads(data("check", "--json")[1])["accepted"] is False
    with Terminal("data", "check", site / "site.yaml", "--contract", site / "contract.yaml", "--rows", columns=100) as terminal:
        terminal.to_its_end()
    assert any("not as frozen, of patients that are: line 2" in line for line in terminal.printed)


def test_a_second_freeze_replaces_nothing(site, data):
    data("freeze")
    before = (site / "cohort.json").read_bytes(), (site / "keys" / "cohort.key").read_bytes()
    write_rows(site, *ROWS[:2])

    code, out, err = data("freeze")

    assert (code, out) == (2, "")
    assert "3 rows are frozen here already, and nothing has been changed" in err
    assert before == ((site / "cohort.json").read_bytes(), (site / "keys" / "cohort.key").read_bytes())
    (site / "cohort.json").unlink()
    assert data("freeze")[0] == 0
    assert before[1] == (site / "keys" / "cohort.key").read_bytes()  # the same key: the commitments can be compared


def test_a_refused_table_is_not_frozen(site, data):
    write_rows(site, *BAD_ROWS)

    code, out, err = data("freeze")

    assert (code, out) == (2, "")
    assert "the contract refuses the table: nothing has been frozen" in err
    assert "bad  sex: a text that is no category's code" in err
    assert not (site / "keys").exists()
    assert not (site / "cohort.json").exists()


def break_key(site):
    (site / "keys" / "cohort.key").write_text("abc\n")


def lose_key(site):
    (site / "keys" / "cohort.key").unlink()


def open_key(site):
    (site / "keys" / "cohort.key").chmod(0o644)


def break_file(site):
    (site / "cohort.json").write_text("{")


def other_key(site):
    (site / "keys" / "cohort.key").write_text("ab" * 32)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (break_key, "is no key of 64 hex digits: restore it from its backup"),
        (lose_key, "the rows were frozen under this key; restore it from its backup"),
        (open_key, "others may use it; run: chmod 600"),
        (break_file, "is no freeze file, or not whole: restore it"),
        (other_key, "the rows were frozen under another key of this site"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_a_lost_key_or_file_is_a_sentence(site, data, fault, sentence):
    data("freeze")
    fault(site)

    code, out, _ = data("check")

    assert code == 2
    assert sentence in " ".join(out.split())


def test_the_keys_folder_of_others_takes_no_key(site, data):
    (site / "keys").mkdir(mode=0o755)
    (site / "keys").chmod(0o755)

    code, _, err = data("freeze")

    assert (code, "others may use the folder of the keys; run: chmod 700" in err) == (2, True)
    assert list((site / "keys").iterdir()) == []
