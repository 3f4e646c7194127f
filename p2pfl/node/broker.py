"""Settings of the MQTT broker in a site's site.yaml: where this site reaches it, and how it logs in there."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from p2pfl.errors import ConfigError
from p2pfl.governance.names import is_loopback
from p2pfl.node.dialling import read_password
from p2pfl.transports import Broker
from p2pfl.transports.broker import LEAST_PACKET_BYTES, MOST_PACKET_BYTES

log = logging.getLogger(__name__)

PASSWORD_VARIABLE = "P2PFL_MQTT_PASSWORD"  # noqa: S105 - the name of a variable
_HOST = re.compile(r"[0-9A-Fa-f:.]+|[A-Za-z0-9][A-Za-z0-9._-]*")
_MOST_NAME_BYTES = 65535
_PORT, _TLS_PORT = 1883, 8883


def _checked_host(text: str) -> str:
    if _HOST.fullmatch(text) is None:
        raise ValueError("expected a host's name or its numeric address, such as broker.example; the port stands in mqtt.port")
    return text


def _checked_username(text: str) -> str:
    if not text or not text.isprintable() or len(text.encode()) > _MOST_NAME_BYTES:
        raise ValueError(f"expected 1 to {_MOST_NAME_BYTES} bytes that can be printed")
    return text


@dataclass(frozen=True, kw_only=True)
class BrokerSettings:
    """The settings of a broker."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    host: Annotated[str, AfterValidator(_checked_host)]
    """Name or numeric address of the broker."""

    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Its port; None: 8883 with TLS, 1883 without."""

    tls: bool = True
    """Whether the connection to it is encrypted."""

    ca_file: Path | None = None
    """Certificates, in PEM, of the authorities that may vouch for it; None: those of this machine."""

    username: Annotated[str, AfterValidator(_checked_username)] | None = None
    """The user that logs in; None: nobody has to."""

    password_file: Path | None = None
    """Holds the user's password; None: P2PFL_MQTT_PASSWORD."""

    version: Literal["3.1.1", "5", 5] = "5"
    """Version of MQTT that is spoken."""

    keepalive: Annotated[int, Field(ge=1, le=3600)] = 20
    """Seconds without a message after which the two look for each other."""

    packet_bytes: Annotated[int, Field(ge=LEAST_PACKET_BYTES, le=MOST_PACKET_BYTES)] = 2**16
    """The largest packet that this site sends; a broker for MQTT 5 that takes less says so by itself."""

    def faults(self) -> list[str]:
        """Find everything that does not fit together."""
        found = []
        if self.password_file is not None and self.username is None:
            found.append(f"mqtt.password_file = {str(self.password_file)!r}: whose password is it? Write mqtt.username, too")
        if self.ca_file is not None and not self.tls:
            found.append(f"mqtt.ca_file = {str(self.ca_file)!r}: is for TLS, and mqtt.tls is false; leave one of them out")
        return found

    def broker(self) -> Broker:
        """Make the broker with its password.

        Raises:
            ConfigError: there is a user and no password; others can read its file; or it is no password.
        """
        password = None
        if self.username is not None:
            password = read_password("mqtt", f"mqtt.username = {self.username!r}", self.password_file, PASSWORD_VARIABLE)
        return Broker(
            host=self.host,
            port=self.port or (_TLS_PORT if self.tls else _PORT),
            tls=self.tls,
            ca_file=self.ca_file,
            username=self.username,
            password=password,
            version=str(self.version),
            keepalive_s=self.keepalive,
            packet_bytes=self.packet_bytes,
        )


def settings_for(settings: BrokerSettings | None, peers: list[str]) -> BrokerSettings:
    """Return the settings of the broker of the links to some neighbours; ConfigError if site.yaml has none."""
    if settings is None:
        raise ConfigError(
            f"mqtt = null: the study has the links to {', '.join(peers)} go over an MQTT broker; write how this site reaches it, such as "
            "mqtt: {host: broker.example, username: hungary, password_file: mqtt-password}"
        )
    return settings


def broker_of(settings: BrokerSettings | None, peers: list[str]) -> Broker:
    """Make the broker of the links to some neighbours.

    Raises:
        ConfigError: site.yaml says none, or its password is not to be had.
    """
    broker = settings_for(settings, peers).broker()
    if broker.username is not None and not broker.tls and not is_loopback(broker.address):
        log.warning("mqtt.tls = false: the password goes to %s unencrypted; write tls: true where the broker has it", broker.host)
    return broker
