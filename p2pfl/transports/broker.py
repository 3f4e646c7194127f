"""A client's connection to an MQTT broker, over the site's own way out, with TLS and a password.

aiomqtt (extra `mqtt`) speaks MQTT. It is given a socket in a folder that only this account can enter. What goes through there is passed
on over a stream that is made, and encrypted, here: so proxies serve brokers as well, faults are known by their cause, and a packet from
the broker has a bounded size.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import socket
import ssl
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2pfl.errors import ConfigError, MissingExtraError
from p2pfl.transports.base import Endpoint, LinkCondition
from p2pfl.transports.mqtt_packets import PacketFilter
from p2pfl.transports.mqtt_words import AROUND_BYTES
from p2pfl.transports.streams import PIECE_BYTES, Stream, accepted, splice
from p2pfl.transports.tunnels import SocketWay, UnreachableError

if TYPE_CHECKING:
    import aiomqtt

log = logging.getLogger(__name__)

MOST_PACKET_BYTES = 2**18
"""The largest packet that a site may send, and that is taken from a broker."""
LEAST_PACKET_BYTES = 2**10
AT_ONCE = 8
"""The most messages that the broker has not confirmed; the library does not know that a broker for MQTT 5 may take fewer than 20."""
ANSWER_S = 10.0
LOG_OUT_S = 1.0
_REFUSES_VERSION, _REFUSES_LOGIN, _TOO_LARGE, _FAILURE = 132, (134, 135), 149, 128
_NO_TLS = "correct mqtt.port, or write mqtt.tls: false where it has none"
_REASONS = {136: "it is not available now", 137: "it is busy", 138: "it has banned this site"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Broker:
    """An MQTT broker and how this site logs in there."""

    host: str
    """Name or numeric address, an IPv6 one without brackets."""
    port: int
    tls: bool = True
    ca_file: Path | None = None
    """Certificates of the authorities that may vouch for the broker; None: those of this machine."""
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    version: str = "5"
    """Version of the protocol: 5 or 3.1.1."""
    keepalive_s: int = 20
    """The broker declares this client dead when it was silent for one and a half times as long."""
    packet_bytes: int = 2**16
    """The largest packet that is sent, unless the broker announces a smaller limit."""

    def __str__(self) -> str:
        return f"{'mqtts' if self.tls else 'mqtt'}://{self._place}"

    @property
    def _place(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def address(self) -> str:
        """Its address as tcp://host:port, for whatever connects to it."""
        return f"tcp://{self._place}"

    def tls_context(self) -> ssl.SSLContext | None:
        """Settings of TLS; None where the connection has none.

        Raises:
            ConfigError: the file of certificates cannot be read, or holds none.
        """
        if not self.tls:
            return None
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:  # ssl.SSLError is one
            why = "holds no certificate in PEM" if isinstance(error, ssl.SSLError) else error.strerror
            raise ConfigError(f"mqtt.ca_file = {str(self.ca_file)!r}: {why}") from error


def check_library() -> None:
    """Raise MissingExtraError where aiomqtt is not installed."""
    if find_spec("aiomqtt") is None:
        raise MissingExtraError("links over an MQTT broker need aiomqtt: pip install 'p2pfl-mesh[mqtt]'")


