"""Studies: what they carry, what they refuse, and that their digest covers meaning and not bytes."""

from __future__ import annotations

import copy
import json
from dataclasses import FrozenInstanceError
from hashlib import sha256

import numpy as np
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from zmq.utils import z85

from p2pfl.errors import ConfigError
from p2pfl.experiment.loading import experiment_from, load_study
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study, confirms
from p2pfl.topology import Topology, make, weighted
from p2pfl.yaml_files import dump_yaml, parse_yaml

NAMES = ("cleveland", "hungary", "switzerland", "va")
IDENTITIES = {name: Identity.new() for name in (*NAMES, "stranger")}
EXPERIMENT = {
    "name": "heart-1e5",
    "task": {"name": "heart-disease", "threshold": 1e-05, "columns": ["age", "12e4", "é", "yes"], "fill": None},
    "nodes": None,
    "weighting": "uniform",
    "optimizer": {"lr": 0.1 + 0.2, "nesterov": False},
    "rounds": 15,
}
RESOLVED = experiment_from({"name": "heart", "task": {"name": "averaging", "dimension": 3}, "rounds": 15}).as_dict()


def card(name, **content):
    said = {"address": f"tcp://{name}.example:7700", "samples": 100, **content}
    return IDENTITIES[name].card(content.pop("name", name), said["address"], said["samples"])


def ring(names=NAMES):
    return weighted(make("ring", len(names)), "metropolis").renamed(sorted(names))


def study(cards=None, topology=None, experiment=EXPERIMENT, **changes):
    return Study.create({**experiment, **changes}, cards or [card(name) for name in NAMES], topology or ring())


def mapping():
    return study().as_dict()


def resigned(content, name, **changes):
    """A study's content with another, rightly signed card of one member."""
    changed = copy.deepcopy(content)
    changed["members"] = [card(name, **changes).as_dict() if m["name"] == name else m for m in changed["members"]]
    return changed


def faults_of(content):
    with pytest.raises(ConfigError) as caught:
        Study.from_mapping(content, "study.yaml")
    assert caught.value.place == "study.yaml"
    return list(caught.value.findings)


@pytest.mark.parametrize("name", ["-rf", "--help", "-"])
def test_a_new_study_has_no_member_that_a_command_would_take_for_an_option(name):
    stranger = IDENTITIES["stranger"].card(name, "tcp://stranger.example:1")
    graph = weighted(make("path", 2), "metropolis").renamed(sorted([name, "va"]))

    with pytest.raises(ConfigError, match=f"members: name = '{name}': expected 1 to 64 of .* not starting with '.' or '-'"):
        study([card("va"), stranger], graph)


def test_an_older_study_with_such_a_member_is_read():
    stranger = IDENTITIES["stranger"].card("-rf", "tcp://stranger.example:1")
    content = {"experiment": EXPERIMENT, "members": [stranger.as_dict()], "graph": {"name": "one", "edges": []}}

    assert Study.from_mapping(content, "study.yaml").names == ("-rf",)


def test_a_study_survives_its_file(tmp_path):
    made = study(experiment=RESOLVED)
    made.save(tmp_path / "study.yaml")
    loaded = load_study(tmp_path / "study.yaml")

    assert loaded == made
    assert loaded.digest == made.digest
    assert loaded.experiment == RESOLVED


def saved(tmp_path, experiment):
    path = tmp_path / "study.yaml"
    path.unlink(missing_ok=True)
    study(experiment=experiment).save(path)
    return path


def loaded_with(tmp_path, experiment):
    return load_study(saved(tmp_path, experiment))


@pytest.mark.parametrize("key", ["rounds", "stop", "optimizer", "compiled"])
def test_a_study_whose_experiment_leaves_a_default_to_its_readers_is_refused(tmp_path, key):
    with pytest.raises(ConfigError) as refused:
        loaded_with(tmp_path, {name: value for name, value in RESOLVED.items() if name != key})

    (finding,) = refused.value.findings
    assert finding == (
        f"experiment: {key} not written out, so that each site would take its own version's defaults; "
        "make the study with p2pfl study new, which resolves it"
    )


def test_a_default_within_a_section_is_written_out_too(tmp_path):
    lacking = {**RESOLVED, "optimizer": {key: value for key, value in RESOLVED["optimizer"].items() if key != "lr"}}

    with pytest.raises(ConfigError, match=r"experiment: optimizer\.lr not written out"):
        loaded_with(tmp_path, lacking)


