"""Ways back to the neighbours that dial this node: libzmq's routing id of each of their connections."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterable, Sequence

import zmq

from p2pfl.transports.admission import Account
from p2pfl.transports.sockets import LinkSocket

ROUTE_BYTES = 5  # routing ids that the ROUTER makes itself, from a random start: a zero and a counter
ROUTES_KEPT = 4


class ReturnRoutes:
    """Reaches each neighbour over its newest connection that still exists.

    Args:
        router: the listening socket.
        peers: the neighbours.
    """

    def __init__(self, router: LinkSocket, peers: Iterable[str]) -> None:
        self._router = router
        self._routes: dict[str, deque[bytes]] = {peer: deque(maxlen=ROUTES_KEPT) for peer in peers}  # newest last
        self._accounts: dict[bytes, Account] = {}

    def send(self, peer: str, frames: Sequence[bytes | memoryview]) -> bool:
        """Send a message; raises zmq.Again where there is no room, and returns False where there is no connection."""
        routes = self._routes[peer]
        while routes:
            try:
                self._router.send([routes[-1], *frames])
            except zmq.ZMQError as error:
                if error.errno != errno.EHOSTUNREACH:
                    raise
                routes.pop()
            else:
                return True
        return False

    def add(self, peer: str, route: bytes) -> Account | None:
        """Take in the connection of a message: an account for it, or None where it is known already."""
        # a late message of an old connection must not change the way back: only a route not yet known is the newest
        if route in self._routes[peer]:
            return None
        self._routes[peer].append(route)
        kept = {route for routes in self._routes.values() for route in routes}
        self._accounts = {known: account for known, account in self._accounts.items() if known in kept}
        return self._accounts.setdefault(route, Account())

    def account(self, route: bytes) -> Account | None:
        """Bytes that were delivered over a connection; None: it is kept no longer."""
        return self._accounts.get(route)

    def is_connected(self, peer: str) -> bool:
        """Whether the neighbour has a connection: a sign of life tells, and those that are gone are forgotten."""
        routes = self._routes[peer]
        while routes and not self._router.send_sign_of_life(peer, routes[-1]):
            routes.pop()
        return bool(routes)
