"""The way from a file to a plan: each file of the room is entered once."""

from __future__ import annotations

import sys
from pathlib import Path

import p2pfl.experiment
from p2pfl.experiment.loading import load_experiment
from p2pfl.experiment.plan import load_sites, make_plan

ROOM = Path(p2pfl.experiment.__file__).parent


def test_from_file_to_plan_each_file_is_entered_once(tmp_path):
    """Calls from another file count; those that follow each other count once, and what a dataclass says of itself does not."""
    path = tmp_path / "ring.yaml"
    path.write_text("task: {name: quadratic}\nnodes: 5\nalgorithm: {name: qg-dsgdm, beta: 0.5}\nclock: {loss: 0.1}\n")
    entered: list[str] = []

    def profile(frame, event, _):
        file, caller = Path(frame.f_code.co_filename), frame.f_back
        is_entry = event == "call" and caller is not None and caller.f_code.co_filename != frame.f_code.co_filename
        if is_entry and file.parent == ROOM and "." not in frame.f_code.co_qualname and entered[-1:] != [file.stem]:
            entered.append(file.stem)

    sys.setprofile(profile)
    try:
        experiment = load_experiment(path)
        plan = make_plan(experiment, load_sites(experiment))
    finally:
        sys.setprofile(None)

    assert len(plan.names) == 5
    assert [file for file in entered if file not in ("rules", "recipe", "sites")] == [
        "loading",
        "spec",
        "findings",
        "plan",
        "graph",
        "requirements",
    ]
