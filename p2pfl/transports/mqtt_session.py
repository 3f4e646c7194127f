"""One end of an edge at an MQTT broker: it keeps a connection there, and meets the other end for streams.

The end that dials asks for a stream until the other end answers; the two numbers that they choose name the stream, so that nothing
recorded is taken for it. A stream ends with the connection to the broker, and with the other end's: the broker says when that dies.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import ssl
from collections import Counter, OrderedDict
from contextlib import suppress

from p2pfl.transports.base import LinkCondition
from p2pfl.transports.broker import LEAST_PACKET_BYTES, Broker, Connection, at_broker
from p2pfl.transports.dialler import RECONNECT_MAX_S, RECONNECT_S
from p2pfl.transports.mqtt_stream import EARLY_PACKETS, MqttStream
from p2pfl.transports.mqtt_words import NONCE_BYTES, Kind, Packet, Words
from p2pfl.transports.tunnels import SocketWay, UnreachableError

log = logging.getLogger(__name__)

ASK_S = 1.0
LOOK_S = 1.0
LASTED_S = 10.0
"""After a connection that lasted so long, the next one is made at once."""
MOST_PENDING = 8
MOST_UNDER_WAY = EARLY_PACKETS
"""Packets that wait for the broker, above which answers are left out: they answer what anybody can repeat."""
MOST_WAITING = 2 * EARLY_PACKETS
"""Messages of the broker that wait to be read here: all that the other end has under way, and a window of its stream."""


class BrokerSession:
    """One end of an edge at a broker, from `run` on until it is cancelled.

    Args:
        names: of this member and of the neighbour.
        words: what the two say to each other.
        broker: where they meet, with the settings of TLS.
        way_out: how connections are made.
        counters: of the link; counts "forged" (messages that the neighbour has not sent).
        patience_s: a stream that got no answer for so long ends.
    """

    def __init__(
        self,
        names: tuple[str, str],
        words: Words,
        broker: tuple[Broker, ssl.SSLContext | None],
        way_out: SocketWay,
        counters: Counter[str],
        *,
        patience_s: float,
    ) -> None:
        self.fault: UnreachableError | None = None
        """Why there is no connection with the broker; None: there is one, or it is being made for the first time."""
        self._me, self._peer = names
        self._words, self._broker, self._way_out, self._counters, self._patience_s = words, broker, way_out, counters, patience_s
        self._changed = asyncio.Event()
        self._connection: Connection | None = None
        self._session = 0
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()  # the windows of streams bound it
        self._asked: bytes | None = None  # the first half of the stream that this end asks for
        self._answer: tuple[bytes, int] | None = None
        self._pending: OrderedDict[bytes, tuple[bytes, int]] = OrderedDict()  # streams that the neighbour asked for, and its sessions
        self._stream: MqttStream | None = None
        self._stream_session = 0
        self._came: MqttStream | None = None
        self._num_under_way = 0

    async def run(self) -> None:
        """Keep a connection with the broker."""
        self.fault = self._came = None
        loop, pause_s = asyncio.get_running_loop(), RECONNECT_S
        while True:
            began_s = loop.time()
            self._session = int.from_bytes(secrets.token_bytes(NONCE_BYTES), "big")
            will = self._words.outbox, self._words.write(Packet(kind=Kind.GONE, number=self._session))
            broker, context = self._broker
            place = at_broker(broker, context, self._way_out, topic=self._words.inbox, will=will, most_waiting=MOST_WAITING)
            try:
                async with place as connection:
                    self._connection, self.fault, self._outgoing = connection, None, asyncio.Queue()
                    self._num_under_way = 0
                    self._changed.set()
                    publishing = connection.group.create_task(self._publish(connection), name=f"{self._me} publishes to {self._peer}")
                    looking = connection.group.create_task(self._look_at_stream(), name=f"{self._me} looks at its stream to {self._peer}")
                    self._post(Packet(kind=Kind.HELLO))
                    try:
                        async for payload in connection.payloads(self._words.inbox):
                            self._take(payload)
                    finally:
                        looking.cancel()
                        publishing.cancel()
            except UnreachableError as fault:
                self.fault = self._with_hint(fault)
            finally:
                self._connection = None
                self._pending.clear()
                if self._stream is not None:
                    self._stream.break_off("the connection with the broker has ended")
                self._changed.set()
            pause_s = RECONNECT_S if loop.time() - began_s > LASTED_S else min(2 * pause_s, RECONNECT_MAX_S)
            await asyncio.sleep(pause_s)

    async def close(self, linger_s: float) -> None:
        """Wait for so long until what was said has come to the broker."""
        if self._connection is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(linger_s):
                    await self._outgoing.join()

    async def open(self, patience_s: float) -> MqttStream:
        """Ask the neighbour for a stream.

        Raises:
            UnreachableError: there is no connection with the broker, or the neighbour does not answer; the message says which.
        """
        try:
            async with asyncio.timeout(patience_s):
                return await self._ask()
        except TimeoutError:
            broker = self._broker[0]
            raise self.fault or UnreachableError(
                LinkCondition.NO_ANSWER,
                f"{self._peer} does not answer at the broker {broker}: it is not running, or does not reach the broker, or the broker does "
                f"not pass on what is published under {self._words.inbox.rpartition('/')[0]}/",
            ) from None
        finally:
            self._asked = self._answer = None

    async def next_stream(self) -> MqttStream:
        """Wait for the next stream that the neighbour asks for; UnreachableError where there is no connection with the broker."""
        while True:
            if self._came is not None:
                stream, self._came = self._came, None
                return stream
            if self.fault is not None:
                raise self.fault
            self._changed.clear()
            await self._changed.wait()

    async def _ask(self) -> MqttStream:
        self._asked = secrets.token_bytes(NONCE_BYTES)
        while True:
            if self._connection is not None and self._answer is not None:
                stream = self._begin(*self._answer)
                stream.begin()
                return stream
            if self.fault is not None:
                raise self.fault
            self._say_open()
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(ASK_S):
                    await self._changed.wait()

    def _say_open(self) -> None:
        if self._asked is not None:
            self._post(Packet(kind=Kind.OPEN, stream=self._asked + bytes(NONCE_BYTES), number=self._session))

    def _begin(self, name: bytes, session: int) -> MqttStream:
        assert self._connection is not None
        if self._stream is not None:
            self._stream.close()
        self._stream, self._stream_session = MqttStream(name, self._post, self._connection.data_bytes), session
        return self._stream

    def _post(self, packet: Packet) -> None:
        """Have a packet published; it is dropped where there is no connection, or where somebody makes this end say too much."""
        is_bounded = packet.kind in (Kind.DATA, Kind.END)  # by the stream's window
        if self._connection is not None and (is_bounded or self._num_under_way < MOST_UNDER_WAY):
            self._num_under_way += 1
            self._outgoing.put_nowait(self._words.write(packet))

    async def _publish(self, connection: Connection) -> None:
        """Publish packets in their order, without waiting for what the broker says of each."""
        outgoing, name = self._outgoing, f"{self._me} publishes a packet"
        while True:
            payload = await outgoing.get()
            task = connection.group.create_task(connection.publish(self._words.outbox, payload), name=name)
            task.add_done_callback(lambda _: self._note_published(outgoing))

    def _note_published(self, outgoing: asyncio.Queue[bytes]) -> None:
        outgoing.task_done()
        if outgoing is self._outgoing:
            self._num_under_way -= 1

    def _take(self, payload: bytes) -> None:
        packet = self._words.read(payload)
        if packet is None:
            self._counters["forged"] += 1
            times = self._counters["forged"]
            if times & (times - 1) == 0:  # the 1st, 2nd, 4th, ...
                log.warning("%s: dropped (%d so far): a message at the broker that %s has not sent", self._me, times, self._peer)
            return
        if packet.kind == Kind.HELLO:
            self._say_open()
        elif packet.kind == Kind.OPEN:
            self._accept(packet)
        elif packet.kind == Kind.ACCEPT:
            if self._asked is not None and packet.stream.startswith(self._asked):
                self._answer = packet.stream, packet.number
                self._changed.set()
        elif packet.kind == Kind.GONE:
            if self._stream is not None and packet.number == self._stream_session:
                self._stream.break_off(f"the broker says that {self._peer} has gone")
        else:
            self._take_of_stream(packet)

    def _accept(self, packet: Packet) -> None:
        """Answer that a stream is to be had; it begins with its first packet, which only the neighbour can make."""
        asked = packet.stream[:NONCE_BYTES]
        name, _ = self._pending.get(asked, (asked + secrets.token_bytes(NONCE_BYTES), 0))
        self._pending[asked] = name, packet.number
        while len(self._pending) > MOST_PENDING:
            self._pending.popitem(last=False)
        self._post(Packet(kind=Kind.ACCEPT, stream=name, number=self._session))

    def _take_of_stream(self, packet: Packet) -> None:
        name, session = self._pending.get(packet.stream[:NONCE_BYTES], (None, 0))
        if packet.stream == name and packet.kind == Kind.DATA:
            self._pending.clear()
            self._came = self._begin(name, session)
            self._changed.set()
        if self._stream is not None and self._stream.stream == packet.stream:
            self._stream.take(packet)
        elif packet.kind != Kind.RESET:
            self._post(Packet(kind=Kind.RESET, stream=packet.stream))

    async def _look_at_stream(self) -> None:
        """End a stream whose packets the broker does not pass on."""
        while True:
            await asyncio.sleep(LOOK_S)
            if self._stream is not None and self._stream.end_if_stuck(self._patience_s):
                self._counters["stuck"] += 1
                log.warning(
                    "%s: what was sent to %s over the broker %s has got no answer for %g s. %s",
                    self._me, self._peer, self._broker[0], self._patience_s, self._about_packets(),
                )  # fmt: skip

    def _with_hint(self, fault: UnreachableError) -> UnreachableError:
        """A fault, with what it may mean where much was under way."""
        if self._connection is None or self._stream is None or not self._stream.has_unanswered:
            return fault
        return UnreachableError(fault.state, f"{fault}. {self._about_packets()}")

    def _about_packets(self) -> str:
        return (
            f"If that happens again and again, the broker may take or pass on no packets of mqtt.packet_bytes = "
            f"{self._broker[0].packet_bytes}: write fewer, such as {LEAST_PACKET_BYTES}"
        )
