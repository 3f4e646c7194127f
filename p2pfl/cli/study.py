"""`p2pfl study`: what institutions agree on before they start."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pfl.cli.new_files import write_new
from p2pfl.cli.options import AcceptDifference, AllowTask, Json
from p2pfl.cli.run import checked_kinds
from p2pfl.errors import ConfigError, some

if TYPE_CHECKING:
    from p2pfl.governance.card import Card
    from p2pfl.governance.study import Study

app = typer.Typer(no_args_is_help=True, help="Make, check and join a study, which all its members confirm.")

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="The file that `p2pfl study new` wrote.")]

_ACCEPTED = "# This site may differ from the study's result contract in these; its records say so.\n"

_SITE = """\
# Private to this site. Paths are relative to this file's folder.
member: {member}
study: {study}
keys: {keys}
# The study's digest as you compared it with the other members.
confirmed: {confirmed}
{accepted}{state}
# Where this site's own data are; these replace arguments of the experiment's task:
# task: {{data: ./data}}

# Tasks that may run here beside p2pfl's own, once you have read their code, such as ["custom_task:stroke"]:
# allow_tasks: []

# The table for the study's data contract, and what analyses of it may be answered; docs/data-contract.md, docs/statistics.md:
# table: {{file: registry.csv}}
# policy: {{patients_per_cell: 5, patients_per_sum: 10}}

