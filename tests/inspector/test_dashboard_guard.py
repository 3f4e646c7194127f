"""The dashboard's guard: tokens, tickets, cookies and origins, without a server."""

from __future__ import annotations

import pytest

from p2pfl.inspector.dashboard.guard import Guard


def guard(**options):
    return Guard(app=None, port=8000, token="right", session="known", **options)


def judged(of, *, kind="http", path="/", query="", **headers):
    answer = of.judge(kind, path, query, {"host": "127.0.0.1:8000", **headers})
    return None if answer is None else answer.status


COOKIE = {"cookie": "other=1; p2pfl-dashboard-8000=known"}
OWN = {"origin": "http://127.0.0.1:8000"}


def test_the_token_is_exchanged_for_a_cookie_that_scripts_and_other_sites_cannot_use():
    answer = guard().judge("http", "/", "token=right", {"host": "127.0.0.1:8000"})

    assert (answer.status, dict(answer.headers)) == (
        303,
        {"location": "/", "set-cookie": "p2pfl-dashboard-8000=known; HttpOnly; SameSite=Strict; Path=/"},
    )


def test_whoever_has_the_cookie_comes_in_and_nobody_else():
    assert judged(guard(), **COOKIE) is None
    assert judged(guard(), kind="websocket", path="/_nicegui_ws/socket.io/", **COOKIE, **OWN) is None
    for path in ("/", "/_nicegui/3/static/nicegui.js", "/_nicegui_ws/socket.io/", "/docs"):
        assert judged(guard(), path=path) == 401
    assert judged(guard(), query="token=wrong") == 401
    assert judged(guard(), query="token=wrong", **COOKIE) == 401
    assert judged(guard(), query="token=r%C3%AFght") == 401
    assert judged(guard(), cookie="p2pfl-dashboard-8000=unknown") == 401
    assert judged(guard(), cookie="p2pfl-dashboard-8001=known") == 401
    assert judged(guard(), path="/docs", **COOKIE) == 404


def test_a_ticket_is_good_for_one_visit():
    door = guard()
    ticket = door.ticket()

    assert judged(door, query=f"token={ticket}") == 303
    assert judged(door, query=f"token={ticket}") == 401
    assert judged(door, query="token=right") == 303
    assert judged(door, query="token=right") == 303


@pytest.mark.parametrize("host", ["evil.example:8000", "127.0.0.1", "127.0.0.1:8001", "127.0.0.1.evil.example:8000", ""])
def test_a_name_that_is_not_this_machines_is_refused(host):
    assert judged(guard(), host=host, **COOKIE) == 403
    assert judged(guard(), host=host, query="token=right") == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:8001", "https://127.0.0.1:8000", "null"])
def test_a_page_of_another_origin_is_refused(origin):
    assert judged(guard(), kind="websocket", path="/_nicegui_ws/socket.io/", origin=origin, **COOKIE) == 403
    assert judged(guard(), path="/_nicegui_ws/socket.io/", origin=origin, **COOKIE) == 403


def test_a_websocket_without_any_origin_is_refused():
    assert judged(guard(), kind="websocket", path="/_nicegui_ws/socket.io/", **COOKIE) == 403


def test_two_guards_have_nothing_in_common():
    one, other = Guard(app=None, port=8000), Guard(app=None, port=8000)

    assert len({one.token, one.session, other.token, other.session}) == 4
    assert min(map(len, (one.token, one.session))) >= 43
