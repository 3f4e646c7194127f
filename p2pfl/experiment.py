"""A run as its file describes it: what to train, how, and until when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from p2pfl.algorithms import ALGORITHMS, Algorithm
from p2pfl.errors import ConfigError
from p2pfl.stopping import StopRule
from p2pfl.tasks import TASKS
from p2pfl.topology import Topology, diameter, diameter_bounds, known_names, laplacian_extremes, load, make, weighted
from p2pfl.training import OptimizerSpec
from p2pfl.yaml_files import check, load_yaml, parse_yaml, unknown_name

_FORBID_UNKNOWN = {"extra": "forbid"}

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]

AGGREGATORS = ("mean",)
COMPRESSORS = ("none",)

_EXACT_DIAMETER_UP_TO = 20_000  # nodes; each needs a search through the graph


@dataclass(frozen=True, kw_only=True)
class AlgorithmSpec:
    """Which rule, and how much each node computes between two exchanges."""

    __pydantic_config__: ClassVar = _FORBID_UNKNOWN

    name: str = "dpsgd"
    local_steps: Count = 5
    """K, steps of a node in one round."""
    batch_size: Positive = 32
    options: dict[str, Any] = field(default_factory=dict)
    """The rule's own arguments; in the file they stand beside `name`."""

    def build(self) -> Algorithm:
        """The rule itself."""
        return ALGORITHMS[self.name](**self.options)


