"""The pictures of docs/inspecting.md, from runs that are made here: python docs/pictures.py (needs .[dev] and chromium)."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from p2pfl.faults.script import FaultScript
from p2pfl.inspector.report import report
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.records import read_run
from p2pfl.simulator import simulate

PICTURES = Path(__file__).parent / "pictures"
WIDTH = 1100
HEIGHT = 1250  # what is shown of it, from the top
EXPERIMENT = {
    "name": "eight hospitals, one bad link",
    "task": {"name": "breast-cancer"},
    "nodes": 8,
    "partition": {"name": "iid"},
    "topology": {"name": "ring"},
    "rounds": 60,
    "stop": None,
}
BAD_LINK = ("hospital-2", "hospital-3")
LOST = "hospital-5"
SEEN_AT = 40  # the round after which the dashboard looks at a run that still goes on


def main() -> None:
    """Run, write the pages, photograph them."""
    program = shutil.which("chromium")
    if program is None:
        sys.exit("chromium is not installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        run = simulate(EXPERIMENT, out=Path(place) / "run", faults=FaultScript.in_rounds(cut={BAD_LINK: frozenset(range(5, 60, 2))}))
        page = Path(place) / "page.html"
        page.write_text(report(read_run(run.path)), encoding="utf-8")
        _photograph(browser, page.as_uri(), PICTURES / "page.png")
        _of_the_dashboard(browser, _in_progress(run.path, Path(place) / "in-progress"))
        browser.close()


def _in_progress(whole: Path, place: Path) -> Path:
    """The run as it would stand there after some rounds, with one node just killed."""
    shutil.copytree(whole, place)
    folder = RunFolder.open(place)
    folder.truncate(SEEN_AT)
    folder.append_event({"round": SEEN_AT - 1, "node": LOST, "event": "died", "detail": "killed by signal 9"})
    return place


def _of_the_dashboard(browser: Browser, place: Path) -> None:
    command = [sys.executable, "-m", "p2pfl", "dashboard", str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:  # noqa: S603  # our own command
        assert running.stdout is not None
        _photograph(browser, running.stdout.readline().strip(), PICTURES / "dashboard.png")
        running.send_signal(signal.SIGINT)


def _photograph(browser: Browser, address: str, picture: Path) -> None:
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.goto(address)
    page.wait_for_selector(".main-svg .textpoint", state="attached")
    page.wait_for_function("document.querySelectorAll('.main-svg .xtitle').length > 0")
    page.screenshot(path=picture, animations="disabled")
    page.close()
    print(picture)


if __name__ == "__main__":
    main()