def test_a_study_of_name_task_and_nodes_alone_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"not written out.*p2pfl study new"):
        loaded_with(tmp_path, {key: RESOLVED[key] for key in ("name", "task", "nodes")})


def test_a_study_whose_experiment_cannot_be_is_refused_when_it_is_read(tmp_path):
    for name in ("\x1b]0;mine\x07", "mine\x9b2J", "mine\u202eevil", "mine\u2028p2pfl: all is well"):
        with pytest.raises(ConfigError, match="names the run's folder"):
            load_study(saved(tmp_path, {**RESOLVED, "name": name}))


def test_the_digest_of_a_given_study_is_fixed():
    identity = Identity(Ed25519PrivateKey.from_private_bytes(bytes(range(32))), X25519PrivateKey.from_private_bytes(bytes(range(32, 64))))
    member = identity.card("a", None, 7)
    content = {"experiment": {"name": "demo", "lr": 1e-05}, "members": [member.as_dict()], "graph": {"name": "point", "edges": []}}
    written_out = (
        b"p2pfl study v1\0"
        b'{"experiment":{"lr":1e-05,"name":"demo"},"graph":{"edges":[],"name":"point"},"members":[{"address":null,'
        b'"curve":"' + z85.encode(identity.curve.public_key().public_bytes_raw()) + b'",'
        b'"identity":"03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8","name":"a","samples":7,"schema":1,'
        b'"signature":"' + member.signature.encode() + b'"}],"schema":1}'
    )

    assert Study.from_mapping(content, "x").digest == sha256(written_out).hexdigest()
    assert (
        Study.from_mapping(content, "x").digest == "16c22dc3dddee7b3b3774abfe93c8e1b4d791d0ed9be23c873de645461e5785f"
    )  # other people's studies are confirmed by it: it must never change


@pytest.mark.parametrize("rule", ["metropolis", "max-degree", "lazy", "best-constant"])
@pytest.mark.parametrize("name", ["ring", "star", "complete", "path"])
def test_the_graph_comes_back_bit_for_bit(tmp_path, name, rule):
    topology = weighted(make(name, 4), rule).renamed(NAMES)
    study(topology=topology, experiment=RESOLVED).save(tmp_path / "study.yaml")
    back = load_study(tmp_path / "study.yaml").topology()

    assert back.names == NAMES
    assert back.name == name
    assert np.array_equal(back.senders, topology.senders)
    assert np.array_equal(back.receivers, topology.receivers)
    assert back.weights.tobytes() == topology.weights.tobytes()


@pytest.mark.no_cover
@settings(max_examples=30, deadline=None)  # the machine may be busy
@given(
    st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]))
)
def test_numbers_and_texts_survive_the_file(number, whole, text):
    made = study(optimizer={"lr": number, "whole": whole, "text": text})

    assert Study.from_mapping(parse_yaml(yaml_text(made), "x"), "x").digest == made.digest


def yaml_text(made):
    return dump_yaml(made.as_dict())


def test_the_digest_does_not_depend_on_how_the_yaml_is_written():
    made = study(task={"name": "heart-disease", "threshold": 1e-05, "columns": ["age", "é", "yes"], "fill": None})
    content = made.as_dict()
    backwards = {
        "graph": {"edges": [[b, a, w] for a, b, w in reversed(content["graph"]["edges"])], "name": content["graph"]["name"]},
        "members": [dict(reversed(member.items())) for member in reversed(content["members"])],
        "experiment": dict(reversed(content["experiment"].items())),
        "schema": 1,
    }
    flow, block, quoted = (
        yaml.safe_dump(content, default_flow_style=True, width=40),
        "# a remark\n" + yaml.safe_dump(backwards, indent=8, allow_unicode=False),
        json.dumps(content),
    )

    assert {Study.from_mapping(parse_yaml(text, "x"), "x").digest for text in (flow, block, quoted)} == {made.digest}
    assert parse_yaml(yaml_text(made).replace("1.0e-05", "1e-5"), "x") == content


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path, value


def changed_value(value):
    if value is None or isinstance(value, bool):
        return "x" if value is None else not value
    if isinstance(value, float):
        return float(np.nextafter(value, np.inf))
    if isinstance(value, int):
        return value + 1
    return ("0" if value[0] != "0" else "1") + value[1:]


