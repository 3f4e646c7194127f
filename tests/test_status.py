"""The status endpoint: what it says, to whom, and that asking changes nothing."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest

from links import ZeroMQLinks
from networks import Network, averaging, finish, plan_of, until
from p2pfl.errors import ConfigError, TransportError
from p2pfl.node.status import read_status, serve_status

GET = "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


async def ask(state, request: str) -> tuple[int, dict]:
    """One request to the endpoint of a state folder: its status code and the JSON."""
    head, body = await ask_plainly(state, request)
    assert "Content-Type: application/json" in head
    return int(head.split()[1]), json.loads(body)


async def ask_plainly(state, request: str) -> tuple[str, str]:
    """The same as it comes: head and body."""
    port = int((state / "status.url").read_text().strip().rstrip("/").rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.encode())
    answer = await reader.read()
    writer.close()
    head, _, body = answer.decode().partition("\r\n\r\n")
    return head, body


def served(tmp_path, status, conversation):
    """Run a conversation with an endpoint that answers with a status."""

    async def main():
        server = asyncio.create_task(serve_status(lambda: status, 0, tmp_path), name="status")
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
    ],
)
def test_only_a_get_of_the_status_from_this_machine_is_answered(tmp_path, request_text, code):
    found, body = served(tmp_path, {"round": 1}, lambda: ask(tmp_path, request_text))

    assert found == code
    assert (body == {"round": 1}) == (code == 200)


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
        server = asyncio.create_task(serve_status(lambda: {"round": 1}, 0, tmp_path), name="status")
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


def test_an_address_that_a_killed_node_left_is_said(tmp_path):
    (tmp_path / "status.url").write_text("http://127.0.0.1:1/\n")

    with pytest.raises(TransportError, match="may have been killed"):
        read_status(tmp_path)


def test_an_address_elsewhere_is_not_asked(tmp_path):
    (tmp_path / "status.url").write_text("http://192.0.2.1:80/\n")

    with pytest.raises(ConfigError, match=r"expected an address on 127\.0\.0\.1"):
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
    assert before["neighbours"][last] == {
        "greeted": False,
        "last_seen_s_ago": None,
        "exchange": None,
        "skipped": False,
        "left": False,
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
    assert sum(r["bytes_sent"] for r in rows[: row["round"] + 1]) <= during["bytes_sent"]


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
    neighbour = {"greeted": True, "last_seen_s_ago": 0.25, "exchange": None, "skipped": True, "left": False, "refused": {}}
    status = {
        "member": "basel",
        "round": 7,
        "rounds": 100,
        "loss": 0.5,
        "disagreement": None,
        "closing": None,
        "metrics": {"auroc": 0.9, "accuracy": None},
        "bytes_sent": 1234,
        "refused": {"wrong_digest": 2},
        "neighbours": {'be"rn': neighbour},
    }
    head, body = served(tmp_path, status, lambda: ask_plainly(tmp_path, METRICS))
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parser.text_string_to_metric_families(body)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    basel = ("member", "basel")

    assert "200 OK" in head
    assert "Content-Type: text/plain; version=0.0.4" in head
    assert samples == {
        ("p2pfl_round", basel): 7,
        ("p2pfl_rounds", basel): 100,
        ("p2pfl_loss", basel): 0.5,
        ("p2pfl_stopped", basel): 0,
        ("p2pfl_metric", basel, ("metric", "auroc")): 0.9,
        ("p2pfl_neighbour_greeted", basel, ("neighbour", 'be"rn')): 1,
        ("p2pfl_neighbour_last_seen_s_ago", basel, ("neighbour", 'be"rn')): 0.25,
        ("p2pfl_neighbour_skipped", basel, ("neighbour", 'be"rn')): 1,
        ("p2pfl_neighbour_left", basel, ("neighbour", 'be"rn')): 0,
        ("p2pfl_sent_bytes_total", basel): 1234,
        ("p2pfl_refused_total", basel, ("reason", "wrong_digest")): 2,
    }


def test_without_prometheus_client_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    code, body = served(tmp_path, {"member": "basel"}, lambda: ask(tmp_path, METRICS))

    assert code == 501
    assert "pip install 'p2pfl-mesh[prometheus]'" in body["error"]
