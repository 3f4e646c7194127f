"""`p2pfl keys`: a site's private keys and the public card that goes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pfl.cli.options import AllowTask, Json
from p2pfl.cli.run import of_file
from p2pfl.errors import ConfigError

if TYPE_CHECKING:
    from p2pfl.governance.card import Card
    from p2pfl.governance.cohort_commitment import CohortCommitment
    from p2pfl.governance.identity import Identity

app = typer.Typer(no_args_is_help=True, help="Make and show a site's keys and its public card.")


@app.command()
def new(
    name: Annotated[str, typer.Option(help="Name of this site in studies.")],
    address: Annotated[
        list[str] | None,
        typer.Option(help="Address tcp://host:port of this site; can be repeated: the first that works counts. Default: it only dials."),
    ] = None,
    relay: Annotated[
        list[str] | None,
        typer.Option(help="Address tcp://host:port where this site relays links of members that cannot dial each other; can be repeated."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Number of training rows at this site, if other members may know it.")] = None,
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Encrypt the private keys. A prompt asks for a passphrase, unless P2PFL_PASSPHRASE is set.")
    ] = False,
    passphrase_file: Annotated[
        Path | None, typer.Option(help="Encrypt the private keys with the passphrase in this file, which has mode 0600.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for both files.")] = Path("keys"),
    as_json: Json = False,
) -> None:
    """Make this site's private keys and public card. private.pem never leaves the site; card.yaml is for the other members.

    Example: p2pfl keys new --name cleveland --address tcp://node.cleveland.example:7700
    """
    from p2pfl.governance.identity import CARD_FILE, Identity, find_passphrase
    from p2pfl.governance.names import NEW_RULE, is_new_name

    if not is_new_name(name):
        raise ConfigError(f"--name = {name!r}: expected {NEW_RULE}")
    identity = Identity.new()
    card = identity.card(name, _one_or_many(address), samples, relay=_one_or_many(relay))
    path = out / CARD_FILE
    if path.exists():
        raise ConfigError("is there already and is never overwritten; choose another --out", str(path))
    secret = find_passphrase(passphrase_file, new=True) if passphrase or passphrase_file else None
    private = identity.save(out, secret)
    card.save(path)
    if as_json:
        typer.echo(json.dumps({"private": str(private), "card": str(path), **_shown(card)}))
        return
    typer.echo(f"{private}   private: stays here, readable by you alone{', encrypted' if secret else ''}")
    typer.echo(f"{path}   public: send it to the other members")
    _say(card)


@app.command()
def show(
    card: Annotated[Path, typer.Argument(metavar="CARD|DIR", help="A card, or the folder that holds card.yaml.")], as_json: Json = False
) -> None:
    """Check a card's signature and print its fingerprint. Members compare fingerprints over the telephone.

    Example: p2pfl keys show keys
    """
    from p2pfl.governance.card import Card

    found = Card.load(card / "card.yaml" if card.is_dir() else card)
    if as_json:
        typer.echo(json.dumps(_shown(found)))
        return
    _say(found)


@app.command()
def card(
    address: Annotated[
        list[str] | None, typer.Option(help="The new address tcp://host:port; can be repeated: the first that works counts.")
    ] = None,
    dials_out: Annotated[
        bool, typer.Option("--dials-out", help="Take the address off the card: this site only dials from now on.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="The site's new name in studies.")] = None,
    relay: Annotated[
        list[str] | None, typer.Option(help="Offer to relay links of other members, at tcp://host:port; can be repeated.")
    ] = None,
    no_relay: Annotated[bool, typer.Option("--no-relay", help="Take that offer off the card.")] = False,
    cohort: Annotated[
        Path | None,
        typer.Option(metavar="SITE", help="Write the commitment to the rows that are frozen for this site's file, such as site.yaml."),
    ] = None,
    no_cohort: Annotated[bool, typer.Option("--no-cohort", help="Take that commitment off the card.")] = False,
    keys: Annotated[Path, typer.Option(help="The folder with private.pem and card.yaml.")] = Path("keys"),
    passphrase_file: Annotated[Path | None, typer.Option(help="File with the passphrase of the keys, which has mode 0600.")] = None,
    as_json: Json = False,
) -> None:
    """Write another address, name or cohort commitment on this site's card, and sign it with the same keys.

    A study that continues another needs the new card, as any new study does.

    Example: p2pfl keys card --address tcp://node2.cleveland.example:7700

    Example: p2pfl keys card --cohort site.yaml
    """
    from p2pfl.governance.names import NEW_RULE, is_new_name

    pairs = (address, dials_out), (relay, no_relay), (cohort, no_cohort), (name is not None, False)
    if not any(map(any, pairs)) or any(map(all, pairs)):
        raise ConfigError(
            "give --address or --dials-out, --relay or --no-relay, --cohort or --no-cohort, or --name; of each pair one at most"
        )
    if name is not None and not is_new_name(name):
        raise ConfigError(f"--name = {name!r}: expected {NEW_RULE}")
    path, found, identity = _own_card(keys, passphrase_file)
    given = None if dials_out else _one_or_many(address) or found.address
    relays_at = None if no_relay else _one_or_many(relay) or found.relay
    frozen = None if no_cohort else found.cohort if cohort is None else _frozen_for(cohort)
    _replace(path, identity.card(name or found.name, given, found.samples, found.moments, relays_at, frozen), as_json=as_json)


@app.command()
def describe(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="The study's experiment, a YAML file.")],
    keys: Annotated[Path, typer.Option(help="The folder with private.pem and card.yaml.")] = Path("keys"),
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a key, such as task.data=./data.")] = None,
    passphrase_file: Annotated[Path | None, typer.Option(help="File with the passphrase of the keys, which has mode 0600.")] = None,
    allow_task: AllowTask = None,
    as_json: Json = False,
) -> None:
    """Write statistics of the training rows on this site's card. They are the number of rows, and each input's mean and deviation.

    Studies with `standardise: pooled` or `weighting: samples` need them. All members can read them. The command signs the card again.

    Example: p2pfl keys describe heart.yaml --set task.hospitals=[va] --set task.data=./data
    """
    from p2pfl.experiment.loading import load_experiment, parse_assignment
    from p2pfl.experiment.plan import load_sites

    path, card, identity = _own_card(keys, passphrase_file)
    wanted = load_experiment(experiment, dict(map(parse_assignment, set_ or ())))
    alone = {"standardise": "site"} if wanted.task.options.get("standardise") == "pooled" else {}  # the others' moments are not here yet
    with of_file(experiment):
        task = load_sites(wanted, alone, allow_tasks=allow_task or ())
    site = next((site for site in task.sites if site.name == card.name), None)
    if site is None:
        raise ConfigError(f"task {task.name} has no site {card.name} here, only {', '.join(s.name for s in task.sites)}", str(experiment))
    if alone and site.moments is None:
        raise ConfigError(f"task {task.name} says nothing of the moments of {card.name}: its sites need `moments`", str(experiment))
    samples = len(site.train[0]) if site.train else None
    new_card = identity.card(card.name, card.address, samples, site.moments, card.relay, card.cohort)
    _replace(path, new_card, as_json=as_json)


def _own_card(keys: Path, passphrase_file: Path | None) -> tuple[Path, Card, Identity]:
    """Read a site's card and the keys that sign it; ConfigError where they do not belong together."""
    from p2pfl.governance.card import Card
    from p2pfl.governance.identity import CARD_FILE, Identity

    path = keys / CARD_FILE
    card, identity = Card.load(path), Identity.load(keys, passphrase_file)
    if not identity.owns(card):
        raise ConfigError("is not of the keys beside it", str(path))
    return path, card, identity


