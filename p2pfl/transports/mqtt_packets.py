"""The packets that a broker sends, looked at before the MQTT library: how large it lets packets be, and that none is larger than allowed.

Anybody who may publish at the broker can publish 256 MB, which the library would hold in memory. Such a packet is passed on without its
payload, so that the broker gets its acknowledgement, and does not send it again. A broker for MQTT 5 does not send it at all.
"""

from __future__ import annotations

_CONNACK, _PUBLISH = 2, 3
_LENGTH_BYTES = 4
_KIND_SHIFT, _QOS_BITS = 4, 0b0110
_MORE, _SEVEN = 0x80, 0x7F


class PacketFilter:
    """Takes what comes from a broker and gives what may be passed on.

    Args:
        most_bytes: of one packet.
        is_v5: whether MQTT 5 is spoken, and not 3.1.1.
    """

    def __init__(self, most_bytes: int, *, is_v5: bool) -> None:
        self.announced_bytes: int | None = None
        """The largest packet that the broker takes, as it said when it let this client in; None: it said nothing of that."""
        self.announced_messages: int | None = None
        """The most messages that the broker takes without having confirmed them, likewise."""
        self.num_cut = 0
        """Packets that were passed on without their payload."""
        self._most_bytes, self._is_v5 = most_bytes, is_v5
        self._held = bytearray()
        self._is_let_in = False
        self._skipped = 0  # bytes of a packet that are still to come, and not passed on

    def pass_on(self, data: bytes | memoryview) -> bytes:
        """Take more bytes, and give what may be passed on; ValueError where they cannot be MQTT, or a packet is too large."""
        self._held += data
        if self._held and not self._is_let_in:
            self._is_let_in = self._held[0] == _CONNACK << _KIND_SHIFT
            if not self._is_let_in:
                raise ValueError("answers with what is not MQTT")
        passed = bytearray()
        while True:
            skipped = min(self._skipped, len(self._held))
            del self._held[:skipped]
            self._skipped -= skipped
            head = _head(self._held)
            if head is None or self._skipped:
                return bytes(passed)
            head_bytes, rest_bytes = head
            size = head_bytes + rest_bytes
            if size > self._most_bytes:
                beginning = self._cut(head_bytes, size)
                if beginning is None:
                    return bytes(passed)
                passed += beginning
            elif len(self._held) < size:
                return bytes(passed)
            else:
                if self._held[0] >> _KIND_SHIFT == _CONNACK and self._is_v5:
                    self._read_answer(bytes(self._held[head_bytes:size]))
                passed += self._held[:size]
                del self._held[:size]

    def _cut(self, head_bytes: int, size: int) -> bytes | None:
        """Give a packet without its payload, and skip that; None: too little of it has come."""
        if self._held[0] >> _KIND_SHIFT != _PUBLISH or self._is_v5:
            raise ValueError(f"sends a packet of {size} bytes; at most {self._most_bytes} are taken")
        kept = head_bytes + 2
        if len(self._held) < kept:
            return None
        topic_bytes = int.from_bytes(self._held[head_bytes:kept], "big")
        kept += topic_bytes + (2 if self._held[0] & _QOS_BITS else 0)
        if kept > size:
            raise ValueError("sends a packet that is shorter than its topic")
        if len(self._held) < kept:
            return None
        rest = bytes(self._held[head_bytes:kept])
        beginning = bytes(self._held[:1]) + _length(len(rest)) + rest
        del self._held[:kept]
        self._skipped = size - kept
        self.num_cut += 1
        return beginning

    def _read_answer(self, rest: bytes) -> None:
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        properties = Properties(PacketTypes.CONNACK)  # type: ignore[no-untyped-call]
        try:
            properties.unpack(rest[2:])  # type: ignore[no-untyped-call]  # flags and reason come first
        except Exception as error:  # the library raises whatever comes of wrong bytes
            raise ValueError("answers with what is not MQTT 5") from error
        self.announced_bytes = getattr(properties, "MaximumPacketSize", None)
        self.announced_messages = getattr(properties, "ReceiveMaximum", None)


def _head(held: bytearray) -> tuple[int, int] | None:
    """Sizes of a packet's head and of its rest; None: too little of it has come."""
    length = 0
    for i, byte in enumerate(held[1 : 1 + _LENGTH_BYTES]):
        length |= (byte & _SEVEN) << (7 * i)
        if not byte & _MORE:
            return 2 + i, length
    if len(held) > _LENGTH_BYTES:
        raise ValueError("sends what is not MQTT")
    return None


def _length(size: int) -> bytes:
    """A size as MQTT writes it, seven bits a byte, the lowest first."""
    found = bytearray()
    while True:
        size, low = size >> 7, size & _SEVEN
        found.append(low | (_MORE if size else 0))
        if not size:
            return bytes(found)
