"""The page: one for each browser that looks, laid out once and then filled anew. Its controls are the browser's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nicegui import ui

from p2pfl.inspector.dashboard.board import Board, Drawing, View, site_view
from p2pfl.inspector.markup import COLOURS, STYLE, escaped, note
from p2pfl.inspector.sections import facts

_REFRESH_S = 0.5
_NOTHING: Drawing = {"data": [], "layout": {}}
_SITE_PICTURES = ("training loss", "metrics on its own rows", "disagreement with neighbours", "seconds a round")

_OWN_STYLE = """
body { line-height: 1.5; }
:focus-visible { outline: 3px solid var(--focus) !important; outline-offset: 2px; }
:root { --focus: #2b6cb0; --lost: #c53030; --late: #9c4221; }
:root[data-theme=dark] { --focus: #90cdf4; --lost: #fc8181; --late: #f6ad55; }
@media (prefers-color-scheme: dark) { :root:not([data-theme=light]) { --focus: #90cdf4; --lost: #fc8181; --late: #f6ad55; } }
.nicegui-content { display: block; padding: 1rem; }
main { max-width: 76rem; margin: 0 auto; }
h1 { font-size: 1.8rem; line-height: 1.2; font-weight: 650; margin: 0; } h2 { font-size: 1.3rem; line-height: 1.3; font-weight: 650; }
h2 { margin: 2rem 0 .8rem; padding-bottom: .2rem; } p { margin: .4rem 0; } ul.short { margin: .4rem 0; padding-left: 1.2rem; }
h1, td, li, p { overflow-wrap: break-word; } table { margin: .8rem 0; } td, th { vertical-align: top; }
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; align-items: center; margin: .8rem 0; }
.controls label { display: flex; flex-wrap: wrap; gap: .2rem .5rem; align-items: center; max-width: 100%; }
select, button { font: inherit; color: var(--ink); background: var(--paper); border: 1px solid var(--faint); border-radius: .3rem; }
select, button { padding: .3rem .6rem; max-width: 100%; min-height: 2rem; } button { cursor: pointer; }
.figure { border: 1px solid var(--line); border-radius: .4rem; margin: .8rem 0; overflow: hidden; }
.sites { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); } .sites .figure { margin: 0; }
.region { overflow-x: auto; } .region .scroll { overflow: visible; } .region:empty { display: none; }
.alarm { font-weight: 650; color: var(--lost); } .error { border: 2px solid var(--lost); border-radius: .4rem; padding: .4rem .8rem; }
.error:empty, .alarm:empty, .whose:empty { display: none; }
.state.lost { color: var(--lost); font-weight: 650; } .state.late, .state.slow { color: var(--late); font-weight: 650; }
.nicegui-error-popup { background-color: var(--paper) !important; color: var(--ink); border-color: var(--lost); }
.js-plotly-plot .main-svg > g:not(.hoverlayer) text { fill: var(--ink) !important; }
.js-plotly-plot .gridlayer path, .js-plotly-plot .zerolinelayer path { stroke: var(--line) !important; }
.js-plotly-plot .legend .bg { fill: none !important; }
"""

_SWITCH = """
const chosen = localStorage.getItem("p2pfl-theme");
if (chosen) document.documentElement.dataset.theme = chosen;
window.switchTheme = () => {
  const root = document.documentElement, prefers = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  root.dataset.theme = (root.dataset.theme || prefers) === "dark" ? "light" : "dark";
  localStorage.setItem("p2pfl-theme", root.dataset.theme);
};
"""


class Page:
    """The board, which another task renews, as one browser sees it."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._label = board.sources[0].label
        self._site: str | None = None
        self._shown: object = None

    async def build(self) -> None:
        """Lay the page out, within NiceGUI's context of a page."""
        ui.add_head_html(f"<style>{COLOURS}{STYLE}{_OWN_STYLE}</style><script>{_SWITCH}</script>")
        with ui.element("main"):
            self._title = _html("h1")
            self._facts = _html("p").classes("facts")
            with ui.element("div").classes("controls"):
                self._offer_runs = _choice("Run", self._choose_run) if len(self._board.sources) > 1 else None
                with ui.element("button").props("type=button").on("click", js_handler="() => switchTheme()"):
                    _html("span", "Light or dark")
            self._alarm = _html("p").classes("alarm").props("role=status")
            self._whose = _html("p").classes("whose")
            self._error = _html("div").classes("error").props("role=alert")
            with _section("In short"):
                self._short = _html("div")
            with _section("Who exchanges with whom"):
                self._network = _picture("the graph of nodes and links")
                self._no_network = _html("div", note("The graph is not drawn: it changes from round to round, or is too large."))
                self._links = _region("links that are lost or slow")
                self._nodes = _region("how every node is")
            with _section("Agreement"):
                self._agreement = _picture("the disagreement of the models, round by round")
            self._comparison = None
            if len(self._board.sources) > 1:
                with _section("The runs compared"):
                    self._comparison = _region("the runs compared")
            with _section("One site"):
                with ui.element("div").classes("controls"):
                    self._offer_sites = _choice("Site", self._choose_site)
                with ui.element("div").classes("sites"):
                    self._pictures = {what: _picture(what) for what in _SITE_PICTURES}
                self._went_without = _region("who went on without whom")
            with _section("Where the time goes"):
                self._time = _region("fractions of a round")
            with _section("Events"):
                self._events = _region("events")
        await self._refresh()
        ui.timer(_REFRESH_S, self._refresh, immediate=False)

    async def _refresh(self) -> None:
        """Fill in what has changed since the last look."""
        wanted = (self._board.version, self._label, self._site)
        if (known := self._board.source(self._label).view) is not None:
            self._facts.set_content(escaped(facts(known.run)))  # how old the newest record is changes without a new one
        if wanted == self._shown:
            return
        source, agreement, comparison = self._board.source(self._label), self._board.agreement, self._board.comparison
        view = source.view
        sites = view.sites if view is not None else ()
        site = self._site if self._site in sites else next(iter(sites), None)
        drawings, went_without = await asyncio.to_thread(site_view, view, site) if view is not None and site is not None else ({}, "")
        if wanted[1:] != (self._label, self._site):
            return  # something else has been chosen meanwhile, and is being filled in
        self._site = site
        faults = [f"{each.label}: {each.error}" for each in self._board.sources if each.error is not None]
        self._error.set_content("".join(f"<p>{escaped(fault)}</p>" for fault in faults))
        if self._offer_runs is not None:
            self._offer_runs([each.label for each in self._board.sources], self._label)
        _show(self._agreement, agreement)
        if self._comparison is not None:
            self._comparison.set_content(comparison)
        self._title.set_content(escaped(view.title if view is not None else source.label))
        if view is not None:
            self._fill(view)
            for what, picture in self._pictures.items():
                _show(picture, drawings.get(what))
            self._went_without.set_content(went_without)
        self._shown = (wanted[0], self._label, self._site)

    def _fill(self, view: View) -> None:
        self._whose.set_content(escaped(view.whose))
        self._alarm.set_content(escaped(view.alarm))
        self._short.set_content(view.short)
        _show(self._network, view.network)
        self._no_network.set_visibility(view.network is None)
        self._links.set_content(view.links)
        self._nodes.set_content(view.nodes)
        self._events.set_content(view.events)
        self._time.set_content(view.time or note("No record here tells how long the nodes took for what."))
        self._offer_sites(view.sites, self._site)

    async def _choose_run(self, label: str) -> None:
        self._label = label
        await self._refresh()

    async def _choose_site(self, name: str) -> None:
        self._site = name
        await self._refresh()


def _choice(label: str, chosen: Callable[[str], Any]) -> Callable[[Sequence[str], str | None], None]:
    """A select with its label, which tells *chosen* what was: the function that fills it, and leaves it open where it is the same."""
    names: list[str] = []

    async def changed(event: Any) -> None:
        if isinstance(event.args, int) and 0 <= event.args < len(names):
            await chosen(names[event.args])

    def offer(offered: Sequence[str], selected: str | None) -> None:
        if list(offered) != names:
            names[:] = offered
            element.clear()
            with element:
                for number, name in enumerate(names):
                    _html("option", escaped(name)).props(f"value={number}" + (" selected" if name == selected else ""))

    with ui.element("label"):
        _html("span", escaped(label))
        element = ui.element("select").on("change", changed, js_handler="(event) => emit(event.target.selectedIndex)")
    return offer


def _picture(what: str) -> Any:
    with ui.element("div").classes("figure"):
        return ui.plotly(_NOTHING).props(f'role=img aria-label="{what}"').style("width: 100%")


def _show(picture: Any, drawing: Drawing | None) -> None:
    """Draw a picture, or hide its frame where there is nothing to see; nothing is sent where it is the same as before."""
    frame = picture.parent_slot.parent
    is_new = drawing != picture.figure or not frame.visible
    frame.set_visibility(drawing is not None)
    if drawing is not None and is_new:
        picture.update_figure(drawing)


@contextmanager
def _section(title: str) -> Iterator[None]:
    with ui.element("section").props(f'aria-label="{title}"'):
        _html("h2", escaped(title))
        yield


def _region(about: str) -> Any:
    """A place for tables that are replaced, which itself stays: the keyboard's focus is not lost while it scrolls."""
    return _html("div").classes("region").props(f'role=region tabindex=0 aria-label="{about}"')


def _html(tag: str, content: str = "") -> Any:
    """An element whose content comes from `markup`, where all that is foreign has been escaped."""
    return ui.html(content, sanitize=False, tag=tag)
