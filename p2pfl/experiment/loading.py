"""Loading of experiments: from a file or a mapping, with keys replaced, to an `Experiment` without faults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from p2pfl.algorithms import ALGORITHMS
from p2pfl.errors import ConfigError, ConflictError, some
from p2pfl.experiment.findings import faults_and_conflicts, faults_of_types
from p2pfl.experiment.spec import AlgorithmSpec, Experiment, algorithm_options
from p2pfl.experiment.table_files import contract_of_task, faults_of_study_task, with_table_contents
from p2pfl.governance.study import Study
from p2pfl.privacy import MECHANISMS
from p2pfl.tasks import TABLE
from p2pfl.topology import base_spec
from p2pfl.yaml_files import check, load_yaml, parse_yaml, shown, text_keys

_WITH_OPTIONS = ("task", "partition", "topology", "aggregator", "compressor")
"""Sections of a name with options beside it."""


def load_experiment(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Load an experiment from its file, with some dotted keys replaced, as `--set algorithm.local_steps=10` gives them.

    Raises:
        ConfigError: every fault at once, each with key, value given and what is allowed.
    """
    return experiment_from(raw_experiment(path), str(path), overrides)


def raw_experiment(path: Path | str) -> dict[str, Any]:
    """Read an experiment's file without checks: with a name, and with its graph's file found; ConfigError where it holds no mapping."""
    raw = load_yaml(path, "task: {name: breast-cancer}")
    raw.setdefault("name", Path(path).stem)
    return with_files_found(raw, Path(path).parent)


