"""The commands study new, show and join, as an institution uses them."""

from __future__ import annotations

import json
import re

import pytest
from test_study import IDENTITIES, NAMES, RESOLVED, card, study
from typer.testing import CliRunner

import p2pfl
from p2pfl.cli.keys import app as keys_app
from p2pfl.cli.study import app
from p2pfl.errors import ConfigError
from p2pfl.experiment.graph import build_schedule
from p2pfl.experiment.loading import experiment_from, load_study
from p2pfl.governance.card import Card
from p2pfl.governance.study import Study, TensorRow, layout_faults
from p2pfl.node.site import SiteFile
from p2pfl.topology import schedule
from p2pfl.yaml_files import dump_yaml, load_yaml


@pytest.fixture
def sites(tmp_path):
    """Each institution's folder after `p2pfl keys new`, and the cards as they were sent to the first."""
    for i, name in enumerate(NAMES):
        arguments = ["new", "--name", name, "--address", f"tcp://127.0.0.1:{7700 + i}", "--out", str(tmp_path / name / "keys"), "--json"]
        assert CliRunner().invoke(keys_app, arguments).exit_code == 0
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def make_study(folder, experiment, *more, names=NAMES):
    cards = [argument for name in names for argument in ("--card", folder / name / "keys" / "card.yaml")]
    (folder / "experiment.yaml").write_text(experiment)
    return invoke("new", folder / "experiment.yaml", *cards, "--out", folder / "study.yaml", *more)


HEART = "name: heart\ntask: {name: averaging, dimension: 3}\n"


def test_study_new_show_and_join_are_the_path_of_an_institution(sites):
    made = make_study(sites, HEART, "--json")
    assert made.exit_code == 0, made.output
    said = json.loads(made.output)
    loaded = load_study(sites / "study.yaml")
    assert said["digest"] == loaded.digest
    assert said["digest_groups"].replace(" ", "") == loaded.digest

    shown = json.loads(invoke("show", sites / "study.yaml", "--json").output)
    assert {key: value for key, value in shown.items() if key != "derived"} == said
    assert shown["members"][0]["neighbours"] == {"hungary": 1 / 3, "va": 1 / 3}
    text = invoke("show", sites / "study.yaml").output
    assert all(name in text for name in NAMES)
    assert said["digest_groups"] in " ".join(text.split())

    keys, out = sites / "hungary" / "keys", sites / "hungary" / "site.yaml"
    joined = invoke("join", sites / "study.yaml", "--keys", keys, "--confirm", said["digest_groups"].upper(), "--out", out)
    assert joined.exit_code == 0, joined.output
    site = SiteFile.load(out)
    assert (site.member, site.study.resolve(), site.keys.resolve()) == ("hungary", sites / "study.yaml", keys)
    assert site.confirmed == loaded.digest
    again = invoke("join", sites / "study.yaml", "--keys", keys, "--confirm", said["digest"], "--out", out)
    assert "File exists" in str(again.exception)


PERSONAL = "name: lines\ntask: {name: synthetic-logistic, features: 3}\nnodes: 4\npersonal: [bias]\n"
TABLE = [
    {"name": "weight", "shape": [1, 3], "dtype": "float32", "trains": True, "travels": True},
    {"name": "bias", "shape": [1], "dtype": "float32", "trains": True, "travels": False},
]


@pytest.mark.usefixtures("numba")
@pytest.mark.parametrize(
    ("more", "answer"),
    [("", "on"), ("compiled: off\n", "off"), ("optimizer: {momentum: 0.5}\n", "off"), ("schema: 1\n", None)],
)
def test_a_study_says_whether_its_members_train_in_compiled_loops(sites, more, answer):
    made = make_study(sites, PERSONAL.replace("personal: [bias]\n", more), "--json")
    assert made.exit_code == 0, made.output

    assert load_study(sites / "study.yaml").experiment.get("compiled") == answer


def test_a_study_whose_task_is_not_here_leaves_compiled_loops_out(sites):
    made = make_study(sites, "name: elsewhere\ntask: {name: 'nowhere:task'}\n")

    assert made.exit_code == 0, made.output
    assert load_study(sites / "study.yaml").experiment["compiled"] == "off"


