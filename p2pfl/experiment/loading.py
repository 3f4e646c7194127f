"""A run as its file describes it: what to train, how, and until when."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field

from p2pfl.algorithms import ALGORITHMS, COMPRESSORS, Algorithm, Requirement
from p2pfl.algorithms.stopping import StopRule
from p2pfl.errors import ConfigError, ConflictError, on_one_line, some
from p2pfl.governance.study import Study
from p2pfl.tasks import PARTITIONS, TASKS
from p2pfl.topology import (
    SCHEDULES,
    WEIGHTS,
    Schedule,
    Topology,
    base_spec,
    diameter,
    diameter_bounds,
    has_base,
    is_schedule,
    known_names,
    laplacian_extremes,
    load_over,
    make,
    make_schedule,
    option_faults,
    schedule_faults,
    weighted,
)
from p2pfl.training import OptimizerSpec
from p2pfl.yaml_files import check, load_yaml, nearest, parse_yaml, shown, strange_keys, unknown_key, unknown_name

_FORBID_UNKNOWN = {"extra": "forbid"}

Count = Annotated[int, Field(ge=0, le=10**6)]
Positive = Annotated[int, Field(ge=1, le=10**6)]
Nodes = Annotated[int, Field(ge=1, le=10**7)]
Share = Annotated[float, Field(ge=0, le=0.9)]

NodeName = Annotated[str, BeforeValidator(lambda name: str(name) if type(name) is int else name)]
"""A node's name as a key; a file may write a number without quotes."""

_NAME = re.compile(r"[^\s./\\\x00-\x1f\x7f]([^/\\\x00-\x1f\x7f]{0,98}[^\s/\\\x00-\x1f\x7f])?")


def _folder_name(text: str) -> str:
    """The run's folder is called so."""
    if not _NAME.fullmatch(text) or on_one_line(text) != text:
        raise ValueError(
            "it names the run's folder: expected 1 to 100 characters without / and \\ and control characters, not starting with '.', "
            "no space at an end"
        )
    return text


def _no_privacy(value: object) -> None:
    if value is not None:
        raise ValueError("expected null; there is no privacy mechanism to choose yet")


def _batch_size(value: object) -> object:
    """A whole number or "full"; others are refused in one sentence."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST_BATCH
    if value != "full" and not is_number:
        raise ValueError(f"expected a whole number from 1 to {_LARGEST_BATCH:,}, or full for all rows of each site")
    return value


def _members(value: object) -> object:
    """A whole number or "all"; others are refused in one sentence."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value != "all" and not is_number:
        raise ValueError("expected all, or a whole number that is more than half of the members")
    return value


def _switch(value: object) -> object:
    """YAML reads a bare on and off as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


_LARGEST_BATCH = 10**6

AGGREGATORS = ("mean",)

_NEEDS_ROUNDS = frozenset({"synchronous", "reliable", "complete"})
"""What an algorithm may require that nodes which do not wait for each other cannot give."""

NEEDS_ALL: frozenset[Requirement] = frozenset({"reliable", "complete"})
"""What an algorithm may require that no network gives in which messages can stay out."""

_FROM_EXPERIMENT = ("nodes", "partition", "seed")
"""What a task takes from the experiment's own keys."""

_MOST_CERTIFIED = 512  # nodes

_MOST_NEWS_ROUNDS = 1000

_EXACT_DIAMETER_UP_TO = 20_000  # nodes; each needs a search through the graph


@dataclass(frozen=True, kw_only=True)
class AlgorithmSpec:
    """Which rule, and how much each node computes between two exchanges."""

    __pydantic_config__: ClassVar = _FORBID_UNKNOWN

    name: str = "dpsgd"
    local_steps: Count = 5
    """K, steps of a node in one round."""
    batch_size: Annotated[Positive | Literal["full"], BeforeValidator(_batch_size)] = 32
    """The most rows in a batch; a site with fewer takes each of its rows once. "full": all rows of every site."""
    options: dict[str, Any] = field(default_factory=dict)
    """The rule's own arguments; in the file they stand beside `name`."""

    def build(self) -> Algorithm:
        """The rule itself.

        Raises:
            ConfigError: an option has a value that it cannot have.
        """
        rule: Any = ALGORITHMS[self.name]
        built: Algorithm = check(rule, self.options, "algorithm")
        return built


