"""Started by torchrun in the tests of sharding: simulations one after the other, as one of its ranks.

The file named on the command line holds them: {"experiment", "out" or "resume"}, and maybe "rounds": stop there with a checkpoint, or
"dies": [rank, round], which then runs through the command line. What is refused is written beside where the run would have been.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from p2pfl.cli import main
from p2pfl.errors import ConfigError
from p2pfl.simulator import Simulation, engine, simulate

RANK = int(os.environ["RANK"])


def run(job):
    try:
        simulate(job.get("experiment", {}), **{key: Path(job[key]) for key in ("out", "resume") if key in job})
    except ConfigError as error:
        Path(f"{job['out']}.refused-by-{RANK}").write_text(str(error), encoding="utf-8")


def run_some_rounds(job):
    whole = Simulation.run

    def some(self, progress=None):
        while self.round < job["rounds"]:
            self.step()
        self.save()

    Simulation.run = some
    run(job)
    Simulation.run = whole


def die(job):
    rank, number = job["dies"]
    step = Simulation.step

    def last(self):
        if rank == RANK and self.round == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    Simulation.step, engine._CHECKPOINT_S = last, 0.0
    sys.argv = ["p2pfl", "simulate", job["file"], "--out", job["out"]]
    main()


for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    (die if "dies" in job else run_some_rounds if "rounds" in job else run)(job)
