"""Checks of what the administrator has written or was given: site.yaml, keys, study, result contract."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from p2pfl.errors import ConfigError, P2PFLError
from p2pfl.experiment.loading import load_study
from p2pfl.governance.identity import Identity
from p2pfl.node.continuation import WITHOUT, continued_plan
from p2pfl.node.doctor.examination import Examination, Fact, Finding, Noted, findings_of
from p2pfl.node.own_contract import contract_here, differences_here
from p2pfl.node.site import SiteFile
from p2pfl.node.start import check_confirmed

_SITE = "mend that key in the file; p2pfl study join writes a new one with every key in it"
_KEYS = "restore private.pem and card.yaml from their backup; new keys need a new study"
_STUDY = "take the file anew from the member that made the study"


def check_site_file(exam: Examination) -> Noted:
    """Read site.yaml; its relative paths are beside it."""
    try:
        exam.site = site = SiteFile.load(exam.path)
    except ConfigError as error:
        yield from findings_of(error, _SITE)
        return
    yield Fact(what="site", said=f"{exam.path} is that of {site.member}", figures={"member": site.member})


def check_study(exam: Examination) -> Noted:
    """Read the study with the signature of every card, and compare its digest with the one that was confirmed."""
    assert exam.site is not None
    site = exam.site
    try:
        study = load_study(site.study)
    except ConfigError as error:
        yield from findings_of(error, _STUDY)
        return
    try:
        check_confirmed(site, study, exam.confirmed, exam.path)
    except ConfigError as error:
        yield from findings_of(error, "compare the digest that p2pfl study show prints with the other members, by telephone")
        return
    try:
        card = study.member(site.member)
    except ConfigError as error:
        yield from findings_of(error, "write the member's name as the study has it")
        return
    try:
        site.listens_at(card)
    except ConfigError as error:
        yield from findings_of(error, "mend listen in site.yaml")
        return
    exam.study = study
    said = f"{len(study.members)} members; {site.member} exchanges with {', '.join(study.neighbours(site.member))}"
    yield Fact(what="study", said=said, figures={"digest": study.digest, "neighbours": list(study.neighbours(site.member))})


def check_keys(exam: Examination) -> Noted:
    """Read the private keys, whose file is its owner's alone, and compare them with the member's card in the study."""
    assert exam.site is not None
    assert exam.study is not None
    site = exam.site
    try:
        identity = Identity.load(site.keys, site.passphrase_file)
    except ConfigError as error:
        yield from findings_of(error, _KEYS)
        return
    card = exam.study.member(site.member)
    if not identity.owns(card):
        yield Finding(
            fault=f"{site.keys}: these are not the keys on the card of {site.member} in the study",
            remedy="name the folder of the keys that this card was made with, or have the study made again with the new card",
        )
        return
    exam.identity = identity
    yield Fact(what="keys", said="they are those of the card, and nobody else on this machine can read them")


def check_contract(exam: Examination) -> Noted:
    """Compare this machine's versions and the task's code with the study's result contract."""
    assert exam.site is not None
    assert exam.study is not None
    study = exam.study
    differs = differences_here(study.result_contract, study.task_name)
    refused = [found for found in differs if found.kind not in exam.site.accept_differences]
    for found in refused:
        accept = f"or accept it on record with accept_differences: [{found.kind}] in site.yaml"
        yield Finding(fault=f"{found.detail}", remedy=f"{found.remedy}, {accept}")
    if any(found.kind == "task" for found in refused):
        return  # its code is not run
    exam.contract_kept = True
    if refused:
        return
    if study.result_contract is None:
        yield Fact(what="result contract", said="the study has none: versions and the task's code are not compared")
        return
    if differs:
        said = f"not kept, and this site has accepted that on record: {'; '.join(found.detail for found in differs)}"
        yield Fact(what="result contract", said=said, figures={"accepted": sorted({found.kind for found in differs})})
        return
    here = contract_here(study.task_name)
    said = f"p2pfl {here.p2pfl}, torch {here.torch}, arithmetic revision {here.arithmetic}"
    yield Fact(what="result contract", said=f"kept: {said}", figures={"p2pfl": here.p2pfl, "torch": here.torch})


def check_old_state(exam: Examination) -> Noted:
    """Read the model of the older study, where this one continues another, as the node would when it starts; nothing is changed."""
    assert exam.site is not None
    assert exam.study is not None
    assert exam.plan is not None
    tried = replace(exam.plan, model=deepcopy(exam.plan.model))  # the buffers of the old model are loaded into it
    try:
        _, beginning = continued_plan(tried, exam.study.continues, exam.site, exam.path, without_old_state=False)
    except P2PFLError as error:
        yield from findings_of(error, f"write old_state in site.yaml; {WITHOUT}")
        return
    if exam.study.continues is None:
        yield Fact(what="old state", said="none is needed: the study continues no other one")
    elif beginning is None:
        yield Fact(what="old state", said="none is needed: the node goes on from its own checkpoint")
    else:
        yield Fact(what="old state", said=f"the node begins {beginning[1]}")
