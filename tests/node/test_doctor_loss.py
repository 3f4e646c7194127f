"""Loss on the connections of one process: each edge's own, whatever ports they have."""

from __future__ import annotations

import socket
import sys
from contextlib import ExitStack

import pytest

from networks import wait_until
from p2pfl.node.doctor.loss import repeated_fraction


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how many segments were sent again, and has 127.0.0.2 by itself")
def test_edges_to_the_same_port_of_several_hosts_are_told_apart():
    with ExitStack() as open_:
        listener = open_.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = listener.getsockname()[1]
        open_.enter_context(socket.create_server(("127.0.0.2", port)))
        used, _unused = (open_.enter_context(socket.create_connection((host, port))) for host in ("127.0.0.1", "127.0.0.2"))
        used.sendall(b"one segment")
        wait_until(lambda: repeated_fraction([("127.0.0.1", port)]) is not None)

        assert repeated_fraction([("127.0.0.2", port)]) is None  # nothing was sent there
        assert repeated_fraction([]) is None