# The rest may stay out; these are the defaults.
# accept_differences: []    # torch, task, arithmetic, wire: in what this site may differ from the study's result contract
# listen: null              # tcp://address:port to bind; null: the card's port on all interfaces, IPv4 and IPv6
# state: state              # checkpoints and records
# passphrase_file: null     # null: P2PFL_PASSPHRASE, or it is asked for
# threads: 1
# spill_mb: 256             # memory that the neighbours' updates may take; beyond it they lie in files; null: always in memory
# send_mbit_s: null         # megabits of updates that are sent in a second, to all neighbours together; null: as many as go
# state_group: null         # a group of this machine that may read it, models and all, such as a backup's; null: nobody else
# status_listen: null       # address:port of the status page; null: 127.0.0.1, and a port that is free
# linger_s: 30              # how long a stopped node answers the others
# deadline_floor_s: 30      # a round waits at least so long for a neighbour,
# deadline_factor: 5        # or so many times as long as recent rounds took
# heartbeat_s: 2
# proxy: null               # {{address: "http://host:port" or "socks5://host:port", user: NAME, password_file: FILE}}
# relay: null               # {{mbit_s: 20}}: so much of others' links passes here, where the card offers to relay
# mqtt: null                # {{host: NAME, username: NAME, password_file: FILE}}: the broker, where the study has links go over one
"""


@app.command()
def new(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="The experiment, a YAML file; see examples/.")],
    card: Annotated[list[Path], typer.Option(metavar="CARD", help="A member's card.yaml; repeated for each member.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("study.yaml"),
    continues: Annotated[
        Path | None, typer.Option(metavar="STUDY", help="An older study: members of both go on from their models of it.")
    ] = None,
    new_key: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Go on with a member whose new key you have asked it about; can be repeated.")
    ] = None,
    transport: Annotated[
        str | None,
        typer.Option(
            help="How links go that the topology's file does not say: zeromq, relay or mqtt. Default: as the members' addresses allow."
        ),
    ] = None,
    contract: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The data contract, contract.yaml, which the study then holds in full.")
    ] = None,
    analysis: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="An analysis that members may run together, named by its file; can be repeated."),
    ] = None,
    allow_task: AllowTask = None,
    as_json: Json = False,
) -> None:
    """Make a study from an experiment and the members' cards. The topology's nodes are the members in the order of their names.

    Example: p2pfl study new experiment.yaml --card cleveland.yaml --card hungary.yaml --card va.yaml

    Example: p2pfl study new experiment.yaml --card cleveland.yaml --card basel.yaml --continues study.yaml --out study-2.yaml

    Example: p2pfl study new experiment.yaml --card a.yaml --card b.yaml --card c.yaml --contract contract.yaml --analysis ages.yaml
    """
    from p2pfl.cli.agreed import say_layout
    from p2pfl.cli.agreed_analyses import say_analyses, with_analyses
    from p2pfl.cli.continued import check_layouts, continuation_of, say_continuation
    from p2pfl.experiment.graph import agreeing_on, build_schedule, edge_transports
    from p2pfl.experiment.loading import load_experiment
    from p2pfl.experiment.requirements import faults_of_members
    from p2pfl.experiment.table_files import without_site_files
    from p2pfl.governance.study import Study
    from p2pfl.node.own_contract import contract_here

    cards = _cards_in(card)
    resolved = load_experiment(experiment)
    if faults := faults_of_members(resolved.require, len(cards)):
        raise ConfigError(faults, str(experiment))
    samples = {member.name: member.samples for member in cards}
    schedule = build_schedule(resolved, sorted(samples), samples=samples)
    content = agreeing_on(resolved, schedule).as_dict()
    content["topology"], content["task"] = _without_folders(content["topology"]), without_site_files(content["task"])
    older = continuation_of(continues, cards, content, new_key or ())
    kinds: dict[str, Any] = {"transport": transport, "transports": edge_transports(resolved, sorted(samples))}
    study = Study.create(content, cards, schedule.union(), **kinds)
    table, reason, compiled = _table_of(study, experiment, allow_task or ())
    if compiled != content.get("compiled", "auto"):
        study = Study.create({**content, "compiled": compiled}, cards, schedule.union(), **kinds)
    result_contract = contract_here(study.task_name)
    study = study.with_result_contract(result_contract)
    if result_contract.task is not None and result_contract.task.source is None:
        typer.echo(f"no digest of the task's code: {result_contract.task.name} is not here, so that nothing binds it", err=True)
    if table is not None:
        study = study.with_layout(table)
    else:
        typer.echo(f"without a table of the model's tensors, which cannot be made here: {reason}", err=True)
    if older is not None:
        check_layouts(older[0], study, experiment)
        study = study.with_continuation(older[1])
    study = with_analyses(study, contract, analysis or ())
    try:
        study.save(out)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", str(out)) from error
    if as_json:
        typer.echo(json.dumps({"study": str(out), **_shown(study)}))
        return
    typer.echo(f"{out}   public: send it to every member")
    say_layout(study)
    say_analyses(study)
    say_continuation(study, older[0] if older is not None else None)
    _say_digest(study)


def _cards_in(paths: Sequence[Path]) -> list[Card]:
    """Load the members' cards; ConfigError with the faults of all of them."""
    from p2pfl.governance.card import Card

    faults: list[str] = []
    cards: list[Card] = []
    for path in paths:
        try:
            cards.append(Card.load(path))
        except ConfigError as error:
            faults += [f"{error.place}: {finding}" for finding in error.findings]
    if faults:
        raise ConfigError(faults)
    return cards


