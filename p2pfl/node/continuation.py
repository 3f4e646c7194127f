"""The start of a node in a study that continues an older one: its model of that study is read, checked and taken over.

A model comes from the site's own disk alone, and nobody sends it. It is taken over bit for bit, with the buffers beside it; the
optimiser's and the algorithm's state begin anew, as do rounds and ledgers. What neighbours had not confirmed when the older run was
stopped stays as the model has it, so that the mean of the new study is that of the models it begins with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2pfl.algorithms import PartlyShared
from p2pfl.errors import ConfigError, StoreError
from p2pfl.experiment.loading import recorded_experiment
from p2pfl.experiment.plan import Plan, build_algorithm
from p2pfl.governance.continuation import Continuation
from p2pfl.governance.encoding import grouped
from p2pfl.node.checkpoint import CHECKPOINT
from p2pfl.node.site import SiteFile
from p2pfl.node.state_folder import has_folder, unused_state
from p2pfl.params import digest_of
from p2pfl.runs.checkpoint import changes_told, read_checkpoint, read_metadata
from p2pfl.runs.events import EventKind
from p2pfl.runs.text import read_document
from p2pfl.yaml_files import load_yaml

WITHOUT = "--without-old-state begins as the study says"
"""The way on for a site whose old state is gone, for messages."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OldModel:
    """A member's model at the end of its run in an older study."""

    member: str
    """Its name in that study."""
    study: str
    """Digest of that study."""
    rounds: int
    """Rounds that it had taken part in, or was in."""
    phase: int
    """Exchange of the round that it was in; 0: between two rounds."""
    x_P: Tensor
    buffers: Mapping[str, Tensor]
    """By name, without the row's axis."""

    @property
    def text(self) -> str:
        """The sentence on what is taken over, with both digests."""
        between = f"after round {self.rounds - 1}" if self.rounds else "before its first round"
        when = f"in round {self.rounds}" if self.phase else between
        return f"with the model of {self.member} {when} of study {grouped(self.study)}; SHA-256 of the model {digest_of(self.x_P)}"


Beginning = tuple[EventKind, str]
"""The event on how a node begins in a study that continues another one, and its detail."""


def continued_plan(
    plan: Plan, continues: Continuation | None, site: SiteFile, place: Path, *, without_old_state: bool
) -> tuple[Plan, Beginning | None]:
    """Let a site's node begin with its model of the study that its own continues; nothing changes once it has a checkpoint.

    Args:
        plan: of the new study, with this site's rows.
        continues: the tie to the older study; None: there is none.
        site: whose state folder is held.
        place: its site.yaml, for messages.
        without_old_state: the model is gone, and the administrator has decided to go on without.

    Raises:
        ConfigError: the old state is not there, in use, or of another study, member or model; or site.yaml names one that is not needed.
        StoreError: the old checkpoint cannot be read.
    """
    was = continues.members.get(site.member) if continues is not None else None
    if site.old_state is not None and was is None:
        why = "the study continues no other one" if continues is None else f"{site.member} is new in this study"
        raise ConfigError(f"old_state = {str(site.old_state)!r}: {why}, so that nothing is taken over; take the line out", str(place))
    if continues is None:
        return plan, None
    if (there := read_metadata(site.state / CHECKPOINT)) is not None:
        if _terms_of(there).get("study") == continues.study:
            raise ConfigError(
                f"state = {str(site.state)!r}: holds the state of the study that this one continues, which is kept as it is; "
                "write old_state with this folder, and state with a new one",
                str(place),
            )
        return plan, None
    of_study = f"study {grouped(continues.study)}"
    if was is None:
        return plan, (EventKind.CONTINUED, f"as a new member, with the first parameters; the others go on from {of_study}")
    if without_old_state:
        return plan, (EventKind.CONTINUED_WITHOUT, f"{site.member}: without its model of {of_study}, as somebody here has decided")
    if site.old_state is None:
        raise ConfigError(
            f"old_state: required, but missing: {site.member} goes on from its model of {of_study}; write the folder of its state there "
            f"(state in its site.yaml); {WITHOUT}",
            str(place),
        )
    old = read_old_model(site.old_state, continues, was, plan, group=site.state_group)
    first = plan.first_buffers or {name: buffer.clone() for name, buffer in plan.model.named_buffers()}
    plan.model.load_state_dict(dict(old.buffers), strict=False)  # of this plan alone; every population copies them
    begins = replace(plan.sites[site.member], start=old.x_P)
    return replace(plan, sites={**plan.sites, site.member: begins}, first_buffers=first), (EventKind.CONTINUED, old.text)


