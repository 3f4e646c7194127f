"""`p2pfl dashboard`: who may see the page, and the page itself in a real browser.

Every browser test also asserts that nothing was asked of any other machine, and that no script failed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_inspector_report import run_of
from test_inspector_terminal import FIVE

from commands import run_here, start_command
from networks import wait_until
from p2pfl.errors import ConfigError, MissingExtraError
from p2pfl.inspector.dashboard.board import Board
from p2pfl.inspector.dashboard.server import _names_its_tasks, listening, serve
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run
from p2pfl.simulator import simulate

DEADLINE_S = 60.0
"""For what takes a second or two on a machine that is not busy."""
IN_THE_BROWSER = {"timeout": DEADLINE_S * 1000}
WIDE = {"width": 1280, "height": 900}
STRANGE = ("<script>alert(1)</script>", "</script><img src=x onerror=alert(2)>", '"><b>geneva</b>', "lausanne", "zurich")


def shown(page, text):
    """Wait until it stands somewhere in the page."""
    page.get_by_text(text).first.wait_for(**IN_THE_BROWSER)


def drawn(page):
    """Wait until the graph stands there, which comes with the last of what the page loads."""
    page.wait_for_selector(".figure .main-svg .textpoint", state="attached", **IN_THE_BROWSER)


def state_of(page, node, state):
    """Wait until the table of nodes says so."""
    page.locator("tr", has=page.get_by_role("cell", name=node, exact=True)).locator(f"td.state.{state}").wait_for(**IN_THE_BROWSER)


@contextmanager
def serving(*sources, cwd):
    """The address of a dashboard in a process of its own, with its token. It ends by Ctrl-C, with exit code 0, and says nothing more."""
    running = start_command("dashboard", *sources, "--json", cwd=cwd)
    try:
        line = json.loads(running.stdout.readline() or '{"url": ""}')["url"]
        assert line.startswith("http://127.0.0.1:"), running.communicate(timeout=DEADLINE_S)
        yield line
        running.send_signal(signal.SIGINT)
        assert (running.communicate(timeout=DEADLINE_S), running.returncode) == (("", ""), 0)
    finally:
        running.kill()
        running.communicate()


@pytest.mark.parametrize(("names", "is_told"), [("", False), ("update loop", True)])
def test_tasks_that_could_not_be_cancelled_are_told_where_there_are_any(names, is_told):
    record = logging.LogRecord("nicegui", logging.ERROR, "", 0, "Could not cancel %s tasks within timeout: %s", (7, names), None)

    assert _names_its_tasks(record) is is_told


def need_chromium():
    found = shutil.which("chromium")
    if found is None:
        assert os.environ.get("P2PFL_NEED_CHROMIUM") != "1", "chromium is not installed: apt-get install chromium"
        pytest.skip("needs chromium: apt-get install chromium")
    return found


@pytest.fixture(scope="module", autouse=True)
def _extra():
    if find_spec("nicegui") is None:  # not imported: that takes a second
        pytest.skip("needs the extra dashboard")


@pytest.fixture(scope="module")
def browser():
    program = need_chromium()
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright").sync_playwright().start()
    found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"], timeout=DEADLINE_S * 1000)
    yield found
    found.close()
    playwright.stop()


@pytest.fixture
def serve_here(tmp_path):
    """The address of a dashboard of some sources, which lasts longer than the pages that are open."""
    with ExitStack() as held:
        yield lambda *sources: held.enter_context(serving(*sources, cwd=tmp_path))


@pytest.fixture
def visit(browser, serve_here):  # pages are closed before what serves them ends
    """Opens pages; in the end nothing may have gone elsewhere, no script may have failed and none may have asked anything."""
    asked, wrong, contexts = [], [], []

    def visit(url, **options):
        context = browser.new_context(**{"viewport": WIDE, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda websocket: asked.append(websocket.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(url, **IN_THE_BROWSER)
        return page

    yield visit
    for context in contexts:
        context.close()

    assert {urllib.parse.urlsplit(url).hostname for url in asked if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}
    assert any(url.startswith("ws://") for url in asked)
    assert wrong == []


@pytest.fixture
def shoot(tmp_path):
    """Keeps a picture: in the folder that P2PFL_SCREENSHOTS names, where there is one."""
    folder = Path(os.environ.get("P2PFL_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)

    def shoot(page, name):
        path = folder / f"dashboard-{name}.png"
        page.screenshot(path=path, full_page=True, animations="disabled")
        assert path.stat().st_size > 20_000  # an empty page has a tenth of it

    return shoot


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory):
    """Of one finished run."""
    place = tmp_path_factory.mktemp("dashboard")
    run_of(place / "run", skips=[(3, "bern", "basel"), (4, "bern", "basel")])
    (place / "here").mkdir()
    with serving(place / "run", cwd=place / "here") as url:
        yield url

    assert list((place / "here").iterdir()) == []  # NiceGUI would keep a .nicegui there


# ---- who may see it


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def asked(url, **headers):
    """Status, headers and body of what is answered."""
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=DEADLINE_S) as response:
            return response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


def websocket_status(url, **headers):
    """The status with which a handshake is answered."""
    parts = urllib.parse.urlsplit(url)
    lines = [
        "GET /_nicegui_ws/socket.io/?EIO=4&transport=websocket HTTP/1.1",
        f"Host: {parts.netloc}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    with socket.create_connection((parts.hostname, parts.port), timeout=DEADLINE_S) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        return int(connection.recv(4096).split(b" ")[1])


def test_the_server_lets_nobody_in_without_the_token(dashboard):
    base = dashboard.split("?")[0]
    origin = base.rstrip("/")
    code, headers, _ = asked(dashboard)
    cookie = headers["set-cookie"].split(";")[0]
    page = asked(base, Cookie=cookie)

    assert (code, headers["location"]) == (303, "/")
    assert page[0] == 200
    assert "nicegui" in page[2]
    assert "frame-ancestors 'none'" in page[1]["content-security-policy"]
    assert page[1]["cache-control"] == "no-store"
    for path in ("", "?token=wrong", "_nicegui_ws/socket.io/?EIO=4&transport=polling", "docs", "openapi.json", "favicon.ico"):
        code, _, body = asked(base + path)
        assert (code, "nicegui" in body) == (401, False)
    assert asked(base, Cookie=cookie, Host="evil.example")[0] == 403
    assert asked(base + "docs", Cookie=cookie)[0] == 404
    assert websocket_status(base, Origin=origin) == 403
    assert websocket_status(base, Origin="http://evil.example", Cookie=cookie) == 403
    assert websocket_status(base, Cookie=cookie) == 403
    assert websocket_status(base, Origin=origin, Cookie=cookie) == 101


# ---- the command


@pytest.mark.slow
def test_a_browser_is_opened_with_a_token_that_is_good_once(tmp_path, monkeypatch):
    run_of(tmp_path / "run")
    program = tmp_path / "browser"
    program.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/new && mv {tmp_path}/new {tmp_path}/opened\n')
    program.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(program))
    with serving(tmp_path / "run", "--open", cwd=tmp_path) as url:
        wait_until((tmp_path / "opened").exists, DEADLINE_S)
        opened = (tmp_path / "opened").read_text().strip()

        assert opened.split("?")[0] == url.split("?")[0]
        assert [asked(opened)[0], asked(opened)[0], asked(url)[0]] == [303, 401, 303]


def test_a_run_that_does_not_exist_is_said_at_once(tmp_path, monkeypatch, capfd):
    code, out, err = run_here("dashboard", tmp_path / "nowhere", monkeypatch=monkeypatch, capfd=capfd)

    assert (code, out) == (2, "")
    assert err == (f"p2pfl: {tmp_path / 'nowhere'}: no such folder: give the folder of a run, as --out named it (runs/NAME by default)\n")


@pytest.mark.parametrize("missing", ["nicegui", "plotly"])
def test_a_missing_extra_is_one_line_that_names_it(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'p2pfl-mesh[dashboard]'")):
        serve([str(tmp_path)], port=0, say=print)


def test_a_port_that_is_taken_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port: {port}: cannot listen on 127.0.0.1"):
            listening(port)


# ---- what it reads


def test_each_source_has_a_name_of_its_own(tmp_path):
    labels = [
        source.label
        for source in Board.of(
            [str(tmp_path / "one" / "run"), str(tmp_path / "two" / "run"), str(tmp_path / "three"), "http://127.0.0.1:81/", "a", "a"]
        ).sources
    ]

    assert labels[2:] == ["three", "127.0.0.1:81", "a (5)", "a (6)"]
    assert len(set(labels)) == 6


def test_a_folder_that_has_not_changed_is_not_read_again(tmp_path):
    run_of(tmp_path / "run")
    board = Board.of([str(tmp_path / "run")])
    board.look()
    view = board.sources[0].view
    board.look()

    assert (board.version, board.sources[0].view is view) == (1, True)
    RunFolder.open(tmp_path / "run").append_event({"round": 3, "node": "bern", "event": "died", "detail": "of age"})
    board.look()
    assert board.version == 2
    assert "of age" in board.sources[0].view.events


def test_what_has_to_be_asked_again_and_is_the_same_is_not_drawn_again(tmp_path, monkeypatch):
    run_of(tmp_path / "run")
    board = Board.of(["http://127.0.0.1:81/"])
    monkeypatch.setattr("p2pfl.inspector.dashboard.board.read_source", lambda _: read_run(tmp_path / "run"))
    board.look()
    board.look()

    assert board.version == 1


def test_what_cannot_be_read_is_said_once_and_what_was_known_stays(tmp_path):
    run_of(tmp_path / "run")
    board = Board.of([str(tmp_path / "run")])
    board.look()
    whole = (tmp_path / "run" / "nodes.jsonl").read_text()
    (tmp_path / "run" / "nodes.jsonl").write_text("rubbish\n")
    board.look()
    board.look()

    assert board.version == 2
    assert "nodes.jsonl, line 1: not JSON" in str(board.sources[0].error)
    assert board.sources[0].view is not None
    (tmp_path / "run" / "nodes.jsonl").write_text(whole)
    board.look()
    assert (board.version, board.sources[0].error) == (3, None)


# ---- the page


@pytest.mark.slow
def test_the_page_shows_a_run_in_light_and_dark_and_at_200_percent(dashboard, visit, shoot):
    page = visit(dashboard)
    drawn(page)

    assert "token" not in page.url
    assert page.title() == "p2pfl dashboard"
    assert page.evaluate("document.documentElement.lang") == "en-US"
    assert [page.get_by_role("heading", level=1).inner_text(), *page.get_by_role("heading", level=2).all_inner_texts()] == [
        "breast-cancer",
        "In short",
        "Who exchanges with whom",
        "Agreement",
        "One site",
        "Where the time goes",
        "Events",
    ]
    shown(page, "It has converged: the nodes agreed to stop after 14 rounds")
    shown(page, "In round 13 the disagreement was certainly between 6.8e-03 and 2.7e-02")
    shown(page, "The slowest link is basel - bern: 2 of 28 messages over it were missed in rounds 0-13.")
    state_of(page, "zurich", "finished")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    shoot(page, "light")

    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 28, 38)"
    assert page.evaluate("getComputedStyle(document.querySelector('.main-svg text')).fill") == "rgb(226, 232, 240)"
    shoot(page, "dark")
    page.get_by_role("button", name="Light or dark").press("Enter")
    page.wait_for_function("getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'", **IN_THE_BROWSER)
    page.reload(**IN_THE_BROWSER)
    drawn(page)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"

    page.set_viewport_size({"width": WIDE["width"] // 2, "height": WIDE["height"] // 2})
    page.wait_for_function("document.querySelector('.main-svg').getBoundingClientRect().right <= innerWidth", **IN_THE_BROWSER)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("[...document.querySelectorAll('.figure')].every((f) => f.getBoundingClientRect().right <= innerWidth)")
    shoot(page, "200-percent")


FOCUS = """() => {
  const found = document.activeElement, style = getComputedStyle(found);
  const name = found.getAttribute("aria-label") || (found.labels && found.labels[0] ? found.labels[0].innerText : found.innerText);
  return [found.tagName.toLowerCase() + " " + name.split("\\n")[0].trim(), style.outlineStyle + " " + style.outlineWidth];
}"""

NAMELESS = """() => [...document.querySelectorAll("main :is([role=img], [role=region], section, table, select, button)")]
  .filter((e) => !(e.getAttribute("aria-label") || (e.labels && e.labels.length) || e.innerText.trim())).map((e) => e.outerHTML)"""


@pytest.mark.slow
def test_the_keyboard_alone_is_enough_and_everything_has_a_name(dashboard, visit):
    page = visit(dashboard)
    drawn(page)
    stops, outlines = [], set()
    for _ in range(12):
        page.keyboard.press("Tab")
        stop, outline = page.evaluate(FOCUS)
        if stop.startswith("body"):
            break
        stops.append(stop)
        outlines.add(outline)

    assert stops == [
        "button Light or dark",
        "div links that are lost or slow",
        "div how every node is",
        "select Site",
        "div who went on without whom",
        "div fractions of a round",
        "div events",
    ]
    assert outlines == {"solid 3px"}
    shown(page, "basel")
    site = page.get_by_role("combobox", name="Site")
    site.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    shown(page, "geneva never went on without a neighbour")
    assert site.locator("option:checked").inner_text() == "geneva"
    assert page.evaluate(FOCUS)[0] == "select Site"
    assert page.evaluate(NAMELESS) == []
    assert page.locator("[role=img]").count() == 6
    assert page.locator("[role=status], [role=alert]").count() == 2


@pytest.mark.slow
def test_names_from_strangers_are_texts(tmp_path, serve_here, visit):
    events = [{"round": 3, "node": STRANGE[0], "event": "refused", "detail": "<img src=x onerror=alert(3)>"}]
    run_of(tmp_path / "run", nodes=STRANGE, skips=[(3, STRANGE[1], STRANGE[0])], events=events)
    url = serve_here(tmp_path / "run")
    page = visit(url)
    drawn(page)
    site = page.get_by_role("combobox", name="Site")
    site.select_option(index=2)
    shown(page, f"{STRANGE[2]} never went on without a neighbour")

    assert site.locator("option").all_inner_texts() == list(STRANGE)
    assert page.get_by_role("cell", name=STRANGE[0], exact=True).count() == 2  # as a node, and in an event
    assert page.get_by_role("cell", name="<img src=x onerror=alert(3)>", exact=True).count() == 1
    assert page.locator("main img, main b, main td script").count() == 0
    assert page.locator(".main-svg .textpoint").all_text_contents() == list(STRANGE)


@pytest.mark.slow
def test_a_run_goes_on_while_it_is_looked_at(tmp_path, serve_here, visit):
    place = run_of(tmp_path / "run")
    (place / "summary.json").unlink()
    folder = RunFolder.open(place)
    url = serve_here(place)
    page = visit(url)
    drawn(page)
    shown(page, "14 rounds · running (last record ")
    without = {"basel": ["bern"], "geneva": ["bern"], "lausanne": [], "zurich": []}
    folder.append_node(*({"round": 14, "node": name, "kind": "settle", "skipped": skipped} for name, skipped in without.items()))
    folder.append_round({"round": 14, "kind": "settle", "bound_low": None, "bound_high": None, "consensus_distance": 1e-4})
    shown(page, "15 rounds · running (last record ")
    state_of(page, "bern", "lost")
    shown(page, "bern is lost.")
    page.get_by_text("bern (lost)").wait_for(**IN_THE_BROWSER)
    shown(page, "Since then messages were missed, and nothing is certified.")
    folder.append_node(*({"round": 15, "node": name, "kind": "settle", "skipped": []} for name in FIVE))
    state_of(page, "bern", "well")
    assert page.get_by_text("bern is lost.").count() == 0


class _Node(BaseHTTPRequestHandler):
    """As a node's status endpoint answers, with what `document` holds."""

    document = b""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.document)

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_a_node_that_does_not_answer_any_more_is_said_and_its_records_stay(tmp_path, serve_here, visit):
    place = run_of(tmp_path / "run")
    experiment = {"name": "asked of a node", "stop": {"relative_consensus": 1e-3}}
    rows = {name: [json.loads(line) for line in (place / f"{name}.jsonl").read_text().splitlines()] for name in ("rounds", "nodes")}
    graph = json.loads((place / "topology.json").read_text())
    document = {"experiment": experiment, "environment": {}, "topology": graph, **rows, "events": [], "summary": None}
    _Node.document = json.dumps(document).encode()
    node = ThreadingHTTPServer(("127.0.0.1", 0), _Node)
    thread = threading.Thread(target=node.serve_forever)
    thread.start()
    try:
        url = serve_here(f"http://127.0.0.1:{node.server_port}/")
        page = visit(url)
        drawn(page)
        shown(page, "asked of a node")
        node.shutdown()
        node.server_close()
        page.get_by_role("alert").get_by_text("no node answers").wait_for(**IN_THE_BROWSER)
        state_of(page, "zurich", "well")
    finally:
        node.shutdown()
        node.server_close()
        thread.join()