class Connection:
    """A client that the broker has let in, and that listens to one topic."""

    def __init__(self, client: aiomqtt.Client, broker: Broker, announced_bytes: int | None, group: asyncio.TaskGroup) -> None:
        self.group = group
        """Tasks that last as long as the connection; an UnreachableError of one ends it."""
        self.data_bytes = min(broker.packet_bytes, announced_bytes or MOST_PACKET_BYTES) - AROUND_BYTES
        """Room for a stream's bytes in one packet; less than 1 where the broker takes none that is large enough."""
        self._client, self._broker = client, broker

    async def publish(self, topic: str, payload: bytes) -> None:
        """Have the broker pass a payload on at least once; UnreachableError where the connection has ended."""
        import aiomqtt

        try:
            await self._client.publish(topic, payload, qos=1, timeout=float("inf"))
        except (aiomqtt.MqttError, RuntimeError) as error:  # of a broker that has never confirmed one of the last 65,535
            raise self._ended(error) from error

    async def payloads(self, topic: str) -> AsyncIterator[bytes]:
        """Payloads that are published to a topic from now on; UnreachableError where the connection ends."""
        import aiomqtt

        try:
            async for message in self._client.messages:
                if message.topic.value == topic and isinstance(message.payload, bytes):
                    yield message.payload
        except aiomqtt.MqttError as error:
            raise self._ended(error.__cause__ or error) from error

    def _ended(self, error: BaseException) -> Broken:
        if _code(error) == _TOO_LARGE:
            return Broken(f"the broker {self._broker} takes no packet of {self._broker.packet_bytes} bytes: lower mqtt.packet_bytes")
        return Broken(f"the connection with the broker {self._broker} has ended ({error})")


def _code(error: BaseException) -> Any:
    """The reason that a broker gives, a number; None: it gives none."""
    rc = getattr(error, "rc", None)
    return getattr(rc, "value", rc)


class Broken(UnreachableError):
    """There is no connection with the broker; the message says why, and what helps."""

    def __init__(self, detail: str) -> None:
        super().__init__(LinkCondition.BROKER, detail)


@asynccontextmanager
async def at_broker(
    broker: Broker, context: ssl.SSLContext | None, way_out: SocketWay, *, topic: str, will: tuple[str, bytes], most_waiting: int
) -> AsyncIterator[Connection]:
    """Connect with a broker and listen to a topic.

    Args:
        broker: where.
        context: settings of TLS; None: without.
        way_out: how connections are made.
        topic: what is listened to.
        will: topic and payload that the broker publishes when this client dies.
        most_waiting: messages that wait to be read; more are dropped.

    Raises:
        UnreachableError: there is no connection, or it ended; the message says why, and what helps.
    """
    line = PacketFilter(MOST_PACKET_BYTES + AROUND_BYTES, is_v5=broker.version == "5")
    far = _Filtered(*await _line_to(broker, context, way_out), line)
    folder = Path(tempfile.mkdtemp(prefix="p2pfl-"))
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            try:
                listener.bind(str(folder / "broker"))
            except OSError as error:
                raise Broken(f"this machine gives no socket in {folder}: {error}") from error
            listener.listen(1)
            listener.setblocking(False)
            async with asyncio.TaskGroup() as group:
                passing = group.create_task(_pass_on(listener, far), name="passes on to the broker")
                client = _client(broker, folder / "broker", will, most_waiting)
                await _log_in(group, client, passing, broker)
                try:
                    await _listen(client, topic, broker)
                    _check_limits(broker, line)
                    yield Connection(client, broker, line.announced_bytes, group)
                finally:
                    await _log_out(client)
                    passing.cancel()
    except BaseExceptionGroup as faults:
        found = _first(faults)
        if found is None:
            raise
        if (task := asyncio.current_task()) is not None and task.cancelling():  # which the group has put aside for the fault
            raise asyncio.CancelledError from None
        raise (found if far.fault is None else Broken(f"the broker {broker} {far.fault}")) from None
    finally:
        far.close()
        shutil.rmtree(folder, ignore_errors=True)


def _check_limits(broker: Broker, line: PacketFilter) -> None:
    if line.announced_bytes is not None and line.announced_bytes < LEAST_PACKET_BYTES:
        raise Broken(
            f"the broker {broker} takes packets of at most {line.announced_bytes} bytes, which is too little: at least "
            f"{LEAST_PACKET_BYTES} are needed; ask its administrator to raise the limit"
        )
    if line.announced_messages is not None and line.announced_messages < AT_ONCE:
        raise Broken(
            f"the broker {broker} takes only {line.announced_messages} messages at once, which is too little: at least {AT_ONCE} are "
            "needed; write mqtt.version: 3.1.1, where there is no such limit, or ask its administrator to raise it"
        )