def test_no_field_can_be_changed_unseen():
    original = mapping()
    digest = study_digest(original)
    paths = list(leaves(original))
    assert len(paths) > 4 * 7 + 4 * 3
    for path, value in paths:
        content = copy.deepcopy(original)
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = changed_value(value)
        try:
            seen = Study.from_mapping(content, "x").digest != digest
        except ConfigError:
            seen = True

        assert seen, path


def test_no_field_can_be_removed_or_added_unseen():
    original = mapping()
    digest = study_digest(original)
    for path, _ in leaves(original):
        content = copy.deepcopy(original)
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        try:
            seen = Study.from_mapping(content, "x").digest != digest
        except ConfigError:
            seen = True

        assert seen or path[-1] == "schema", path  # what it stands for is unchanged: there is one schema
    assert study_digest({**original, "experiment": {**original["experiment"], "more": None}}) != digest
    assert "unknown key" in faults_of({**original, "more": 1})[0]


def study_digest(content):
    return Study.from_mapping(content, "x").digest


def test_the_digest_tells_numbers_from_texts_and_whole_numbers():
    assert len({study(rounds=value).digest for value in (1, 1.0, "1", True)}) == 4


def test_a_tampered_card_in_a_study_is_refused_by_name():
    content = mapping()
    content["members"][1]["address"] = "tcp://evil.example:7700"

    (fault,) = faults_of(content)
    assert fault.startswith("members: signature = ")
    assert "the card of 'hungary'" in fault


def test_members_and_neighbours_are_found_by_name():
    made = study(cards=[card(name) for name in reversed(NAMES)])

    assert made.names == NAMES
    assert made.member("hungary") == card("hungary")
    assert made.neighbours("cleveland") == ("hungary", "va")
    with pytest.raises(ConfigError, match="member = 'budapest': not in this study; one of cleveland, hungary"):
        made.neighbours("budapest")


def test_a_study_does_not_change():
    with pytest.raises(FrozenInstanceError):
        study().members = ()


def test_a_confirmed_digest_may_be_written_as_it_was_read():
    made = study()
    groups = [made.digest[i : i + 4] for i in range(0, 64, 4)]

    assert confirms(made, made.digest)
    assert confirms(made, " ".join(groups).upper())
    assert confirms(made, "-".join(groups) + "\n")
    assert not confirms(made, made.digest[:-1])
    assert not confirms(made, "")
    assert not confirms(made, ("0" if made.digest[0] != "0" else "1") + made.digest[1:])


@pytest.mark.parametrize(
    ("field", "make_cards"),
    [
        ("name", lambda: [card("cleveland"), IDENTITIES["hungary"].card("cleveland", "tcp://other.example:1", 1)]),
        ("address", lambda: [card("cleveland"), card("hungary", address="tcp://cleveland.example:7700")]),
        ("identity", lambda: [card("cleveland"), Identity(IDENTITIES["cleveland"].signing, IDENTITIES["hungary"].curve).card("hungary")]),
        ("curve", lambda: [card("cleveland"), Identity(IDENTITIES["hungary"].signing, IDENTITIES["cleveland"].curve).card("hungary")]),
    ],
)
def test_what_must_differ_between_members_differs(field, make_cards):
    cards = make_cards()
    names = sorted({c.name for c in cards})
    edges = [[names[0], names[1], 0.5]] if len(names) == 2 else []
    content = {"experiment": EXPERIMENT, "members": [c.as_dict() for c in cards], "graph": {"name": "pair", "edges": edges}}

    (fault,) = faults_of(content)
    bearers = ", ".join(c.name for c in cards)
    assert fault == f"members: {field} = {getattr(cards[0], field)!r} stands in 2 cards ({bearers}); expected one"


def test_an_address_of_two_cards_is_found_within_lists():
    shared = "tcp://cleveland.example:7700"
    with pytest.raises(ConfigError, match=f"address = '{shared}' stands in 2 cards \\(cleveland, hungary\\)"):
        study([card("cleveland"), card("hungary", address=["tcp://hungary.example:1", shared]), *map(card, NAMES[2:])])


def test_two_sites_that_only_dial_out_cannot_exchange():
    content = resigned(resigned(mapping(), "hungary", address=None), "switzerland", address=None)

    (fault,) = faults_of(content)
    assert fault.startswith("graph.edges: hungary - switzerland: neither has an address, so that neither can dial the other; one of them")
    assert fault.endswith("needs one, or a third member must offer to relay on its card (p2pfl keys new --relay tcp://host:port)")
    study_digest(resigned(resigned(mapping(), "hungary", address=None), "va", address=None))  # opposite corners: each edge has an address


