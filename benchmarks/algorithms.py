"""Which algorithm on which graph, where 32 sites share the patients out very unequally: the table of docs/algorithms.md.

breast-cancer over 32 sites, Dirichlet alpha 0.1, five seeds, 100 rounds of 5 local steps in batches of 32; everything else is the same for
all, the learning rate too. Prints Markdown; progress goes to standard error.

    python benchmarks/algorithms.py [--rounds 100] [--only "choco, int8" …] [--json]
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import p2pfl
from p2pfl.errors import ConfigError

SEEDS = range(5)
TOPOLOGIES = ("ring", "torus", "exponential", "one-peer-exponential", "base-2", "base-5", "el-oracle", "path")
ALGORITHMS: dict[str, dict[str, Any]] = {
    "dpsgd": {},
    "qg-dsgdm": {},
    "gradient-tracking": {},
    "k-gt": {},
    "exact-diffusion": {},
    "extra": {},
    "push-sum": {},
    "relaysgd": {},
    "diloco": {},
    "choco, int8": {"compressor": {"name": "int8"}},
    "choco, top-k of 10 %": {"compressor": {"name": "top-k", "share": 0.1}},
    "powergossip": {},
    "ad-psgd": {},
}
"""What a row adds to the experiment, by its label; a label begins with the algorithm's name."""

COLUMNS = {
    "auroc, mean model": 4,
    "log loss, mean model": 4,
    "auroc, worst site": 3,
    "accuracy, worst site": 3,
    "consensus distance": 4,
    "MB sent": 2,
}
"""And how many decimals are shown."""


@dataclass(frozen=True)
class Cell:
    """One algorithm on one graph: each column's figure for every seed."""

    algorithm: str
    topology: str
    seeds: list[list[float]]

    def line(self) -> str:
        """Mean and sample standard deviation over the seeds, the latter where it shows."""
        figures = []
        for places, values in zip(COLUMNS.values(), zip(*self.seeds, strict=True), strict=True):
            spread = f"{statistics.stdev(values):.{places}f}" if len(values) > 1 else "0"
            figures.append(f"{statistics.fmean(values):.{places}f}" + (f" ± {spread}" if float(spread) else ""))
        return f"| {self.algorithm} | {self.topology} | {' | '.join(figures)} |"


def experiment(label: str, topology: str, seed: int, rounds: int) -> dict[str, Any]:
    """One run."""
    algorithm = label.partition(",")[0]
    graph: dict[str, Any] = {"name": topology} | ({"degree": 4} if topology == "el-oracle" else {})
    weights = "push-sum" if algorithm == "push-sum" and topology in ("ring", "torus", "exponential", "path") else None
    return {
        "task": {"name": "breast-cancer"},
        "nodes": 32,
        "partition": {"name": "dirichlet", "alpha": 0.1},
        "topology": graph,
        "weights": weights or ("given" if topology == "exponential" else "metropolis"),
        "algorithm": {"name": algorithm, "local_steps": 5, "batch_size": 32},
        "optimizer": {"name": "sgd", "lr": 0.05},
        "rounds": rounds,
        "stop": None,
        "evaluate_every": 100_000,
        "checkpoint_every": 100_000,
        "baselines": [],
        "seed": seed,
        **ALGORITHMS[label],
    }


def measured(content: dict[str, Any]) -> list[float]:
    """One run's figures, by column; ConfigError where the algorithm cannot run on the graph."""
    with tempfile.TemporaryDirectory() as folder:
        run = p2pfl.simulate(content, out=Path(folder) / "run")
        models, summary = torch.stack(list(run.models.values())).double(), run.summary
    mean_P = models.mean(dim=0)
    apart = float(torch.linalg.vector_norm(models - mean_P, dim=1).square().mean().sqrt() / torch.linalg.vector_norm(mean_P))
    worst = {name: summary["metrics"][name]["min"] for name in ("auroc", "accuracy")}
    pooled = summary["mean_model"]
    return [pooled["auroc"], pooled["log_loss"], worst["auroc"], worst["accuracy"], apart, summary["bytes_sent"] / 1e6]


def cells(algorithms: Iterable[str], rounds: int) -> list[Cell]:
    """Some algorithms, by label, on every graph that they can run on."""
    found = []
    for algorithm in algorithms:
        for topology in TOPOLOGIES:
            try:
                seeds = [measured(experiment(algorithm, topology, seed, rounds)) for seed in SEEDS]
            except ConfigError as error:
                sys.stderr.write(f"{algorithm} on {topology}: {error}\n")
                continue
            found.append(Cell(algorithm, topology, seeds))
            sys.stderr.write(found[-1].line() + "\n")
    return found


def main() -> None:
    """Read the command line, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), metavar="LABEL", help="rows of these")
    parser.add_argument("--json", action="store_true", help="all figures, by seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # small sites without a class: said 400 times
    table = cells(arguments.only, arguments.rounds)
    if arguments.json:
        print(json.dumps([{"algorithm": c.algorithm, "topology": c.topology, "columns": list(COLUMNS), "seeds": c.seeds} for c in table]))
        return
    print(f"| algorithm | topology | {' | '.join(COLUMNS)} |")
    print("| --- | --- | " + " | ".join("---" for _ in COLUMNS) + " |")
    for cell in table:
        print(cell.line())


if __name__ == "__main__":
    main()
