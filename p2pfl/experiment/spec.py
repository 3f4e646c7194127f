"""The keys of an experiment's file, their types and their defaults, as dataclasses."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from p2pfl.algorithms import ALGORITHMS
from p2pfl.paces import PACES, Pace
from p2pfl.privacy import MECHANISMS
from p2pfl.training import OptimizerSpec
from p2pfl.yaml_files import shown

_FORBID_UNKNOWN = {"extra": "forbid"}

Count = Annotated[int, Field(ge=0, le=10**6)]
Positive = Annotated[int, Field(ge=1, le=10**6)]
Nodes = Annotated[int, Field(ge=1, le=10**7)]
HeldOut = Annotated[float, Field(ge=0, le=0.9)]

NodeName = Annotated[str, BeforeValidator(lambda name: str(name) if type(name) is int else name)]
"""A node's name as a key; a file may write a number without quotes."""


def _privacy(value: object) -> object:
    if value is not None and not MECHANISMS:
        raise ValueError("expected null; there is no privacy mechanism to choose yet")
    return value


def _whole_number_or(word: str, most: float, expected: str) -> BeforeValidator:
    """Refuse a value that is neither a whole number up to *most* nor the word, in one sentence."""

    def checked(value: object) -> object:
        is_number = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
        if value != word and not is_number:
            raise ValueError(f"expected {expected}")
        return value

    return BeforeValidator(checked)


_BATCH_SIZE = _whole_number_or("full", 10**6, "a whole number from 1 to 1,000,000, or full for all rows of each site")
_MEMBERS = _whole_number_or("all", math.inf, "all, or a whole number that is more than half of the members")


def _switch(value: object) -> object:
    """Turn true and false back into on and off, which YAML reads as such."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


@dataclass(frozen=True, kw_only=True)
class AlgorithmSpec:
    """The algorithm, and how much each node computes between two exchanges."""

    __pydantic_config__: ClassVar = _FORBID_UNKNOWN
    name: str = "dpsgd"
    local_steps: Count = 5
    """K, steps of a node in one round."""
    batch_size: Annotated[Positive | Literal["full"], _BATCH_SIZE] = 32
    """The most rows in a batch; a site with fewer takes each of its rows once. "full": all rows of every site."""
    options: dict[str, Any] = field(default_factory=dict)
    """The algorithm's own arguments; in the file they stand beside `name`."""


@dataclass(frozen=True, kw_only=True)
class StopSpec:
    """The condition for stopping early, and how many mixing-only rounds may follow the last training round."""

    __pydantic_config__: ClassVar = _FORBID_UNKNOWN
    relative_consensus: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    """Disagreement over the models' root mean square norm."""
    patience: Positive = 3
    settle: Count = 200
    """The most mixing-only rounds, which have no local steps."""


@dataclass(frozen=True, kw_only=True)
class PaceSpec:
    """The pace: whether nodes wait for each other."""

    __pydantic_config__: ClassVar = _FORBID_UNKNOWN
    name: str = "synchronous"
    """ "synchronous": round by round, together; "asynchronous": each at its own pace, with its neighbours' newest models; "pairwise": each
    at its own pace, with one neighbour at a time. Default: what the algorithm needs."""
    max_age: Positive = 16
    """Asynchronous: the number of its own rounds for which a node may merge a neighbour's model again."""
    staleness: Annotated[float, Field(ge=0, le=10)] = 1.0
    """Asynchronous: a model that has been merged a times before counts w / (1 + a)**staleness."""

    @property
    def kind(self) -> type[Pace]:
        """The pace's class, which declares what it needs."""
        return PACES[self.name]


@dataclass(frozen=True, kw_only=True)
class StragglersSpec:
    """Stragglers: nodes that are slow in some rounds."""

    __pydantic_config__: ClassVar = _FORBID_UNKNOWN
    share: Annotated[float, Field(ge=0, le=1)]
    """The probability that a node is slow in a round."""
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    """How many times as long its training takes."""