def with_files_found(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Replace the name of a graph's file by its full path, in a folder or where the command runs; for a table's files see table_files."""
    raw = _with_table_contents(raw, folder)
    topology = raw.get("topology")
    if not isinstance(topology, dict):
        return dict(raw)
    if isinstance(topology.get("file"), str):
        topology = {**topology, "file": _found_beside(folder, topology["file"])}
    if isinstance(base := topology.get("base"), str | dict) and isinstance(file := base_spec(base).get("file"), str):
        topology = {**topology, "base": {**base_spec(base), "file": _found_beside(folder, file)}}
    return {**raw, "topology": topology}


def experiment_from(raw: Mapping[str, Any], place: str = "experiment", overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Check a mapping as an experiment's file holds it; for overrides and faults see `load_experiment`."""
    merged = overridden(raw, overrides or {})
    if overrides:
        merged = _with_table_contents(merged, Path())
    merged.setdefault("name", "experiment")
    merged["pace"] = _with_default_pace(merged.get("pace"), merged.get("algorithm"))
    try:
        experiment = check(Experiment, _with_options_apart(merged), place)
    except ConfigError as error:
        raise ConfigError(faults_of_types(merged, error.findings), place) from error
    faults, conflicts = faults_and_conflicts(merged, experiment)
    if faults:
        raise ConfigError([*faults, *conflicts], place)
    if conflicts:
        raise ConflictError(conflicts, place)
    return experiment


def recorded_experiment(raw: Mapping[str, Any], place: str, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Check the experiment of a study or a run's folder as `experiment_from`; without a schema an earlier version has resolved it."""
    return experiment_from({"schema": 1, **raw}, place, overrides)


def load_study(path: Path | str) -> Study:
    """Read a study from its file and check its experiment, its data contract and its analyses.

    Raises:
        ConfigError: one of them cannot be, or leaves keys to the defaults of each reader's version.
    """
    study = Study.read(path)
    if faults := list(faults_of_study_task(study.experiment.get("task"))):
        raise ConfigError(faults, str(path))
    resolved = recorded_experiment(study.experiment, str(path)).as_dict()
    if missing := sorted(_missing_keys(resolved, study.experiment)):
        raise ConfigError(
            f"experiment: {some(missing)} not written out, so that each site would take its own version's defaults; "
            "make the study with p2pfl study new, which resolves it",
            str(path),
        )
    if study.contract is not None:
        from p2pfl.analyses.agreed import AgreedAnalyses  # a study without a contract does without analyses

        agreed, own = AgreedAnalyses.of(study, str(path)), contract_of_task(study.experiment.get("task"))
        if agreed is not None and own is not None and own.digest != agreed.contract.digest:
            raise ConfigError(
                "contract: another one than experiment.task.contract; a study has one contract: make it with p2pfl study new", str(path)
            )
    return study


def _missing_keys(resolved: Mapping[str, Any], raw: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """Dotted keys of one mapping that another one lacks."""
    for key, value in resolved.items():
        if key not in raw:
            yield f"{within}{key}"
        elif isinstance(value, Mapping) and isinstance(given := raw[key], Mapping):
            yield from _missing_keys(value, given, f"{within}{key}.")


def overridden(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Replace some dotted keys of a mapping, names first, which drop the options of the name before; ConfigError inside of no mapping."""
    merged = dict(raw)
    for key, value in sorted(overrides.items(), key=lambda item: not item[0].endswith((".name", ".file"))):
        merged = _replaced(merged, key.split("."), value, key)
    return merged


def _with_default_pace(pace: Any, algorithm: Any) -> Any:
    """Name the pace that the algorithm needs where none is named."""
    rule = ALGORITHMS.get(str(algorithm.get("name"))) if isinstance(algorithm, Mapping) else None
    needs = "pairwise" if rule is not None and "pairwise" in rule.requires else "synchronous"
    if pace is None:
        return {"name": needs}
    return {"name": needs, **pace} if isinstance(pace, Mapping) else pace


def resolve(experiment: Experiment | Mapping[str, Any] | Path | str, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Make an Experiment of an Experiment, of a mapping as a file holds it, or of a file's path."""
    if isinstance(experiment, Experiment):
        return recorded_experiment(experiment.as_dict(), "experiment", overrides) if overrides else experiment
    if isinstance(experiment, Mapping):
        return experiment_from(_with_table_contents(experiment, Path()), "experiment", overrides)
    return load_experiment(experiment, overrides)


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split KEY=VALUE and read the value as YAML: ("rounds", 10) from "rounds=10"; ConfigError where there is no "="."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{text!r}: expected KEY=VALUE, such as algorithm.local_steps=10", "--set")
    return key.strip(), parse_yaml(value, f"--set {key}")


def _with_table_contents(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Put what a table task's files hold in the place of their names; other experiments stay as they are."""
    task = raw.get("task")
    is_table = isinstance(task, Mapping) and task.get("name") == TABLE
    return with_table_contents(raw, folder) if is_table else dict(raw)


def _found_beside(folder: Path, file: str) -> str:
    """Find a graph's file beside the experiment, or where the command runs."""
    try:
        return str(((folder / file) if (folder / file).exists() else Path(file)).resolve())
    except (OSError, ValueError, RuntimeError):  # a name that no file can have: said when the graph is loaded
        return file


def _with_options_apart(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Gather the free keys beside a `name` under `options`, as the dataclasses have them."""
    sections = {key: text_keys(value) for key, value in text_keys(raw).items()}
    for key in (*_WITH_OPTIONS, *(["privacy"] if MECHANISMS else [])):
        value = sections.get(key)
        if key == "topology" and isinstance(value, dict) and "file" in value and "name" not in value:
            value = {"name": "file", **value}
        if isinstance(value, dict):
            sections[key] = {k: v for k, v in value.items() if k == "name"}
            sections[key]["options"] = {k: v for k, v in value.items() if k != "name"}
    algorithm = sections.get("algorithm")
    if isinstance(algorithm, dict):
        own = algorithm_options(algorithm.get("name", AlgorithmSpec.name))
        sections["algorithm"] = {k: v for k, v in algorithm.items() if k not in own}
        sections["algorithm"]["options"] = {k: v for k, v in algorithm.items() if k in own}
    return sections


def _replaced(raw: dict[str, Any], path: list[str], value: Any, key: str) -> dict[str, Any]:
    head, rest = path[0], path[1:]
    if not rest:
        return {**raw, head: value}
    inner = raw.get(head)
    if inner is None:
        inner = {}
    if not isinstance(inner, dict):
        raise ConfigError(f"{key}: {head} = {shown(inner)} is not a mapping", "--set")
    if rest == ["name"] and inner.get("name") != value:
        inner = {option: given for option, given in inner.items() if option not in _own_to_name(head, inner)}
    if head == "topology" and rest == ["file"]:
        inner = {}
    if head == "topology" and rest[0] in ("base", "budget"):
        inner = {option: given for option, given in inner.items() if option not in ("probabilities", "step")}  # they were for another one
    return {**raw, head: _replaced(inner, rest, value, key)}


def _own_to_name(section: str, value: Mapping[str, Any]) -> set[str]:
    """Keys of a section that belong to its name and are dropped when the name changes."""
    if section in ("topology", "partition", "compressor"):
        return set(value)
    return algorithm_options(value.get("name", AlgorithmSpec.name)) if section == "algorithm" else set()