def test_a_graph_that_names_others_than_the_cards_is_refused():
    with pytest.raises(ConfigError) as caught:
        study(topology=ring(("cleveland", "hungary", "switzerland", "budapest")))

    assert caught.value.findings == (
        "topology 'ring': its node 'budapest' has no card",
        "topology 'ring': has no node 'va', but there is a card",
    )


def test_faults_of_the_graph_are_all_named():
    content = mapping()
    content["graph"]["edges"] += [["cleveland", "cleveland", 0.1], ["hungary", "cleveland", 0.1], ["va", "budapest", 0.1]]

    assert sorted(faults_of(content)) == [
        "graph.edges: 'budapest' has no card",
        "graph.edges: cleveland - hungary is given 2 times; expected once",
        "graph.edges: cleveland is joined to itself",
    ]


def test_a_graph_in_two_parts_is_refused_with_two_members_named():
    content = mapping()
    content["graph"]["edges"] = [["cleveland", "hungary", 0.5], ["switzerland", "va", 0.5]]

    (fault,) = faults_of(content)
    assert "cleveland" in fault
    assert "switzerland" in fault


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "heavy", None])
def test_a_weight_is_a_finite_number(weight):
    content = mapping()
    content["graph"]["edges"][0][2] = weight

    assert [fault for fault in faults_of(content) if fault.startswith("graph.edges.0.2 = ")]


def test_a_directed_graph_comes_back_bit_for_bit(tmp_path):
    senders, receivers, weights = [0, 1, 2, 3, 0], [1, 2, 3, 0, 2], [0.1, 0.2, 0.3, 0.4, 0.5]
    topology = Topology.from_edges("one way", 4, senders, receivers, directed=True, names=NAMES, weights=weights)
    study(topology=topology, experiment=RESOLVED).save(tmp_path / "study.yaml")
    found = load_study(tmp_path / "study.yaml")

    assert found.topology().directed
    for field in ("senders", "receivers", "weights"):
        assert np.array_equal(getattr(found.topology(), field), getattr(topology, field))
    assert found.neighbours("cleveland") == ("hungary", "switzerland", "va")


def test_weights_that_differ_by_direction_are_refused():
    topology = ring()
    weights = topology.weights.copy()
    weights[0] += 0.01
    with pytest.raises(ConfigError, match=r"weighs cleveland - hungary with 0.34.* one way and 0.33.* the other"):
        study(topology=topology.with_weights(weights))


def test_partitioned_data_lie_on_one_machine():
    (fault,) = faults_of({**mapping(), "experiment": {**EXPERIMENT, "nodes": 4}})
    assert fault.startswith("experiment.nodes = 4: ")
    assert "cleveland, hungary, switzerland, va have addresses elsewhere" in fault

    here = [card(name, address=f"tcp://127.0.0.1:{7700 + i}") for i, name in enumerate(NAMES)]
    assert study(cards=here, nodes=4).experiment["nodes"] == 4


def test_weighting_by_samples_needs_them_in_every_card():
    content = resigned({**mapping(), "experiment": {**EXPERIMENT, "weighting": "samples"}}, "va", samples=None)

    assert faults_of(content) == ["experiment.weighting = 'samples': needs `samples` in every card; missing in va"]
    study(weighting="samples")


def test_what_has_no_one_encoding_is_refused():
    content = {**mapping(), "experiment": {"task": {"a": [1, float("nan")], "b": {2: "x"}, "c": {1, 2}}, "d": float("inf")}}

    assert faults_of(content) == [
        "experiment.task.a.1 = nan: expected a finite number",
        "experiment.task.b: the key 2 is not a text",
        "experiment.task.c = {1, 2}: expected a number, a text, true, false, null, a list or a mapping",
        "experiment.d = inf: expected a finite number",
    ]


def test_unrelated_faults_are_named_at_once():
    content = resigned({**mapping(), "experiment": {**EXPERIMENT, "nodes": 4, "weighting": "samples"}}, "va", samples=None)
    content = resigned(resigned(content, "hungary", address=None), "switzerland", address=None)
    content["members"][0]["samples"] = 7

    assert [fault.split(":")[0].split(" = ")[0] for fault in faults_of(content)] == [
        "members", "graph.edges", "experiment.nodes", "experiment.weighting"
    ]  # fmt: skip


def test_a_study_without_members_is_refused():
    assert faults_of({**mapping(), "members": [], "graph": {"name": "none", "edges": []}}) == ["members = []: a study has members"]


# ---- the commands
