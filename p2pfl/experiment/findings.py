"""Findings about an experiment's file: every fault of a single value, and every conflict between values, in one sentence each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from p2pfl.algorithms import AGGREGATORS, ALGORITHMS, COMPRESSORS, Algorithm, Requirement
from p2pfl.errors import UNSAFE_OR_BREAK, ConfigError
from p2pfl.experiment.requirements import NEEDS_ALL
from p2pfl.experiment.spec import AlgorithmSpec, ClockSpec, Experiment, algorithm_options
from p2pfl.paces import PACES
from p2pfl.privacy import MECHANISMS
from p2pfl.tasks import PARTITIONS, TASKS
from p2pfl.topology import SCHEDULES, TOPOLOGIES, WEIGHTS, option_faults, schedule_faults
from p2pfl.yaml_files import check, nearest, shown, strange_keys, text_keys, unknown_key, unknown_name

_NEEDS_ROUNDS: frozenset[Requirement] = frozenset({"synchronous", "reliable", "complete"})
"""Requirements that nodes which do not wait for each other cannot meet."""

_FROM_EXPERIMENT = ("nodes", "partition", "seed")
"""Arguments of a task that stand among the experiment's own keys."""

_FROM_NODE = ("site_file",)
"""Arguments of a task that a node alone gives it."""

_RUN_NAME = re.compile(r"[^\s./\\\x00-\x1f\x7f]([^/\\\x00-\x1f\x7f]{0,98}[^\s/\\\x00-\x1f\x7f])?")

_ALGORITHM_KEYS = [f.name for f in fields(AlgorithmSpec) if f.name != "options"]


def faults_of_types(raw: Mapping[str, Any], findings: Sequence[str]) -> list[str]:
    """All faults of a file's mapping whose values have wrong types or unknown keys, which *findings* name as the dataclasses do."""
    faults = _faults_of_names(raw)
    has_no_graph = any(fault.startswith("topology = ") for fault in faults)
    # one fault of a name is one finding, ours: pydantic cannot know which names there are, and the file has no `options`
    return [
        *(
            finding.replace("algorithm.options.", "algorithm.").replace(", options", "")
            for finding in findings
            if not (has_no_graph and finding.startswith("topology.name: required"))
        ),
        *faults,
    ]


def faults_and_conflicts(raw: Mapping[str, Any], experiment: Experiment) -> tuple[list[str], list[str]]:
    """Values of a file's mapping that are wrong by themselves, and values that are right one by one and wrong together."""
    faults, conflicts = _faults_of_names(raw), []
    try:
        if experiment.aggregator.name in AGGREGATORS:
            check(AGGREGATORS[experiment.aggregator.name], experiment.aggregator.options, "aggregator")
        if experiment.privacy is not None and experiment.privacy.name in MECHANISMS:
            check(MECHANISMS[experiment.privacy.name], experiment.privacy.options, "privacy")
        if experiment.algorithm.name in ALGORITHMS and experiment.compressor.name in COMPRESSORS:
            conflicts += _conflicts_of_algorithm(experiment)
    except ConfigError as error:
        faults += [f"{error.place}.{finding}" for finding in error.findings]
    return faults, conflicts + _conflicts_of_keys(experiment)


def _faults_of_names(raw: Mapping[str, Any]) -> list[str]:
    """Faults of names that nothing is registered under and of options that they do not take, whatever else is wrong."""
    allowed = {
        "task": [*TASKS, "package.module:function"],
        "topology": [*TOPOLOGIES, *SCHEDULES],
        "algorithm": list(ALGORITHMS),
        "aggregator": list(AGGREGATORS),
        "compressor": list(COMPRESSORS),
        "partition": list(PARTITIONS),
    } | ({"privacy": list(MECHANISMS)} if MECHANISMS else {})
    found = [*strange_keys(raw), *_faults_of_run_name(raw.get("name")), *_faults_of_pace(raw.get("pace"))]
    for key in (*allowed, "optimizer", "stop"):
        value = raw.get(key)
        if isinstance(value, dict):
            found += [*strange_keys(value, key), *_faults_of_section(key, text_keys(value), allowed.get(key))]
    weights = raw.get("weights", "metropolis")
    if isinstance(weights, str) and weights not in WEIGHTS:
        found.append(unknown_name("weights", weights, list(WEIGHTS)))
    return found


