"""A site's own settings: which member it is, where its keys and data are, how long it waits. Private to the site."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from p2pfl.analyses.policy import Policy
from p2pfl.data.site_section import section_table
from p2pfl.data.table_format import SiteTable
from p2pfl.errors import ConfigError
from p2pfl.governance.card import Card
from p2pfl.governance.edge_kinds import DIRECT, EDGE_KINDS
from p2pfl.governance.encoding import plain_digest
from p2pfl.governance.names import Name, checked_task_name, split_address
from p2pfl.governance.result_contract import Kind
from p2pfl.node.broker import BrokerSettings
from p2pfl.node.dialling import ProxySettings, RelaySettings, checked_listen
from p2pfl.transports import TRANSPORTS
from p2pfl.yaml_files import check, load_yaml, shown

SPILL_MB = 256.0
"""Memory that neighbours' updates may take where site.yaml says nothing."""

_LAST_PORT = 65535

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _checked_status(text: str) -> str:
    host, _, port = text.rpartition(":")
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        is_fit = (":" in host) == host.startswith("[") and port.isascii() and port.isdigit() and int(port) <= _LAST_PORT
    except ValueError:
        is_fit = False
    if not is_fit:
        raise ValueError("expected address:port with an IP address of this machine, such as 127.0.0.1:9464 or [::1]:9464")
    return text


def _checked_transport(name: str) -> str:
    allowed = {DIRECT, *(TRANSPORTS.keys() - EDGE_KINDS.keys())}  # the others are the study's, edge by edge
    if name not in allowed:
        raise ValueError(f"expected one of {', '.join(sorted(allowed))}")
    return name


