"""A study that continues an older one, at the command line: what is taken from the older one, and what is said of it."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from p2pfl.errors import ConfigError, StoreError
from p2pfl.governance.continuation import Continuation, changed_experiment, faults_of_rows, is_divided_anew, kept_scale
from p2pfl.yaml_files import dump_yaml, shown

if TYPE_CHECKING:
    from p2pfl.governance.card import Card
    from p2pfl.governance.study import Study

_NOT_COMPARED = {"name", "schema", "compiled"}
"""Keys that change nothing that is measured, or follow from the machine."""


def continuation_of(
    path: Path | None, cards: Sequence[Card], content: dict[str, Any], new_keys: Collection[str]
) -> tuple[Study, Continuation] | None:
    """Tie a new study to an older one, and let its experiment keep the scale that the older models have learnt with.

    Args:
        path: of the older study; None: there is none.
        cards: of the new study's members.
        content: the new study's experiment; a scale is added to it.
        new_keys: members whose new keys somebody has asked them about.

    Raises:
        ConfigError: it cannot be continued by these members, or with this experiment; all findings at once.
    """
    from p2pfl.governance.study import Study

    if path is None:
        if new_keys:
            raise ConfigError("--new-key is about a study that is continued: give it with --continues, or leave it out")
        return None
    old = Study.read(path)
    faults = faults_of_rows(old.experiment, content)
    try:
        continuation = Continuation.of(old.digest, old.members, cards, new_keys)
    except ConfigError as error:
        raise ConfigError([*error.findings, *faults], str(path)) from error
    if faults:
        raise ConfigError(faults, str(path))
    if (scale := kept_scale(old.experiment, content)) is not None:
        content["task"] = {**content["task"], "scale": scale}
    return old, continuation


def check_layouts(old: Study, study: Study, path: Path) -> None:
    """Refuse a study whose model has other tensors than the one that it continues, as far as both have a table of them."""
    from p2pfl.governance.study import layout_faults

    if old.layout is None or study.layout is None:
        which = "the study that is continued" if old.layout is None else "this study"
        typer.echo(f"{which} has no table of its model's tensors: each node compares the two models when it starts", err=True)
    elif faults := layout_faults(old.layout, study.layout):
        told = [fault.replace("the study's", "the older study's").replace("in the study", "in the older study") for fault in faults]
        raise ConfigError([f"layout: {fault}; a model is taken over only where the layout is the same" for fault in told], str(path))


def say_continuation(study: Study, old: Study | None = None) -> None:
    """Print which study is continued, how each member begins and, where the older study is at hand, what is different from it."""
    from p2pfl.cli.agreed import say_table
    from p2pfl.governance.encoding import grouped

    if study.continues is None:
        return
    rows = [("study", grouped(study.continues.study)), *study.continues.sentences(study.names)]
    if old is not None:
        gone = sorted(set(old.names) - set(study.continues.members.values()))
        rows += [(name, "does not go on") for name in gone]
        rows += [
            (key, f"{shown(before)} -> {shown(now)}")
            for key, before, now in changed_experiment(old.experiment, study.experiment)
            if key not in _NOT_COMPARED
        ]
    say_table("continues an older study", iter(rows))
    if old is not None and is_divided_anew(old.experiment, study.experiment):
        typer.echo("the rows are divided otherwise than before: a model may have trained on what are test rows now", err=True)


def state_lines(study: Study, member: str, folder: Path, old_state: Path | None) -> str:
    """Lines of site.yaml on the state of a study that continues another one; empty for any other study.

    Raises:
        ConfigError: *old_state* is given for nothing.
    """
    goes_on = study.continues is not None and member in study.continues.members
    if old_state is not None and not goes_on:
        raise ConfigError(f"--old-state = {str(old_state)!r}: {member} takes no model over in this study; leave it out")
    if study.continues is None:
        return ""
    old_state = old_state or next((place for place in sorted(folder.glob("state*")) if _study_in(place) == study.continues.study), None)
    lines = [f"# A folder of its own, beside that of the study that this one continues.\nstate: state-{study.digest[:8]}\n"]
    if goes_on and old_state is None:
        lines += [
            "# Where this site's state in that study is; its model is taken over from there, and nothing is changed:\n# old_state: \n"
        ]
    elif goes_on and old_state is not None:
        found = dump_yaml({"old_state": os.path.relpath(old_state, folder)})
        lines += [f"# Its model is taken over from here, and nothing in it is changed.\n{found}"]
    return "".join(lines)


def _study_in(state: Path) -> str | None:
    """Digest of the study whose node has left its state in a folder; None where there is none that can be read."""
    from p2pfl.node.checkpoint import CHECKPOINT
    from p2pfl.runs.checkpoint import read_metadata

    try:
        terms = (read_metadata(state / CHECKPOINT) or {}).get("terms")
    except (StoreError, OSError):
        return None
    return str(terms.get("study")) if isinstance(terms, dict) else None