@app.command()
def show(
    study: StudyFile,
    start_file: Annotated[
        Path | None, typer.Option("--start", metavar="FILE", help="Write the first parameters to this new file: flat, little-endian.")
    ] = None,
    contract_file: Annotated[
        Path | None, typer.Option("--contract", metavar="FILE", help="Write the study's data contract to this new file.")
    ] = None,
    allow_task: AllowTask = None,
    as_json: Json = False,
) -> None:
    """Check a study and its signatures, and print its digest. It also prints what the study will do, its members and its graph.

    With --json it also prints all that a node derives from the study: who dials, weights, tensors, channels, rounds, the stop rule.

    Example: p2pfl study show study.yaml
    """
    from p2pfl.cli.agreed_analyses import say_analyses, write_contract
    from p2pfl.experiment.loading import load_study

    found = load_study(study)
    if contract_file is not None:
        write_contract(found, contract_file)
    derived = _derived(found, study, allow_task or (), start_file) if as_json or start_file is not None else {}
    if as_json:
        typer.echo(json.dumps({"study": str(study), **_shown(found), "derived": derived}))
        return
    from rich.table import Table

    from p2pfl.cli.agreed import say_agreement
    from p2pfl.cli.continued import say_continuation
    from p2pfl.cli.terminal import open_console
    from p2pfl.errors import on_one_line
    from p2pfl.node.own_contract import differences_here

    say_agreement(found, differences_here(found.result_contract, found.task_name))
    say_analyses(found)
    say_continuation(found)
    table = Table(title=on_one_line(f"{found.experiment.get('name')}: {found.graph.name}"))
    for column in ("member", "address", "samples", "exchanges with (weight)"):
        table.add_column(column, overflow="fold")
    for member in _shown(found)["members"]:
        neighbours = ", ".join(f"{name} ({weight:.4g})" for name, weight in member["neighbours"].items())
        samples = "" if member["samples"] is None else str(member["samples"])
        address = member["address"] or "dials out"
        table.add_row(member["name"], address if isinstance(address, str) else "\n".join(address), samples, neighbours)
    open_console(markup=False, highlight=False).print(table)
    _say_digest(found)


@app.command()
def join(
    study: StudyFile,
    keys: Annotated[Path, typer.Option(help="The folder that `p2pfl keys new` made.")],
    confirm: Annotated[str, typer.Option(metavar="DIGEST", help="The study's digest, as another member read it out.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("site.yaml"),
    old_state: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="This site's state in the study that this one continues. Default: found beside OUT."),
    ] = None,
    accept_difference: AcceptDifference = None,
    as_json: Json = False,
) -> None:
    """Write site.yaml for the member that owns the keys. It also prints what the study will do.

    Example: p2pfl study join study.yaml --keys keys --confirm "3f1c 09ab ... 77de"
    """
    from p2pfl.cli.agreed import say_agreement
    from p2pfl.cli.agreed_analyses import say_analyses
    from p2pfl.cli.continued import say_continuation, state_lines
    from p2pfl.experiment.loading import load_study
    from p2pfl.governance.card import Card
    from p2pfl.governance.encoding import grouped
    from p2pfl.governance.result_contract import accepted
    from p2pfl.governance.study import confirms
    from p2pfl.node.own_contract import differences_here
    from p2pfl.yaml_files import dump_yaml

    found = load_study(study)
    if not confirms(found, confirm):
        raise ConfigError(
            f"--confirm = {confirm!r}: not the digest of this file; find out who holds another study before anybody starts", str(study)
        )
    mine = Card.load(keys / "card.yaml")
    member = next((card for card in found.members if (card.identity, card.curve) == (mine.identity, mine.curve)), None)
    if member is None:
        raise ConfigError(f"--keys = {str(keys)!r}: these are no member's keys; the members are {some(found.names)}", str(study))
    kinds = checked_kinds(accept_difference)
    differs = accepted(differences_here(found.result_contract, found.task_name), kinds, str(study))
    folder = out.absolute().parent
    said = {"member": member.name, "study": os.path.relpath(study, folder), "keys": os.path.relpath(keys, folder)}
    values = {key: dump_yaml({"value": value}).removeprefix("value: ").strip() for key, value in said.items()}
    values["state"] = state_lines(found, member.name, folder, old_state)
    agreed = f"{_ACCEPTED}accept_differences: [{', '.join(kinds)}]\n" if kinds else ""
    write_new(out, _SITE.format(**values, confirmed=grouped(found.digest), accepted=agreed))
    if as_json:
        typer.echo(json.dumps({"site": str(out), "member": member.name, "digest": found.digest, "layout": _layout_rows(found)}))
        return
    say_agreement(found, differs)
    say_analyses(found)
    say_continuation(found)
    typer.echo(f"{out}   private: this site is {member.name}; say there where its data are, then: p2pfl node start {out}")