def read_old_model(state: Path, continues: Continuation, was: str, plan: Plan, *, group: str | int | None = None) -> OldModel:
    """Read a member's model from the state folder of the older study, which stays as it is.

    Args:
        state: the folder.
        continues: the tie to the older study.
        was: the member's name in it.
        plan: of the new study.
        group: who besides the owner may read the folder.

    Raises:
        ConfigError: the folder is not there or in use, or its state is of another study, member or model.
        StoreError: its checkpoint cannot be read.
    """
    path = state / CHECKPOINT
    if not has_folder(state):
        raise ConfigError(f"no such folder: write where the state in the older study is, or: {WITHOUT}", str(state))
    try:
        with unused_state(state, group), changes_told(path):
            found = read_checkpoint(path)
            if found is None:
                raise ConfigError(f"holds no {CHECKPOINT}: is it the folder of a node's state? Restore it, or: {WITHOUT}", str(state))
            tensors, metadata = found
            _check(state, _terms_of(metadata), continues, was, plan)
            x_P = _estimate_of(state / "run", tensors, plan)
            buffers = {name.removeprefix("buffers/"): tensor[0] for name, tensor in tensors.items() if name.startswith("buffers/")}
            old = OldModel(member=was, study=continues.study, rounds=metadata["round"], phase=metadata["phase"], x_P=x_P, buffers=buffers)
    except StoreError as error:  # which may advise to remove it
        raise StoreError(f"{str(error).partition('; restore it')[0]}; restore it from a backup, or: {WITHOUT}") from error
    if not bool(x_P.isfinite().all()):
        raise ConfigError(f"the model in it has numbers that are not finite: it cannot be taken over; {WITHOUT}", str(path))
    return old


def _check(state: Path, terms: Mapping[str, Any], continues: Continuation, was: str, plan: Plan) -> None:
    """Refuse the state of another study, member or model."""
    if terms["study"] != continues.study:
        raise ConfigError(
            f"is the state of study {grouped(str(terms['study']))}, and this study continues {grouped(continues.study)}: "
            f"give the folder of that one, or: {WITHOUT}",
            str(state),
        )
    member = (read_document(state / "run" / "environment.json") or {}).get("member")
    if member is None:  # members of one study begin with the same model, so that nothing else tells their states apart
        raise ConfigError(
            f"no member is named, and only the state of {was} can be taken over here: restore the folder with this file, or: {WITHOUT}",
            str(state / "run" / "environment.json"),
        )
    if member != was:
        raise ConfigError(f"is the state of {member}, and {was} is who goes on here: give the folder of {was}, or: {WITHOUT}", str(state))
    if terms["layout"] != plan.layout.digest:
        raise ConfigError(
            f"its model has another layout (SHA-256 {terms['layout']}) than this study's ({plan.layout.digest}): a model is taken over "
            f"only where names, shapes and types of all tensors are the same; agree on a study of that model, or: {WITHOUT}",
            str(state),
        )


def _estimate_of(run: Path, tensors: Mapping[str, Tensor], plan: Plan) -> Tensor:
    """Compute the parameters that the older study's rule would evaluate, (P,), from its checkpoint."""
    place = run / "experiment.yaml"
    if not place.is_file():
        raise ConfigError(f"no such file, and it says by which rule the model was made: restore the folder, or: {WITHOUT}", str(place))
    algorithm = build_algorithm(recorded_experiment(load_yaml(place), str(place)))
    rule = PartlyShared(algorithm, plan.layout) if plan.layout.personal else algorithm
    state = {name.removeprefix("state/"): tensor for name, tensor in tensors.items() if name.startswith("state/")}
    x_1P = rule.estimate(state)
    if x_1P.shape != (1, plan.layout.size) or x_1P.dtype != plan.layout.dtype:
        raise ValueError(f"models: {x_1P.dtype} {tuple(x_1P.shape)}, expected {plan.layout.dtype} {(1, plan.layout.size)}")
    return torch.clone(x_1P[0])


def _terms_of(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    terms = metadata.get("terms")
    return terms if isinstance(terms, Mapping) else {}