def test_a_study_has_its_models_tensors_and_shows_them_without_the_task(sites, monkeypatch):
    said = json.loads(make_study(sites, PERSONAL, "--json").output)

    def not_here(*_):
        raise ConfigError("no such task here")

    def no_task(*_):
        raise AssertionError("a task was looked for")

    monkeypatch.setattr("p2pfl.experiment.plan.find_task", not_here)
    assert said["layout"] == TABLE
    shown = json.loads(invoke("show", sites / "study.yaml", "--json").output)
    assert (shown["layout"], shown["derived"]["start"], shown["derived"]["not_known"]) == (TABLE, None, "no such task here")
    monkeypatch.setattr("p2pfl.tasks.loading.find_task", no_task)
    monkeypatch.setattr("p2pfl.experiment.plan.find_task", no_task)
    text = invoke("show", sites / "study.yaml").output
    assert "stays" in next(line for line in text.splitlines() if line.startswith("│ bias"))
    joined = invoke(
        "join", sites / "study.yaml", "--keys", sites / "va" / "keys", "--confirm", said["digest"], "--out", sites / "site.yaml"
    )
    assert "stays" in next(line for line in joined.output.splitlines() if line.startswith("│ bias"))


def test_a_study_whose_task_cannot_be_made_here_says_that_it_has_no_table(sites):
    made = make_study(sites, HEART.replace("averaging, dimension: 3", "elsewhere.hospital:task"))

    assert made.exit_code == 0, made.output
    assert "without a table of the model's tensors" in made.output
    assert "no digest of the task's code" in made.output
    shown = invoke("show", sites / "study.yaml").output
    assert "no table" in shown
    assert "not bound" in shown
    agreed = load_study(sites / "study.yaml")
    assert (agreed.schema, agreed.layout, agreed.result_contract.task.source) == (3, None, None)


def test_a_pattern_that_names_no_tensor_is_refused_when_the_study_is_made(sites):
    refused = make_study(sites, PERSONAL.replace("[bias]", "[head]"))

    assert "personal: 'head' matches no parameter; the trained parameters are weight, bias" in str(refused.exception)
    assert not (sites / "study.yaml").exists()


def test_a_study_without_a_table_keeps_its_digest():
    old = study()
    new = old.with_layout(TABLE)

    assert "layout" not in old.as_dict()
    assert Study.from_mapping(old.as_dict(), "here").digest == old.digest
    assert new.digest != old.digest
    assert Study.from_mapping(new.as_dict(), "here") == new
    (finding,) = refusal_of({**old.as_dict(), "layout": TABLE})
    assert finding == (
        "schema = 1: schema 3 is that of a study with a result contract, 2 that of one with a layout alone, 1 that of one with neither; "
        "expected 2"
    )
    assert refusal_of({**new.as_dict(), "layout": [*TABLE, TABLE[0]]}) == ["layout: tensor weight is given 2 times; expected once"]


def refusal_of(content):
    with pytest.raises(ConfigError) as refused:
        Study.from_mapping(content, "here")
    return list(refused.value.findings)


def row(name, **changes):
    return TensorRow(**{"name": name, "shape": (2,), "dtype": "float32", "trains": True, "travels": True, **changes})


@pytest.mark.parametrize(
    ("own", "fault"),
    [
        ([row("a"), row("b", shape=(3,))], "tensor b: float32 [3], trains and travels here; float32 [2], trains and travels in the study"),
        ([row("a")], "tensor b: is in the study's model (float32 [2], trains and travels) and not in this one"),
        (
            [row("a"), row("b"), row("c", dtype="int64")],
            "tensor c: is in this model (int64 [2], trains and travels) and not in the study's",
        ),
        ([row("a"), row("b", travels=False)], "tensor b: float32 [2], trains and stays here; float32 [2], trains and travels in the study"),
        ([row("b"), row("a")], "tensor b: stands in another place of the model than in the study's"),
    ],
)
def test_another_layout_is_told_by_its_tensors(own, fault):
    assert layout_faults([row("a"), row("b")], own) == [fault]
    assert layout_faults([row("a"), row("b")], [row("a"), row("b")]) == []


def test_other_frozen_values_are_told_by_their_tensor():
    agreed, own = (row("a", trains=False, travels=False, values=digit * 64) for digit in "01")

    assert layout_faults([agreed], [own]) == ["tensor a: its frozen values are not the study's; take the same pretrained weights"]


def test_study_show_and_join_say_what_will_be_done_in_80_columns(sites):
    experiment = "name: lines\ntask: {name: synthetic-logistic, features: 3, samples: 40}\nnodes: 4\npersonal: [bias]\nrounds: 17\n"
    made = make_study(sites, experiment, "--json")
    assert made.exit_code == 0, made.output
    digest = json.loads(made.output)["digest"]
    arguments = ("--keys", sites / "va" / "keys", "--confirm", digest, "--out", sites / "va" / "site.yaml")
    for text in (invoke("show", sites / "study.yaml").output, invoke("join", sites / "study.yaml", *arguments).output):
        rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]

        assert max(map(len, [line for line in text.splitlines() if not line.startswith(str(sites))])) <= 80
        assert ["task", "synthetic-logistic"] in rows
        assert ["features", "3"] in rows
        assert ["algorithm", "dpsgd"] in rows
        assert ["graph", "ring: 4 members, 4 links"] in rows
        assert any(row[0] == "rounds" and row[1].startswith("17, then at most 200") for row in rows)
        assert ["bias", "1", "float32", "yes", "stays"] in rows
        assert ["arithmetic", "revision 1"] in rows
        assert ["task's code", "built in: the arithmetic revision covers it"] in rows