def _first(faults: BaseExceptionGroup[BaseException]) -> UnreachableError | None:
    """The first fault of a connection, where there are no others."""
    ours, others = faults.split(UnreachableError)
    if ours is None or others is not None:
        return None
    found: BaseException = ours
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, UnreachableError)
    return found


class _Sparing(logging.Filter):
    """Passes the 1st, 2nd, 4th, ... of each warning only: anybody who may publish at a broker can cause as many as he likes."""

    def __init__(self) -> None:
        super().__init__()
        self._times: Counter[object] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a warning is passed on, and say in it how many there were."""
        self._times[record.msg] += 1
        times = self._times[record.msg]
        record.msg = f"{record.msg} ({times} so far)"
        return times & (times - 1) == 0


def _sparing_logger() -> logging.Logger:
    logger = logging.Logger(log.name, logging.WARNING)  # noqa: LOG001 - each connection counts for itself
    logger.parent = log
    logger.addFilter(_Sparing())
    return logger


def _client(broker: Broker, place: Path, will: tuple[str, bytes], most_waiting: int) -> aiomqtt.Client:
    import aiomqtt
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties

    options: dict[str, Any] = {"protocol": aiomqtt.ProtocolVersion.V311, "clean_session": True}
    if broker.version == "5":
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.MaximumPacketSize = MOST_PACKET_BYTES + AROUND_BYTES
        options = {"protocol": aiomqtt.ProtocolVersion.V5, "clean_start": True, "properties": properties}
    client = aiomqtt.Client(
        str(place),
        transport="unix",
        username=broker.username,
        password=broker.password,
        identifier=f"p2pfl{secrets.token_hex(8)}",  # 21 characters: every broker takes 23
        will=aiomqtt.Will(*will, qos=1),
        keepalive=broker.keepalive_s,
        max_queued_incoming_messages=most_waiting,
        max_inflight_messages=AT_ONCE,
        timeout=ANSWER_S,
        logger=_sparing_logger(),
        **options,
    )
    client.pending_calls_threshold = 1000  # many are under way at once
    return client


async def _line_to(broker: Broker, context: ssl.SSLContext | None, way_out: SocketWay) -> tuple[Stream, socket.socket]:
    """Make the stream to a broker, with TLS where that is wanted."""
    at = f"the broker {broker}"
    try:
        stream = await way_out.open(Endpoint("the broker", None, b""), broker.address, ANSWER_S)
    except UnreachableError as error:
        raise Broken(f"{at}: {error}; is it running, and are mqtt.host and mqtt.port in site.yaml right?") from error
    if context is None:
        return stream, stream.socket
    try:
        async with asyncio.timeout(ANSWER_S):
            connected = await asyncio.open_connection(sock=stream.socket, ssl=context, server_hostname=broker.host)
            return AsyncioStream(*connected), stream.socket
    except TimeoutError:
        said = f"does not answer with TLS: {_NO_TLS}"
    except ssl.SSLCertVerificationError as error:
        why = error.verify_message
        said = f"shows a certificate that this site does not trust ({why}): write its authority's as mqtt.ca_file, or correct mqtt.host"
    except (OSError, ValueError) as error:  # ssl.SSLError is one; no certificate can be for some names
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or "the connection has ended"
        said = f"does not answer with TLS ({why}): {_NO_TLS}"
    stream.close()
    raise Broken(f"{at} {said}")


class AsyncioStream:
    """A connection of asyncio as a stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def receive(self) -> bytes:
        """Wait for bytes; see Stream.receive."""
        return await self._reader.read(PIECE_BYTES)

    async def send(self, data: bytes | memoryview) -> None:
        """Send all of some bytes; see Stream.send."""
        self._writer.write(bytes(data))
        await self._writer.drain()

    def end(self) -> None:
        """Send no more; see Stream.end."""
        with suppress(OSError, RuntimeError):
            if self._writer.can_write_eof():
                self._writer.write_eof()
            else:
                self._writer.close()

    def close(self) -> None:
        """Close the connection; see Stream.close."""
        self._writer.close()