@dataclass(frozen=True, kw_only=True)
class StopSpec:
    """When the network has agreed well enough, and how long it may take after the last training round."""

    __pydantic_config__: ClassVar = _FORBID_UNKNOWN

    relative_consensus: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    """Disagreement over the models' root mean square norm."""
    patience: Positive = 3
    settle: Count = 200
    """The most rounds without local steps."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """A name and what is said beside it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides a run's result. Made by `load_experiment` or `experiment_from`."""

    __pydantic_config__: ClassVar = _FORBID_UNKNOWN

    name: str
    task: Named
    nodes: Positive | None = None
    partition: Named = field(default_factory=lambda: Named(name="dirichlet", options={"alpha": 0.5}))
    topology: Named = field(default_factory=lambda: Named(name="ring"))
    weights: str = "metropolis"
    weighting: Literal["uniform", "samples"] = "uniform"
    algorithm: AlgorithmSpec = field(default_factory=AlgorithmSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    aggregator: Named = field(default_factory=lambda: Named(name="mean"))
    compressor: Named = field(default_factory=lambda: Named(name="none"))
    privacy: None = None
    rounds: Count = 100
    stop: StopSpec | None = field(default_factory=StopSpec)
    dtype: Literal["float32", "float64"] | None = None
    """Of population and wire; None: the task's default."""
    validation: Share = 0.0
    evaluate_every: Positive = 10
    checkpoint_every: Positive = 1
    save_models_every: Positive | None = None
    baselines: tuple[Literal["local", "pooled"], ...] = ("local", "pooled")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @property
    def last_possible_round(self) -> int:
        """The run's cap: one past the last round it can have."""
        return self.rounds + (self.stop.settle if self.stop else 0)

    def local_steps_at(self, round: int) -> int:
        """K in the training rounds, 0 in those that follow."""
        return self.algorithm.local_steps if round < self.rounds else 0

    def as_dict(self) -> dict[str, Any]:
        """As its file would say it, every default written out; `experiment_from` takes it back."""
        plain = asdict(self)
        return {
            key: _flat(value) if isinstance(value, dict) else list(value) if isinstance(value, tuple) else value
            for key, value in plain.items()
        }

    def build_topology(self, names: Sequence[str]) -> Topology:
        """The weighted graph over the nodes, which are the rows in the order of their sorted names.

        Raises:
            TopologyError: the graph is not connected, cannot have that many nodes, or names other nodes than the task has.
        """
        place = "topology"
        if self.topology.name == "file":
            graph = load(Path(self.topology.options["file"]))
            if graph.names is not None and tuple(graph.names) != tuple(names):
                raise ConfigError(f"topology.file names the nodes {', '.join(graph.names)}: the run has {', '.join(names)}", place)
            if graph.num_nodes != len(names):
                raise ConfigError(f"topology.file has {graph.num_nodes} nodes: the run has {len(names)}", place)
        else:
            graph = make(self.topology.name, len(names), **{"seed": self.seed, **self.topology.options})
            if graph.num_nodes != len(names):
                raise ConfigError(
                    f"topology.name = {self.topology.name!r} has {graph.num_nodes} nodes, the run {len(names)}; set nodes to that"
                )
        return weighted(graph, self.weights).renamed(tuple(names))

    def stop_rule(self, topology: Topology) -> StopRule | None:
        """How this network agrees to stop; None: after exactly `rounds`."""
        if self.stop is None:
            return None
        lambda_2, _ = laplacian_extremes(topology)
        return StopRule(
            tolerance=self.stop.relative_consensus, patience=self.stop.patience, diameter=news_rounds(topology), lambda_2=float(lambda_2)
        )


def news_rounds(topology: Topology) -> int:
    """Rounds in which news from any node has certainly reached every other: the diameter, or a bound on it for very large graphs."""
    return diameter(topology) if topology.num_nodes <= _EXACT_DIAMETER_UP_TO else diameter_bounds(topology)[1]


def load_experiment(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment of a file, with some keys replaced.

    Args:
        path: a YAML file.
        overrides: dotted keys to values, as `--set algorithm.local_steps=10` gives them.

    Raises:
        ConfigError: every fault at once, each with key, value given and what is allowed.
    """
    raw = load_yaml(path)
    raw.setdefault("name", Path(path).stem)
    topology = raw.get("topology")
    if isinstance(topology, dict) and isinstance(topology.get("file"), str):
        beside = Path(path).parent / topology["file"]
        raw["topology"] = {**topology, "file": str((beside if beside.exists() else Path(topology["file"])).resolve())}
    return experiment_from(raw, str(path), overrides)


def experiment_from(raw: Mapping[str, Any], place: str = "experiment", overrides: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment that a mapping describes; for places and faults see `load_experiment`."""
    merged = dict(raw)
    # names first: they drop the options of the name before them
    for key, value in sorted((overrides or {}).items(), key=lambda item: not item[0].endswith(".name")):
        merged = _replaced(merged, key.split("."), value, key)
    merged.setdefault("name", "experiment")
    faults = _unknown_names(merged)
    try:
        experiment = check(Experiment, _lifted(merged), place)
    except ConfigError as error:
        raise ConfigError([*(_as_written(f) for f in error.findings), *faults], place) from error
    if faults := faults or _contradictions(experiment):  # an unknown rule cannot be asked what it needs
        raise ConfigError(faults, place)
    return experiment


def resolve(experiment: Experiment | Mapping[str, Any] | Path | str, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """An Experiment from whatever names one: itself, a mapping as a file would hold, or a file's path."""
    if isinstance(experiment, Experiment):
        return experiment_from(experiment.as_dict(), "experiment", overrides) if overrides else experiment
    if isinstance(experiment, Mapping):
        return experiment_from(experiment, "experiment", overrides)
    return load_experiment(experiment, overrides)


def parse_assignment(text: str) -> tuple[str, Any]:
    """("algorithm.local_steps", 10) from "algorithm.local_steps=10"; the value is read as YAML.

    Raises:
        ConfigError: there is no "=".
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{text!r}: expected KEY=VALUE, such as algorithm.local_steps=10", "--set")
    return key.strip(), parse_yaml(value, f"--set {key}")


def _lifted(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with the free keys beside a `name` gathered under `options`."""
    lifted = dict(raw)
    for key in ("task", "partition", "topology", "aggregator", "compressor"):
        value = lifted.get(key)
        if key == "topology" and isinstance(value, dict) and "file" in value and "name" not in value:
            value = {"name": "file", **value}
        if isinstance(value, dict):
            lifted[key] = {k: v for k, v in value.items() if k == "name"}
            lifted[key]["options"] = {k: v for k, v in value.items() if k != "name"}
    algorithm = lifted.get("algorithm")
    if isinstance(algorithm, dict):
        own = _own_options(algorithm.get("name", AlgorithmSpec.name))
        lifted["algorithm"] = {k: v for k, v in algorithm.items() if k not in own}
        lifted["algorithm"]["options"] = {k: v for k, v in algorithm.items() if k in own}
    return lifted


def _own_options(name: object) -> set[str]:
    rule = ALGORITHMS.get(str(name))
    return {f.name for f in fields(rule)} if rule else set()  # type: ignore[arg-type]  # every rule is a dataclass


def _as_written(finding: str) -> str:
    """Pydantic's findings speak of our dataclasses; the file has no `options`."""
    return finding.replace("algorithm.options.", "algorithm.").replace(", options", "")


def _flat(value: dict[str, Any]) -> dict[str, Any]:
    flat = {k: v for k, v in value.items() if k != "options"} | value.get("options", {})
    return {k: v for k, v in flat.items() if k != "name"} if flat.get("name") == "file" else flat


def _unknown_names(raw: Mapping[str, Any]) -> list[str]:
    """Findings for names that nothing is registered under, whatever else is wrong."""
    allowed = {
        "task": [*TASKS, "package.module:function"],
        "topology": [*known_names(), "file"],
        "algorithm": list(ALGORITHMS),
        "aggregator": list(AGGREGATORS),
        "compressor": list(COMPRESSORS),
        "partition": ["iid", "dirichlet", "unequal"],
    }
    found = []
    for key, names in allowed.items():
        value = raw.get(key)
        if isinstance(value, dict) and isinstance(value.get("name"), str) and value["name"] not in names:
            custom = key == "task" and ":" in value["name"]
            if not custom:
                found.append(unknown_name(f"{key}.name", value["name"], [name for name in names if name != "file"]))
    weights = raw.get("weights", "metropolis")
    rules = ["metropolis", "max-degree", "lazy", "best-constant", "given"]
    if weights not in rules:
        found.append(unknown_name("weights", weights, rules))
    return found


def _contradictions(experiment: Experiment) -> list[str]:
    """Values that are right one by one and wrong together."""
    found = []
    if "complete" in experiment.algorithm.build().requires and experiment.topology.name != "complete":
        found.append(f"topology.name = {experiment.topology.name!r}: algorithm {experiment.algorithm.name} needs complete")
    if experiment.rounds == 0 and experiment.stop is None:
        found.append("rounds = 0: with stop: null there is nothing to do; give rounds >= 1 or a stop")
    if experiment.optimizer.momentum and experiment.optimizer.name not in ("sgd", "rmsprop"):
        found.append(
            f"optimizer.momentum = {experiment.optimizer.momentum}: {experiment.optimizer.name} has none; only sgd and rmsprop take it"
        )
    return found


def _replaced(raw: dict[str, Any], path: list[str], value: Any, key: str) -> dict[str, Any]:
    head, rest = path[0], path[1:]
    if not rest:
        return {**raw, head: value}
    inner = raw.get(head)
    if inner is None:
        inner = {}
    if not isinstance(inner, dict):
        raise ConfigError(f"{key}: {head} = {inner!r} is not a mapping", "--set")
    if rest == ["name"] and head in ("topology", "partition"):
        inner = {}  # another generator: the options of the one before do not belong to it
    return {**raw, head: _replaced(inner, rest, value, key)}
