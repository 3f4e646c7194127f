"""The public and private files of a network on this machine, made by the path that institutions take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from p2pfl.errors import ConfigError
from p2pfl.experiment.loading import load_study
from p2pfl.experiment.plan import Plan
from p2pfl.experiment.table_files import is_table, without_site_files
from p2pfl.governance.continuation import Continuation, faults_of_rows
from p2pfl.governance.identity import Identity
from p2pfl.governance.result_contract import accepted
from p2pfl.governance.study import Study
from p2pfl.node.own_contract import contract_here, differences_here
from p2pfl.node.site import SiteFile
from p2pfl.runs.checkpoint import NODE_CHECKPOINT, read_metadata
from p2pfl.runs.open_files import replace_file
from p2pfl.tasks.contract_table import site_files
from p2pfl.transports import reserve_port
from p2pfl.yaml_files import dump_yaml, load_yaml


def found_network(
    plan: Plan,
    place: Path,
    stack: ExitStack,
    settings: Mapping[str, Any],
    *,
    via: Callable[[str, str], str] | None = None,
    continues: Path | None = None,
) -> Study:
    """Make keys, cards, a study and a site file for each node, as institutions would one after the other.

    Args:
        plan: of the run.
        place: its folder.
        stack: holds the ports until they are bound.
        settings: for every site.yaml.
        via: gives the address that a node's card names, by the node's name and the address at which it listens; None: the latter.
        continues: folder of an earlier run of `p2pfl up`, whose nodes keep their keys and go on from their models; None: there is none.

    Raises:
        ConfigError: the earlier run cannot be continued with this plan.
    """
    old = older_study(continues, plan)
    cards, listens = [], {}
    (place / "cards").mkdir()
    (place / "sites").mkdir(mode=0o700)  # keys, states and logs: its owner's alone, unlike the figures of the run
    for name in plan.names:
        listens[name] = stack.enter_context(reserve_port()).address
        address = listens[name] if via is None else via(name, listens[name])
        train = plan.sites[name].train
        home = place / "sites" / name
        former = continues / "sites" / name / "keys" if continues is not None else None
        identity = Identity.load(former) if former is not None and former.is_dir() else Identity.new()
        identity.save(home / "keys")
        card = identity.card(name=name, address=address, samples=len(train[0]) if train else None, moments=plan.sites[name].moments)
        card.save(place / "cards" / f"{name}.yaml")
        cards.append(card)
    content = plan.experiment.as_dict()
    own_files = site_files(content["task"]["sites"]) if is_table(content["task"]) else {}
    study = Study.create({**content, "task": without_site_files(content["task"])}, cards, plan.topology)
    study = study.with_result_contract(contract_here(plan.experiment.task.name))
    if old is not None:
        study = study.with_continuation(Continuation.of(old.digest, old.members, cards))
    study.save(place / "study.yaml")
    goes_on = study.continues.members if study.continues is not None else {}
    for name in plan.names:
        site = {"member": name, "study": "../../study.yaml", "keys": "keys", "confirmed": study.digest, "state": "state"}
        if continues is not None and name in goes_on:
            site["old_state"] = str((continues / "sites" / goes_on[name] / "state").absolute())
        own: dict[str, Any] = {"task": {"sites": [str(own_files[name])]}} if name in own_files else {}
        text = dump_yaml({**site, **own, "listen": listens[name], **settings})
        (place / "sites" / name / "site.yaml").write_text(text, encoding="utf-8")
    return study


def older_study(run: Path | None, plan: Plan | None = None) -> Study | None:
    """Read the study of an earlier run of `p2pfl up`, and compare its models with those of a plan; None without such a run.

    Raises:
        ConfigError: there is none, its models are others, or it held out other rows.
    """
    if run is None:
        return None
    if not (run / "study.yaml").is_file():
        raise ConfigError("holds no study.yaml: --continues takes the folder of an earlier run of `p2pfl up`", str(run))
    study = Study.read(run / "study.yaml")
    if plan is None:
        return study
    faults = faults_of_rows(study.experiment, plan.experiment.as_dict())
    for name in study.names:
        terms = (read_metadata(run / "sites" / name / "state" / NODE_CHECKPOINT) or {}).get("terms")
        if isinstance(terms, Mapping) and terms.get("layout") != plan.layout.digest:
            faults.append(f"{name}: its model has another layout than this experiment's: take the same task, model and dtype")
    if faults:
        raise ConfigError(faults, str(run))
    return study


def check_result_contract(place: Path, accept: Sequence[str]) -> None:
    """Compare this machine with the result contract of a run before its daemons go on.

    Raises:
        ConfigError: it differs, and nobody has accepted that.
    """
    path = place / "study.yaml"
    if not path.exists():
        return  # said by whoever needs it
    study = load_study(path)
    if study.result_contract is None:
        return
    sites = sorted((place / "sites").glob("*/site.yaml"))
    for site in sites if accept else ():
        content = load_yaml(site)
        kinds = dict.fromkeys([*content.get("accept_differences", ()), *accept])
        replace_file(site, dump_yaml({**content, "accept_differences": list(kinds)}))
    differs = differences_here(study.result_contract, study.task_name)
    for site in sites if differs else ():
        accepted(differs, SiteFile.load(site).accept_differences, str(site))
