"""Authentication by public key: answers libzmq's question for each handshake from a list of keys (RFC 27)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq.asyncio
from zmq.utils import z85

ZAP_ADDRESS = "inproc://zeromq.zap.01"
"""Where libzmq asks, within a context."""

NOT_NOW = 500
"""Status for a neighbour's key that is not let in for a while; RFC 27 calls it an internal error. 300 would leave the connection open."""


async def answer_for_keys(
    zap: zmq.asyncio.Socket,
    allowed: frozenset[bytes],
    refuse: Callable[[str, str], None],
    is_excluded: Callable[[bytes], bool] = lambda _: False,
) -> None:
    """Serve a REP that is bound to ZAP_ADDRESS until cancelled; a key that is let in becomes the User-Id of its frames.

    Args:
        zap: the socket.
        allowed: CURVE public keys, z85.
        refuse: told ("unauthorized", why) of each refusal.
        is_excluded: whether an allowed key is not let in now.
    """
    while True:
        await asyncio.sleep(0)  # a question that waits already is returned without a pause: many would hold the loop
        version, request_id, _domain, address, _identity, mechanism, *credentials = await zap.recv_multipart()
        key = z85.encode(credentials[0]) if mechanism == b"CURVE" and len(credentials) == 1 else b""
        if key in allowed and is_excluded(key):
            reply = [b"%d" % NOT_NOW, b"not now", b"", b""]
        elif key in allowed:
            reply = [b"200", b"", key, b""]
        else:
            reply = [b"400", b"not a neighbour", b"", b""]
            refuse("unauthorized", f"key {key!r} from {address!r} is no neighbour's")
        await zap.send_multipart([version, request_id, *reply])
