"""The rules that an experiment names, made from their registries with the options beside their names."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from p2pfl.algorithms import AGGREGATORS, ALGORITHMS, COMPRESSORS, Aggregator, Algorithm
from p2pfl.errors import ConflictError
from p2pfl.experiment.spec import Experiment
from p2pfl.yaml_files import check


def build_algorithm(experiment: Experiment) -> Algorithm:
    """Build the algorithm that an experiment names, with the compressor that it takes.

    Raises:
        ConfigError: an option has a value that it cannot have.
        ConflictError: an algorithm that sends full models is given a compressor.
    """
    make_algorithm: Any = ALGORITHMS[experiment.algorithm.name]
    algorithm: Algorithm = check(make_algorithm, experiment.algorithm.options, "algorithm")
    name = experiment.compressor.name
    make_compressor: Any = COMPRESSORS[name]
    compressed = algorithm.with_compressor(check(make_compressor, experiment.compressor.options, "compressor"))
    if compressed is None and name != "none":
        raise ConflictError(f"compressor.name = {name!r}: algorithm {experiment.algorithm.name} takes no compressor; choco does")
    return compressed or algorithm


def build_aggregator(experiment: Experiment) -> Aggregator:
    """Build the aggregator that an experiment names.

    Raises:
        ConfigError: an option has a value that it cannot have.
    """
    return check(AGGREGATORS[experiment.aggregator.name], experiment.aggregator.options, "aggregator")


def algorithm_options(name: object) -> set[str]:
    """Names of the options that an algorithm has of its own; none for an unknown one."""
    rule: Any = ALGORITHMS.get(str(name))
    return {f.name for f in fields(rule)} - {"compressor"} if rule else set()
