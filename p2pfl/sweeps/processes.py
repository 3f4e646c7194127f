"""Executor of a sweep in processes of this machine: each has one thread and computes one run after the other."""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from p2pfl.launcher.processes import PYTHON, own_path
from p2pfl.sweeps.work import Job

_STOP_S = 10.0


@dataclass
class _Worker:
    """One process, and what it is at."""

    process: subprocess.Popen[bytes]
    log: Path
    job: Job
    unread: bytes = b""

    def give(self, job: Job) -> None:
        """The next job; a process that has died meanwhile says so by the end of its answers."""
        assert self.process.stdin is not None
        self.job = job
        try:
            self.process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return

    @property
    def answers(self) -> int:
        """File descriptor of the answers."""
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def hear(self) -> list[Job]:
        """The job as each answer since the last call tells it."""
        content = os.read(self.answers, 65536)
        if not content:
            return [replace(self.job, ended=True, failure=f"its process {self._ending()} ({self.log})")]
        *lines, self.unread = (self.unread + content).split(b"\n")
        return [replace(self.job, **json.loads(line)) for line in lines]

    def stop(self) -> None:
        """End it, whatever it is at."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _ending(self) -> str:
        """Wait for its end, and say it in words; what a killed process said last has nothing to do with it."""
        if (code := self.process.wait()) < 0:
            return f"was killed by signal {-code}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"ended with exit code {code}{f': {lines[-1]}' if lines else ''}"


def run_in_processes(folder: Path, jobs: Sequence[Job], workers: int | None, lock: int) -> Generator[Job, None, None]:
    """As `Executor` says; without a number of workers, one for each core that this process may use."""
    waiting = deque(jobs)
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = min(len(jobs), workers or num_cores)
    (folder / "logs").mkdir(exist_ok=True)
    at_work: list[_Worker] = []
    try:
        number = 0
        while waiting or at_work:
            while waiting and len(at_work) < most:
                at_work.append(_start(folder, folder / "logs" / f"worker-{number}.log", waiting.popleft(), lock))
                number += 1
            ready, _, _ = select.select([worker.answers for worker in at_work], [], [])
            for worker in [worker for worker in at_work if worker.answers in ready]:
                for job in worker.hear():
                    if job.ended and worker.process.returncode is not None:
                        at_work.remove(worker)
                        worker.stop()
                    elif job.ended and waiting:
                        worker.give(waiting.popleft())
                    elif job.ended:
                        at_work.remove(worker)
                        worker.stop()
                    yield job
    finally:
        for worker in at_work:
            worker.stop()


def _start(folder: Path, log: Path, job: Job, lock: int) -> _Worker:
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **own_path(), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603  # ourselves
            [*PYTHON, "-m", "p2pfl.sweeps.worker", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env=environment,
            pass_fds=[lock],  # held until the last of them has ended, also where this process is killed
            start_new_session=True,  # Ctrl-C reaches us alone
        )
    worker = _Worker(process, log, job)
    worker.give(job)
    return worker
