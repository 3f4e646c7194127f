"""The pictures of docs/inspecting.md, from a run that is made here: python docs/pictures.py (needs the extra `report` and chromium)."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from p2pfl.inspector.report import write_report
from p2pfl.records import read_run
from p2pfl.simulator import simulate
from p2pfl.simulator.faults import Faults

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


def main() -> None:
    """Run, write the page, photograph it."""
    browser = shutil.which("chromium")
    if browser is None:
        sys.exit("chromium is not installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as place:
        page = Path(place) / "page.html"
        run = simulate(EXPERIMENT, out=Path(place) / "run", faults=Faults(cut={BAD_LINK: frozenset(range(5, 60, 2))}))
        write_report(read_run(run.path), page)
        picture = PICTURES / "page.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000"]
        command = [browser, *options, f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)  # noqa: S603  # our own page
        print(picture)


if __name__ == "__main__":
    main()
