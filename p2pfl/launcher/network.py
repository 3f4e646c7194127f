"""A whole network of real node daemons on this machine, by exactly the path that institutions take.

The run folder holds, for each site, what that institution would have on its own machine (sites/NAME: keys, site.yaml, state), the public
files (cards/, study.yaml), and what is gathered from all of them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shlex
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from p2pfl.errors import MembersMissing, P2PFLError, Paused
from p2pfl.evaluation.results import Run
from p2pfl.experiment.loading import recorded_experiment, resolve
from p2pfl.experiment.plan import Plan, load_sites, make_plan
from p2pfl.experiment.spec import Experiment
from p2pfl.governance.continuation import is_divided_anew, kept_scale
from p2pfl.launcher.founding import check_result_contract, found_network, older_study
from p2pfl.launcher.gathering import gather, network_row_of
from p2pfl.launcher.processes import ForkServer, Process, can_fork, start_plainly
from p2pfl.launcher.watched import WatchedNode
from p2pfl.runs.events import EventKind, event_row
from p2pfl.runs.folder import RunFolder
from p2pfl.runs.stopwatch import Stopwatch
from p2pfl.tasks.permission import options_of
from p2pfl.yaml_files import load_yaml

log = logging.getLogger(__name__)
progress_log = logging.getLogger("p2pfl.evaluation.progress")
"""The command shows its INFO lines."""

SAY_AFTER_S, SAY_AT_MOST_S = 5.0, 60.0
"""Without a new round, what is waited for is said after so long, then after twice as long, and so on."""

POLL_S = 0.25
STOP_S = 15.0
STOP_POLL_S = 0.05
START_S = 120.0
"""For all daemons to be ready: longer than this none of them waits for another, whatever the experiment says."""

RESTARTS = 5
"""How often a daemon that died is started again, as a service manager would."""

_NAMED = 5
_HERE = "p2pfl up"  # in the place of a node's name, which has no blanks

Progress = Callable[[int, int, Mapping[str, Any]], None]


def up(
    experiment: Experiment | Mapping[str, Any] | Path | str,
    *,
    overrides: Mapping[str, Any] | None = None,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    continues: Path | str | None = None,
    site: Mapping[str, Any] | None = None,
    accept_differences: Sequence[str] = (),
    progress: Progress | None = None,
    fork: bool | ForkServer = True,
    waited_s: float = 0.0,
    say: Callable[[str], None] | None = log.warning,
    allow_tasks: Collection[str] = (),
    **more: Any,
) -> Run:
    """Run an experiment with one daemon process a node, over encrypted sockets on 127.0.0.1.

    Args:
        experiment: its file, a mapping as the file would hold, or an Experiment.
        overrides: dotted keys to values.
        out: the run's folder, which must not exist; None: runs/NAME.
        resume: the folder of an interrupted run; its daemons go on from their checkpoints.
        continues: the folder of an earlier run; nodes of the same names go on from their models of it, which stays as it is.
        site: settings for every site.yaml, such as deadline_floor_s.
        accept_differences: in what this machine may differ from the result contract of a run that is resumed; every site.yaml says so then.
        progress: called after each round with the round, the last possible one and the network's record.
        fork: start the daemons by forking one process that has imported what they need, so that they start at once and share its memory.
            False, and always where the system is not Linux: each is a Python of its own. A ForkServer at work: that one.
        waited_s: for how long somebody waits for this run already; the summary's `seconds` have it as `start`.
        say: told in a sentence that a signal has paused the run, and how it goes on. Then SIGTERM and SIGHUP end this process, unless
            None: they are raised as Paused, too.
        allow_tasks: tasks that may run beside the built-in ones, as distribution:entry or module:function.
        more: top-level keys to replace, such as rounds=10.

    Raises:
        TaskNotAllowed: the experiment asks for another task; nothing of it has been imported.
        ConfigError: what is asked is wrong.
        KeyboardInterrupt: Ctrl-C has paused the run.
        P2PFLError: daemons died and could not be started again, or what they are forked from died.
    """
    stopwatch = Stopwatch(waited_s=waited_s)
    if resume is None:
        resolved = resolve(experiment, {**(overrides or {}), **more})
        place = Path(out) if out is not None else Path("runs") / resolved.name
        resolved = _after(continues, resolved)
    else:
        place = Path(resume)
        resolved = recorded_experiment(load_yaml(place / "experiment.yaml"), str(place / "experiment.yaml"))
        if (place / "summary.json").exists():
            if without := [home.name for home in sorted(place.glob("sites/*")) if not (home / "state" / "run" / "summary.json").exists()]:
                said = "%s has ended, and %s without a result: nobody is left to go on with; start anew with another --out"
                log.warning(said, place, ", ".join(without))
            return Run(place)
        check_result_contract(place, accept_differences)
    with ExitStack() as stack:
        forks = fork if isinstance(fork, ForkServer) else None
        if fork is True and can_fork():
            forks = stack.enter_context(ForkServer())  # it imports while we prepare
        plan = make_plan(resolved, load_sites(resolved, allow_tasks=allow_tasks))
        if resume is not None:
            folder = RunFolder.open(place)
        else:
            earlier = Path(continues) if continues is not None else None
            older_study(earlier, plan)  # before there is a folder
            folder = RunFolder.create(place, plan.experiment.as_dict(), topology=plan.graph_record(), engine="daemons")
            settings = {**({"allow_tasks": [*allow_tasks]} if allow_tasks else {}), **(site or {})}
            found_network(plan, place, stack, settings, continues=earlier)
        network = _Network(plan, place, folder, progress, forks, allow_tasks)
        if (number := _complete(network, stopwatch)) is not None:
            network.write_interruption(number)
            paused = Paused(f"go on with: {shlex.join(['p2pfl', 'up', '--resume', str(place), *options_of(allow_tasks)])}", number)
            if say is None:
                raise paused
            say(str(paused))
            if number == signal.SIGINT:
                raise KeyboardInterrupt  # it has been told
            signal.raise_signal(number)  # nobody hears it any more: it ends this process
    return Run(place)


def _after(earlier: Path | str | None, resolved: Experiment) -> Experiment:
    """Let an experiment keep the scale that the models of an earlier run, where there is one, have learnt with."""
    study = older_study(Path(earlier)) if earlier is not None else None
    if study is None:
        return resolved
    old = study.experiment
    if is_divided_anew(old, resolved.as_dict()):
        log.warning("the rows are divided otherwise than in %s: a model may have trained on what are test rows now", earlier)
    scale = kept_scale(old, resolved.as_dict())
    return resolve(resolved, {"task.scale": scale}) if scale is not None else resolved


def _complete(network: _Network, stopwatch: Stopwatch) -> signal.Signals | None:
    """Run a network to its end and gather what it has; returns the signal that paused it before that."""
    try:
        with network.hearing_signals():
            asyncio.run(network.run())
            if network.ended_by is None:
                network.gather(stopwatch)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return network.ended_by or signal.SIGINT
    except P2PFLError:
        if network.ended_by is None:
            raise
    return network.ended_by


class _Network:
    """The daemons of one run, from their start to what is gathered of them."""

    def __init__(
        self, plan: Plan, place: Path, folder: RunFolder, progress: Progress | None, forks: ForkServer | None, allow_tasks: Collection[str]
    ) -> None:
        self._allow_tasks = allow_tasks
        self._plan, self._place, self._folder, self._progress, self._forks = plan, place, folder, progress, forks
        self._sites = [WatchedNode(name=name, folder=place / "sites" / name) for name in plan.names]
        self._shown = 0
        self._known: set[str] = set()
        """Events that the folder holds already."""
        self._deaths: list[dict[str, Any]] = []
        self._quiet_since_s = time.monotonic()
        self._say_after_s = SAY_AFTER_S
        self.ended_by: signal.Signals | None = None
        """The signal that has ended it; everything is paused."""
        self._task: asyncio.Task[Any] | None = None

    def write_interruption(self, number: signal.Signals) -> None:
        """Write down that a signal has paused all this, whatever the nodes have written."""
        self._folder.append_event(event_row(EventKind.INTERRUPTED, self._shown, _HERE, f"by {number.name}"))
        self._folder.leave()

    async def run(self) -> None:
        """Start the daemons, start again what dies, until all have finished. Leaves none behind, however it ends."""
        self._task = asyncio.current_task()
        if self._forks is not None and not await self._forks.is_fit():
            log.warning("each daemon is a Python of its own, since the process to fork them from is unfit: %s", self._forks.unfit)
            self._forks = None
        if self._forks is not None:
            self._forks.say(read=str((self._place / "study.yaml").absolute()))
        self._folder.truncate(0)  # of a run that is resumed: its nodes have all that it held
        earlier = self._folder.events()
        self._known = {_key(event) for event in earlier}
        self._deaths = [_death_of(event) for event in earlier if event["event"] == EventKind.DIED]
        progress_log.info("%d daemons are being started", len(self._sites))
        self._quiet_since_s = time.monotonic()
        try:
            for site in self._sites:
                self._start(site)
            while any(site.process is not None for site in self._sites) and not self._is_pointless():
                await asyncio.sleep(POLL_S)
                for site in self._sites:
                    self._look_after(site)
                self._take_events()
                self._show()
                self._say_what_is_waited_for()
        except asyncio.CancelledError:
            self.ended_by = self.ended_by or signal.SIGINT  # which asyncio.run hears
            raise
        finally:
            at_work = [(site, process) for site in self._sites if (process := site.process) is not None and process.poll() is None]
            await self._stop_all()
            self._take_events()
            number = self.ended_by or signal.SIGTERM
            for site in [site for site, process in at_work if process.poll() == -number]:  # too early to record it
                self._folder.append_event(event_row(EventKind.PAUSED, max(site.rounds_seen, 0), site.name, f"by {number.name}"))
        missing = [site for site in self._sites if not site.is_finished]
        if missing and (self._is_pointless() or not all(site.is_lost for site in missing)):
            reasons = [f"{site.name} did not finish: {site.why or 'stopped with the others'}; its log is {site.log}" for site in missing]
            raise P2PFLError("\n".join([*reasons, f"go on with --resume {self._place}"]))
        if untrained := [site for site in self._sites if site.is_finished and site.has_not_started()]:
            reasons = [f"{site.name}: {site.last_words() or 'too few nodes were ready'}; its log is {site.log}" for site in untrained]
            raise MembersMissing("\n".join([*reasons, f"go on with --resume {self._place}"]))

    @contextmanager
    def hearing_signals(self) -> Iterator[None]:
        """Inside of it a signal that would end this process ends the work first, and `ended_by` says which one it was.

        While `run` is at work it is cancelled; otherwise KeyboardInterrupt is raised. A signal that somebody else hears, or has ignored, is
        left alone.
        """
        is_main = threading.current_thread() is threading.main_thread()
        heard = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL] if is_main else []

        def end(number: int, _: object) -> None:
            self.ended_by = signal.Signals(number)
            if self._task is None or self._task.done():
                raise KeyboardInterrupt
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)  # which also wakes the loop

        try:
            for number in heard:
                signal.signal(number, end)
            yield
        finally:
            for number in heard:
                signal.signal(number, signal.SIG_DFL)

    def _is_pointless(self) -> bool:
        """Whether those that are left cannot go on: half of all or fewer, or too few to begin."""
        lost = sum(site.is_lost for site in self._sites)
        total = len(self._sites)
        has_begun = any(site.rounds_seen >= 0 for site in self._sites)
        needed = total // 2 + 1 if has_begun else self._plan.experiment.require.at_least(total)
        # who died once and has not greeted since may die once more: its end is reported, too
        undecided = any(site.process is not None and site.fruitless and not site.has_greeted for site in self._sites)
        return lost > 0 and total - lost < needed and (has_begun or not undecided)

    def _take_events(self) -> None:
        """Write down what the nodes have, each event once."""
        for site in self._sites:
            for event in site.read_new_events():
                if _key(event) not in self._known:
                    self._known.add(_key(event))
                    self._folder.append_event(event)

    def _say_what_is_waited_for(self) -> None:
        """A line where no round has ended for long."""
        now_s = time.monotonic()
        at_work = [site for site in self._sites if site.process is not None]
        if now_s - self._quiet_since_s < self._say_after_s or not at_work:
            return
        self._say_after_s = min(2 * self._say_after_s, self._say_after_s + SAY_AT_MOST_S)
        where = what_is_waited_for(
            {site.name: site.rounds_seen for site in at_work},
            {site.name for site in at_work if site.has_ended_its_rounds(self._plan.experiment.last_possible_round)},
            self._shown,
            train_alone="local" in self._plan.experiment.baselines and any(site.train for site in self._plan.sites.values()),
        )
        reasons = [f"{site.name} waits for {why}" for site in at_work for why in site.waits.values()]
        because = "".join(f"; {reason}" for reason in reasons[:_NAMED])
        progress_log.info("no new round for %.0f s; waiting for %s%s", now_s - self._quiet_since_s, where, because)

    def _start(self, site: WatchedNode) -> None:
        arguments = ["--verbose", "node", "start", str(site.folder / "site.yaml"), "--until-stdin-closes", "--start-within-s", str(START_S)]
        arguments += ["--only-these-tasks", *options_of(self._allow_tasks)]  # a folder that is resumed may have come from anywhere
        site.starts += 1
        site.began_at = site.rounds_seen
        site.log_offset = site.log.stat().st_size if site.log.exists() else 0
        site.process = (start_plainly if self._forks is None else self._forks.start)(site.name, arguments, site.log)

    def _look_after(self, site: WatchedNode) -> None:
        site.read_new_rows()
        if site.process is None or (code := site.process.poll()) is None:
            return
        site.process = None
        site.read_new_rows()  # of its last moment
        self._take_events()
        if site.is_finished:
            return
        if self._forks is not None and (fate := self._forks.fate()):
            raise P2PFLError(f"{fate}; nothing is lost that their checkpoints hold: go on with --resume {self._place}")
        said, last = site.last_words(), site.last_line()
        site.why = said or (f"killed by signal {-code}" if code < 0 else f"exit code {code}" + (f": {last}" if last else ""))
        site.fruitless = site.fruitless + 1 if site.rounds_seen == site.began_at else 0
        self._folder.append_event(event_row(EventKind.DIED, max(site.rounds_seen, 0), site.name, site.why))
        self._deaths.append(
            {"node": site.name, "round": max(site.rounds_seen, 0), "exit_code": code, "detail": site.why, "last_line": last}
        )
        hopeless = bool(said) or site.fruitless > 1  # it would end in the same way
        if not hopeless and site.starts <= RESTARTS:
            log.warning("%s died (%s); starting it again", site.name, site.why)
            self._start(site)
            return
        site.fate = site.end_of_life(code, said)
        also = f"its last line is {last!r}; " if last and code < 0 else ""
        log.warning("%s; not started again; %sits log is %s", site.fate, also, site.log)

    async def _stop_all(self) -> None:
        for number, patience_s in ((self.ended_by or signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
            for process in self._running():
                process.send_signal(number)
            try:
                async with asyncio.timeout(patience_s):
                    while self._running():  # noqa: ASYNC110  # processes, not an event
                        await asyncio.sleep(STOP_POLL_S)
            except TimeoutError:
                continue

    def _running(self) -> list[Process]:
        return [site.process for site in self._sites if site.process is not None and site.process.poll() is None]

    def gather(self, stopwatch: Stopwatch) -> None:
        """Gather what all nodes have into the run folder, and conclude the run."""
        self._take_events()
        gather(self._plan, self._place, self._folder, self._sites, self._deaths, stopwatch)

    def _show(self) -> None:
        """Record, and say, how far the network is: the last round that every node has recorded, or half of them while one is away."""
        done = min(site.rounds_seen for site in self._sites) + 1
        if any(site.is_away() for site in self._sites):
            done = max(done, sorted(site.rounds_seen for site in self._sites)[len(self._sites) // 2] + 1)
        for number in range(self._shown, done):  # for whoever looks on; `gather` writes it all anew from what the nodes have
            self._folder.append_node(*(site.rows[number] for site in self._sites if number in site.rows))
            self._folder.append_round(network_row_of(self._plan, self._sites, number))
        if done > self._shown:
            self._shown, self._quiet_since_s, self._say_after_s = done, time.monotonic(), SAY_AFTER_S
            if self._progress is not None:
                self._progress(done, self._plan.experiment.last_possible_round, network_row_of(self._plan, self._sites, done - 1).as_row())


def what_is_waited_for(last_rounds: Mapping[str, int], ended: Collection[str], shown: int, *, train_alone: bool) -> str:
    """Say what a network waits for whose last round was long ago.

    Args:
        last_rounds: the last round on record of every daemon at work, -1 for none.
        ended: those that have made their last round.
        shown: how many rounds the network has made.
        train_alone: whether each site trains alone at its end, for comparison.
    """
    behind = [name for name, number in last_rounds.items() if number < shown and name not in ended]
    if not behind:
        count, trains = ("1 daemon", "trains") if len(last_rounds) == 1 else (f"{len(last_rounds)} daemons", "train")
        return f"the end of {count}" + (f", which {trains} alone for comparison" if train_alone and set(last_rounds) <= set(ended) else "")
    named = ", ".join(behind[:_NAMED]) + (f" and {len(behind) - _NAMED} more" if len(behind) > _NAMED else "")
    return f"round {shown + 1} of {named}"


def _death_of(event: Mapping[str, Any]) -> dict[str, Any]:
    """A death before the run was resumed, from its event; null is what that does not tell."""
    detail = str(event.get("detail", ""))
    killed, ended = re.fullmatch(r"killed by signal (\d+)", detail), re.fullmatch(r"exit code (\d+)(?:: (.*))?", detail, re.DOTALL)
    code = -int(killed[1]) if killed else int(ended[1]) if ended else None
    last_line = (ended[2] or "") if ended else None
    return {"node": event["node"], "round": event["round"], "exit_code": code, "detail": detail, "last_line": last_line}


def _key(event: Mapping[str, Any]) -> str:
    """Equal for one event that is met twice."""
    return json.dumps([event.get(part) for part in ("time", "node", "event", "round", "detail")])
