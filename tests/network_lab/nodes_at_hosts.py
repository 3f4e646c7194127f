"""A fork server as `p2pfl up` has it, whose processes each enter a host first: their first argument is the file of its namespace."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence

from p2pfl.cli import main
from p2pfl.launcher.fork_server import serve

CLONE_NEWNET = 0x40000000  # linux/sched.h


def program(arguments: Sequence[str]) -> None:
    namespace = os.open(arguments[0], os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns", arguments[0])
    os.close(namespace)
    sys.argv = ["p2pfl", *arguments[1:]]
    main()


if __name__ == "__main__":
    serve(program)
