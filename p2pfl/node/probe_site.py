"""Probe of a neighbour's node from the files of a site: its keys, its study, and the state that its own node has left."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from p2pfl.errors import ConfigError, TransportError, some
from p2pfl.experiment.loading import load_study
from p2pfl.governance.card import Card
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.node.checkpoint import CHECKPOINT
from p2pfl.node.own_links import endpoint, link_to
from p2pfl.node.probe import Counts, Finding, Probe, new_incarnation
from p2pfl.node.probe_messages import Standing
from p2pfl.node.site import SiteFile
from p2pfl.node.start import check_confirmed
from p2pfl.node.state_folder import held_state
from p2pfl.node.status import read_status
from p2pfl.node.study_facts import facts_of
from p2pfl.protocol.ledger import EdgeLedger
from p2pfl.runs.checkpoint import changes_told, read_checkpoint
from p2pfl.wire.link import LinkSession, Terms
from p2pfl.wire.messages import NO_STOP, StopNews
from p2pfl.wire.update import EncodedUpdate, UpdateFormat


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """All that one probe has found."""

    member: str
    """In whose name it spoke."""
    neighbour: str
    address: str | None
    """Where the node was dialled; None: it dialled this site, or the two meet at a relay."""
    exchange: int
    """Where the node was."""
    findings: list[Finding]

    @property
    def is_as_expected(self) -> bool:
        """Whether the node took and refused everything as the protocol says, as far as it shows."""
        return all(finding.as_expected for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return {
            "member": self.member,
            "neighbour": self.neighbour,
            "address": self.address,
            "exchange": self.exchange,
            "as_expected": self.is_as_expected,
            "findings": [finding.as_row() for finding in self.findings],
        }


def probe_node(
    address: str,
    site_path: Path,
    *,
    neighbour: str | None = None,
    state: Path | None = None,
    faulty: bool = False,
    allow_tasks: Collection[str] = (),
) -> ProbeReport:
    """Greet the node at an address as this site's member, and try one message of each kind.

    Args:
        address: as on the neighbour's card, or another one that leads to it; or the neighbour's name.
        site_path: this site's site.yaml; its own node must not run.
        neighbour: whose node is there, where the address is on no card.
        state: the state folder of the probed node, where it is on this machine: its counters say why it refuses.
        faulty: also send messages that the node must refuse.
        allow_tasks: tasks that may run here beside the built-in ones and those that site.yaml allows.

    Raises:
        ConfigError: the files are wrong, the node of this site runs, or nobody in the study is meant.
        TransportError: there is no link to the node.
    """
    site = SiteFile.load(site_path)
    study = load_study(site.study)
    check_confirmed(site, study, None, site_path)
    identity, card = Identity.load(site.keys, site.passphrase_file), study.member(site.member)
    if not identity.owns(card):
        raise ConfigError(f"keys = {str(site.keys)!r}: not those of {site.member} in the study", str(site_path))
    name, dialled = _whom(study, site.member, address, neighbour)
    allowed = (*allow_tasks, *site.allow_tasks)
    facts = facts_of(study, str(site.study), allow_tasks=allowed, overrides=site.task, site_file=site_path)
    if not facts.formats:
        raise ConfigError(f"the first parameters and the messages are not known here: {facts.unknown}", str(site_path))
    terms = Terms(study=study.digest, layout=facts.values["parameters"]["digest"], start=facts.values["start"]["digest"])
    edge = next(edge for edge in facts.values["edges"] if sorted(edge["members"]) == sorted([site.member, name]))
    dials = edge["dials"] == site.member
    with held_state(site.state, site.state_group):
        standing, anew = standing_of(site.state, name, facts.formats)
        session = LinkSession(peer=name, member=site.member, terms=terms, incarnation=new_incarnation(), formats=facts.formats)
        there = endpoint(study.member(name))
        peer = replace(there, address=dialled) if dials else there
        transport = link_to(site, study, card, identity.curve_secret, peer)
        counts = _counts_in(state, name, site.member) if state is not None else None
        probe = Probe(
            transport,
            session,
            standing,
            anew=anew,
            remembered=standing.ledger.remembered(),
            counts=counts,
            without_link="" if dials else _why_not_dialled(edge, name, card, site),
        )
        try:
            findings = asyncio.run(probe.run(faulty=faulty))
        except* TransportError as group:
            raise group.exceptions[0] from None
    return ProbeReport(
        member=site.member, neighbour=name, address=dialled if dials else None, exchange=probe.heard.exchange, findings=findings
    )


def _why_not_dialled(edge: Mapping[str, Any], name: str, card: Card, site: SiteFile) -> str:
    """Say that a probe waits on this edge, and what to check where nobody comes."""
    if edge["dials"] is None:
        where = f"its relay {edge['relay']}" if edge["relay"] is not None else "their broker"
        return f"on this edge nobody dials the other: the two meet at {where}; check that {name} runs, and that it and this site reach that"
    return (
        f"on this edge it is {name} that dials, and the probe waits for it; check that its node runs with this study, and that firewalls "
        f"let it reach this site at {', '.join(card.addresses)}, which leads to {site.listens_at(card)} here"
    )


def _whom(study: Study, member: str, address: str, neighbour: str | None) -> tuple[str, str]:
    """The neighbour that is meant, and where it is dialled."""
    near = study.neighbours(member)
    if neighbour is None:
        neighbour = next((name for name in near if address == name or address in study.member(name).addresses), None)
    if neighbour is None or neighbour not in near:
        raise ConfigError(f"{address!r}: neither a neighbour of {member} nor the address of one ({some(near)}); name it with --neighbour")
    known = study.member(neighbour).addresses
    return neighbour, next(iter(known), "") if address == neighbour else address


def standing_of(state: Path, name: str, formats: Sequence[UpdateFormat]) -> tuple[Standing, int]:
    """State that a site's own node has left: its ledger of the edge to a neighbour, where it was, its last update, when it began anew.

    Where the node has never run it is the beginning. The formats of updates are those of each phase.

    Raises:
        StoreError: its checkpoint cannot be read.
        ConfigError: it is of another study.
    """
    ledger, exchange, stop, anew, sent = EdgeLedger(), 0, NO_STOP, 0, None
    found = read_checkpoint(state / CHECKPOINT)
    if found is not None:
        with changes_told(state / CHECKPOINT):
            tensors, metadata = found
            protocol = metadata["protocol"]
            if name not in protocol["ledgers"]:
                raise ConfigError("holds the checkpoint of another study", str(state))
            ledger, anew = EdgeLedger.from_dict(protocol["ledgers"][name]), protocol.get("anew", 0)
            exchange = metadata["round"] * len(formats) + metadata["phase"]
            stop = StopNews(agreed_for=protocol["agreed_for"], stop_round=protocol["stop_round"])
            sent = _last_sent(tensors, protocol["sent"], name, formats)
    return Standing(ledger=ledger, exchange=exchange, stop=stop, their_exchange=0, formats=formats, sent=sent), anew


def _last_sent(tensors: Mapping[str, Any], sent: Mapping[str, Any], name: str, formats: Sequence[UpdateFormat]) -> EncodedUpdate | None:
    """The newest update in a checkpoint that went to a neighbour."""
    for number in sorted(map(int, sent), reverse=True):
        payload = tensors.get(f"sent/{number}/{name}", tensors.get(f"sent/{number}/*"))
        if payload is None:
            continue
        update_format = formats[number % len(formats)]
        saved = sent[str(number)]["marks"]
        digests = None if not saved else (saved[0] and bytes.fromhex(saved[0]), bytes.fromhex(saved[1]))
        return update_format.pack(number, update_format.unpack(payload.numpy())[0], digests)
    return None


def _counts_in(state: Path, node: str, member: str) -> Counts:
    """Reads from the status of a node on this machine how often it has refused messages of a member."""

    def counts() -> Mapping[str, int]:
        status = read_status(state)
        if status["member"] != node:
            raise ConfigError(f"is that of {status['member']}, and the node that is probed is {node}", str(state))
        refused: Mapping[str, int] = {**status["refused"], **status["neighbours"][member]["refused"]}
        return refused

    return counts