@pytest.mark.slow
def test_two_runs_stand_beside_each_other(tmp_path, serve_here, visit, shoot):
    for graph in ("ring", "complete"):
        simulate(
            {"task": {"name": "breast-cancer"}, "nodes": 4, "partition": {"name": "iid"}, "topology": {"name": graph}, "baselines": []},
            out=tmp_path / graph,
            rounds=3,
        )
    url = serve_here(tmp_path / "ring", tmp_path / "complete")
    page = visit(url)
    drawn(page)
    table = page.get_by_role("table", name="the runs compared")
    rows = [row.split("\t")[:2] for row in table.inner_text().splitlines()]

    assert rows == [["run", "graph"], ["ring", "ring"], ["complete", "complete"]]
    assert table.get_by_role("cell", name="converged").count() == 2
    agreement = page.get_by_role("img", name="the disagreement of the models")
    assert agreement.locator(".legendtext").all_text_contents() == ["ring", "complete"]
    assert agreement.locator(".scatterlayer .trace").count() == 4  # each with its bound
    page.get_by_role("combobox", name="Run").select_option("1")
    shown(page, "4 nodes, complete")
    shoot(page, "compared")


def pid_of(site):
    """Of the daemon with this site.yaml; None while there is none."""
    for words in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(site).encode() in words.read_bytes().split(b"\0"):
                return int(words.parent.name)
        except OSError:
            continue
    return None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the daemon in /proc")