def _faults_of_run_name(name: object) -> list[str]:
    """The fault of a run's name that cannot be the name of its folder."""
    if not isinstance(name, str) or (_RUN_NAME.fullmatch(name) and not UNSAFE_OR_BREAK.search(name)):
        return []
    expected = "1 to 100 characters without / and \\ and control characters, not starting with '.', no space at an end"
    return [f"name = {shown(name)}: it names the run's folder: expected {expected}"]


def _faults_of_pace(pace: object) -> list[str]:
    """The fault of a pace that nothing is registered under."""
    name = pace.get("name") if isinstance(pace, Mapping) else None
    if not isinstance(name, str) or name in PACES:
        return []
    *others, last = map(repr, PACES)
    return [f"pace.name = {shown(name)}: one of {', '.join(others)} or {last}"]


def _faults_of_section(key: str, value: Mapping[str, Any], names: list[str] | None) -> list[str]:
    """Faults of a section whose `name` must be one of some."""
    name = value.get("name")
    if key == "topology" and (name in (None, "file") or "file" in value):
        return _faults_of_topology_file(value)
    found = []
    if key == "algorithm" and "options" in value:
        found.append(f"algorithm.{unknown_key('options', value['options'], [*_ALGORITHM_KEYS, *algorithm_options(name)])}")
    if names is None or not isinstance(name, str):
        return found
    if name not in names:
        return found if key == "task" and ":" in name else [*found, unknown_name(f"{key}.name", name, names)]
    return found if key == "algorithm" else [*found, *_faults_of_options(key, name, value)]


def _faults_of_topology_file(value: Mapping[str, Any]) -> list[str]:
    """Faults of a topology that has a file, or neither that nor a name."""
    if "file" not in value:
        missing = "name" not in value or value["name"] == "file"
        return [f"topology = {shown(value)}: expected a name (see `p2pfl topology list`) or a file"] if missing else []
    found = [
        f"topology.{unknown_key(key, value[key], ['name', 'file'])}"
        for key in value
        if isinstance(key, str) and key not in ("name", "file")
    ]
    if not isinstance(value["file"], str) or not value["file"]:
        found.append(f"topology.file = {shown(value['file'])}: expected a path")
    if value.get("name", "file") != "file":
        found = [f"topology = {shown(value)}: has a name and a file; keep one of them"]
    return found


def _faults_of_options(key: str, name: str, value: Mapping[str, Any]) -> list[str]:
    """Faults of the options beside a known name."""
    options = {option: given for option, given in value.items() if option != "name"}
    if key == "topology":
        return schedule_faults(name, options) if name in SCHEDULES else option_faults(name, options)
    if key == "task":
        return _faults_of_task_options(name, options) if name in TASKS else []
    registries: dict[str, Any] = {"partition": PARTITIONS, "compressor": COMPRESSORS, "aggregator": AGGREGATORS, "privacy": MECHANISMS}
    parameters = inspect.signature(registries[key][name]).parameters.values()
    offered = [p.name for p in parameters if key != "partition" or p.kind is p.KEYWORD_ONLY]
    return [f"{key}.{unknown_key(option, given, ['name', *offered])}" for option, given in options.items() if option not in offered]


def _faults_of_task_options(name: str, options: Mapping[str, Any]) -> list[str]:
    """Faults of the options of a built-in task; a task of the user's own is asked when it is loaded."""
    accepted = [option for option in inspect.signature(TASKS[name]).parameters if option not in _FROM_NODE]
    offered = [option for option in accepted if option not in _FROM_EXPERIMENT]
    return [
        f"task.{option} = {shown(given)}: {nearest(option, offered)}{name} takes {', '.join(offered)}"
        for option, given in options.items()
        if option not in accepted
    ]


