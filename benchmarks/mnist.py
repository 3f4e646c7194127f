"""MNIST at sixteen sites that see different digits: the tables of docs/algorithms.md.

First, which algorithm on which graph, with much training between few exchanges; then CHOCO beside plain D-PSGD on one ring, with many
exchanges. Every row's learning rate is chosen in the same way: from a common start, raised and lowered as long as that makes the sites' own
models better on rows held out of the training rows; int8 takes plain D-PSGD's. Test rows are looked at once the choice is made.
Prints Markdown; progress goes to standard error.

    P2PFL_DATA=... python benchmarks/mnist.py --keep runs/mnist.jsonl    # goes on where it stopped
    P2PFL_DATA=... python benchmarks/mnist.py --quick                    # two rounds of everything: that it runs, nothing else
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import p2pfl
from p2pfl.experiment.plan import load_sites
from p2pfl.params import load_parameters
from p2pfl.training import build_model

NODES = 16
SAMPLES = 8000  # of the 60,000 training images: 500 a site on average
SEEDS = range(3)
CHOICE_SEED = 1000
VALIDATION = 0.2
COLUMNS = ("accuracy, mean model", "accuracy, own models", "accuracy, worst site", "consensus distance", "MB sent")
OWN = COLUMNS.index("accuracy, own models")

Figures = list[float]
"""One run's, by column."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is the same for all rows of a table."""

    alpha: float
    rounds: int
    local_steps: int
    batch_size: int
    warmup_rounds: int


