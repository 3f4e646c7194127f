"""Facts that every member derives from a study alone, for whoever writes another node or checks this one.

Nothing here is agreed on beside the study: all of it is computed, by the functions that a node itself uses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from p2pfl.algorithms.guard import TOO_LARGE
from p2pfl.errors import ConfigError, TaskError
from p2pfl.experiment.graph import agreeing_on, build_schedule, diameter_bound, stop_rule
from p2pfl.experiment.loading import recorded_experiment
from p2pfl.experiment.plan import Plan, build_algorithm, load_sites, make_plan
from p2pfl.experiment.spec import Experiment
from p2pfl.governance.edge_kinds import DIRECT, EdgeKind
from p2pfl.governance.study import Study
from p2pfl.node.mixing import update_formats
from p2pfl.node.own_edges import AHEAD
from p2pfl.node.site import SiteFile
from p2pfl.params import Layout, TensorSpec, parameters_of
from p2pfl.protocol.agreed_start import GRACE_S, RESEND_S, longest_way
from p2pfl.protocol.protocol import HELLO_EVERY_S
from p2pfl.tasks import Task
from p2pfl.topology import Schedule
from p2pfl.topology.schedule import neighbourhoods_of
from p2pfl.transports.base import dials
from p2pfl.wire.messages import SCHEMA
from p2pfl.wire.update import UpdateFormat

_MOST_LISTED = 100_000  # weights


@dataclass(frozen=True, kw_only=True)
class StudyFacts:
    """Facts that follow from one study, as plain values for JSON, and the first parameters."""

    values: dict[str, Any]
    formats: Sequence[UpdateFormat]
    """Formats of updates by phase; empty where the task cannot be made here."""
    start: Tensor | None
    """The first parameters of all members, (P,); None where the task cannot be made here."""
    unknown: str = ""
    """Why the model's part is not known here; empty where it is."""


def facts_of(
    study: Study,
    place: str,
    *,
    allow_tasks: Collection[str] = (),
    overrides: Mapping[str, Any] | None = None,
    site_file: Path | None = None,
) -> StudyFacts:
    """Derive all that follows from a study; what needs the task's code is None where that cannot be made here.

    Args:
        study: checked.
        place: of its file, for errors.
        allow_tasks: tasks that may run here beside the built-in ones.
        overrides: a site's own arguments of the task, such as paths.
        site_file: the site.yaml with the site's own table, where there is one.

    Raises:
        ConfigError: the experiment or its graph cannot be.
    """
    experiment = recorded_experiment(study.experiment, place)
    samples = {card.name: card.samples or 0 for card in study.members} if experiment.weighting == "samples" else None
    schedule = build_schedule(experiment, study.names, study.topology(), samples)
    experiment = agreeing_on(experiment, schedule)
    algorithm = build_algorithm(experiment)
    unknown, plan = "", None
    try:
        # how the steps are computed changes neither the layout nor what is sent
        task = load_sites(experiment, overrides, allow_tasks=allow_tasks, site_file=site_file)
        plan = _plan(replace(experiment, compiled="off"), study, samples, task)
    except (ConfigError, TaskError) as error:
        unknown = str(error).splitlines()[0]
    formats = [] if plan is None else update_formats(plan.recipe.algorithm, plan.population(study.names[:1]))
    values = {
        "schema": SCHEMA,
        **_graph(study, schedule),
        "weights": _weights(schedule, experiment.last_possible_round, splits_mass=algorithm.splits_mass),
        "pace": experiment.pace.name,
        **_rounds(experiment, schedule, algorithm.phases),
        "stop_rule": _stop_rule(experiment, schedule),
        **_model(study, plan, formats),
        "not_known": unknown or None,
        **_times(experiment, schedule, len(study.members), algorithm.phases),
    }
    start = None if plan is None else parameters_of(plan.model)
    return StudyFacts(values=values, formats=formats, start=start, unknown=unknown)


def _plan(experiment: Experiment, study: Study, samples: dict[str, int] | None, task: Task) -> Plan:
    """Plan a run on one site, which stands for any: what follows from the study is the same at all members."""
    if not len(task.sites):
        raise ConfigError(f"task {task.name}: no site's data are here")
    task = replace(task, sites=[replace(task.sites[0], name=study.names[0])])
    return make_plan(experiment, task, names=study.names, topology=study.topology(), samples=samples)


def _graph(study: Study, schedule: Schedule) -> dict[str, Any]:
    """The roster, the edges with how each is carried and who dials, and how far news goes."""
    addresses = {card.name: card.address for card in study.members}

    def edge(one: str, other: str, found: EdgeKind) -> dict[str, Any]:
        if found.kind != DIRECT:
            return {"members": [one, other], "kind": found.kind, "dials": None, "relay": found.relay}
        dialler = one if dials(one, addresses[one], other, addresses[other]) else other
        return {"members": [one, other], "kind": found.kind, "dials": dialler, "relay": None}

    return {
        "roster": list(study.names),
        "keys": {card.name: {"identity": card.identity, "curve": card.curve} for card in study.members},
        "directed": study.graph.directed,
        "edges": [edge(one, other, found) for (one, other), found in sorted(study.edge_kinds().items())],
        "diameter": diameter_bound(schedule.union()),
        "schedule": {"steady": schedule.is_steady, "period": schedule.period},
    }


