"""Access to the page: whoever has its token may see it, in a browser on this machine, under this machine's own name.

Other users of the machine and pages of other origins in the same browser reach the port, too. The token is exchanged for a cookie that
scripts cannot read and other sites cannot send; a name other than 127.0.0.1 (DNS rebinding) and a foreign Origin are refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

TOKEN_BYTES = 32

_SERVED = ("/_nicegui/", "/_nicegui_ws/")
_PAGES = ("/", "/favicon.ico")
_POLICY_VIOLATED = 1008

_HEADERS = {
    # Vue compiles its templates in the browser: hence unsafe-eval; nothing may be loaded from, or sent to, anywhere else
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """Given in the application's place."""

    status: int
    text: str
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(kw_only=True)
class Guard:
    """An ASGI application that lets another one answer only those who may ask."""

    app: Application
    port: int
    token: str = field(default_factory=lambda: secrets.token_urlsafe(TOKEN_BYTES))
    session: str = field(default_factory=lambda: secrets.token_urlsafe(TOKEN_BYTES))
    """Content of the cookie: the token itself is in no browser's memory once it has been exchanged."""
    tickets: set[str] = field(default_factory=set)
    """Tokens that are good for one visit: for a browser's command line, which others can read."""

    @property
    def url(self) -> str:
        """Where the page is, without a token."""
        return f"http://127.0.0.1:{self.port}/"

    @property
    def cookie(self) -> str:
        """Its name: cookies do not tell ports apart, and there may be several such pages."""
        return f"p2pfl-dashboard-{self.port}"

    def ticket(self) -> str:
        """A token for one visit."""
        found = secrets.token_urlsafe(TOKEN_BYTES)
        self.tickets.add(found)
        return found

    def judge(self, kind: str, path: str, query: str, headers: MutableMapping[str, str]) -> Answer | None:
        """Decide what to answer an "http" or "websocket" request instead of the page; None: let it through.

        The query has no question mark, and headers have their names in lower case.
        """
        hosts = {f"127.0.0.1:{self.port}", f"localhost:{self.port}"}
        if headers.get("host") not in hosts:
            return Answer(403, f"Ask as {self.url}\n")
        origin = headers.get("origin")
        # a browser names the origin of every websocket
        if (origin is not None or kind == "websocket") and origin not in {f"http://{host}" for host in hosts}:
            return Answer(403, "A page of another origin may not ask.\n")
        if path == "/" and (given := parse_qs(query).get("token")):
            return self._exchanged(given[0])
        if not _same(self._session_of(headers), self.session):
            return Answer(401, "Open the address that p2pfl dashboard has printed, with its token.\n")
        return None if path in _PAGES or path.startswith(_SERVED) else Answer(404, "There is one page only: /\n")

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        answer = self.judge(scope["type"], scope["path"], scope["query_string"].decode("latin-1"), headers)
        if answer is None:
            await self.app(scope, receive, _with_headers(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _POLICY_VIOLATED})  # before it is accepted: HTTP 403
        else:
            body = answer.text.encode()
            own = [("content-type", "text/plain; charset=utf-8"), ("content-length", str(len(body))), *answer.headers]
            sent = [(name.encode(), value.encode()) for name, value in own]
            guarded = _with_headers(send)
            await guarded({"type": "http.response.start", "status": answer.status, "headers": sent})
            await guarded({"type": "http.response.body", "body": body})

    def _exchanged(self, given: str) -> Answer:
        ticket = next((ticket for ticket in self.tickets if _same(given, ticket)), None)
        if ticket is not None:
            self.tickets.remove(ticket)
        elif not _same(given, self.token):
            return Answer(401, "That is not the token, or it has been used: take the address that p2pfl dashboard printed last.\n")
        cookie = f"{self.cookie}={self.session}; HttpOnly; SameSite=Strict; Path=/"
        return Answer(303, "", (("location", "/"), ("set-cookie", cookie)))

    def _session_of(self, headers: MutableMapping[str, str]) -> str:
        try:
            cookies: SimpleCookie = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return ""
        return cookies[self.cookie].value if self.cookie in cookies else ""


def _same(given: str, expected: str) -> bool:
    return secrets.compare_digest(given.encode("utf-8", "surrogatepass"), expected.encode())


def _with_headers(send: Send) -> Send:
    """Sends the headers of a page that nobody else may frame, load or feed, too; and nothing but its unchanging parts is kept."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {name.lower() for name, _ in message.get("headers", ())}
            more = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            kept = [] if b"cache-control" in there else [(b"cache-control", b"no-store")]
            message = {**message, "headers": [*message.get("headers", ()), *more, *kept]}
        await send(message)

    return sending