@dataclass(frozen=True, kw_only=True)
class Walk:
    """How one number is chosen: the start times a power of the factor, such that neither the next nor the last power is better."""

    key: str
    """Dotted."""
    start: float
    factor: float

    def at(self, step: int) -> float:
        """Rounded, so that the tables show what was run."""
        return float(f"{self.start * self.factor**step:.3g}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table, and what is chosen for it."""

    label: str
    topology: str = "ring"
    algorithm: dict[str, Any]
    optimizer: dict[str, Any] = field(default_factory=dict)
    compressor: dict[str, Any] = field(default_factory=lambda: {"name": "none"})
    walks: tuple[Walk, ...] = (Walk(key="optimizer.lr", start=0.2, factor=2.0),)
    """One after the other, those still to come at their start."""
    choice_of: str | None = None
    """The row whose choice it takes, before its own."""

    def experiment(self, setting: Setting, seed: int, choice: dict[str, float], validation: float = 0.0) -> dict[str, Any]:
        """What `p2pfl.simulate` is given."""
        content: dict[str, Any] = {
            "task": {"name": "mnist", "samples": SAMPLES},
            "nodes": NODES,
            "partition": {"name": "dirichlet", "alpha": setting.alpha},
            "topology": {"name": self.topology},
            "algorithm": {**self.algorithm, "local_steps": setting.local_steps, "batch_size": setting.batch_size},
            "optimizer": {"name": "sgd", "schedule": "linear", "warmup_rounds": setting.warmup_rounds, **self.optimizer},
            "compressor": self.compressor,
            "rounds": setting.rounds,
            "stop": None,
            "validation": validation,
            "evaluate_every": 100_000,
            "checkpoint_every": 100_000,
            "baselines": [],
            "seed": seed,
        }
        for key, value in choice.items():
            group, name = key.split(".")
            content[group] = {**content[group], name: value}
        return content


FEW_EXCHANGES = Setting(alpha=0.1, rounds=50, local_steps=20, batch_size=16, warmup_rounds=5)
MANY_EXCHANGES = Setting(alpha=0.1, rounds=12_000, local_steps=1, batch_size=8, warmup_rounds=200)

GRAPH_ROWS = (
    Row(label="allreduce", topology="complete", algorithm={"name": "allreduce"}),
    Row(label="relaysgd", topology="path", algorithm={"name": "relaysgd"}),
    Row(label="dpsgd", topology="one-peer-exponential", algorithm={"name": "dpsgd"}),
    Row(label="dpsgd", algorithm={"name": "dpsgd"}),
    Row(label="qg-dsgdm", algorithm={"name": "qg-dsgdm"}),
    Row(label="exact-diffusion", algorithm={"name": "exact-diffusion"}),
    Row(label="gradient-tracking", algorithm={"name": "gradient-tracking"}),
)
BYTES_ROWS = (
    Row(label="dpsgd", algorithm={"name": "dpsgd"}),
    Row(label="choco, int8", algorithm={"name": "choco", "gamma": 1.0}, compressor={"name": "int8"}, walks=(), choice_of="dpsgd"),
    # half as large again a gamma lets one site drift, in runs half as long
    Row(label="choco, top-k of 1 %", algorithm={"name": "choco", "gamma": 0.04}, compressor={"name": "top-k", "share": 0.01}),
)


@dataclass
class Bench:
    """Runs, each made once and kept."""

    keep: Path | None
    quick: bool

    def __post_init__(self) -> None:
        """Take up what an earlier call has kept."""
        lines = self.keep.read_text().splitlines() if self.keep is not None and self.keep.exists() else []
        self._kept: dict[str, Figures] = {line["experiment"]: line["figures"] for line in map(json.loads, lines)}

    @property
    def seeds(self) -> Sequence[int]:
        """Of the tables."""
        return SEEDS[:1] if self.quick else SEEDS

    def figures(self, content: dict[str, Any]) -> Figures:
        """One run's."""
        if self.quick:
            content = {**content, "task": {**content["task"], "samples": 320}, "rounds": 2}
            content["optimizer"] = {**content["optimizer"], "warmup_rounds": 0}
        key = json.dumps(content, sort_keys=True)
        if key not in self._kept:
            self._kept[key] = measured(content)
            sys.stderr.write(f"{key} {self._kept[key]}\n")
            if self.keep is not None:
                self.keep.parent.mkdir(parents=True, exist_ok=True)
                with self.keep.open("a") as file:
                    file.write(json.dumps({"experiment": key, "figures": self._kept[key]}) + "\n")
        return self._kept[key]

    def choose(self, row: Row, setting: Setting, choice: dict[str, float]) -> dict[str, float]:
        """A row's choice, given what it takes from another's."""
        choice = {**choice, **{walk.key: walk.start for walk in row.walks}}
        for walk in () if self.quick else row.walks:
            choice = self.walked(row, setting, choice, walk)
        return choice

    def walked(self, row: Row, setting: Setting, choice: dict[str, float], walk: Walk) -> dict[str, float]:
        """The choice with one number of it replaced by the best for the sites' own models on validation rows."""

        def score(step: int) -> float:
            tried = {**choice, walk.key: walk.at(step)}
            return self.figures(row.experiment(setting, CHOICE_SEED, tried, VALIDATION))[OWN]

        step = 0
        while (best := max((step, step - 1, step + 1), key=score)) != step:
            step = best
        return {**choice, walk.key: walk.at(step)}

    def table(self, rows: Sequence[Row], setting: Setting) -> list[dict[str, Any]]:
        """Each row's choice and figures, for every seed."""
        lines: list[dict[str, Any]] = []
        for row in rows:
            taken = next((line["choice"] for line in lines if line["label"] == row.choice_of), {})
            choice = self.choose(row, setting, taken)
            seeds = [self.figures(row.experiment(setting, seed, choice)) for seed in self.seeds]
            lines.append({"label": row.label, "topology": row.topology, "alpha": setting.alpha, "choice": choice, "seeds": seeds})
        return lines


def measured(content: dict[str, Any]) -> Figures:
    """One run's figures; every site's own model is measured on all sites' test (or validation) rows together."""
    with tempfile.TemporaryDirectory() as folder:
        run = p2pfl.simulate(content, out=Path(folder) / "run")
        models, summary, experiment = run.models, run.summary, run.experiment
    task = load_sites(experiment)
    tests = [site.test for site in task.sites if site.test is not None]
    inputs, targets = (torch.cat([rows[axis] for rows in tests]) for axis in (0, 1))
    model, own = build_model(task, torch.float32, experiment.seed).eval(), []
    for x_P in models.values():
        load_parameters(model, x_P)
        with torch.no_grad():
            own.append(float((model(inputs).argmax(dim=1) == targets).double().mean()))
    mean_model = summary["mean_model"]["accuracy"] or 0.0  # none where models are not finite
    return [mean_model, statistics.fmean(own), min(own), summary["relative_consensus"] or 0.0, summary["bytes_sent"] / 1e6]


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """Mean and sample standard deviation over the seeds; bytes also as a share of the first row's."""
    head = ["algorithm", "topology", "chosen", *COLUMNS, "of the first row's"]
    table = [head, ["---"] * len(head)]
    for line in lines:
        columns = list(zip(*line["seeds"], strict=True))
        spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
        figures = [f"{statistics.fmean(column):.4f} ± {s:.4f}" for column, s in zip(columns[:-1], spread[:-1], strict=True)]
        share = columns[-1][0] / lines[0]["seeds"][0][-1]
        chosen = ", ".join(f"{key.split('.')[1]} {value:g}" for key, value in line["choice"].items())
        table.append([line["label"], line["topology"], chosen, *figures, f"{columns[-1][0]:.1f}", f"{share:.4f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def main() -> None:
    """Read the command line, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a file that keeps every run, and is read first; remove it to measure afresh")
    parser.add_argument("--quick", action="store_true", help="two rounds on 320 images, one seed, nothing chosen")
    parser.add_argument("--json", action="store_true", help="all figures, by seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    bench = Bench(arguments.keep, arguments.quick)
    found = []
    for rows, setting in ((GRAPH_ROWS, FEW_EXCHANGES), (BYTES_ROWS, MANY_EXCHANGES)):
        lines = bench.table(rows, setting)
        found.append({"setting": vars(setting), "columns": COLUMNS, "lines": lines})
        if not arguments.json:
            said = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in vars(setting).items())
            print(f"{NODES} sites, {SAMPLES} images, {said}; seeds {[*bench.seeds]}\n\n{markdown(lines)}\n", flush=True)
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
