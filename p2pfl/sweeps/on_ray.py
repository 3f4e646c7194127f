"""Runs on a Ray cluster, one core each; needs the `ray` extra.

Ray moves the names of functions and the folder's path, pickled, between machines of the researcher's own; nothing of it ever meets a peer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from p2pfl.errors import MissingExtraError
from p2pfl.sweeps.work import Job, run_one


def run_on_ray(folder: Path, jobs: Sequence[Job], workers: int | None, lock: int) -> Generator[Job, None, None]:  # noqa: ARG001  # a cluster shares no open files
    """As `Executor` says; on the cluster that RAY_ADDRESS names or that runs on this machine, else on one that is started here.

    Every machine needs p2pfl installed and the sweep's folder under the same path.
    """
    ray = import_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False, logging_level="error")
    run = ray.remote(num_cpus=1, max_retries=0)(_run)
    waiting = list(reversed(jobs))
    running: dict[Any, Job] = {}
    most = workers or len(jobs)  # Ray queues what it has no room for, and may find room
    try:
        while waiting or running:
            while waiting and len(running) < most:
                job = waiting.pop()
                running[run.remote(str(folder.resolve()), job.cell, job.seed, str(Path.cwd()), sys.path, job.allow_tasks)] = job
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                yield replace(running.pop(reference), ended=True, failure=_failure(ray, reference))
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if started_here:
            ray.shutdown()


def import_ray() -> Any:
    """Import the package ray, or name the extra that it needs.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError(
            "--executor ray needs ray: pip install 'p2pfl-mesh[ray]'; --executor processes uses the cores of this machine"
        ) from error
    return ray


def _run(folder: str, cell: int, seed: int, here: str, paths: list[str], allow_tasks: tuple[str, ...]) -> str | None:
    """On a machine of the cluster: as if it were started where the sweep was."""
    if Path(here).is_dir():
        os.chdir(here)
    sys.path += [path for path in paths if path not in sys.path]
    return run_one(Path(folder), Job(cell, seed, allow_tasks))


def _failure(ray: Any, reference: Any) -> str | None:
    try:
        failure: str | None = ray.get(reference)
    except ray.exceptions.RayError as error:
        return " ".join(str(error).split()) or type(error).__name__
    return failure
