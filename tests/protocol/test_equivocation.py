"""A member that tells its neighbours different things is found out by what it has signed, and nobody honest ever is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from networks import HASTY, STUDY, Network, finish, plan_of
from p2pfl.node.evidence import EVIDENCE, evidence_rounds, keep_evidence
from p2pfl.node.mixing import Mixing
from p2pfl.node.sending import Sending
from p2pfl.protocol.equivocation import KEPT_ROUNDS, MOST_EACH, Equivocation, Witness, update_digest
from p2pfl.protocol.network_view import ViewPolicy
from p2pfl.protocol.view import NetworkView
from p2pfl.wire.round_record import seal, unseal, verify
from wire_samples import RECORD

ONE, OTHER = update_digest([b"one"]), update_digest([b"other"])
ONE_CAME, OTHER_CAME = (b"one",), (b"other",)
KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(1, 5)]
STUDY_BYTES = bytes.fromhex(STUDY)
EVIL = "node-3"
LEARNING = {
    "task": {"name": "synthetic-logistic"},
    "nodes": 4,
    "topology": {"name": "complete"},
    "rounds": 12,
    "stop": None,
    "baselines": [],
}


def said(update: bytes | None, *, member: int = 3, key: int | None = None, **changes) -> bytes:
    record = replace(RECORD, member=member, update=update, **{"round": 6, **changes})
    return seal(record, KEYS[member if key is None else key].sign, STUDY_BYTES)


def view(me: int, neighbours: list[str]) -> NetworkView:
    keys = [key.public_key().public_bytes_raw() for key in KEYS]
    return NetworkView(
        me=me, keys=keys, sign=KEYS[me].sign, study=STUDY_BYTES, neighbours=neighbours, diameter=2, last_round=100, bytes_per_s=None
    )


# ---- records


def test_a_record_carries_the_digest_of_an_update_and_is_as_it_was_without_one():
    assert unseal(said(ONE)).update == ONE
    assert unseal(said(None)).update is None
    assert len(said(ONE)) == len(said(None)) + 22


def test_two_records_of_a_round_with_different_updates_are_evidence_that_anybody_can_check():
    here = view(0, ["1", "2"])
    here.hear("1", [said(ONE)], 0.0)
    here.hear("2", [said(OTHER)], 0.0)
    (found,) = here.witness.found

    assert (found.member, found.round, found.sealed) == (3, 6, (said(ONE), said(OTHER)))
    for sealed in found.sealed:
        verify(sealed, KEYS[3].public_key(), STUDY_BYTES)


@pytest.mark.parametrize(
    "other",
    [said(ONE), said(ONE, loss=0.25, milliseconds=(1, 2, 3, 4)), said(None), said(OTHER, round=7), said(OTHER, began=RECORD.began + 1)],
    ids=["the same", "other figures", "no digest", "another round", "a run that began anew"],
)
def test_honest_records_are_no_evidence(other):
    here = view(0, ["1", "2"])
    here.hear("1", [said(ONE)], 0.0)
    here.hear("2", [other], 0.0)

    assert here.witness.found == []


def test_nobody_can_be_framed_by_somebody_else():
    here = view(0, ["1", "2"])
    here.hear("1", [said(ONE)], 0.0)
    with pytest.raises(Exception, match="wrong_signature"):
        here.hear("2", [said(OTHER, key=2)], 0.0)

    assert here.witness.found == []


def test_evidence_is_passed_on_once_and_found_there_too():
    near, far = view(0, ["1", "2"]), view(2, ["0"])
    near.hear("1", [said(ONE)], 0.0)
    near.hear("1", [said(OTHER)], 0.0)

    assert near.is_due("2", 0.0)
    far.hear("0", near.take("2", 0.0), 0.0)
    assert [each.sealed for each in far.witness.found] == [(said(ONE), said(OTHER))]
    assert near.take("2", 0.0) == []


def test_what_is_remembered_and_kept_of_a_member_is_bounded():
    witness = Witness()
    for number in range(2 * KEPT_ROUNDS):
        for update in (ONE, OTHER):
            sealed = said(update, round=number)
            witness.note(unseal(sealed), sealed)
        witness.note_update(3, number, ONE_CAME)

    assert len(witness.found) == MOST_EACH
    assert len(witness._statements[3]) == len(witness._updates[3]) == KEPT_ROUNDS


def test_an_update_that_is_not_the_signed_one_is_told_whichever_comes_first():
    for order in ("record", "update"):
        witness = Witness()
        if order == "update":
            witness.note_update(3, 6, OTHER_CAME)
        witness.note(unseal(said(ONE)), said(ONE))
        if order == "record":
            witness.note_update(3, 6, OTHER_CAME)

        assert witness.differing() == [(3, 6)]
        witness.note_update(3, 6, OTHER_CAME)  # it is merged once more
        assert witness.differing() == []


def test_the_file_holds_each_piece_once_and_is_read_again(tmp_path):
    found = Equivocation(member=3, round=6, sealed=(said(ONE), said(OTHER)))

    assert keep_evidence(tmp_path, STUDY, "node-3", found)
    assert not keep_evidence(tmp_path, STUDY, "node-3", found)
    with (tmp_path / EVIDENCE).open("a") as file:
        file.write('{"member": "nod')
    assert evidence_rounds(tmp_path) == {"node-3": [6]}
    row = json.loads((tmp_path / EVIDENCE).read_text().splitlines()[0])
    assert [bytes.fromhex(record) for record in row["records"]] == [said(ONE), said(OTHER)]
    assert keep_evidence(tmp_path, STUDY, "node-3", replace(found, round=7))
    assert evidence_rounds(tmp_path) == {"node-3": [6, 7]}


# ---- daemons


class Viewing(Network):
    """Daemons that take part in the network's view."""

    def start(self, *names: str, **options) -> None:
        for name in names or self.plan.names:
            super().start(name, view=ViewPolicy(bytes_per_s=None), **options)