@dataclass(frozen=True, kw_only=True)
class ChurnSpec:
    """Churn: nodes leave the network and come back."""

    __pydantic_config__: ClassVar = _FORBID_UNKNOWN
    share: Annotated[float, Field(ge=0, le=1)]
    """The probability that a node that is there leaves in a round; in the first one everybody is there."""
    rounds: Positive
    """How many rounds of the network it stays away."""


@dataclass(frozen=True, kw_only=True)
class ClockSpec:
    """Simulated time: how long training and messages take, and what fails."""

    __pydantic_config__: ClassVar = _FORBID_UNKNOWN
    round_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Seconds of training in a round, at speed 1."""
    speeds: dict[NodeName, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = field(default_factory=dict)
    """Speed of each node; 1 where none is given."""
    latency_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Latency one way of edges for which the topology's file says nothing."""
    bandwidth_mbps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Bandwidth of edges for which the topology's file says nothing; None: no limit."""
    uplink_mbps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Bandwidth of each node, whose messages leave one after another; None: no limit."""
    stragglers: StragglersSpec | None = None
    loss: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The fraction of messages that never arrive, however often they are asked for."""
    churn: ChurnSpec | None = None
    deadline_floor_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    """The least time that neighbours have for an exchange, as in site.yaml."""
    deadline_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 5.0
    """The multiple of recent exchanges' duration that neighbours have, where that is more."""

    @property
    def drops(self) -> list[str]:
        """Settings that keep messages from arriving at all, as the file writes them."""
        churn = [f"churn = {shown(asdict(self.churn))}"] if self.churn is not None and self.churn.share else []
        return [*([f"loss = {self.loss:g}"] if self.loss else []), *churn]


@dataclass(frozen=True, kw_only=True)
class RequireSpec:
    """The number of members that must be there before any daemon trains."""

    __pydantic_config__: ClassVar = _FORBID_UNKNOWN
    members: Annotated[Literal["all"] | Positive, _MEMBERS] = "all"
    """How many members are enough once within_s is over: more than half of them, or all."""
    within_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 86_400.0
    """How long a node waits for all members. With fewer than `members` then, it ends without training, with exit code 3."""

    def at_least(self, num_members: int) -> int:
        """The number of members that is enough."""
        return num_members if self.members == "all" else self.members


@dataclass(frozen=True, kw_only=True)
class Named:
    """A name from a registry, with the options beside it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The whole of an experiment's file: everything that decides a run's result. Made by `load_experiment` or `experiment_from`."""

    __pydantic_config__: ClassVar = _FORBID_UNKNOWN
    name: str
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
    privacy: Annotated[Named | None, BeforeValidator(_privacy)] = None
    pace: PaceSpec = field(default_factory=PaceSpec)
    clock: ClockSpec | None = None
    """None: rounds have no seconds where nodes go round by round, and the default ones where they do not."""
    rounds: Count = 100
    stop: StopSpec | None = field(default_factory=StopSpec)
    dtype: Literal["float32", "float64"] | None = None
    """Type of parameters in memory and in messages; None: the task's default."""
    validation: HeldOut = 0.0
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
        """The run's cap: one past the last round that it can have."""
        return self.rounds + (self.stop.settle if self.stop else 0)

    def local_steps_at(self, round: int) -> int:
        """The number of local steps: K in training rounds, 0 in the mixing-only rounds that follow."""
        return self.algorithm.local_steps if round < self.rounds else 0

    def as_dict(self) -> dict[str, Any]:
        """The content of the experiment's file, every default written out; `experiment_from` reads it back."""
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


def algorithm_options(name: object) -> set[str]:
    """Names of the options that an algorithm has of its own; none for an unknown one."""
    rule: Any = ALGORITHMS.get(str(name))
    return {f.name for f in fields(rule)} - {"compressor"} if rule else set()


def _flat(value: dict[str, Any]) -> dict[str, Any]:
    """Put a section's options beside its name, where the file has them."""
    flat = {k: v for k, v in value.items() if k != "options"} | value.get("options", {})
    return {k: v for k, v in flat.items() if k != "name"} if flat.get("name") == "file" else flat
