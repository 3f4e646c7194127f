"""How each edge of a study is carried, and who relays it: the same at every member."""

from __future__ import annotations

import random

import pytest

from p2pfl.errors import ConfigError
from p2pfl.governance.edge_kinds import EdgeKind, edge_kinds
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.topology import Topology, weighted

NAMES = "abcdefgh"
IDENTITIES = {name: Identity.new() for name in NAMES}
RING = [(NAMES[i], NAMES[(i + 1) % 8]) for i in range(8)]
EXPERIMENT = {"name": "x", "task": {"name": "averaging"}}


def cards(hidden="", relays="", names=NAMES):
    return [
        IDENTITIES[name].card(
            name,
            None if name in hidden else f"tcp://{name}.example:7700",
            relay=f"tcp://{name}.example:7701" if name in relays else None,
        )
        for name in names
    ]


def study(members, **kinds):
    names = [card.name for card in members]
    ring = Topology.from_edges("ring", len(names), range(len(names)), [*range(1, len(names)), 0], names=names)
    return Study.create(EXPERIMENT, members, weighted(ring, "metropolis"), **kinds)


def relayed(hidden, relays, edges=RING, wanted=None, default=None):
    found = edge_kinds(cards(hidden, relays), edges, wanted or {}, default)
    return {a + b: kind.relay for (a, b), kind in found.items() if kind.kind == "relay"}


def test_only_an_edge_whose_ends_have_no_address_is_relayed():
    assert relayed("bc", "h") == {"bc": "h"}
    assert relayed("b", "h") == {}


def test_a_common_neighbour_comes_first_then_the_least_load_then_the_name():
    assert relayed("bc", "ah", [*RING, ("b", "h"), ("c", "h")]) == {"bc": "h"}
    assert relayed("bcfg", "ad") == {"bc": "a", "fg": "d"}
    assert relayed("bcdfg", "ah") == {"bc": "a", "cd": "h", "fg": "a"}
    assert relayed("bc", "hd") == {"bc": "d"}


def test_no_end_relays_its_own_edge():
    assert relayed("bc", "bch") == {"bc": "h"}


def test_the_choice_does_not_depend_on_any_order():
    draw = random.Random(1)
    found = []
    for _ in range(20):
        members, edges = cards("bcdfg", "aeh"), [draw.choice([edge, edge[::-1]]) for edge in RING]
        draw.shuffle(members)
        draw.shuffle(edges)
        found.append(edge_kinds(members, edges, {}))

    assert all(each == found[0] for each in found)


def test_an_edge_goes_as_it_is_wanted_then_as_the_study_says():
    assert relayed("", "h", wanted={("b", "c"): "relay"}) == {"bc": "h"}
    found = edge_kinds(cards("", "gh"), RING, {("b", "c"): "zeromq", ("g", "h"): "zeromq"}, "relay")

    assert found["b", "c"] == EdgeKind(kind="zeromq")
    assert found["a", "h"] == EdgeKind(kind="relay", relay="g")
    assert found["c", "d"] == EdgeKind(kind="relay", relay="h")


@pytest.mark.parametrize(
    ("hidden", "relays", "wanted", "said"),
    [
        ("bc", "", {}, "neither has an address, so that neither can dial the other; one of them needs one, or a third"),
        ("bc", "c", {}, "neither has an address, so that neither can dial the other; one of them needs one, or a third"),
        ("", "", {("b", "c"): "relay"}, "is to go through a relay, and nobody else offers one: a third member must offer"),
        ("bc", "h", {("b", "c"): "zeromq"}, "neither has an address, so that neither can dial the other; one of them"),
    ],
)
def test_an_edge_without_a_way_is_named_with_its_remedy(hidden, relays, wanted, said):
    with pytest.raises(ConfigError) as error:
        study(cards(hidden, relays), transports=wanted)

    assert len(error.value.findings) == 1
    assert error.value.findings[0].startswith(f"graph.edges: b - c: {said}")


def test_a_study_that_names_no_transport_keeps_its_digest():
    """Fields of relays and transports are in the canonical form only where they are there."""
    plain = study(cards())

    assert plain.as_dict().keys() == {"schema", "experiment", "members", "graph"}
    assert plain.as_dict()["graph"].keys() == {"name", "edges"}
    assert "relay" not in plain.members[0].as_dict()

    other = study(cards(relays="eh"), transport="relay", transports={("b", "c"): "zeromq"})

    assert Study.from_mapping(other.as_dict(), "again").digest == other.digest != plain.digest
    assert other.as_dict()["graph"]["transports"] == [["b", "c", "zeromq"]]
    assert other.edge_kinds()["a", "b"] == EdgeKind(kind="relay", relay="e")


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ({"transport": "pigeon"}, "transport = 'pigeon': expected one of mqtt, relay, zeromq"),
        ({"transports": {("a", "c"): "zeromq"}}, "graph.transports: a - c is given 1 times; expected once, and an edge of the graph"),
    ],
)
def test_a_transport_that_is_none_or_of_no_edge_is_refused(kinds, said):
    with pytest.raises(ConfigError) as error:
        study(cards(), **kinds)

    assert said in str(error.value)


def test_an_address_of_a_relay_is_nobody_elses():
    members = cards(relays="h")
    members[0] = IDENTITIES["a"].card("a", "tcp://h.example:7701")
    with pytest.raises(ConfigError, match="stands in 2 cards"):
        study(members)


def test_an_edge_over_a_broker_needs_no_address_at_either_end():
    found = study(cards("ab"), transports={("a", "b"): "mqtt"})

    assert found.edge_kinds()["a", "b"] == EdgeKind(kind="mqtt")
