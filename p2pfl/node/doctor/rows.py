"""Checks of the site's rows: the task and its data, the model's layout, a round's training, its memory and its traffic."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from p2pfl.errors import P2PFLError
from p2pfl.node.doctor.examination import Examination, Fact, Finding, Noted, findings_of, unknown
from p2pfl.node.memory import forecast_node
from p2pfl.node.mixing import update_formats
from p2pfl.node.start import own_plan

_DATA = "mend the data, or what `task` in site.yaml says of where they are, and run doctor again"
_LAYOUT = "take the task's code and options with which the study was made"
_EXTRA = "install that extra on this machine, and run doctor again"

MEMINFO, SELF_STATUS, CGROUP = Path("/proc/meminfo"), Path("/proc/self/status"), Path("/sys/fs/cgroup")
"""Where Linux says how much memory is left, what this process has, and what a container may have."""


def check_rows(exam: Examination) -> Noted:
    """Load the site's rows, make the model of the study, and compare its layout with the study's."""
    assert exam.site is not None
    assert exam.study is not None
    torch.set_num_threads(exam.site.threads)
    try:
        exam.plan = own_plan(exam.site, exam.study, exam.path, (*exam.allow_tasks, *exam.site.allow_tasks))
    except P2PFLError as error:
        for found in findings_of(error, _DATA):
            kind = _LAYOUT if "layout: " in found.fault else _EXTRA if "p2pfl-mesh[" in found.fault else found.remedy
            yield Finding(fault=found.fault, remedy=kind if found.remedy == _DATA else found.remedy)
        return
    mine = exam.plan.sites[exam.site.member]
    trains, tests = (0 if rows is None else len(rows[0]) for rows in (mine.train, mine.test))
    yield Fact(
        what="rows",
        said=f"{trains:,} to train on and {tests:,} to test on, all finite numbers",
        figures={"train": trains, "test": tests},
    )
    layout = exam.plan.layout
    said = f"{layout.size:,} numbers in {len(layout.tensors)} tensors" + (", as in the study" if exam.study.layout is not None else "")
    yield Fact(what="model", said=said, figures={"parameters": layout.size, "layout": layout.digest, "start": exam.plan.start_digest})


def check_memory(exam: Examination) -> Noted:
    """Compare the memory that a node needs for this layout with what this machine has left."""
    assert exam.plan is not None
    assert exam.site is not None
    try:
        exam.population = exam.plan.population([exam.site.member])
        if exam.plan.recipe.compiled:
            exam.population.compile()
    except P2PFLError as error:
        yield from findings_of(error, "change `compiled` in the study, with the other members")
        return
    neighbours, spill_mb = len(exam.plan.neighbours(exam.site.member)), exam.site.spill_mb
    needed = forecast_node(exam.plan, exam.population, neighbours, spill_mb=spill_mb).peak_bytes
    left = available_bytes()
    if left is not None and left < needed:
        exam.population = None  # nothing is trained for trial that might end other programs
    if exam.status is not None:
        yield Fact(what="memory", said=f"the node that runs has what it needs, at most {_mb(needed)}", figures={"needed_bytes": needed})
    elif left is None:
        yield unknown("memory", f"models need at most {_mb(needed)}; this system does not say how much is left", needed_bytes=needed)
    elif left < needed:
        yield Finding(
            fault=f"models of this layout need {_mb(needed)} of memory, and {_mb(left)} are left here",
            remedy="give the machine or the container more memory, or stop other programs",
        )
    else:
        figures = {"needed_bytes": needed, "available_bytes": left}
        yield Fact(what="memory", said=f"models need at most {_mb(needed)}, and {_mb(left)} are left", figures=figures)


def check_training(exam: Examination) -> Noted:
    """Train one round on the site's rows, and measure it; the result is thrown away."""
    assert exam.population is not None
    population = exam.population
    if not population.trains or not exam.plan or not exam.plan.recipe.local_steps:
        yield Fact(what="training", said="nothing trains here: the node only mixes")
        exam.step_seconds = 0.0
        return
    try:
        began_s = time.perf_counter()
        population.train(0)
        exam.step_seconds = time.perf_counter() - began_s
    except P2PFLError as error:
        yield from findings_of(error, "mend the task's code")
        return
    finally:
        exam.population = None  # it is not at its start any more
    if population.diverged:
        yield Finding(
            fault="one round of training on the site's rows became non-finite",
            remedy="agree with the members on a lower optimizer.lr or a clip_norm, and make the study again",
        )
        return
    if population.without_loss:
        yield Finding(
            fault="one round of training on the site's rows had no finite loss, although the parameters stayed finite",
            remedy="mend the loss of the task's code, or the rows for which it is no number",
        )
        return
    yield Fact(
        what="training",
        said=f"one round on the site's rows takes {exam.step_seconds:.3g} s, with finite loss",
        figures={"seconds": exam.step_seconds, "loss_is_finite": True},
    )


def check_round(exam: Examination) -> Noted:
    """Foretell a round's bytes, and its seconds as far as the edges were measured."""
    assert exam.plan is not None
    assert exam.site is not None
    neighbours = exam.plan.neighbours(exam.site.member)
    formats = update_formats(exam.plan.recipe.algorithm, exam.plan.population([exam.site.member]))
    each = sum(one.encoded_bytes(phase) for phase, one in enumerate(formats))
    figures = {"bytes_each": each, "bytes": each * len(neighbours)}
    said = f"{each:,} bytes to each of {len(neighbours)} neighbours, and as many from them"
    measured = [edge for name, edge in (exam.edges or {}).items() if name in neighbours and edge.mbit_s and edge.round_trip_s is not None]
    if exam.step_seconds is None or not measured or len(measured) < len(neighbours):
        yield unknown("round", f"{said}; its seconds are unknown, as not every edge was measured", **figures, seconds=None)
        return
    moving_s = max(8 * each / (1e6 * (edge.mbit_s or 1)) + (edge.round_trip_s or 0) for edge in measured)
    seconds = exam.step_seconds + moving_s + (exam.fsync_seconds or 0)
    yield Fact(what="round", said=f"{said}; some {seconds:.3g} s with training and checkpoint", figures={**figures, "seconds": seconds})


def available_bytes() -> int | None:
    """Bytes of memory that a program may still take, by the machine and by the container; None where the system does not say."""
    found = []
    try:
        found.append(1024 * int(MEMINFO.read_text(encoding="ascii").partition("MemAvailable:")[2].split()[0]))
    except (OSError, ValueError, IndexError):
        return None
    try:
        most = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        if most != "max":
            found.append(max(0, int(most) - int((CGROUP / "memory.current").read_text(encoding="ascii"))))
    except (OSError, ValueError):
        pass
    return min(found)


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"