def _weights(schedule: Schedule, num_rounds: int, *, splits_mass: bool) -> list[dict[str, Any]] | None:
    """Mixing row of each member, by round of the schedule's period, or of the run where it never repeats; None: too many to list."""
    names = schedule.names or ()
    listed = min(schedule.period or num_rounds, num_rounds)
    if listed * schedule.union().num_edges > _MOST_LISTED:
        return None
    rows = {name: neighbourhoods_of(schedule, row, splits_mass=splits_mass) for row, name in enumerate(names)}
    return [
        {
            name: {"self": (of := row(r)).self_weight, "from": dict(of.weights), "sends_to": sorted(of.receivers)}
            for name, row in rows.items()
        }
        for r in range(listed)
    ]


def _rounds(experiment: Experiment, schedule: Schedule, phases: int) -> dict[str, Any]:
    in_step, last = experiment.pace.kind.in_step, experiment.last_possible_round
    return {
        "phases": phases,
        "training_rounds": experiment.rounds,
        "mixing_only_rounds": last - experiment.rounds,
        "last_round": last - 1,
        "last_exchange": last * phases - 1,
        "ahead": last if not in_step else 1 if schedule.is_steady else AHEAD,
    }


def _stop_rule(experiment: Experiment, schedule: Schedule) -> dict[str, Any] | None:
    rule = stop_rule(experiment, schedule) if experiment.pace.kind.in_step else None
    if rule is None:
        return None
    return {
        "tolerance": rule.tolerance,
        "patience": rule.patience,
        "diameter": rule.diameter,
        "lambda_2": rule.lambda_2,
        "window": rule.window,
        "announces_at": rule.patience + rule.diameter,
        "stops_after": 2 * rule.diameter,
        "earliest": rule.earliest(experiment.rounds),
    }


def _described(layout: Layout) -> dict[str, Any]:
    """Tensors of a model with their places in its flat vector, and what of them does not travel."""
    places = [
        {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype, "count": spec.size, "offset": place.start}
        for spec, place in layout.slices()
    ]
    return {
        "digest": layout.digest,
        "tensors": places,
        "personal": list(layout.personal),
        "frozen": [spec.name for spec in layout.frozen],
        "count": layout.size,
        "size_bytes": layout.size_bytes,
    }


def _layout_in(study: Study) -> Layout | None:
    """Layout that a study's own table gives; None where it has none."""
    if study.layout is None:
        return None
    return Layout(
        tensors=tuple(TensorSpec(row.name, row.shape, row.dtype) for row in study.layout if row.trains),
        frozen=tuple(TensorSpec(row.name, row.shape, row.dtype, row.values) for row in study.layout if not row.trains),
        personal=tuple(row.name for row in study.layout if row.trains and not row.travels),
    )


def _model(study: Study, plan: Plan | None, formats: Sequence[UpdateFormat]) -> dict[str, Any]:
    """Layout, start and messages of the model; where its task cannot be made here, what the study's own table says of the layout."""
    if plan is None:
        layout = _layout_in(study)
        nothing = dict.fromkeys(("start", "channels", "model_channel", "largest_norm"))
        return {"parameters": None if layout is None else _described(layout), **nothing}
    starts_elsewhere = any(site.start is not None for site in plan.sites.values())
    start = {
        "digest": plan.start_digest,
        "numbers": plan.layout.size,
        "dtype": plan.layout.tensors[0].dtype,
        "zeros": not bool(parameters_of(plan.model).any()),
        "made": f"the model of task {plan.task.name} as it is made under seed {plan.experiment.seed}, before a site's own values",
        "sites_replace_it": starts_elsewhere,
    }
    algorithm = plan.recipe.algorithm
    return {
        "parameters": _described(plan.layout),
        "start": start,
        "channels": [_phase(number, fmt) for number, fmt in enumerate(formats)],
        "model_channel": algorithm.model_channel,
        "largest_norm": {"times": TOO_LARGE, "first_norm": plan.guard.first_norm},
    }


def _phase(number: int, update_format: UpdateFormat) -> dict[str, Any]:
    """Describe the update of one phase; *full* is the one that continues nothing, None where no update continues another."""
    full = update_format.full
    return {
        "phase": number,
        "channels": _entries(update_format),
        "size_bytes": update_format.size_bytes,
        "full": None if full is None else {"channels": _entries(full), "size_bytes": full.size_bytes},
    }


def _entries(update_format: UpdateFormat) -> list[list[Any]]:
    return [list(entry) for entry in update_format.entries]


def _times(experiment: Experiment, schedule: Schedule, num_members: int, phases: int) -> dict[str, Any]:
    """Times in seconds: what the study asks for, and what a site of this implementation takes where its site.yaml says nothing."""
    way = longest_way(schedule.union())
    return {
        "start_agreement": {
            "members": num_members,
            "needed": experiment.require.at_least(num_members),
            "within_s": experiment.require.within_s,
            "grace_s": GRACE_S + RESEND_S * way,
            "starting_exchanges": phases * (way + 1),
        },
        "deadlines": {
            "floor_s": SiteFile.deadline_floor_s,
            "factor": SiteFile.deadline_factor,
            "linger_s": SiteFile.linger_s,
            "heartbeat_s": SiteFile.heartbeat_s,
            "hello_every_s": HELLO_EVERY_S,
        },
    }
