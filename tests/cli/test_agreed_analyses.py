"""`study new`, `show` and `join` with a data contract and analyses, and `keys card --cohort`, as institutions use them."""

from __future__ import annotations

import json

import pytest
from study_tables import made, write_study
from typer.testing import CliRunner

from commands import run_here
from p2pfl.cli.data import app as data_app
from p2pfl.cli.keys import app as keys_app
from p2pfl.cli.study import app
from p2pfl.data.contract import Contract
from p2pfl.errors import ConfigError
from p2pfl.experiment.loading import load_study
from p2pfl.governance.card import Card
from p2pfl.yaml_files import dump_yaml, load_yaml

NAMES = ("ost", "sued", "west")
RISK = {"kind": "glm", "formula": "died ~ age + sex", "family": "binomial", "contract": "contract.yaml"}


def invoke(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture
def sites(tmp_path):
    """Three institutions with keys and a table each; the first two have frozen their rows."""
    contract, _ = write_study(tmp_path, made(num_rows=36))
    for place, name in enumerate(NAMES):
        home = tmp_path / name
        address = f"tcp://127.0.0.1:{7700 + place}"
        assert invoke(keys_app, "new", "--name", name, "--address", address, "--out", home / "keys").exit_code == 0
        (tmp_path / f"site-{place}.csv").rename(home / "registry.csv")
        (home / "data.yaml").write_text(dump_yaml({"member": name, "table": {"file": "registry.csv"}}))
        if name != "west":
            assert invoke(data_app, "freeze", home / "data.yaml", "--contract", contract).exit_code == 0
            written = invoke(keys_app, "card", "--cohort", home / "data.yaml", "--keys", home / "keys")
            assert written.exit_code == 0, written.output
    (tmp_path / "risk.yaml").write_text(dump_yaml(RISK))
    (tmp_path / "ages.yaml").write_text(dump_yaml({"kind": "describe", "variables": ["age"]}))
    (tmp_path / "experiment.yaml").write_text("task: {name: averaging, dimension: 1}\ntopology: {name: path}\n")
    return tmp_path


def make_study(sites, *more, names=NAMES):
    cards = [argument for name in names for argument in ("--card", sites / name / "keys" / "card.yaml")]
    return invoke(app, "new", sites / "experiment.yaml", *cards, "--out", sites / "study.yaml", *more)


def with_everything(sites, *more):
    analyses = ("--analysis", sites / "risk.yaml", "--analysis", sites / "ages.yaml")
    return make_study(sites, "--contract", sites / "contract.yaml", *analyses, *more)


def test_a_card_has_the_commitment_of_the_rows_that_are_frozen(sites):
    home = sites / "ost"
    frozen = json.loads((home / "cohort.json").read_text())
    card = Card.load(home / "keys" / "card.yaml")

    assert card.cohort.hmac in json.dumps(frozen)
    assert (card.cohort.rows, card.cohort.patients, card.cohort.contract) == (12, 12, Contract.load(sites / "contract.yaml").digest)
    shown = invoke(keys_app, "show", home / "keys").output
    assert "cohort       12 frozen rows of 12 patients" in shown
    assert json.loads(invoke(keys_app, "show", home / "keys", "--json").output)["cohort"] == card.cohort.as_dict()

    moved = invoke(keys_app, "card", "--address", "tcp://127.0.0.1:7799", "--keys", home / "keys", "--json")
    assert json.loads(moved.output)["cohort"] == card.cohort.as_dict()
    assert "cohort" not in json.loads(invoke(keys_app, "card", "--no-cohort", "--keys", home / "keys", "--json").output)


def test_a_site_that_has_frozen_nothing_has_nothing_to_put_on_its_card(sites):
    home = sites / "west"
    refused = invoke(keys_app, "card", "--cohort", home / "data.yaml", "--keys", home / "keys")
    both = invoke(keys_app, "card", "--cohort", home / "data.yaml", "--no-cohort", "--keys", home / "keys")

    assert str(refused.exception) == f"{home}/cohort.json: no such file: freeze the rows first"
    assert "of each pair one at most" in str(both.exception)
    assert Card.load(home / "keys" / "card.yaml").cohort is None


def test_study_show_has_digest_analyses_and_the_cohort_of_each_member(sites):
    said = with_everything(sites, "--json")
    assert said.exit_code == 0, said.output
    study, contract = load_study(sites / "study.yaml"), Contract.load(sites / "contract.yaml")
    shown = json.loads(invoke(app, "show", sites / "study.yaml", "--json").output)

    assert {key: value for key, value in shown.items() if key != "derived"} == json.loads(said.output)
    assert (shown["contract"], shown["contract_digest"]) == (contract.as_dict(), contract.digest)
    assert {name: content["kind"] for name, content in shown["analyses"].items()} == {"risk": "glm", "ages": "describe"}
    assert [each["cohort"] for each in shown["members"]] == [
        study.member(name).cohort.as_dict() if name != "west" else None for name in NAMES
    ]


def rows_of(text):
    """Rows of the tables in a text, cells joined where they are folded."""
    rows = []
    for line in text.splitlines():
        if line.startswith("│"):
            first, *rest = [cell.strip() for cell in line.strip("│").split("│")]
            if first or not rows:
                rows.append([first, *rest])
            else:
                rows[-1] = [" ".join(filter(None, pair)) for pair in zip(rows[-1], [first, *rest], strict=False)]
    return rows


def test_people_see_all_that_they_agree_to_in_80_columns(sites):
    made = with_everything(sites)
    assert made.exit_code == 0, made.output
    digest = load_study(sites / "study.yaml").digest
    arguments = ("--keys", sites / "ost" / "keys", "--confirm", digest, "--out", sites / "ost" / "site.yaml")
    texts = [made.output, invoke(app, "show", sites / "study.yaml").output, invoke(app, "join", sites / "study.yaml", *arguments).output]
    grouped = Contract.load(sites / "contract.yaml").digest
    grouped = " ".join(grouped[start : start + 4] for start in range(0, 64, 4))
    for text in texts:
        rows = rows_of(text)

        assert max(len(line) for line in text.splitlines() if not line.startswith(str(sites))) <= 80
        assert ["digest", grouped] in rows
        assert any(row[0] == "analysis risk" and '"died ~ age + sex"' in row[1] for row in rows)
        assert any(row[0] == "variable sex" and '"female"' in row[1] for row in rows)
        assert any(row[0] == "ost" and row[1].startswith("12 rows of 12 patients, ") for row in rows)
        assert ["west", "not said: its rows may change"] in rows


def test_a_study_without_a_contract_shows_none(sites):
    make_study(sites)
    shown = json.loads(invoke(app, "show", sites / "study.yaml", "--json").output)

    assert (shown["contract"], shown["contract_digest"], shown["analyses"]) == (None, None, None)
    assert "data contract" not in invoke(app, "show", sites / "study.yaml").output


def test_the_contract_can_be_written_out_of_the_study(sites):
    with_everything(sites)
    out = sites / "written.yaml"

    assert invoke(app, "show", sites / "study.yaml", "--contract", out).exit_code == 0
    assert Contract.load(out).digest == Contract.load(sites / "contract.yaml").digest
    assert "File exists" in str(invoke(app, "show", sites / "study.yaml", "--contract", out).exception)
    (sites / "study.yaml").unlink()
    make_study(sites)
    refused = invoke(app, "show", sites / "study.yaml", "--contract", sites / "other.yaml")
    assert "the study has no data contract" in str(refused.exception)


def another_range(sites):
    other = load_yaml(sites / "contract.yaml")
    other["variables"]["age"]["range"] = [18, 111]
    (sites / "contract.yaml").write_text(dump_yaml(other))


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        (lambda _: None, ("--analysis", "risk.yaml"), "--analysis: needs --contract, the table that the analyses are about"),
        (another_range, ("--contract", "contract.yaml"), "members: ost has frozen its rows under another data contract than this study's"),
        (
            lambda sites: (sites / "risk.yaml").write_text(dump_yaml({**RISK, "formula": "died ~ weight"})),
            ("--contract", "contract.yaml", "--analysis", "risk.yaml"),
            "risk.yaml: formula: weight: no variable of the contract",
        ),
        (
            lambda sites: (sites / "curve.yaml").write_text(dump_yaml({"kind": "describe", "variables": ["patient"]})),
            ("--contract", "contract.yaml", "--analysis", "curve.yaml"),
            "patient is of type id: each value is one patient",
        ),
    ],
)
def test_study_new_refuses_what_no_member_could_run(sites, change, arguments, said, monkeypatch):
    change(sites)
    monkeypatch.chdir(sites)
    refused = make_study(sites, *arguments)

    assert isinstance(refused.exception, ConfigError)
    assert said in str(refused.exception)
    assert not (sites / "study.yaml").exists()


def test_two_members_cannot_run_an_analysis_and_make_no_study_of_one(sites):
    refused = make_study(sites, "--contract", sites / "contract.yaml", "--analysis", sites / "risk.yaml", names=NAMES[:2])

    assert "analyses.risk: a secure sum over 2 participants: expected at least 3" in str(refused.exception)
    assert make_study(sites, "--contract", sites / "contract.yaml", names=NAMES[:2]).exit_code == 0


def test_a_study_whose_contract_was_changed_is_exit_code_2(sites, monkeypatch, capfd):
    with_everything(sites)
    text = (sites / "study.yaml").read_text()
    (sites / "study.yaml").write_text(text.replace("unseen: refuse", "unseen: guess"))
    code, _, said = run_here("study", "show", sites / "study.yaml", monkeypatch=monkeypatch, capfd=capfd)

    assert (code, "contract.variables.sex.unseen = 'guess'" in said) == (2, True)
