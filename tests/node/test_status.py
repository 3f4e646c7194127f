"""The status endpoint: what it says, to whom, and that asking changes nothing."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

import p2pfl
from links import ZeroMQLinks
from networks import HASTY, Network, averaging, finish, plan_of, until
from p2pfl.errors import ConfigError, TransportError
from p2pfl.inspector.sources import read_source
from p2pfl.node.prometheus import exposition
from p2pfl.node.status import Answer, read_status, requested, serve_status
from p2pfl.protocol.link_watch import STATES

GET = "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


async def ask(state, request: str) -> tuple[int, dict]:
    """One request to the endpoint of a state folder: its status code and the JSON."""
    head, body = await ask_plainly(state, request)
    assert "Content-Type: application/json" in head
    return int(head.split()[1]), json.loads(body)


async def ask_plainly(state, request: str) -> tuple[str, str]:
    """The same as it comes: head and body. Where a request says nothing of a token, it is shown the right one."""
    port = int((state / "status.url").read_text().strip().rstrip("/").rpartition(":")[2])
    if "Authorization" not in request:
        request = request.replace("\r\n\r\n", f"\r\nAuthorization: Bearer {(state / 'status.token').read_text().strip()}\r\n\r\n")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.encode())
    answer = await reader.read()
    writer.close()
    head, _, body = answer.decode().partition("\r\n\r\n")
    return head, body


def served(tmp_path, status, conversation, *, at=MappingProxyType({}), **asked):
    """Run a conversation with an endpoint that answers with a status.

    Args:
        tmp_path: the state folder.
        status: the answer.
        conversation: a coroutine function.
        at: where it listens.
        asked: more of the node.
    """

    async def main():
        server = asyncio.create_task(serve_status(lambda: status, tmp_path, **asked, **at), name="status")
        await until((tmp_path / "status.url").exists)
        try:
            return await conversation()
        finally:
            server.cancel()
            await asyncio.wait([server])

    return finish(main())


def test_the_status_is_json_without_nan(tmp_path):
    assert served(tmp_path, {"loss": float("nan"), "inner": {"x": 1}}, lambda: ask(tmp_path, GET)) == (
        200,
        {"loss": None, "inner": {"x": 1}},
    )


@pytest.mark.parametrize(
    ("request_text", "code"),
    [
        ("GET /status HTTP/1.1\r\nHost: localhost:80\r\n\r\n", 200),
        ("GET /status?x=1 HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", 200),
        ("GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        ("GET / HTTP/1.1\r\nHost: 127.0.0.1.evil.example:80\r\n\r\n", 403),
        ("GET / HTTP/1.1\r\n\r\n", 403),
        ("POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n", 405),
        ("DELETE / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 405),
        ("GET /checkpoint.safetensors HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 404),
        ("GET /../run HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 404),
        ("GET / HTTP/1.1\r\nHost: evil.example\r\nHost: 127.0.0.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: 127.0.0.1:80@evil\r\n\r\n", 403),
        ("GET / HTTP/1.1\r\nHost: 127.0.0.1:\r\n\r\n", 403),
        ("GET / HTTP/1.1\r\nHost : 127.0.0.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n folded: x\r\n\r\n", 400),
        ("GET / SMTP\r\nHost: 127.0.0.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", 200),
        ("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://127.0.0.1\r\n\r\n", 403),
    ],
)
def test_only_a_get_of_the_status_from_this_machine_is_answered(tmp_path, request_text, code):
    found, body = served(tmp_path, {"round": 1}, lambda: ask(tmp_path, request_text))

    assert found == code
    assert (body == {"round": 1}) == (code == 200)


TOKEN = "x" * 43


@pytest.mark.parametrize("page", ["/", "/status", "/run", "/metrics", "/there-is-none"])
@pytest.mark.parametrize("shown", ["", "Authorization: Bearer wrong\r\n", "Authorization: Basic RIGHT\r\n", "Authorization: \xff\r\n"])
def test_without_its_token_it_says_neither_what_it_knows_nor_what_there_is(page, shown):
    request = f"GET {page} HTTP/1.1\r\nHost: 127.0.0.1\r\n{shown}\r\n".replace("RIGHT", TOKEN).encode("latin-1")
    answer = requested(request, TOKEN, local=True)

    assert answer.code == 401
    assert "WWW-Authenticate: Bearer" in answer.more
    assert TOKEN.encode() not in answer.to_bytes()


def test_two_tokens_are_none():
    shown = f"Authorization: Bearer {TOKEN}\r\n"

    assert requested(f"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n{shown}\r\n".encode(), TOKEN, local=True) == "/"
    assert requested(f"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n{shown}{shown}\r\n".encode(), TOKEN, local=True).code == 400


@pytest.mark.parametrize(
    ("page", "ready", "expected"),
    [
        ("live", True, (200, "live\n")),
        ("ready", True, (200, "ready\n")),
        ("live", False, (200, "live\n")),
        ("ready", False, (503, "leaving\n")),
    ],
)
def test_a_probe_hears_one_word_without_a_token(tmp_path, page, ready, expected):
    request = f"GET /{page} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: none\r\n\r\n"
    head, body = served(tmp_path, {"round": 1}, lambda: ask_plainly(tmp_path, request), is_ready=lambda: ready)

    assert (int(head.split()[1]), body) == expected


def test_every_answer_forbids_to_keep_it_to_guess_its_kind_and_to_use_it_elsewhere(tmp_path):
    async def conversation():
        return [
            (await ask_plainly(tmp_path, request))[0]
            for request in (GET, METRICS, GET.replace("127.0.0.1", "evil"), GET.replace("GET", "PUT"))
        ]

    for head in served(tmp_path, {"member": "basel"}, conversation):
        assert "X-Content-Type-Options: nosniff" in head
        assert "Cache-Control: no-store" in head
        assert "Cross-Origin-Resource-Policy: same-origin" in head
        assert "Content-Security-Policy: default-src 'none'" in head


@pytest.mark.parametrize("silent", [8, 200])
def test_connections_that_say_nothing_keep_nobody_from_an_answer(tmp_path, silent):
    async def conversation():
        port = int((tmp_path / "status.url").read_text().strip().rstrip("/").rpartition(":")[2])
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(silent)]
        for _, writer in held:
            writer.write(b"GET / HT")
        try:
            return [(await ask(tmp_path, GET))[0] for _ in range(3)]
        finally:
            for _, writer in held:
                writer.close()

    assert served(tmp_path, {"round": 1}, conversation) == [200, 200, 200]


def test_the_token_is_the_owners_alone_and_stays_over_a_restart(tmp_path):
    async def conversation():
        return (tmp_path / "status.token").read_text()

    before = os.umask(0)
    try:
        first, second = (served(tmp_path, {}, conversation) for _ in range(2))
    finally:
        os.umask(before)

    assert first == second
    assert len(first.strip()) >= 43
    assert (tmp_path / "status.token").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("content", "mode"), [(TOKEN, 0o644), (TOKEN, 0o620), ("short", 0o600), ("", 0o600), ("a b" * 20, 0o600)])
def test_a_token_that_others_may_know_or_that_is_damaged_is_not_used(tmp_path, content, mode):
    (tmp_path / "status.token").write_text(content)
    (tmp_path / "status.token").chmod(mode)

    with pytest.raises(ConfigError) as caught:
        finish(serve_status(dict, tmp_path), 10)
    assert caught.value.place == str(tmp_path / "status.token")
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0", "::"])
def test_it_listens_where_it_is_told_and_its_own_commands_find_it(tmp_path, host):
    async def conversation():
        return await asyncio.to_thread(read_status, tmp_path), (tmp_path / "status.url").read_text()

    status, url = served(tmp_path, {"round": 3}, conversation, at={"host": host})

    assert status == {"round": 3}
    assert url.startswith("http://[::1]:" if ":" in host else "http://127.0.0.1:")


def test_on_another_address_any_name_is_answered_to_but_only_with_the_token():
    known = f"GET /metrics HTTP/1.1\r\nHost: node.hospital.example:9464\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"

    assert requested(known.encode(), TOKEN, local=False) == "/metrics"
    assert requested(known.encode(), TOKEN, local=True).code == 403
    assert requested(known.replace("Bearer", "Basic").encode(), TOKEN, local=False).code == 401
    assert requested(b"GET /live HTTP/1.1\r\nHost: 10.0.0.7:9464\r\n\r\n", TOKEN, local=False) == "/live"


def test_a_port_that_somebody_else_holds_keeps_no_node_from_its_work(tmp_path, caplog):
    async def conversation():
        return await asyncio.to_thread(read_status, tmp_path)

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status = served(tmp_path, {"round": 3}, conversation, at={"port": port})

    assert status == {"round": 3}
    assert f"cannot listen at 127.0.0.1, port {port}" in caplog.text


def test_what_listens_at_the_address_of_a_killed_node_is_not_shown_its_token(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        (tmp_path / "status.url").write_text(f"http://127.0.0.1:{other.getsockname()[1]}/\n")
        (tmp_path / "status.token").write_text(TOKEN)
        (tmp_path / "lock").touch()
        with pytest.raises(TransportError, match="may have been killed"):
            read_status(tmp_path)
        with pytest.raises(TransportError, match="does not run"):
            read_source(str(tmp_path / "status.url"))
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()


def test_the_token_goes_to_no_proxy_and_follows_no_redirection(tmp_path, monkeypatch):
    heard = []

    async def redirect(reader, writer):
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async def main():
        async with await asyncio.start_server(redirect, "127.0.0.1", 0) as server:
            (tmp_path / "status.url").write_text(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/\n")
            (tmp_path / "status.token").write_text(TOKEN)
            await asyncio.to_thread(read_status, tmp_path)

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1/")
    with pytest.raises(TransportError, match="302"):
        finish(main(), 20)
    assert len(heard) == 1
    assert f"Bearer {TOKEN}".encode() in heard[0]


@pytest.mark.parametrize("noise", [b"", b"\xff\xfe\r\n\r\n", b"x" * 100_000, b"GET / HTTP/1.1\r\n" * 2000])
def test_noise_ends_its_own_connection_only(tmp_path, noise):
    async def conversation():
        port = int((tmp_path / "status.url").read_text().strip().rstrip("/").rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(noise)
            writer.write_eof()
            await reader.read()
        except ConnectionError:
            pass  # it was closed before it had read all
        finally:
            writer.close()
        return await ask(tmp_path, GET)

    assert served(tmp_path, {"round": 1}, conversation) == (200, {"round": 1})


def test_the_address_is_written_down_and_taken_away(tmp_path):
    async def conversation():
        return await asyncio.to_thread(read_status, tmp_path), (tmp_path / "status.url").read_text()

    status, url = served(tmp_path, {"round": 3}, conversation)

    assert status == {"round": 3}
    assert url.startswith("http://127.0.0.1:")
    with pytest.raises(ConfigError, match="no node is running here"):
        read_status(tmp_path)


def test_who_is_let_in_as_it_ends_has_an_answer(tmp_path):
    async def main(steps):
        server = asyncio.create_task(serve_status(lambda: {"round": 1}, tmp_path), name="status")
        await until((tmp_path / "status.url").exists)
        asked = asyncio.create_task(ask(tmp_path, GET))
        for _ in range(steps):
            await asyncio.sleep(0)
        server.cancel()
        await asyncio.wait([server])
        return await asked

    answers = []
    for steps in range(12):  # of the event loop, between asking and the end
        try:
            answers.append(finish(main(steps), 10))
        except (ConnectionError, FileNotFoundError):
            continue  # not let in; who is let in and waits for ever is a TimeoutError
    assert answers
    assert all(answer == (200, {"round": 1}) for answer in answers)


def test_a_node_that_does_not_run_is_said_to_with_its_last_sign_of_life_and_how_to_start_it(tmp_path):
    with pytest.raises(ConfigError, match="it was never started; start it with p2pfl node start"):
        read_status(tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"")
    os.utime(tmp_path / "checkpoint.safetensors", (1e9, 1e9))
    said = "its last sign of life was at 2001-09-09 01:46:40 UTC; start it with p2pfl node start, and it goes on where it was"
    with pytest.raises(ConfigError, match=said):
        read_status(tmp_path)
    (tmp_path / "status.url").write_text("http://127.0.0.1:1/\n")
    with pytest.raises(TransportError, match=said):
        read_status(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    (tmp_path / "status.url").unlink()
    with pytest.raises(ConfigError, match="it has finished, and its result is in"):
        read_status(tmp_path)


def test_an_address_that_a_killed_node_left_is_said(tmp_path):
    (tmp_path / "status.url").write_text("http://127.0.0.1:1/\n")

    with pytest.raises(TransportError, match="may have been killed"):
        read_status(tmp_path)


def test_an_address_elsewhere_is_not_asked(tmp_path):
    (tmp_path / "status.url").write_text("http://192.0.2.1:80/\n")

    with pytest.raises(ConfigError, match=r"a node answers only on its own machine"):
        read_status(tmp_path)


def test_a_running_node_says_where_it_is_whom_it_hears_and_what_it_refused(tmp_path):
    plan = plan_of(task={"name": "breast-cancer"}, nodes=3, topology={"name": "path"}, rounds=24, stop=None, evaluate_every=1)
    first, middle, last = plan.names
    links = ZeroMQLinks()

    async def main():
        async with Network(plan, tmp_path, links=links, status_port=0) as network:
            network.start(first, middle)
            await until((network.states[middle] / "status.url").exists)
            await until(lambda: network.nodes[middle].daemon.status()["neighbours"][first]["greeted"])
            before = (await ask(network.states[middle], GET))[1]
            network.start(last)
            await network.reached(3, [middle])
            network.nodes[middle].daemon.protocol.hear(first, (memoryview(b"\xc1"),), 0.0)
            during = (await ask(network.states[middle], GET))[1]
            await network.ended()
            return before, during, network.rows(middle)

    before, during, rows = finish(main())
    links.close()

    assert (before["member"], before["round"], before["rounds"], before["disagreement"]) == (middle, 0, 24, None)
    assert 0 <= before["neighbours"][last].pop("link_for_s") < 60
    assert before["neighbours"][last] == {
        "schema": None,
        "patience": 1.0,
        "held": 0,
        "unconfirmed": False,
        "link": "awaited",
        "link_detail": "it has not dialled this node yet",
        "link_events": {},
        "greeted": False,
        "last_seen_s_ago": None,
        "exchange": None,
        "skipped": False,
        "left": False,
        "paused": False,
        "state_lost": None,
        "dropped": 0,
        "events_held_back": 0,
        "refused": {},
    }
    assert during["round"] >= 3
    row = next(row for row in rows if row["disagreement"] == during["disagreement"])
    assert row["round"] in (during["round"] - 1, during["round"] - 2)  # a round that is over is being written down
    assert during["loss"] == row["loss"]
    assert during["metrics"] in (row["metrics"], rows[row["round"] + 1]["metrics"])
    assert during["refused"] == {"bad_message": 1}
    assert during["neighbours"][first]["refused"] == {"bad_message": 1}
    assert during["neighbours"][last]["greeted"] is True
    assert 0 <= during["neighbours"][last]["last_seen_s_ago"] < 60
    assert during["links"]["connected"] >= 2
    assert during["neighbours"][last]["link"] == during["neighbours"][first]["link"] == "up"
    assert during["neighbours"][last]["link_events"]["connected"] >= 1
    assert (before["last_round_time"], before["version"]) == (None, p2pfl.__version__)
    assert abs(time.time() - during["last_round_time"]) < 600
    assert sum(r["bytes_sent"] for r in rows[: row["round"] + 1]) <= during["bytes_sent"]


def test_a_node_that_waits_for_members_is_ready_and_one_that_leaves_is_not(tmp_path):
    plan = averaging({"name": "path"}, 2)
    first, _ = plan.names

    async def main():
        async with Network(plan, tmp_path, status_port=0) as network:
            network.start(first)
            await until((network.states[first] / "status.url").exists)
            request = "GET /ready HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: none\r\n\r\n"
            heard = await ask_plainly(network.states[first], request)
            daemon = network.nodes[first].daemon
            daemon.stop()
            return heard, daemon.is_ready(), await network.nodes[first].task

    (head, body), still, reason = finish(main())

    assert (head.split()[1], body) == ("200", "ready\n")
    assert not still
    assert reason == "paused"


def test_asking_changes_nothing(tmp_path):
    plan = averaging({"name": "ring"}, 3)

    async def main(place, *, asks):
        async with Network(plan, place, status_port=0) as network:
            network.start()
            while asks and not network.nodes[plan.names[0]].task.done():
                try:
                    await ask(network.states[plan.names[0]], GET)
                except OSError:
                    await asyncio.sleep(0)  # not there yet, or no more
            await network.ended()
            return network.models()

    assert finish(main(tmp_path / "asked", asks=True)).equal(finish(main(tmp_path / "not asked", asks=False)))


METRICS = "GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def test_prometheus_collects_the_status(tmp_path):
    parser = pytest.importorskip("prometheus_client.parser")
    neighbour = {
        "greeted": True,
        "last_seen_s_ago": 0.25,
        "exchange": None,
        "skipped": True,
        "left": False,
        "paused": True,
        "state_lost": "it was after round 3, and now is at the start",
        "refused": {"stale_round": 4},
        "link": "up",
        "link_events": {"connected": 3},
    }
    status = {
        "member": "basel",
        "version": "1.2.3",
        "round": 7,
        "rounds": 100,
        "loss": 0.5,
        "disagreement": None,
        "closing": None,
        "state_lost": None,
        "last_round_time": 1e9,
        "metrics": {"auroc": 0.9, "accuracy": None},
        "bytes_sent": 1234,
        "refused": {"wrong_digest": 2},
        "neighbours": {'be"rn': neighbour},
    }
    asked_s = time.time()
    head, body = served(tmp_path, status, lambda: ask_plainly(tmp_path, METRICS))
    samples = of_metrics(parser, body)
    basel, bern = ("member", "basel"), ("neighbour", 'be"rn')
    states = {key: value for key, value in samples.items() if key[0] == "p2pfl_neighbour_link_state"}
    last_seen_s = samples.pop(("p2pfl_neighbour_last_seen_timestamp_seconds", basel, bern))

    assert "200 OK" in head
    assert "Content-Type: text/plain; version=0.0.4" in head
    assert asked_s - 0.25 <= last_seen_s <= time.time() - 0.25
    assert [dict(key[1:])["state"] for key, value in states.items() if value] == ["up"]
    assert len(states) == len(STATES) + 1
    assert {key: value for key, value in samples.items() if key not in states} == {
        ("p2pfl_build_info", basel, ("version", "1.2.3")): 1,
        ("p2pfl_round", basel): 7,
        ("p2pfl_rounds_configured", basel): 100,
        ("p2pfl_loss", basel): 0.5,
        ("p2pfl_stopped", basel): 0,
        ("p2pfl_state_lost", basel): 0,
        ("p2pfl_last_round_timestamp_seconds", basel): 1e9,
        ("p2pfl_metric", basel, ("metric", "auroc")): 0.9,
        ("p2pfl_neighbour_greeted", basel, bern): 1,
        ("p2pfl_neighbour_skipped", basel, bern): 1,
        ("p2pfl_neighbour_left", basel, bern): 0,
        ("p2pfl_neighbour_paused", basel, bern): 1,
        ("p2pfl_neighbour_state_lost", basel, bern): 1,
        ("p2pfl_neighbour_up", basel, bern): 1,
        ("p2pfl_neighbour_link_events_total", ("event", "connected"), basel, bern): 3,
        ("p2pfl_neighbour_refused_total", basel, bern, ("reason", "stale_round")): 4,
        ("p2pfl_sent_bytes_total", basel): 1234,
        ("p2pfl_refused_total", basel, ("reason", "wrong_digest")): 2,
    }


def test_what_is_not_known_has_no_sample_and_is_never_called_up():
    parser = pytest.importorskip("prometheus_client.parser")
    samples = of_metrics(parser, exposition({"member": "basel", "neighbours": {"bern": {}}}).decode())
    named = {key[0] for key in samples}

    assert named == {"p2pfl_neighbour_link_state"}
    assert [dict(key[1:])["state"] for key, value in samples.items() if value] == ["unknown"]


def test_a_killed_neighbour_is_called_well_by_no_metric_and_by_no_line_of_the_status(tmp_path):
    parser = pytest.importorskip("prometheus_client.parser")
    plan, links = averaging({"name": "complete"}, 3, tolerance=1e-300), ZeroMQLinks()
    first, killed, _ = plan.names

    async def main():
        async with Network(plan, tmp_path, links=links, timeouts=HASTY) as network:
            network.start()
            await network.reached(3)
            await network.kill(killed)
            daemon = network.nodes[first].daemon
            await until(lambda: daemon.status()["neighbours"][killed]["link"] != "up")
            return daemon.status()

    status = finish(main())
    links.close()
    facts = status["neighbours"][killed]
    samples = of_metrics(parser, exposition(status).decode())
    dead = {key[0]: value for key, value in samples.items() if ("neighbour", killed) in key and "state" not in dict(key[1:])}

    assert facts["greeted"] is False
    assert facts["link_events"]["disconnected"] >= 1
    assert (dead["p2pfl_neighbour_up"], dead["p2pfl_neighbour_greeted"]) == (0, 0)
    assert samples["p2pfl_neighbour_link_state", ("member", first), ("neighbour", killed), ("state", "up")] == 0
    assert dead["p2pfl_neighbour_last_seen_timestamp_seconds"] <= time.time()


def of_metrics(parser, text):
    """Each sample by its name and labels."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_without_prometheus_client_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    code, body = served(tmp_path, {"member": "basel"}, lambda: ask(tmp_path, METRICS))

    assert code == 501
    assert "pip install 'p2pfl-mesh[prometheus]'" in body["error"]


@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"GET /live HTTP/1.1\r\n"]),
    st.booleans(),
)
def test_no_bytes_get_more_than_a_word_out_of_it_without_the_token(noise, begins, local):
    found = requested(begins + noise + b"\r\n\r\n", TOKEN, local=local)

    assert found in ("/live", "/ready") or (isinstance(found, Answer) and 400 <= found.code < 500)
