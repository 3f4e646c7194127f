"""A process that runs cells of a sweep one after the other: a job a line on standard input, what becomes of it on standard output.

Started by `p2pfl.sweeps.processes`, with the sweep's folder as its argument.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from p2pfl.sweeps.work import Job, run_one

_SAY_EVERY_S = 0.2


def main() -> None:
    """Work until standard input is closed."""
    parent = os.getppid()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what a task prints is no answer
    folder, said_s = Path(sys.argv[1]), 0.0

    def progress(round: int, most: int, row: Mapping[str, Any]) -> None:  # noqa: ARG001
        nonlocal said_s
        if os.getppid() != parent:
            os._exit(1)  # whoever started this process is gone
        if time.monotonic() - said_s >= _SAY_EVERY_S:
            said_s = time.monotonic()
            answers.write(json.dumps({"round": round, "most": most}) + "\n")

    try:
        for line in sys.stdin:
            failure = run_one(folder, Job(**json.loads(line)), progress)
            answers.write(json.dumps({"ended": True, "failure": failure}) + "\n")
    except BrokenPipeError:
        os._exit(1)


if __name__ == "__main__":
    main()