def test_nothing_of_a_long_option_stays_unseen(sites):
    long = "x" * 300 + "the end"
    make_study(sites, HEART.replace("averaging, dimension: 3", f"'elsewhere.hospital:task', command: {long}, {'k' * 60}: 1"))
    text = invoke("show", sites / "study.yaml").output
    told = "".join(line.strip("│ ") for line in text.splitlines() if line.startswith("│"))

    assert long.replace(" ", "") in "".join(told.replace("│", "").split())
    assert max(map(len, text.splitlines())) <= 80


def unlike(sites, **changes):
    """The study as a machine that computes otherwise would have made it."""
    content = load_yaml(sites / "study.yaml")
    content["result_contract"] |= changes
    (sites / "study.yaml").write_text(dump_yaml(content))
    return load_study(sites / "study.yaml")


def test_study_join_refuses_a_difference_by_name_or_writes_down_that_the_site_accepts_it(sites):
    make_study(sites, HEART)
    digest = unlike(sites, torch="1.99").digest
    arguments = ("join", sites / "study.yaml", "--keys", sites / "va" / "keys", "--confirm", digest, "--out", sites / "site.yaml")
    refused, strange = invoke(*arguments), invoke(*arguments, "--accept-difference", "colour")

    assert re.search(r"torch \d+\.\d+ here, 1\.99 in the study: install torch 1\.99, or let", str(refused.exception))
    assert "'colour': expected one of wire, arithmetic, torch, task" in str(strange.exception)
    assert not (sites / "site.yaml").exists()
    assert "differs here" in invoke("show", sites / "study.yaml").output
    assert invoke(*arguments, "--accept-difference", "torch").exit_code == 0
    assert SiteFile.load(sites / "site.yaml").accept_differences == ("torch",)


def test_another_version_of_p2pfl_is_shown_and_not_refused(sites):
    make_study(sites, HEART)
    digest = unlike(sites, p2pfl="0.0.9").digest
    joined = invoke("join", sites / "study.yaml", "--keys", sites / "va" / "keys", "--confirm", digest, "--out", sites / "site.yaml")

    assert joined.exit_code == 0, joined.output
    assert f"p2pfl 0.0.9 (here {p2pfl.__version__})" in joined.output


def test_a_study_of_before_there_were_result_contracts_is_shown_as_not_bound(sites, tmp_path):
    study(experiment=RESOLVED).save(tmp_path / "old.yaml")

    assert "not bound" in invoke("show", tmp_path / "old.yaml").output


def test_study_join_refuses_another_digest_and_does_not_tell_the_right_one(sites):
    make_study(sites, HEART)
    digest = load_study(sites / "study.yaml").digest
    out = sites / "site.yaml"
    refused = invoke("join", sites / "study.yaml", "--keys", sites / "va" / "keys", "--confirm", "00" * 32, "--out", out)

    assert isinstance(refused.exception, ConfigError)
    assert digest[:16] not in str(refused.exception).replace(" ", "")
    assert not out.exists()


def test_study_join_refuses_keys_that_are_no_members(sites):
    make_study(sites, HEART)
    IDENTITIES["stranger"].save(sites / "stranger")
    card("stranger").save(sites / "stranger" / "card.yaml")
    digest = load_study(sites / "study.yaml").digest
    refused = invoke("join", sites / "study.yaml", "--keys", sites / "stranger", "--confirm", digest, "--out", sites / "site.yaml")

    assert isinstance(refused.exception, ConfigError)
    assert "no member's keys; the members are cleveland, hungary, switzerland, va" in str(refused.exception)
    assert not (sites / "site.yaml").exists()


def test_study_new_takes_a_graph_from_a_file_and_names_the_differences(sites):
    graph = "nodes: [va, hungary, cleveland, switzerland]\nedges: [[va, hungary], [hungary, cleveland], [cleveland, switzerland]]\n"
    (sites / "line.yaml").write_text(graph)
    experiment = HEART + "topology: {file: line.yaml}\n"
    assert make_study(sites, experiment).exit_code == 0
    loaded = load_study(sites / "study.yaml")
    assert loaded.neighbours("hungary") == ("cleveland", "va")
    assert loaded.experiment["topology"] == {"file": "line.yaml"}  # and not the folder of who made it

    (sites / "study.yaml").unlink()
    refused = make_study(sites, experiment, names=NAMES[:3])
    assert isinstance(refused.exception, ConfigError)
    assert "va" in str(refused.exception)