def _frozen_for(site: Path) -> CohortCommitment:
    """Read the commitment to the rows that are frozen for a site's file."""
    from p2pfl.data.cohort import Freeze
    from p2pfl.data.site_section import SiteSection

    return Freeze.load(SiteSection.load(site).cohort).commitment


def _replace(path: Path, card: Card, *, as_json: bool) -> None:
    """Write a card in the place of the one before, and print it."""
    from p2pfl.runs.open_files import replace_file

    replace_file(path, card.text)
    if as_json:
        typer.echo(json.dumps({"card": str(path), **_shown(card)}))
        return
    typer.echo(f"{path}   public: send it to the other members")
    _say(card)


def _one_or_many(addresses: list[str] | None) -> str | list[str] | None:
    return addresses[0] if addresses is not None and len(addresses) == 1 else addresses or None


def _shown(card: Card) -> dict[str, Any]:
    return {
        "name": card.name,
        "address": card.address,
        **({"relay": card.relay} if card.relay is not None else {}),
        "samples": card.samples,
        "moments": card.moments.as_dict() if card.moments else None,
        **({"cohort": card.cohort.as_dict()} if card.cohort is not None else {}),
        "fingerprint": card.fingerprint,
    }


def _say(card: Card) -> None:
    from p2pfl.governance.encoding import grouped

    typer.echo(f"name         {card.name}")
    typer.echo(f"address      {', '.join(card.addresses) or 'none: this site only dials out'}")
    if card.relay is not None:
        typer.echo(f"relays at    {', '.join(card.relay_addresses)}")
    if card.samples is not None:
        typer.echo(f"samples      {card.samples}")
    if card.moments is not None:
        typer.echo(f"moments      means and deviations of {len(card.moments.means)} inputs")
    if card.cohort is not None:
        typer.echo(f"cohort       {card.cohort.rows:,} frozen rows of {card.cohort.patients:,} patients")
        typer.echo(f"commitment   {grouped(card.cohort.hmac)}")
    typer.echo(f"fingerprint  {grouped(card.fingerprint)}")
