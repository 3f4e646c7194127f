"""Who may connect: libzmq's question for each handshake, answered from a list of public keys (RFC 27)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq.asyncio
from zmq.utils import z85

ZAP_ADDRESS = "inproc://zeromq.zap.01"
"""Where libzmq asks, within a context."""


async def answer_for_keys(zap: zmq.asyncio.Socket, allowed: frozenset[bytes], refuse: Callable[[str, str], None]) -> None:
    """Serve until cancelled; a key that is let in becomes the User-Id of its frames.

    Args:
        zap: REP, bound to ZAP_ADDRESS.
        allowed: CURVE public keys, z85.
        refuse: told ("unauthorized", why) of each refusal.
    """
    while True:
        await asyncio.sleep(0)  # a question that waits already is returned without a pause: many would hold the loop
        version, request_id, _domain, address, _identity, mechanism, *credentials = await zap.recv_multipart()
        key = z85.encode(credentials[0]) if mechanism == b"CURVE" and len(credentials) == 1 else b""
        if key in allowed:
            reply = [b"200", b"", key, b""]
        else:
            reply = [b"400", b"not a neighbour", b"", b""]
            refuse("unauthorized", f"key {key!r} from {address!r} is no neighbour's")
        await zap.send_multipart([version, request_id, *reply])