def test_a_daemon_that_is_killed_turns_red_and_comes_back(tmp_path, serve_here, visit, shoot):
    need_chromium()
    experiment = {"task": {"name": "breast-cancer"}, "nodes": 5, "topology": {"name": "ring"}, "rounds": 1000, "baselines": []}
    code = "import sys, json, p2pfl; p2pfl.up(json.loads(sys.argv[1]), out=sys.argv[2], site=json.loads(sys.argv[3]))"
    # a round takes so long that a dead node stays away for several looks
    site = {"round_at_least_s": 2.0, "deadline_floor_s": 4.0, "deadline_factor": 2.0}
    place = tmp_path / "run"
    log = (tmp_path / "up.log").open("wb")
    running = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(experiment), str(place), json.dumps(site)], stdout=log, stderr=log, start_new_session=True
    )
    try:
        wait_until(lambda: (place / "rounds.jsonl").exists() or running.poll() is not None, DEADLINE_S)
        url = serve_here(place)
        page = visit(url)
        drawn(page)
        shown(page, re.compile(r" (?:[3-9]|\d\d+) rounds · running"))
        state_of(page, "hospital-2", "well")
        shoot(page, "live")
        os.kill(pid_of(place / "sites" / "hospital-2" / "site.yaml"), signal.SIGKILL)
        state_of(page, "hospital-2", "lost")
        shown(page, "It died after round")
        page.get_by_text("hospital-2 (lost)").wait_for(**IN_THE_BROWSER)
        shoot(page, "killed")
        state_of(page, "hospital-2", "well")
        shown(page, "killed by signal 9")  # the event stays
        shoot(page, "back")
    finally:
        running.send_signal(signal.SIGINT)
        running.wait(DEADLINE_S)
        log.close()