def _derived(study: Study, place: Path, allow_tasks: Collection[str], start_file: Path | None) -> dict[str, Any]:
    """All that follows from a study; the first parameters go into a file where one is named."""
    from p2pfl.node.study_facts import facts_of
    from p2pfl.params import bytes_of

    facts = facts_of(study, str(place), allow_tasks=allow_tasks)
    if start_file is not None:
        if facts.start is None:
            raise ConfigError(f"--start = {str(start_file)!r}: the first parameters are not known here: {facts.unknown}", str(place))
        try:
            with start_file.open("xb") as file:
                file.write(bytes_of(facts.start))
        except OSError as error:
            raise ConfigError(f"cannot be written: {error.strerror}", str(start_file)) from error
    return facts.values


def _table_of(study: Study, place: Path, allow_tasks: Collection[str]) -> tuple[list[dict[str, Any]] | None, str, str]:
    """The tensors of a study's model as rows, None with the reason where its task cannot be made on this machine; and its `compiled`."""
    import torch

    from p2pfl.errors import TaskError
    from p2pfl.experiment.loading import recorded_experiment
    from p2pfl.experiment.plan import build_algorithm, load_sites, resolve_recipe
    from p2pfl.training import build_model

    experiment = recorded_experiment(study.experiment, str(place))
    unknown = "off" if experiment.compiled == "auto" and experiment.schema != 1 else experiment.compiled
    try:
        task = load_sites(experiment, allow_tasks=allow_tasks)
        model = build_model(task, getattr(torch, experiment.dtype or task.dtype), experiment.seed)
    except (ConfigError, TaskError) as error:
        return None, str(error).splitlines()[0], unknown
    resolved, _, layout = resolve_recipe(experiment, build_algorithm(experiment), task, model)
    return layout.table(), "", resolved.compiled


def _layout_rows(study: Study) -> list[dict[str, Any]] | None:
    return None if study.layout is None else [row.as_dict() for row in study.layout]


def _without_folders(topology: dict[str, Any]) -> dict[str, Any]:
    """The study carries the graph itself; a folder on this machine is nobody else's business."""
    shown = dict(topology)
    if "file" in shown:
        shown["file"] = Path(shown["file"]).name
    if isinstance(shown.get("base"), dict):
        shown["base"] = _without_folders(shown["base"])
    return shown


def _shown(study: Study) -> dict[str, Any]:
    from p2pfl.cli.agreed_analyses import shown_analyses
    from p2pfl.governance.encoding import grouped

    edges = study.graph.edges
    weights = {(other, one): 0.0 if study.graph.directed else weight for one, other, weight in edges}  # 0: nothing comes that way
    weights |= {(one, other): weight for one, other, weight in edges}
    members = [
        {
            "name": card.name,
            "address": card.address,
            "samples": card.samples,
            "fingerprint": card.fingerprint,
            "cohort": None if card.cohort is None else card.cohort.as_dict(),
            "neighbours": {name: weights[card.name, name] for name in study.neighbours(card.name)},
        }
        for card in study.members
    ]
    relays = [{"between": list(ends), "relay": found.relay} for ends, found in study.edge_kinds().items() if found.relay is not None]
    return {
        "experiment": study.experiment.get("name"),
        "topology": study.graph.name,
        "members": members,
        "relays": relays,
        "layout": _layout_rows(study),
        "resolved": study.experiment,
        "continues": None if study.continues is None else study.continues.as_dict(),
        "result_contract": None if study.result_contract is None else study.result_contract.as_dict(),
        **shown_analyses(study),
        "digest": study.digest,
        "digest_groups": grouped(study.digest),
    }


def _say_digest(study: Study) -> None:
    from p2pfl.governance.encoding import grouped

    groups = grouped(study.digest)
    half = len(groups) // 2
    typer.echo(f"digest   {groups[:half]}\n         {groups[half + 1 :]}\nRead it out to every member over the telephone.")