_ALGORITHM_KEYS = [f.name for f in fields(AlgorithmSpec) if f.name != "options"]


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
class PaceSpec:
    """Whether nodes wait for each other."""

    __pydantic_config__: ClassVar = _FORBID_UNKNOWN

    name: Literal["synchronous", "asynchronous", "pairwise"] = "synchronous"
    """ "synchronous": round by round, together; "asynchronous": each at its own pace, with its neighbours' newest models; "pairwise": each
    at its own pace, with one neighbour at a time. Default: what the algorithm needs."""
    max_age: Positive = 16
    """Asynchronous: for so many rounds of its own a node goes on with a model that it has merged before."""
    staleness: Annotated[float, Field(ge=0, le=10)] = 1.0
    """Asynchronous: a model that has been merged a times before counts w / (1 + a)**staleness."""

    def share(self, age: int) -> float:
        """What a model of that age counts for, of its weight."""
        return float((1 + age) ** -self.staleness)


@dataclass(frozen=True, kw_only=True)
class StragglersSpec:
    """Now and then a node is slow."""

    __pydantic_config__: ClassVar = _FORBID_UNKNOWN

    share: Annotated[float, Field(ge=0, le=1)]
    """The chance of each node in each round."""
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    """Its training takes so many times as long."""


@dataclass(frozen=True, kw_only=True)
class ChurnSpec:
    """Nodes leave and come back."""

    __pydantic_config__: ClassVar = _FORBID_UNKNOWN

    share: Annotated[float, Field(ge=0, le=1)]
    """The chance of each node that is there to leave in each round; in the first one everybody is there."""
    rounds: Positive
    """Of the network, until it is back."""


@dataclass(frozen=True, kw_only=True)
class ClockSpec:
    """What the simulator takes for time, and what goes wrong on its clock."""

    __pydantic_config__: ClassVar = _FORBID_UNKNOWN

    round_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Seconds of training in a round, at speed 1."""
    speeds: dict[NodeName, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = field(default_factory=dict)
    """By node; 1 where none is given."""
    latency_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """One way, of edges for which the topology's file says nothing."""
    bandwidth_mbps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Of edges for which the topology's file says nothing; None: no limit."""
    uplink_mbps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Of each node: its messages leave one after another; None: no limit."""
    stragglers: StragglersSpec | None = None
    loss: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of messages that never come, however often they are asked for."""
    churn: ChurnSpec | None = None
    deadline_floor_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    """As in site.yaml: the least time that neighbours have for an exchange."""
    deadline_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 5.0
    """Or so many times what recent ones took, where that is more."""

    @property
    def drops(self) -> list[str]:
        """What of it keeps messages from coming at all, as the file has it."""
        churn = [f"churn = {shown(asdict(self.churn))}"] if self.churn is not None and self.churn.share else []
        return [*([f"loss = {self.loss:g}"] if self.loss else []), *churn]


@dataclass(frozen=True, kw_only=True)
class RequireSpec:
    """How many members must be there before anybody trains; of daemons only."""

    __pydantic_config__: ClassVar = _FORBID_UNKNOWN

    members: Annotated[Literal["all"] | Positive, BeforeValidator(_members)] = "all"
    """How many are enough once within_s is over: more than half of them, or all."""
    within_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 86_400.0
    """How long a node waits for all members. With fewer than `members` then, it ends without training, with exit code 3."""

    def at_least(self, num_members: int) -> int:
        """The number of members that is enough."""
        return num_members if self.members == "all" else self.members

    def faults(self, num_members: int) -> list[str]:
        """A sentence where so many of the members cannot be required."""
        least = num_members // 2 + 1
        if self.members == "all" or least <= self.members <= num_members:
            return []
        if self.members > num_members:
            return [f"require.members = {self.members}: there are {num_members} members; give all, or {least} to {num_members}"]
        fault = f"require.members = {self.members}: not more than half of the {num_members} members, so that two halves could train apart"
        return [f"{fault}; give all, or {least} to {num_members}"]