def beside_split(place, monkeypatch, *, signs_each: bool):
    """A run beside a member that sends each neighbour another model, and signs one of them, or each neighbour's own."""
    make, send = Mixing._to_receivers, Sending._send_records
    digests: dict[str, dict[int, bytes]] = {}

    def split(self, outgoing, maker, **options):
        protocol = self._protocol
        if protocol.edges.me != EVIL or protocol.edges.exchange < 3:
            return make(self, outgoing, maker, **options)
        made = {}
        for k, to in enumerate(sorted(protocol.edges.neighbourhood.receivers)):
            made[to] = make(self, {name: tensor + k for name, tensor in outgoing.items()}, maker, **options)[to]
            digests.setdefault(to, {})[protocol.edges.exchange] = update_digest([made[to].digest])
        return made

    def sealed_for(self, to: str, sealed: bytes) -> bytes:
        record = unseal(sealed)
        if f"node-{record.member}" != EVIL or record.round not in digests.get(to, {}):
            return sealed
        return seal(replace(record, update=digests[to][record.round]), self._protocol.view._sign, STUDY_BYTES)

    async def send_records(self, neighbour):
        if self._protocol.edges.me == EVIL and signs_each:
            take = self._protocol.view.take
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self._protocol.view, "take", lambda name, now_s: [sealed_for(self, name, s) for s in take(name, now_s)])
                await send(self, neighbour)
        else:
            await send(self, neighbour)

    monkeypatch.setattr(Mixing, "_to_receivers", split)
    monkeypatch.setattr(Sending, "_send_records", send_records)

    async def main():
        async with Viewing(plan_of(**LEARNING), place) as network:
            network.start()
            await network.ended()
            return network

    return finish(main())


def test_neighbours_keep_the_proof_where_each_is_sent_and_signed_something_else(tmp_path, monkeypatch):
    network = beside_split(tmp_path, monkeypatch, signs_each=True)
    for name in network.plan.names[:3]:
        assert "equivocation" in network.events(name)
        rows = [json.loads(line) for line in (network.states[name] / EVIDENCE).read_text().splitlines()]
        assert {row["member"] for row in rows} == {EVIL}
        assert 1 <= len(rows) <= MOST_EACH
        assert network.nodes[name].daemon.status()["evidence"].keys() == {EVIL}
        for row in rows:
            one, other = (bytes.fromhex(record) for record in row["records"])
            key = network.plan.names.index(EVIL)
            assert (unseal(one).member, unseal(one).round) == (unseal(other).member, unseal(other).round) == (key, row["round"])
            assert unseal(one).update != unseal(other).update


@pytest.mark.no_cover
def test_neighbours_that_are_not_sent_what_was_signed_say_so(tmp_path, monkeypatch):
    network = beside_split(tmp_path, monkeypatch, signs_each=False)
    told = [name for name in network.plan.names[:3] if "update_differs" in network.events(name)]

    assert len(told) == 2  # the third one has what was signed
    assert not any((network.states[name] / EVIDENCE).exists() for name in network.plan.names)


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("rounds", "kills"), [pytest.param(24, 2, id="2 of 24"), pytest.param(200, 20, id="20 of 200", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("algorithm", ["dpsgd", pytest.param("choco", marks=pytest.mark.slow)])
def test_nodes_that_are_killed_and_go_on_are_honest(rounds, kills, algorithm, tmp_path):
    plan = plan_of(**{**LEARNING, "topology": {"name": "ring"}, "rounds": rounds, "algorithm": {"name": algorithm}})

    async def main():
        async with Viewing(plan, tmp_path, timeouts=HASTY) as network:
            network.start()
            for number in range(kills):
                name = plan.names[number % 4]
                await network.reached((number + 1) * rounds // (kills + 1), [name])
                await network.kill(name)
                network.start(name)
            await network.ended()
            return network

    network = finish(main())
    for name in plan.names:
        daemon = network.nodes[name].daemon
        assert daemon.protocol.view.witness.found == []
        assert not {"equivocation", "update_differs"} & set(network.events(name))
        assert any(said for said in daemon.protocol.view.witness._statements.values())
        assert not (network.states[name] / EVIDENCE).exists()