def _conflicts_of_keys(experiment: Experiment) -> list[str]:
    """Conflicts between keys that no algorithm has a part in."""
    found = []
    if experiment.topology.name in SCHEDULES and experiment.weights not in ("metropolis", "push-sum"):
        found.append(
            f"weights = {experiment.weights!r}: topology {experiment.topology.name} changes from round to round and has its own; leave it"
            " out"
        )
    if experiment.weights == "stationary" and experiment.weighting == "samples":
        found.append("weighting = 'samples': weights: stationary counts the samples already; keep one of both")
    if experiment.rounds == 0 and experiment.stop is None:
        found.append("rounds = 0: with stop: null there is nothing to do; give rounds >= 1 or a stop")
    if experiment.optimizer.warmup_rounds and experiment.optimizer.warmup_rounds >= experiment.rounds:
        found.append(f"optimizer.warmup_rounds = {experiment.optimizer.warmup_rounds}: must be < rounds, which is {experiment.rounds}")
    if experiment.optimizer.momentum and experiment.optimizer.name not in ("sgd", "rmsprop"):
        found.append(
            f"optimizer.momentum = {experiment.optimizer.momentum}: {experiment.optimizer.name} has none; only sgd and rmsprop take it"
        )
    return found


def _conflicts_of_algorithm(experiment: Experiment) -> list[str]:
    """Conflicts of the algorithm with the compressor, the pace or the topology; ConfigError where an option of it cannot have its value."""
    rule, compressor = experiment.algorithm, experiment.compressor
    make_algorithm: Any = ALGORITHMS[rule.name]
    make_compressor: Any = COMPRESSORS[compressor.name]
    algorithm: Algorithm = check(make_algorithm, rule.options, "algorithm")
    compressed = algorithm.with_compressor(check(make_compressor, compressor.options, "compressor"))
    if compressed is None and compressor.name != "none":
        return [f"compressor.name = {compressor.name!r}: algorithm {rule.name} takes no compressor; choco does"]
    requires = (compressed or algorithm).requires
    found = _conflicts_of_pace(experiment, requires) if experiment.pace.name in PACES else []
    if "complete" in requires and experiment.topology.name != "complete":
        found.append(f"topology.name = {experiment.topology.name!r}: algorithm {rule.name} needs complete")
    return found


def _conflicts_of_pace(experiment: Experiment, requires: frozenset[Requirement]) -> list[str]:
    """Conflicts of the pace with the algorithm, the clock, the topology or the stop."""
    pace, kind, rule = experiment.pace.name, experiment.pace.kind, experiment.algorithm.name
    found = []
    if ("pairwise" in requires) != kind.counts_edges:
        expected = " or ".join(name for name, each in PACES.items() if each.counts_edges == ("pairwise" in requires))
        others = "" if "pairwise" in requires else "; pairwise is for ad-psgd"
        found.append(f"pace.name = {pace!r}: algorithm {rule} needs {expected}{others}")
    found += _conflicts_of_clock(experiment, requires)
    if kind.in_step:
        return found
    if not kind.counts_edges and not _NEEDS_ROUNDS.isdisjoint(requires):
        found.append(f"pace.name = {pace!r}: algorithm {rule} needs all messages of a round together; take synchronous, or dpsgd")
    if experiment.topology.name in SCHEDULES:
        found.append(f"topology.name = {experiment.topology.name!r}: changes from round to round, and pace {pace} has no common rounds")
    if experiment.stop is not None:
        found.append(f"stop: pace {pace} has no common round to stop after; take stop: null")
    return found


def _conflicts_of_clock(experiment: Experiment, requires: frozenset[Requirement]) -> list[str]:
    """Conflicts of the clock with the pace or the algorithm."""
    clock, pace, kind = experiment.clock, experiment.pace.name, experiment.pace.kind
    if clock is None:
        return []
    found = []
    if needed := sorted(requires & NEEDS_ALL):
        found += [f"clock.{drop}: algorithm {experiment.algorithm.name} needs every message ({needed[0]})" for drop in clock.drops]
    if kind.in_step:
        return found
    if kind.counts_edges and clock.loss:
        found.append(
            f"clock.loss = {clock.loss:g}: two that meet ask until they have heard each other; take pace synchronous or asynchronous"
        )
    if clock.churn is not None:
        found.append(f"clock.churn: pace {pace} has no common rounds to be away for; take synchronous")
    for key in ("deadline_floor_s", "deadline_factor"):
        if getattr(clock, key) != getattr(ClockSpec, key):
            found.append(f"clock.{key} = {getattr(clock, key):g}: with pace {pace} nobody waits until a deadline; leave it out")
    return found
