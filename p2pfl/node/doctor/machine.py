"""Checks of the machine: the node's state folder, its disk, and the ports that the node will take."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from statistics import median

from p2pfl.errors import ConfigError, P2PFLError
from p2pfl.node.doctor.examination import Examination, Fact, Finding, Noted, findings_of
from p2pfl.node.memory import forecast_node
from p2pfl.node.state_folder import check_state_folder, has_folder, holder_of
from p2pfl.node.status import read_status
from p2pfl.runs.status_client import LOCK

SLOW_FSYNC_S = 0.5
"""A checkpoint is written and synced after every exchange: a disk that takes longer decides how long a round takes."""
FSYNCS = 3
TRIED_BYTES = 64 * 1024
RECORD_BYTES = 700
"""Bytes that a round adds to the records, about."""
CHECKPOINTS = 2
"""The one that holds, and the one that is being written."""
ROOM_BYTES = 16 * 2**20
"""Room for logs and all that is small."""


def check_state(exam: Examination) -> Noted:
    """See who may enter the state folder, whether it can be written to, and whether a node is at work on it."""
    assert exam.site is not None
    state, group = exam.site.state, exam.site.state_group
    try:
        is_there = has_folder(state)
    except ConfigError as error:
        yield from findings_of(error, "name another `state` in site.yaml")
        return
    if not is_there:
        yield from _unmade(exam)
        return
    try:
        check_state_folder(state, group)
    except ConfigError as error:
        yield from findings_of(error, "mend the folder's owner and mode")
        return
    if not _is_writable(state):
        yield Finding(fault=f"nothing can be written to {state}", remedy="mount its disk for writing, or name another `state` in site.yaml")
        return
    exam.state_usable = True
    exam.state_holder = _held(state)
    if exam.state_holder is None:
        yield Fact(what="state", said=f"{state} can be written to, and no node is at work on it", figures={"running": False})
        return
    try:
        exam.status = read_status(state)
    except P2PFLError:
        yield Finding(
            fault=f"{state} is held{exam.state_holder}, and no node answers there",
            remedy="stop that process: a node that starts would be refused",
        )
        return
    said = f"the node runs: round {exam.status['round']} of {exam.status['rounds']}"
    yield Fact(what="state", said=said, figures={"running": True, "round": exam.status["round"]})


def _unmade(exam: Examination) -> Noted:
    """See whether a state folder that is not there can be made."""
    assert exam.site is not None
    state = exam.site.state
    parent = next(folder for folder in state.parents if folder.is_dir())
    if not _is_writable(parent):
        yield Finding(
            fault=f"{state} is not there, and nothing can be written to {parent}", remedy="make it, or name another `state` in site.yaml"
        )
        return
    exam.state_usable = True
    yield Fact(what="state", said=f"{state} will be made when the node starts")


def check_disk(exam: Examination) -> Noted:
    """Compare the room on the state's disk with what the node will write, and measure how long an fsync takes."""
    assert exam.site is not None
    folder = exam.site.state if exam.site.state.is_dir() else next(each for each in exam.site.state.parents if each.is_dir())
    free, needed = shutil.disk_usage(folder).free, ROOM_BYTES
    if exam.plan is not None and exam.population is not None:
        neighbours, spill_mb = len(exam.plan.neighbours(exam.site.member)), exam.site.spill_mb
        memory = forecast_node(exam.plan, exam.population, neighbours, spill_mb=spill_mb)
        needed += memory.spilled_bytes
        needed += CHECKPOINTS * (memory.held_bytes + memory.training_bytes) + RECORD_BYTES * exam.plan.experiment.last_possible_round
    if free < needed:
        yield Finding(
            fault=f"the disk of {folder} has {free / 1e6:,.1f} MB left, and checkpoints and records need {needed / 1e6:,.1f} MB",
            remedy="make room there, or name a `state` on another disk in site.yaml",
        )
        return
    try:
        exam.fsync_seconds = median(_fsync_s(folder) for _ in range(FSYNCS))
    except OSError as error:
        yield Finding(
            fault=f"{folder} cannot be written to: {error.strerror}", remedy="mend the disk, or name another `state` in site.yaml"
        )
        return
    if exam.fsync_seconds > SLOW_FSYNC_S:
        yield Finding(
            fault=f"the disk of {folder} takes {exam.fsync_seconds:.2g} s for an fsync, and each round waits for one",
            remedy="name a `state` on a faster disk in site.yaml, not one on a network",
        )
        return
    figures = {"free_bytes": free, "needed_bytes": needed, "fsync_seconds": exam.fsync_seconds}
    said = f"{free / 1e9:,.1f} GB are left, {needed / 1e6:,.0f} MB are needed, and an fsync takes {1000 * exam.fsync_seconds:.2g} ms"
    yield Fact(what="disk", said=said, figures=figures)


def check_ports(exam: Examination) -> Noted:
    """See whether the node can listen at its own address and at that of its status page."""
    assert exam.site is not None
    assert exam.study is not None
    if exam.status is not None:
        yield Fact(what="ports", said="the node that runs has them")
        return
    address = exam.site.listens_at(exam.study.member(exam.site.member))
    places = [("neighbours", *_split(address))] if address is not None and exam.site.transport != "memory" else []
    host, port = exam.site.status_address
    if port:
        places.append(("its status page", host, port))
    is_free = True
    for whom, at, number in places:
        fault = bind_fault(at, number)
        if fault is None:
            continue
        is_free = False
        shown = f"{at}:{number}"
        if fault == errno.EADDRINUSE:
            yield Finding(
                fault=f"port {number} is in use, at which the node listens for {whom} ({shown})",
                remedy="stop the program that has it (ss -ltnp shows which), or say another port in site.yaml",
            )
        else:
            yield Finding(
                fault=f"the node cannot listen for {whom} at {shown}: {os.strerror(fault)}",
                remedy="say an address of this machine, and a port that this account may take, in site.yaml",
            )
    if is_free:
        said = (
            f"free: {', '.join(str(number) for _, _, number in places)}" if places else "the node listens at none: it dials its neighbours"
        )
        yield Fact(what="ports", said=said, figures={"ports": [number for _, _, number in places]})


def bind_fault(host: str, port: int) -> int | None:
    """Error number for which nobody can listen at an address; None where it is free. The host * stands for all interfaces."""
    everywhere = host == "*"
    families = ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")) if everywhere else ((None, host),)  # noqa: S104  # all interfaces are asked for
    fault: int | None = None
    for family, at in families:
        chosen = family if family is not None else socket.AF_INET6 if ":" in at else socket.AF_INET
        try:
            with socket.socket(chosen, socket.SOCK_STREAM) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind((at, port))
                tried.listen(1)
        except OSError as error:
            if everywhere and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                continue  # a machine without IPv6
            fault = error.errno or errno.EIO
    return fault


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def _is_writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        return error.errno == errno.ENOSPC  # said of the disk


def _fsync_s(folder: Path) -> float:
    """Seconds that writing and syncing a small file take."""
    with tempfile.TemporaryFile(dir=folder) as file:
        began_s = time.perf_counter()
        file.write(bytes(TRIED_BYTES))
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - began_s


def _held(state: Path) -> str | None:
    """The process that holds the lock of a state folder, in brackets, as far as the system says; None: nobody."""
    try:
        with (state / LOCK).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return holder_of(file.fileno())
    except OSError:
        pass
    return None