@dataclass(frozen=True, kw_only=True)
class SiteFile:
    """Settings of a site, as its site.yaml has them. Relative paths in it are relative to its folder; `load` makes them absolute."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    member: Name
    """Which card of the study is this site's."""

    study: Path
    """The study's file."""

    keys: Path = Path("keys")
    """The folder with private.pem."""

    confirmed: Annotated[str, AfterValidator(plain_digest)] | None = None
    """The study's digest as the administrator compared it with the other members, in groups or not; a node does not start without it."""

    accept_differences: tuple[Kind, ...] = ()
    """In what this site may differ from the study's result contract; events.jsonl and summary.json say so."""

    listen: Annotated[str, AfterValidator(checked_listen)] | None = None
    """tcp://address:port to bind; None: the card's port on all interfaces, IPv4 and IPv6, or nothing if the card has no address."""

    state: Path = Path("state")
    """The folder of checkpoints and records."""

    old_state: Path | None = None
    """The folder of this site's state in the study that this one continues; it is read once and never changed. None: there is none."""

    state_group: str | Annotated[int, Field(ge=0)] | None = None
    """The group of this machine that may read the state, models and all, such as a backup's; None: only the node's own account."""

    task: dict[str, Any] = field(default_factory=dict)
    """Arguments of the task that are this site's own, such as where its data are. A text that starts with ./ ../ or ~/ is a path."""

    table: SiteTable | None = None
    """Table that this site has for the study's data contract; None: its rows come from the task's own arguments alone."""

    contract: Path | None = None
    """The data contract's file, which `p2pfl data check` holds the table against."""

    cohort: Path | None = None
    """The file of the frozen rows; None: cohort.json beside the state folder."""

    policy: Policy = field(default_factory=Policy)
    """Floors that no analysis of the table may go below, and what the site answers at all."""

    allow_tasks: tuple[Annotated[str, AfterValidator(checked_task_name)], ...] = ()
    """Tasks that may run here beside the built-in ones, as distribution:entry or module:function; a study can only ask."""

    passphrase_file: Path | None = None
    """Holds the passphrase of private.pem; None: P2PFL_PASSPHRASE, or it is asked for."""

    spill_mb: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = SPILL_MB
    """Memory that neighbours' updates may take, in MB; beyond it all of them lie in files of the state folder. null: always in memory."""

    send_mbit_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Megabits of updates and of a doctor's large messages that its node sends in a second, to all neighbours together; null: no cap."""

    threads: Annotated[int, Field(ge=1)] = 1
    """Threads to compute with."""

    status_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port of the status page on 127.0.0.1; None or 0: one that is free."""

    status_listen: Annotated[str, AfterValidator(_checked_status)] | None = None
    """address:port of the status page instead, such as 127.0.0.1:9464, [::1]:9464 or, for another machine with its token, 0.0.0.0:9464."""

    linger_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    """How long a node that has stopped still answers neighbours that have not."""

    greet_timeout_s: Seconds | None = None
    """Key of earlier versions, accepted for one more: how long this node waits for members; None: as the study's require.within_s says."""

    deadline_floor_s: Seconds = 30.0
    """A round waits at least so long for a neighbour."""

    deadline_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 5.0
    """A round waits so many times as long as recent rounds took."""

    round_at_least_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """For rehearsals: a round's training takes at least so long here, and each round where nothing is trained at all."""

    transport: Annotated[str, AfterValidator(_checked_transport)] = "zeromq"
    """zeromq: each link goes as the study says; memory: all links stay within this process."""

    proxy: ProxySettings | None = None
    """How this site dials out: through a proxy; None: directly."""

    relay: RelaySettings | None = None
    """How much of others' links this site relays, where its card offers that; None: nothing."""

    mqtt: BrokerSettings | None = None
    """How this site reaches the MQTT broker over which the study has some of its links go; None: it reaches none."""

    heartbeat_s: Annotated[int, Field(ge=1)] = 2
    """Whole seconds between two signs of life on an idle link."""

    view_metrics: bool = True
    """Whether the whole network hears this site's losses and its metrics on its own test rows; of fewer than ten patients it never does."""

    view_counts: Literal["exact", "tens", "withheld"] = "exact"
    """How many rows this site has, as the network hears it: as it is, rounded down to tens, or not at all."""

    view_bytes_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 1000.0
    """Bytes that the node may send so that every node knows the network; null: as much as there is to say."""

    @classmethod
    def load(cls, path: Path | str) -> SiteFile:
        """Read the settings in a file; ConfigError with all faults otherwise."""
        folder = Path(path).absolute().parent
        site = _checked(load_yaml(path), str(path))
        given: dict[str, Path | None] = {"study": site.study, "keys": site.keys, "state": site.state, "old_state": site.old_state}
        given |= {"contract": site.contract, "cohort": site.cohort}
        given |= {"passphrase_file": site.passphrase_file}
        given |= {"proxy.password_file": site.proxy.password_file if site.proxy else None}
        given |= {f"mqtt.{key}": getattr(site.mqtt, key) for key in ("ca_file", "password_file") if site.mqtt}
        given |= {f"task.{key}": Path(value) for key, value in site.task.items() if _is_path(value)}
        strange = {key: written for key, written in given.items() if written is not None and _homeless(written)}
        if strange:
            raise ConfigError(
                [f"{key} = {shown(str(of))}: no account has this home folder; write the folder" for key, of in strange.items()], str(path)
            )
        faults = [*(site.proxy.faults() if site.proxy else ()), *(site.mqtt.faults() if site.mqtt else ())]
        if faults:
            raise ConfigError(faults, str(path))
        if site.status_port is not None and site.status_listen is not None:
            raise ConfigError("status_port and status_listen: both say where the status page is; keep one of them", str(path))
        return replace(
            site,
            study=_beside(folder, site.study),
            keys=_beside(folder, site.keys),
            state=_beside(folder, site.state),
            old_state=site.old_state and _beside(folder, site.old_state),
            contract=site.contract and _beside(folder, site.contract),
            cohort=site.cohort and _beside(folder, site.cohort),
            passphrase_file=site.passphrase_file and _beside(folder, site.passphrase_file),
            proxy=site.proxy and replace(site.proxy, password_file=site.proxy.password_file and _beside(folder, site.proxy.password_file)),
            mqtt=site.mqtt
            and replace(
                site.mqtt,
                ca_file=site.mqtt.ca_file and _beside(folder, site.mqtt.ca_file),
                password_file=site.mqtt.password_file and _beside(folder, site.mqtt.password_file),
            ),
            task={key: str(_beside(folder, Path(value))) if _is_path(value) else value for key, value in site.task.items()},
        )

    @property
    def status_address(self) -> tuple[str, int]:
        """Address of the status page: an IP address, and a port or 0."""
        if self.status_listen is None:
            return "127.0.0.1", self.status_port or 0
        host, _, port = self.status_listen.rpartition(":")
        return str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))), int(port)

    def listens_at(self, card: Card) -> str | None:
        """Address to bind for this site's card: tcp://address:port, or None for a site that only dials out.

        Raises:
            ConfigError: site.yaml says to listen, but nobody knows where: the card has no address. Or it does not say where, and the
                card's addresses have several ports.
        """
        if card.address is None:
            if self.listen is not None:
                raise ConfigError(f"listen = {self.listen!r}: the card of {card.name} has no address, so nobody would dial; expected null")
            return None
        if self.listen is not None:
            return self.listen
        ports = sorted({split_address(address)[1] for address in card.addresses})
        if len(ports) > 1:
            raise ConfigError(
                f"listen = null: the addresses on the card of {card.name} have the ports {', '.join(map(str, ports))}; "
                f"say which one to listen at here, such as tcp://*:{ports[0]}"
            )
        return f"tcp://*:{ports[0]}"


def _beside(folder: Path, path: Path) -> Path:
    return folder / path.expanduser()


def _checked(raw: dict[str, Any], place: str) -> SiteFile:
    """Check the keys of a site's file, those of its table among them, with all faults at once."""
    table, faults = section_table(raw["table"]) if raw.get("table") is not None else (None, [])
    policy = Policy()
    try:
        policy = Policy.from_mapping(raw.get("policy", {}), place)
    except ConfigError as error:
        faults = [*faults, *error.findings]
    try:
        site = check(SiteFile, {**raw, "table": table, "policy": policy}, place)
    except ConfigError as error:
        raise ConfigError([*error.findings, *faults], place) from error
    if faults:
        raise ConfigError(faults, place)
    return site


def _homeless(path: Path) -> bool:
    """Tell whether a path begins with the home folder of an account that this machine does not know."""
    try:
        path.expanduser()
    except RuntimeError:
        return True
    return False


def _is_path(value: object) -> bool:
    return isinstance(value, str) and value.startswith(("./", "../", "~/"))