@dataclass(frozen=True, kw_only=True)
class Named:
    """A name and what is said beside it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides a run's result. Made by `load_experiment` or `experiment_from`."""

    __pydantic_config__: ClassVar = _FORBID_UNKNOWN

    name: Annotated[str, AfterValidator(_folder_name)]
    schema: Literal[1, 2] = 2
    """Number of the rules by which batches are drawn: 1, as in files without it that earlier versions resolved, gives every batch exactly
    `batch_size` rows, also at a site with fewer; 2 gives no batch a row twice."""
    task: Named
    nodes: Nodes | None = None
    partition: Named = field(default_factory=lambda: Named(name="dirichlet", options={"alpha": 0.5}))
    topology: Named = field(default_factory=lambda: Named(name="ring"))
    weights: str = "metropolis"
    weighting: Literal["uniform", "samples"] = "uniform"
    algorithm: AlgorithmSpec = field(default_factory=AlgorithmSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    aggregator: Named = field(default_factory=lambda: Named(name="mean"))
    compressor: Named = field(default_factory=lambda: Named(name="none"))
    privacy: Annotated[None, BeforeValidator(_no_privacy)] = None
    pace: PaceSpec = field(default_factory=PaceSpec)
    clock: ClockSpec | None = None
    """None: rounds have no seconds where nodes go round by round, and the default ones where they do not."""
    rounds: Count = 100
    stop: StopSpec | None = field(default_factory=StopSpec)
    dtype: Literal["float32", "float64"] | None = None
    """Of population and wire; None: the task's default."""
    validation: Share = 0.0
    evaluate_every: Positive = 10
    checkpoint_every: Positive = 1
    save_models_every: Positive | None = None
    baselines: tuple[Literal["local", "pooled"], ...] = ("local", "pooled")
    compiled: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    """Whether local steps are those of compiled loops. "auto": where model and rows qualify and the extra `fast` is installed; a plan says
    which of both it is."""
    personal: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Patterns of names of trained parameters that stay at their node; the others travel."""
    require: RequireSpec = field(default_factory=RequireSpec)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @property
    def last_possible_round(self) -> int:
        """The run's cap: one past the last round it can have."""
        return self.rounds + (self.stop.settle if self.stop else 0)

    def build_algorithm(self) -> Algorithm:
        """The rule, with the compressor that it takes.

        Raises:
            ConfigError: an option has a value that it cannot have.
            ConflictError: a rule that sends models whole is given a compressor.
        """
        algorithm = self.algorithm.build()
        make: Any = COMPRESSORS[self.compressor.name]
        compressor = check(make, self.compressor.options, "compressor")
        if (compressed := algorithm.with_compressor(compressor)) is not None:
            return compressed
        if self.compressor.name != "none":
            raise ConflictError(
                f"compressor.name = {self.compressor.name!r}: algorithm {self.algorithm.name} takes no compressor; choco does"
            )
        return algorithm

    def local_steps_at(self, round: int) -> int:
        """K in the training rounds, 0 in those that follow."""
        return self.algorithm.local_steps if round < self.rounds else 0

    def as_dict(self) -> dict[str, Any]:
        """As its file would say it, every default written out; `experiment_from` takes it back."""
        plain = asdict(self)
        if not self.personal:  # as it was written before there were any
            del plain["personal"]
        if self.require == RequireSpec():
            del plain["require"]
        if self.schema == 1:  # likewise: digests were made of it
            del plain["schema"]
            if self.compiled == "auto":
                del plain["compiled"]
        return {
            key: _flat(value) if isinstance(value, dict) else list(value) if isinstance(value, tuple) else value
            for key, value in plain.items()
        }

    def build_topology(self, names: Sequence[str], samples: Mapping[str, int | None] | None = None) -> Topology:
        """The weighted graph over the nodes, which are the rows in the order of their sorted names.

        Args:
            names: of the nodes.
            samples: training rows of each, for `weights: stationary` where the graph's file gives no masses.

        Raises:
            TopologyError: the graph is not connected, cannot have that many nodes, or names other nodes than the task has.
            ConfigError: it is not known how much a node counts.
        """
        graph = self._graph(self.topology, names)
        if self.weights == "stationary" and graph.masses is None:
            counts = {name: (samples or {}).get(name) for name in names}
            if unknown := [name for name, count in counts.items() if not count]:
                raise ConflictError(
                    f"weights = 'stationary': how much does {some(unknown)} count? Their training rows are not known or none; give"
                    " `samples` on every card, or a mass for every node in a topology's file"
                )
            graph = replace(graph.renamed(tuple(names)), masses=np.array(list(counts.values()), dtype=np.float64))
        return weighted(graph, self.weights).renamed(tuple(names))

    def _graph(self, wanted: Named, names: Sequence[str]) -> Topology:
        """A graph by name, as it comes, or from a file, its nodes matched with the names."""
        if wanted.name == "file":
            return load_over(Path(wanted.options["file"]), names)
        graph = make(wanted.name, len(names), **{"seed": self.seed, **wanted.options})
        if graph.num_nodes != len(names):
            raise ConflictError(f"topology.name = {wanted.name!r} has {graph.num_nodes} nodes, the run {len(names)}; set nodes to that")
        return graph

    def _rule_for_rounds(self, schedule: Schedule, stop: StopSpec) -> StopRule:
        """The rule where the graph is directed or changes: certified over the links of as many rounds as news needs."""
        if schedule.num_nodes > _MOST_CERTIFIED:
            raise ConflictError(
                f"stop: a graph that is directed or changes is certified for at most {_MOST_CERTIFIED} nodes, this one has "
                f"{schedule.num_nodes}; take stop: null"
            )
        last = self.rounds if schedule.period is not None else self.last_possible_round
        starts = range(self.rounds, (self.rounds + schedule.period) if schedule.period is not None else last)
        rounds = [rounds_of_news(schedule, start, max(4 * schedule.num_nodes, _MOST_NEWS_ROUNDS)) for start in starts]
        if None in rounds:
            raise ConflictError(f"stop: on topology {schedule.name} news does not reach everybody; take stop: null")
        window = max(int(number) for number in rounds if number is not None)
        if schedule.period is not None:  # whole periods have all links in them
            window = -(-window // schedule.period) * schedule.period
            return self._rule(stop, window, lambda_2_of(schedule, self.rounds, window))
        return self._rule(stop, window, min(lambda_2_of(schedule, start, window) for start in starts))

    def _rule(self, stop: StopSpec, window: int, lambda_2: float) -> StopRule:
        return StopRule(tolerance=stop.relative_consensus, patience=stop.patience, diameter=window, lambda_2=lambda_2, window=window)

    def build_schedule(
        self, names: Sequence[str], agreed: Topology | None = None, samples: Mapping[str, int | None] | None = None
    ) -> Schedule:
        """The weighted graph of every round over the nodes, which are the rows in the order of their sorted names.

        Args:
            names: of the nodes.
            agreed: the graph of a study; None: the experiment's own.
            samples: as in `build_topology`.

        Raises:
            TopologyError: as `build_topology`.
            ConfigError: the study's links are not those of the experiment's rounds.
        """
        if not is_schedule(self.topology.name):
            graph = agreed if agreed is not None else self.build_topology(names, samples)
            return Schedule.static(graph, weighted_mean=self.weights == "stationary")
        options = {"seed": self.seed, **self.topology.options}
        if has_base(self.topology.name):
            options["base"] = agreed if agreed is not None else self._base(names)
        schedule = make_schedule(self.topology.name, len(names), **options).renamed(tuple(names))
        if agreed is not None and _links(agreed) != _links(schedule.union()):
            raise ConfigError(
                f"topology.name = {self.topology.name!r}: the study has other links than its rounds need; make the study again"
            )
        return schedule

    def links(self, topology: Topology, names: Sequence[str]) -> Topology | None:
        """The graph that knows latencies and bandwidths: that of all rounds, or what rounds that change choose from; None: nothing does.

        Args:
            topology: of the run.
            names: of the nodes.
        """
        graph = self._base(names) if has_base(self.topology.name) else topology
        return graph if graph.latency_ms is not None or graph.bandwidth_mbps is not None else None

    def _base(self, names: Sequence[str]) -> Topology:
        """The graph whose links a schedule uses."""
        spec = base_spec(self.topology.options.get("base", "ring"))
        return self._graph(Named(name=spec.pop("name", "file"), options=spec), names)

    def agreeing_on(self, schedule: Schedule) -> Experiment:
        """The same, with what nodes must not each compute for itself written into the topology's options."""
        if not schedule.agreed:
            return self
        return replace(self, topology=replace(self.topology, options={**self.topology.options, **schedule.agreed}))

    def stop_rule(self, schedule: Schedule) -> StopRule | None:
        """How this network agrees to stop; None: after exactly `rounds`.

        Raises:
            ConfigError: the rounds of settling do not connect everybody often enough, or there are too many nodes to find that out.
        """
        if self.stop is None:
            return None
        if schedule.period != 1 or schedule.directed:
            return self._rule_for_rounds(schedule, self.stop)
        topology = schedule.union()
        lambda_2, _ = laplacian_extremes(topology)
        return StopRule(
            tolerance=self.stop.relative_consensus, patience=self.stop.patience, diameter=news_rounds(topology), lambda_2=float(lambda_2)
        )


def rounds_of_news(schedule: Schedule, start: int, most: int) -> int | None:
    """How many rounds from `start` on news from every node needs to reach every other; None: more than `most`."""
    knows_NN = np.eye(schedule.num_nodes, dtype=np.bool_)
    for number in range(most):
        graph = schedule.at(start + number)
        before_NN = knows_NN.copy()
        np.logical_or.at(knows_NN, graph.receivers, before_NN[graph.senders])
        if knows_NN.all():
            return number + 1
    return None


def lambda_2_of(schedule: Schedule, start: int, window: int) -> float:
    """Second smallest eigenvalue of the Laplacian of all links of some rounds, each once."""
    codes = np.unique(np.concatenate([(g := schedule.at(start + r)).receivers * g.num_nodes + g.senders for r in range(window)]))
    n = schedule.num_nodes
    links = Topology.from_edges(schedule.name, n, codes % n, codes // n, directed=schedule.directed)
    return float(np.linalg.eigvalsh(links.laplacian().toarray())[1])


def _links(topology: Topology) -> set[tuple[int, int]]:
    """Both ends of every link, the smaller number first."""
    return {(min(i, j), max(i, j)) for i, j in zip(topology.senders.tolist(), topology.receivers.tolist(), strict=True)}


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
    return experiment_from(raw_experiment(path), str(path), overrides)


def raw_experiment(path: Path | str) -> dict[str, Any]:
    """What an experiment's file says, unchecked: with a name, and with its graph's file found.

    Raises:
        ConfigError: it cannot be read as a mapping.
    """
    raw = load_yaml(path, "task: {name: breast-cancer}")
    raw.setdefault("name", Path(path).stem)
    return with_files_found(raw, Path(path).parent)


def with_files_found(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The mapping with the full path of a graph's file that lies in a folder, or where the command runs."""
    topology = raw.get("topology")
    if not isinstance(topology, dict):
        return dict(raw)
    if isinstance(topology.get("file"), str):
        topology = {**topology, "file": _found_beside(folder, topology["file"])}
    if isinstance(base := topology.get("base"), str | dict) and isinstance(file := base_spec(base).get("file"), str):
        topology = {**topology, "base": {**base_spec(base), "file": _found_beside(folder, file)}}
    return {**raw, "topology": topology}


def experiment_from(raw: Mapping[str, Any], place: str = "experiment", overrides: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment that a mapping describes; for places and faults see `load_experiment`."""
    merged = overridden(raw, overrides or {})
    merged.setdefault("name", "experiment")
    merged["pace"] = _with_default_pace(merged.get("pace"), merged.get("algorithm"))
    faults = _faults_of_names(merged)
    try:
        experiment = check(Experiment, _lifted(merged), place)
    except ConfigError as error:
        # one fault of a name is one finding, ours: pydantic cannot know which names there are
        found = [finding for finding in map(_as_written, error.findings) if not _is_said(finding, faults)]
        raise ConfigError([*found, *faults], place) from error
    faults += _faults_of_rule(experiment)
    conflicts = _conflicts(experiment)
    if faults:
        raise ConfigError([*faults, *conflicts], place)
    if conflicts:
        raise ConflictError(conflicts, place)
    return experiment


def recorded_experiment(raw: Mapping[str, Any], place: str, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment that a study or a run's folder holds; without a schema it is what an earlier version resolved.

    Raises:
        ConfigError: as `experiment_from`.
    """
    return experiment_from({"schema": 1, **raw}, place, overrides)


def defaults_left_out(raw: Mapping[str, Any], place: str) -> list[str]:
    """Keys that a recorded experiment does not write out, dotted: each reader would fill them with its own version's defaults.

    Raises:
        ConfigError: as `experiment_from`.
    """
    return sorted(_missing_keys(recorded_experiment(raw, place).as_dict(), raw))


def load_study(path: Path | str) -> Study:
    """Read a study from its file and check that its experiment leaves no key to a default.

    Raises:
        ConfigError: something in it cannot be, or its experiment leaves keys to the defaults of each reader's version.
    """
    study = Study.read(path)
    if missing := defaults_left_out(study.experiment, str(path)):
        raise ConfigError(
            f"experiment: {some(missing)} not written out, so that each site would take its own version's defaults; "
            "make the study with p2pfl study new, which resolves it",
            str(path),
        )
    return study


def _missing_keys(resolved: Mapping[str, Any], raw: Mapping[str, Any], of: str = "") -> Iterator[str]:
    """Dotted keys of one mapping that another one lacks."""
    for key, value in resolved.items():
        if key not in raw:
            yield f"{of}{key}"
        elif isinstance(value, Mapping) and isinstance(given := raw[key], Mapping):
            yield from _missing_keys(value, given, f"{of}{key}.")


def overridden(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with some dotted keys replaced, names first: they drop the options of the name before them.

    Raises:
        ConfigError: a key leads into something that is not a mapping.
    """
    merged = dict(raw)
    for key, value in sorted(overrides.items(), key=lambda item: not item[0].endswith((".name", ".file"))):
        merged = _replaced(merged, key.split("."), value, key)
    return merged


def _with_default_pace(pace: Any, algorithm: Any) -> Any:
    """The pace as written, or what the algorithm needs where none is named."""
    rule = ALGORITHMS.get(str(algorithm.get("name"))) if isinstance(algorithm, Mapping) else None
    needs = "pairwise" if rule is not None and "pairwise" in rule.requires else "synchronous"
    if pace is None:
        return {"name": needs}
    return {"name": needs, **pace} if isinstance(pace, Mapping) else pace


def resolve(experiment: Experiment | Mapping[str, Any] | Path | str, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """An Experiment from whatever names one: itself, a mapping as a file would hold, or a file's path."""
    if isinstance(experiment, Experiment):
        return recorded_experiment(experiment.as_dict(), "experiment", overrides) if overrides else experiment
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


def _found_beside(folder: Path, file: str) -> str:
    """A graph's file, which lies beside the experiment or where the command runs."""
    try:
        return str(((folder / file) if (folder / file).exists() else Path(file)).resolve())
    except (OSError, ValueError, RuntimeError):  # a name that no file can have: said when the graph is loaded
        return file


def _lifted(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with the free keys beside a `name` gathered under `options`."""
    lifted = {key: _texts_only(value) for key, value in _texts_only(raw).items()}
    for key in _NAMED:
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


def _texts_only(value: Any) -> Any:
    return {key: part for key, part in value.items() if isinstance(key, str)} if isinstance(value, Mapping) else value


def _own_options(name: object) -> set[str]:
    rule = ALGORITHMS.get(str(name))
    return {f.name for f in fields(rule)} - {"compressor"} if rule else set()  # type: ignore[arg-type]  # every rule is a dataclass


def _as_written(finding: str) -> str:
    """Pydantic's findings speak of our dataclasses; the file has no `options`."""
    return finding.replace("algorithm.options.", "algorithm.").replace(", options", "")


def _is_said(finding: str, faults: Sequence[str]) -> bool:
    return finding.startswith("topology.name: required") and any(fault.startswith("topology = ") for fault in faults)


def _flat(value: dict[str, Any]) -> dict[str, Any]:
    flat = {k: v for k, v in value.items() if k != "options"} | value.get("options", {})
    return {k: v for k, v in flat.items() if k != "name"} if flat.get("name") == "file" else flat


_NAMED = ("task", "partition", "topology", "aggregator", "compressor")


def _faults_of_names(raw: Mapping[str, Any]) -> list[str]:
    """Findings for names that nothing is registered under and for options that they do not take, whatever else is wrong."""
    allowed = {
        "task": [*TASKS, "package.module:function"],
        "topology": [*known_names(), *SCHEDULES],
        "algorithm": list(ALGORITHMS),
        "aggregator": list(AGGREGATORS),
        "compressor": list(COMPRESSORS),
        "partition": list(PARTITIONS),
    }
    found = strange_keys(raw)
    for key in (*allowed, "optimizer", "stop"):
        value = raw.get(key)
        if isinstance(value, dict):
            found += [*strange_keys(value, key), *_faults_of_section(key, _texts_only(value), allowed.get(key))]
    weights = raw.get("weights", "metropolis")
    if isinstance(weights, str) and weights not in WEIGHTS:
        found.append(unknown_name("weights", weights, list(WEIGHTS)))
    return found


def _faults_of_section(key: str, value: Mapping[str, Any], names: list[str] | None) -> list[str]:
    """Of a section whose `name` must be one of some."""
    name = value.get("name")
    if key == "topology" and (name in (None, "file") or "file" in value):
        return _faults_of_topology_file(value)
    found = []
    if key == "algorithm" and "options" in value:
        found.append(f"algorithm.{unknown_key('options', value['options'], [*_ALGORITHM_KEYS, *_own_options(name)])}")
    if names is None or not isinstance(name, str):
        return found
    if name not in names:
        return found if key == "task" and ":" in name else [*found, unknown_name(f"{key}.name", name, names)]
    return found if key == "algorithm" else [*found, *_faults_of_options(key, name, value)]


def _faults_of_topology_file(value: Mapping[str, Any]) -> list[str]:
    """Of a topology that has a file, or neither that nor a name."""
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
    """Of the options beside a known name."""
    options = {option: given for option, given in value.items() if option != "name"}
    if key == "topology":
        return schedule_faults(name, options) if is_schedule(name) else option_faults(name, options)
    if key == "task":
        return _faults_of_task_options(name, options) if name in TASKS else []
    offered: list[str] = []
    if key == "partition":
        offered = [p.name for p in inspect.signature(PARTITIONS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if key == "compressor":
        offered = list(inspect.signature(COMPRESSORS[name]).parameters)
    return [f"{key}.{unknown_key(option, given, ['name', *offered])}" for option, given in options.items() if option not in offered]


def _faults_of_task_options(name: str, options: Mapping[str, Any]) -> list[str]:
    """Of a task of ours; one of the user's own is asked when it is loaded."""
    accepted = inspect.signature(TASKS[name]).parameters
    offered = [option for option in accepted if option not in _FROM_EXPERIMENT]
    return [
        f"task.{option} = {shown(given)}: {nearest(option, offered)}{name} takes {', '.join(offered)}"
        for option, given in options.items()
        if option not in accepted
    ]


def _faults_of_rule(experiment: Experiment) -> list[str]:
    """Of the options of algorithm and compressor."""
    if experiment.algorithm.name not in ALGORITHMS or experiment.compressor.name not in COMPRESSORS:
        return []  # an unknown rule cannot be asked what it takes
    try:
        experiment.build_algorithm()
    except ConflictError:
        return []
    except ConfigError as error:
        return [f"{error.place}.{finding}" if error.place else finding for finding in error.findings]
    return []


def _conflicts(experiment: Experiment) -> list[str]:
    """Values that are right one by one and wrong together."""
    found = []
    if experiment.algorithm.name in ALGORITHMS and experiment.compressor.name in COMPRESSORS:
        found += _conflicts_of_rule(experiment)
    if is_schedule(experiment.topology.name) and experiment.weights not in ("metropolis", "push-sum"):
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


def _conflicts_of_rule(experiment: Experiment) -> list[str]:
    """Of a known rule with its compressor, with the pace and with the graph."""
    try:
        requires = experiment.build_algorithm().requires
    except ConflictError as error:
        return list(error.findings)
    except ConfigError:
        return []  # its options are wrong by themselves
    found = _faults_of_pace(experiment, requires)
    if "complete" in requires and experiment.topology.name != "complete":
        found.append(f"topology.name = {experiment.topology.name!r}: algorithm {experiment.algorithm.name} needs complete")
    return found


def _faults_of_pace(experiment: Experiment, requires: frozenset[Requirement]) -> list[str]:
    """What does not go with nodes that do not wait for each other."""
    pace, rule = experiment.pace.name, experiment.algorithm.name
    found = []
    if ("pairwise" in requires) != (pace == "pairwise"):
        expected = "pairwise" if "pairwise" in requires else "synchronous or asynchronous"
        others = "" if "pairwise" in requires else "; pairwise is for ad-psgd"
        found.append(f"pace.name = {pace!r}: algorithm {rule} needs {expected}{others}")
    found += _faults_of_clock(experiment, requires)
    if pace == "synchronous":
        return found
    if pace == "asynchronous" and not _NEEDS_ROUNDS.isdisjoint(requires):
        found.append(f"pace.name = 'asynchronous': algorithm {rule} needs all messages of a round together; take synchronous, or dpsgd")
    if is_schedule(experiment.topology.name):
        found.append(f"topology.name = {experiment.topology.name!r}: changes from round to round, and pace {pace} has no common rounds")
    if experiment.stop is not None:
        found.append(f"stop: pace {pace} has no common round to stop after; take stop: null")
    return found


def _faults_of_clock(experiment: Experiment, requires: frozenset[Requirement]) -> list[str]:
    """What of the clock does not go with the pace or the rule."""
    clock, pace = experiment.clock, experiment.pace.name
    if clock is None:
        return []
    found = []
    if needed := sorted(requires & NEEDS_ALL):
        found += [f"clock.{drop}: algorithm {experiment.algorithm.name} needs every message ({needed[0]})" for drop in clock.drops]
    if pace == "synchronous":
        return found
    if pace == "pairwise" and clock.loss:
        found.append(
            f"clock.loss = {clock.loss:g}: two that meet ask until they have heard each other; take pace synchronous or asynchronous"
        )
    if clock.churn is not None:
        found.append(f"clock.churn: pace {pace} has no common rounds to be away for; take synchronous")
    for key in ("deadline_floor_s", "deadline_factor"):
        if getattr(clock, key) != getattr(ClockSpec, key):
            found.append(f"clock.{key} = {getattr(clock, key):g}: with pace {pace} nobody waits until a deadline; leave it out")
    return found


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
    """The keys of a section that belong to its name and do not go on beside another one."""
    if section in ("topology", "partition", "compressor"):
        return set(value)
    return _own_options(value.get("name", AlgorithmSpec.name)) if section == "algorithm" else set()
