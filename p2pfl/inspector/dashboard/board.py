"""Content of the dashboard, renewed from its sources off the loop that serves it. Knows nothing of browsers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2pfl.errors import P2PFLError
from p2pfl.inspector import figures, sections
from p2pfl.inspector.convergence import Convergence, convergence
from p2pfl.inspector.gaps import gaps
from p2pfl.inspector.health import node_health
from p2pfl.inspector.link_health import edge_health
from p2pfl.inspector.markup import listed
from p2pfl.inspector.run_state import banner, run_state
from p2pfl.inspector.sources import is_url, read_source
from p2pfl.inspector.verdict import certificate, verdict
from p2pfl.runs.records import RunRecords, damage_told
from p2pfl.runs.status_client import ADDRESS
from p2pfl.runs.writing_process import process_state

EVERY_S = 1.0
_NAMED = 3
_SHARE = 3.0
"""Looking may take at most one part in so many, and one, of the time: large runs are looked at less often."""

Drawing = dict[str, Any]
"""A figure as plotly.js takes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One run as it is shown: title, alarm and whose view it is as plain texts, the rest in HTML."""

    run: RunRecords
    course: Convergence
    title: str
    short: str
    time: str
    nodes: str
    links: str
    events: str
    network: Drawing | None
    sites: tuple[str, ...]
    """Plain names, of all of which something is recorded."""
    alarm: str
    """Sentences about who is lost or late, and about a run that ended not as agreed; empty where there are none."""
    state: str
    """The kind of `run_state` when it was drawn."""
    whose: str
    """A sentence on whose view this is; empty where the records are of the whole network."""


@dataclass(kw_only=True)
class Source:
    """A run's folder or a node's address, and what was last found there."""

    place: str
    label: str
    """Short, and of all sources its own."""
    view: View | None = None
    error: P2PFLError | None = None
    """Why it cannot be read now."""
    version: object = None
    """By what the folder is known to be unchanged."""


@dataclass(kw_only=True)
class Board:
    """All sources, with what they hold together."""

    sources: list[Source]
    agreement: Drawing | None = None
    comparison: str = ""
    version: int = 0
    """Grows with every change."""
    pause_s: float = field(default=EVERY_S)

    @classmethod
    def of(cls, places: Sequence[str]) -> Board:
        """A board that has not looked yet."""
        return cls(sources=[Source(place=place, label=label) for place, label in zip(places, _labels(places), strict=True)])

    async def follow(self) -> None:
        """Look again and again until cancelled."""
        while True:
            await asyncio.sleep(self.pause_s)
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        """Read what has changed and draw it anew. What cannot be read is said, and what was known of it stays."""
        began_s = time.perf_counter()
        changed = [_look(source) for source in self.sources]
        if any(changed):
            views = {source.label: source.view for source in self.sources if source.view is not None}
            shaded = gaps(view.run, view.course) if len(views) == 1 and (view := next(iter(views.values()))) else ()
            self.agreement = _drawing(figures.agreement({label: view.course for label, view in views.items()}, shaded), "agreement")
            self.comparison = sections.comparison({label: view.run for label, view in views.items()}) if len(self.sources) > 1 else ""
            self.version += 1
        self.pause_s = max(EVERY_S, _SHARE * (time.perf_counter() - began_s))

    def source(self, label: str) -> Source:
        """By its label; the first where no such is there."""
        return next((source for source in self.sources if source.label == label), self.sources[0])


def site_view(view: View, name: str) -> tuple[dict[str, Drawing | None], str]:
    """One node's own course: pictures by what each shows, and HTML about whom it went on without."""
    drawings = {what: _drawing(figure, what) for what, figure in figures.site(view.run, name).items()}
    return drawings, sections.went_without(view.run, name)


def _look(source: Source) -> bool:
    """Whether there is something new."""
    try:
        version = _version(source.place)
        if version is not None and version == source.version and not _has_fallen_silent(source.view):
            return False
        with damage_told(source.place):
            run = read_source(source.place)
            is_known = source.error is None and source.view is not None and source.view.run == run and not _has_fallen_silent(source.view)
            if not is_known:
                source.view = _view(run)
    except P2PFLError as error:
        is_new = str(error) != str(source.error)
        source.version, source.error = None, error
        return is_new
    source.version, source.error = version, None
    return not is_known


def _has_fallen_silent(view: View | None) -> bool:
    """Whether time alone has changed what there is to say."""
    return view is not None and run_state(view.run).kind != view.state


def _version(place: str) -> object:
    """Changes when a folder does, or the process that writes it ends; None for what has to be asked."""
    if is_url(place) or not Path(place).is_dir():
        return None
    files = sorted(path for path in Path(place).iterdir() if path.suffix in (".json", ".jsonl", ".yaml"))
    found = [(path.name, path.stat()) for path in files if path.exists()]
    return process_state(Path(place)), *((name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in found)


def _view(run: RunRecords) -> View:
    course = convergence(run)
    nodes = node_health(run)
    edges = edge_health(run, nodes)
    drawn = _drawing(figures.network(run, course, nodes, edges), "the graph")
    recorded = {str(row["node"]) for row in run.nodes}
    ill = [f"{name} is {health.state}" for name, health in nodes.items() if health.state in ("late", "lost")]
    state = run_state(run)
    ended = [f"It {state.sentence}."] if state.kind == "departed" else []
    late = [f"{'; '.join(ill[:_NAMED])}{f' and {len(ill) - _NAMED} more' if len(ill) > _NAMED else ''}."] if ill else []
    return View(
        run=run,
        course=course,
        title=str(run.experiment.get("name", "run")),
        short=listed([*verdict(run, course), certificate(run, course)]),
        time=sections.time_spent(run),
        nodes=sections.node_states(nodes),
        links=sections.link_states(run, edges),
        events=sections.events(run),
        network=drawn,
        sites=tuple(name for name in nodes if name in recorded),
        alarm=" ".join(ended + late),
        state=state.kind,
        whose=banner(run),
    )


def _drawing(figure: figures.Figure | None, what: str) -> Drawing | None:
    """As plotly.js takes it, without the buttons that a keyboard does not reach."""
    if figure is None:
        return None
    return {**figure.to_plotly_json(), "config": {"displayModeBar": False, "responsive": True}, "meta": what}


def _labels(places: Sequence[str]) -> list[str]:
    """A folder's own name, or an address without its scheme; all of it where two would be called the same."""
    short = [
        place.split("://")[-1].rstrip("/") if is_url(place) or Path(place).name == ADDRESS else Path(place).resolve().name
        for place in places
    ]
    times = Counter(short)
    full = [label if times[label] == 1 else place for label, place in zip(short, places, strict=True)]
    seen = Counter(full)
    return [label if seen[label] == 1 else f"{label} ({number})" for number, label in enumerate(full, start=1)]
