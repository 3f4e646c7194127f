"""A port that nobody else is given between being chosen and being used."""

from __future__ import annotations

import socket
from typing import Self


class ReservedPort:
    """A TCP port held for a process that is still to be started; `with` or close() gives it back.

    The holder is bound but does not listen, and both sides set SO_REUSEADDR (libzmq does): Linux then lets the process bind and listen, as
    often as it likes, while the system gives the port to nobody who did not ask for it by number.
    """

    def __init__(self, host: str) -> None:
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, 0))
        except OSError:
            self._socket.close()
            raise
        self.port: int = self._socket.getsockname()[1]
        self.address = f"tcp://[{host}]:{self.port}" if ":" in host else f"tcp://{host}:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the system give the port to anybody."""
        self._socket.close()


def reserve_port(host: str = "127.0.0.1") -> ReservedPort:
    """A free port of *host*, chosen by the system and held until closed."""
    return ReservedPort(host)