class _Filtered:
    """The stream from a broker, whose packets go through a filter."""

    def __init__(self, stream: Stream, connection: socket.socket, line: PacketFilter) -> None:
        self.fault: str | None = None
        """Words for what the broker has sent and cannot be taken."""
        self._stream, self._connection, self._line = stream, connection, line
        self.send, self.end, self.close = stream.send, stream.end, stream.close

    async def receive(self) -> bytes:
        """Wait for bytes; see Stream.receive."""
        while data := await self._stream.receive():
            self._answer_at_once()
            try:
                passed = self._line.pass_on(data)
            except ValueError as error:
                self.fault = str(error)
                raise OSError(self.fault) from error
            if passed:
                return passed
        return b""

    def _answer_at_once(self) -> None:
        """Have the kernel acknowledge what came: many brokers send a small packet only when the one before is acknowledged."""
        if hasattr(socket, "TCP_QUICKACK"):  # Linux; it does not last
            with suppress(OSError):
                self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


async def _pass_on(listener: socket.socket, far: Stream) -> None:
    """Pass on what the client and the broker say."""
    near, _ = await accepted(listener)
    near.setblocking(False)
    try:
        stream = AsyncioStream(*await asyncio.open_connection(sock=near))
    except BaseException:
        near.close()
        raise
    await splice(stream, far)


async def _log_in(group: asyncio.TaskGroup, client: aiomqtt.Client, passing: asyncio.Task[None], broker: Broker) -> None:
    entering = group.create_task(_enter(client), name="logs in at the broker")
    try:
        await asyncio.wait((entering, passing), return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:  # the library closes its socket only when it is let in or refused
        await asyncio.wait((entering,), timeout=LOG_OUT_S)
        if entering.done() and entering.result() is None:
            await _log_out(client)
        raise
    if not entering.done():
        entering.cancel()
        raise Broken(
            f"the broker {broker} ended the connection before it answered: has it a listener for MQTT {broker.version} "
            f"{'with' if broker.tls else 'without'} TLS there? See mqtt.port, mqtt.tls and mqtt.version in site.yaml"
        )
    fault = entering.result()
    if fault is None:
        return
    code = _code(fault)
    if code == _REFUSES_VERSION:
        said = f"does not speak MQTT {broker.version}: write mqtt.version: {'3.1.1' if broker.version == '5' else '5'}"
    elif code in _REFUSES_LOGIN and broker.username is None:
        said = "wants a password: write mqtt.username and mqtt.password_file in site.yaml"
    elif code in _REFUSES_LOGIN:
        said = f"does not take the password of {broker.username!r}: correct mqtt.username or the password, or ask its administrator"
    elif code is None:
        said = f"does not answer: is it a broker for MQTT {broker.version}?"
    else:
        said = f"refuses this client: {_REASONS.get(code, str(fault))}; ask its administrator"
    raise Broken(f"the broker {broker} {said}")


async def _enter(client: aiomqtt.Client) -> Exception | None:
    import aiomqtt

    try:
        await client.__aenter__()
    except (aiomqtt.MqttError, OSError, ValueError) as error:
        return error
    return None


async def _listen(client: aiomqtt.Client, topic: str, broker: Broker) -> None:
    import aiomqtt

    try:
        granted = await client.subscribe(topic, qos=1)
    except aiomqtt.MqttError as error:
        raise Broken(f"the broker {broker} has ended the connection: {error}") from error
    if any(getattr(code, "value", code) >= _FAILURE for code in granted):
        allowed = topic.rpartition("/")[0]
        raise Broken(f"the broker {broker} does not let this site listen to {allowed}/#: ask its administrator to allow it, both ways")


async def _log_out(client: aiomqtt.Client) -> None:
    import aiomqtt

    with suppress(aiomqtt.MqttError, TimeoutError):
        async with asyncio.timeout(LOG_OUT_S):
            await client.__aexit__(None, None, None)