def test_study_new_names_every_card_that_cannot_be_trusted(sites):
    for name in ("hungary", "va"):
        path = sites / name / "keys" / "card.yaml"
        path.write_text(path.read_text().replace("127.0.0.1", "203.0.113.9"))
    refused = make_study(sites, HEART)

    assert isinstance(refused.exception, ConfigError)
    assert [finding.split(":")[0] for finding in refused.exception.findings] == [
        str(sites / name / "keys" / "card.yaml") for name in ("hungary", "va")
    ]
    assert not (sites / "study.yaml").exists()


def test_study_new_refuses_the_same_card_twice(sites):
    refused = make_study(sites, HEART, names=(*NAMES, "va"))

    assert isinstance(refused.exception, ConfigError)
    assert "name = 'va' stands in 2 cards (va, va)" in str(refused.exception)


def test_a_card_in_the_study_is_the_card_that_was_sent(sites):
    make_study(sites, HEART)

    assert load_study(sites / "study.yaml").members == tuple(Card.load(sites / name / "keys" / "card.yaml") for name in NAMES)


@pytest.mark.parametrize(
    "topology", ["{name: base-2}", "{name: el-oracle}", "{name: matchings, base: star}", "{name: one-peer-exponential}"]
)
def test_study_new_links_everybody_who_ever_meets_where_the_graph_changes(sites, topology):
    made = make_study(sites, f"{HEART}topology: {topology}\n")
    assert made.exit_code == 0, made.output
    loaded = load_study(sites / "study.yaml")
    experiment = experiment_from(loaded.experiment)

    assert build_schedule(experiment, NAMES, loaded.topology()).union().num_edges == loaded.topology().num_edges


def test_study_new_writes_down_what_matcha_has_computed(sites, monkeypatch):
    (sites / "line.yaml").write_text(
        "nodes: [va, hungary, cleveland, switzerland]\nedges: [[va, hungary], [hungary, cleveland], [cleveland, switzerland]]\n"
    )
    made = make_study(sites, f"{HEART}topology: {{name: matcha, base: {{file: line.yaml}}, budget: 0.4}}\n")
    assert made.exit_code == 0, made.output
    loaded = load_study(sites / "study.yaml")
    said = loaded.experiment["topology"]
    monkeypatch.setattr(schedule, "activation", None)  # members do not compute it
    (sites / "line.yaml").unlink()
    rounds = build_schedule(experiment_from(loaded.experiment), NAMES, loaded.topology())

    assert {key: said[key] for key in ("name", "base", "budget")} == {"name": "matcha", "base": {"file": "line.yaml"}, "budget": 0.4}
    assert rounds.agreed == {key: said[key] for key in ("probabilities", "step")}
    assert loaded.neighbours("hungary") == ("cleveland", "va")
    assert rounds.union().weights.tobytes() == loaded.topology().weights.tobytes()


def test_study_show_gives_each_direction_its_own_weight(sites):
    made = make_study(sites, f"{HEART}topology: {{name: star}}\nweights: push-sum\nalgorithm: {{name: push-sum}}\nstop: null\n", "--json")
    weights = {member["name"]: member["neighbours"] for member in json.loads(made.output)["members"]}

    assert weights["cleveland"] == {"hungary": 0.5, "switzerland": 0.5, "va": 0.5}
    assert weights["va"] == {"cleveland": 0.25}


def test_a_study_shows_who_relays_for_whom(sites):
    new = ["new", "--name", "va", "--address", "tcp://127.0.0.1:7703", "--relay", "tcp://127.0.0.1:7803", "--out", str(sites / "again")]
    assert "relays at    tcp://127.0.0.1:7803" in CliRunner().invoke(keys_app, new).output
    (sites / "again" / "card.yaml").replace(sites / "va" / "keys" / "card.yaml")
    graph = "nodes: [cleveland, hungary, switzerland, va]\nedges:\n  - {between: [cleveland, hungary], transport: relay}\n"
    (sites / "net.yaml").write_text(graph + "  - [hungary, switzerland]\n  - [switzerland, va]\n  - [va, cleveland]\n")
    said = json.loads(make_study(sites, HEART + f"topology: {{file: {sites / 'net.yaml'}}}\n", "--json").output)

    assert said["relays"] == [{"between": ["cleveland", "hungary"], "relay": "va"}]
    text = invoke("show", sites / "study.yaml").output
    assert "relayed by va" in next(line for line in text.splitlines() if "cleveland - hungary" in line)


def test_a_study_whose_links_all_need_a_relay_is_refused_where_nobody_offers_one(sites):
    refused = make_study(sites, HEART, "--transport", "relay")

    assert isinstance(refused.exception, ConfigError)
    assert "graph.edges: hungary - switzerland: is to go through a relay, and nobody else offers one" in str(refused.exception)
