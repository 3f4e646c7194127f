"""Heart disease at four hospitals, FLamby's protocol and budget: every figure of ours in docs/heart-disease.md.

    P2PFL_DATA=... python benchmarks/heart_disease.py            # the table, as Markdown; --json for machines
    P2PFL_DATA=... python benchmarks/heart_disease.py --choose   # the choice of hyper-parameters again, on validation rows only
    P2PFL_DATA=... python benchmarks/heart_disease.py --both     # the choice by the worse of the two margins, protocol to the letter

The table comes from `p2pfl.simulate`, one run a row and seed. The choice trains all settings at once in one tensor, because 6,000 runs
would take hours, and then runs each winner through `p2pfl.simulate` on the same validation rows, to show that both say the same.

Shapes: C settings, N trained models of one setting, T steps, B examples in a batch, P parameters.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import p2pfl
from p2pfl.draws import batch_positions
from p2pfl.experiment.loading import load_experiment, resolve
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.experiment.spec import Experiment
from p2pfl.params import parameters_of
from p2pfl.tasks import Site

EXAMPLE = Path(__file__).parent.parent / "examples" / "heart_disease.yaml"
SEEDS = range(42, 47)
CHOICE_SEEDS = range(1000, 1100)  # each draws its validation rows and its batches; five draws would leave the choice to luck
CHECKED_SEEDS = CHOICE_SEEDS[:5]  # of the winners, through p2pfl.simulate
VALIDATION = 0.25
TEST_ROWS = {"cleveland": 104, "hungary": 89, "switzerland": 16, "va": 45}
POOLED_NODE = 2**32 - 1  # whose data stream the pooled baseline draws from
METRICS = ("accuracy", "balanced_accuracy", "auroc")
TARGETS = (0.745, 0.825)  # accuracy, AUROC
TO_ONE_MODEL = {"relative_consensus": 1e-3, "patience": 3, "settle": 200}

Figures = dict[str, dict[str, float | None]]
"""Metric to hospital to value; None where it is undefined."""

Line = dict[str, tuple[float, float]]
"""Mean and sample standard deviation over the seeds, by column."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: whose models, and what they train with."""

    label: str
    standardise: str = "pooled"
    models: str = "network"
    """network | local | pooled"""
    mixing_only: int | None = 0
    """Rounds without training that follow; None: until the hospitals agree on one model."""
    setting: dict[str, Any] | None = None
    """Optimiser and weighting chosen for this row; None: the example's."""

    def experiment(self, seed: int, *, validation: float = 0.0, chosen: dict[str, Any] | None = None) -> Experiment:
        """What `p2pfl.simulate` is given."""
        stop = TO_ONE_MODEL
        if self.mixing_only is not None:  # an agreement so close is not reached, so that all these rounds are run
            stop = {"relative_consensus": 1e-9, "patience": 1, "settle": self.mixing_only}
        return resolve(
            load_experiment(EXAMPLE),
            {
                **(chosen or self.setting or {}),
                "task.standardise": self.standardise,
                "stop": None if self.mixing_only == 0 else stop,
                "validation": validation,
                "baselines": [] if self.models == "network" else [self.models],
                "evaluate_every": 1000,
                "checkpoint_every": 1000,
                "seed": seed,
            },
        )


def setting(weighting: str = "uniform", **optimizer: Any) -> dict[str, Any]:
    """An optimiser, whole, so that nothing of the example's stays."""
    default = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "clip_norm": None}
    return {"optimizer": default | optimizer, "weighting": weighting}


# chosen by (accuracy + AUROC) / 2 on validation rows: `--choose` finds them again; rows that train alike stand together
CHOSEN_ROWS = (
    Row(label="network, agreed scale"),
    Row(label="network, agreed scale, settled", mixing_only=None, setting=setting("samples", name="adam", lr=0.01, weight_decay=0.3)),
    Row(label="network", standardise="site", setting=setting(lr=0.01, momentum=0.9, weight_decay=0.1)),
    Row(
        label="network, settled",
        standardise="site",
        mixing_only=None,
        setting=setting(lr=0.001, momentum=0.9, weight_decay=1.0, clip_norm=1.0),
    ),
    Row(
        label="alone",
        standardise="site",
        models="local",
        setting=setting(lr=0.1, weight_decay=0.1, schedule="linear", clip_norm=1.0),
    ),
    Row(label="pooled", standardise="site", models="pooled", setting=setting(name="adam", lr=0.01, weight_decay=1.0)),
    Row(label="pooled, agreed scale", models="pooled", setting=setting(lr=0.0003, momentum=0.9, weight_decay=1.0)),
    Row(label="alone, agreed scale", models="local", setting=setting(name="adam", lr=0.001, weight_decay=0.3)),
)
ROWS = (
    *CHOSEN_ROWS,
    # chosen by the worse of the two margins: `--both` finds it again
    Row(
        label="network, for both targets",
        standardise="site",
        setting=setting(name="adam", lr=0.01, weight_decay=3.0, schedule="linear"),
    ),
    Row(label="alone, setting of the network, agreed scale", models="local"),
    Row(label="pooled, setting of the network, agreed scale", models="pooled"),
)
MIXING_ONLY_ROWS = tuple(  # chosen for, never in the table
    Row(label=f"network, mixing-only rounds: {s}", standardise="site", mixing_only=s) for s in (1, 2, 3, 5, 10)
)


def grid(models: str) -> list[dict[str, Any]]:
    """All settings, in the order in which ties are broken: the first of the best is taken."""
    decays = (0.0, 1e-3, 1e-2, 3e-2, 1e-1, 0.3, 1.0, 3.0)
    families = [("sgd", 0.0, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)), ("sgd", 0.9, (3e-4, 1e-3, 3e-3, 1e-2))]
    adam = ("adam", 0.0, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2))
    settings = []
    for schedule, clip, weighting, decay in itertools.product(
        ("constant", "linear", "cosine"),
        (None, 1.0),
        ("uniform", "samples") if models == "network" else ("uniform",),
        decays,
    ):
        for name, momentum, rates in [*families, *([adam] if clip is None else [])]:
            for lr in rates:
                optimizer = {"name": name, "lr": lr, "momentum": momentum, "weight_decay": decay, "schedule": schedule, "clip_norm": clip}
                settings.append({"optimizer": optimizer, "weighting": weighting})
    return settings


def trained(row: Row, settings: list[dict[str, Any]], seed: int, validation: float) -> tuple[Tensor, Tensor, list[Site]]:
    """All settings after the last training round, (C, N, P), the mixing matrix, and the hospitals with what they are scored on."""
    base = row.experiment(seed, validation=validation, chosen=settings[0])
    plan = make_plan(base, load_sites(base))
    sites = [plan.sites[name] for name in plan.names]
    recipe = plan.recipe
    specs = [resolve(base, s).optimizer for s in settings]
    trains = [site.train for site in sites if site.train is not None]
    nodes = torch.arange(len(sites))
    mixing_NN = torch.eye(len(sites))
    if row.models == "pooled":
        trains = [(torch.cat([x for x, _ in trains]), torch.cat([y for _, y in trains]))]
        nodes, mixing_NN = torch.tensor([POOLED_NODE]), torch.eye(1)
    elif row.models == "network":
        mixing_NN = torch.from_numpy(plan.topology.mixing_matrix().toarray()).float()
    sizes_N = torch.tensor([len(x) for x, _ in trains])
    positions_NTB = batch_positions(seed, nodes, sizes_N, 0, recipe.rounds * recipe.local_steps, recipe.batch_size)
    inputs = torch.stack([x[p] for (x, _), p in zip(trains, positions_NTB, strict=True)])
    inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)  # the last parameter is the bias
    targets_NTB = torch.stack([y[p][..., 0] for (_, y), p in zip(trains, positions_NTB, strict=True)])

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values)[:, None, None]

    momentum, decay = column([s.momentum for s in specs]), column([s.weight_decay for s in specs])
    clip, is_adam = column([s.clip_norm or torch.inf for s in specs]), column([s.name == "adam" for s in specs])
    by_samples_N = sizes_N / sizes_N.float().mean()
    scale_CN1 = torch.stack([by_samples_N if s["weighting"] == "samples" else torch.ones(len(nodes)) for s in settings])[..., None]
    x_CNP = parameters_of(plan.model).expand(len(settings), len(nodes), -1).clone()
    buffer, first, second = (torch.zeros_like(x_CNP) for _ in range(3))
    step = 0
    for number in range(recipe.rounds):
        lr = column([s.lr_at(number, recipe.rounds) for s in specs])
        for _ in range(recipe.local_steps):
            batch, target = inputs[:, step], targets_NTB[:, step]
            error = torch.sigmoid(torch.einsum("cnp,nbp->cnb", x_CNP, batch)) - target
            gradient = torch.einsum("cnb,nbp->cnp", error, batch) / recipe.batch_size * scale_CN1
            norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
            gradient = torch.where(norm > clip, gradient * (clip / norm), gradient) + decay * x_CNP
            step += 1
            buffer = momentum * buffer + gradient
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            adam = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            x_CNP = x_CNP - lr * torch.where(is_adam, adam, buffer)
        x_CNP = torch.einsum("ij,cjp->cip", mixing_NN, x_CNP)
    return x_CNP, mixing_NN, sites


def scores(x_CNP: Tensor, sites: list[Site]) -> np.ndarray:
    """Accuracy and AUROC, means over the hospitals that have them, (C, 2); one model for all where N is 1."""
    found = np.full((len(x_CNP), 2, len(sites)), np.nan)
    for i, site in enumerate(sites):
        assert site.test is not None
        inputs, positive = site.test[0].double(), site.test[1][:, 0] > 0
        x_CP = x_CNP[:, i if x_CNP.shape[1] > 1 else 0].double()
        logits = inputs @ x_CP[:, :-1].T + x_CP[:, -1]
        found[:, 0, i] = ((logits > 0) == positive[:, None]).double().mean(0)
        if 0 < positive.sum() < len(positive):
            ahead = logits[positive][:, None] - logits[~positive][None]
            found[:, 1, i] = ((ahead > 0).double() + 0.5 * (ahead == 0)).mean((0, 1))
    return np.asarray(np.nanmean(found, axis=-1))


def validated(rows: list[Row], settings: list[dict[str, Any]]) -> np.ndarray:
    """Accuracy and AUROC on validation rows of rows that train alike, by row, seed and setting, (R, S, C, 2)."""
    found = np.zeros((len(rows), len(CHOICE_SEEDS), len(settings), 2))
    for s, seed in enumerate(CHOICE_SEEDS):
        x_CNP, mixing_NN, sites = trained(rows[0], settings, seed, VALIDATION)
        for r, row in enumerate(rows):
            if row.mixing_only is None:
                mixed_CNP = x_CNP.mean(1, keepdim=True)
            else:
                mixed_CNP = torch.einsum("ij,cjp->cip", torch.linalg.matrix_power(mixing_NN, row.mixing_only), x_CNP)
            found[r, s] = scores(mixed_CNP, sites)
    return found


def best_settings(rows: list[Row]) -> list[tuple[dict[str, Any], np.ndarray]]:
    """For each of rows that train alike, the setting with the largest (accuracy + AUROC) / 2 on validation rows; both by seed, (S, 2)."""
    settings = grid(rows[0].models)
    found = validated(rows, settings)
    best = found.mean(axis=(1, 3)).argmax(axis=-1)
    return [(settings[b], found[r, :, b]) for r, b in enumerate(best)]


def best_for_both() -> dict[str, Any]:
    """Mixing-only rounds and setting with the largest of min(accuracy - .745, AUROC - .825) on validation rows, protocol to the letter.

    Of equals the one with the fewest mixing-only rounds, then the first of the grid.
    """
    every_number = (0, *(row.mixing_only for row in MIXING_ONLY_ROWS), None)
    rows = [Row(label=f"mixing-only rounds: {s}", standardise="site", mixing_only=s) for s in every_number]
    settings = grid("network")
    means_RC2 = validated(rows, settings).mean(axis=1)
    margins_RC = (means_RC2 - TARGETS).min(axis=-1)
    table = []
    for row, margins_C, means_C2 in zip(rows, margins_RC, means_RC2, strict=True):
        c = int(margins_C.argmax())
        accuracy, auroc = means_C2[c].tolist()
        table.append(
            {"mixing_only_rounds": row.mixing_only, "setting": settings[c], "accuracy": accuracy, "auroc": auroc, "margin": margins_C[c]}
        )
    return {"chosen": max(table, key=lambda line: line["margin"]), "best_of_each": table}


def measured(row: Row, seed: int, validation: float = 0.0) -> Figures:
    """Each hospital's figures by metric, from one run of `p2pfl.simulate`."""
    with tempfile.TemporaryDirectory() as folder:
        summary = p2pfl.simulate(row.experiment(seed, validation=validation), out=Path(folder) / "run").summary
    metrics = summary["metrics"] if row.models == "network" else summary["baselines"][row.models]
    return {name: metrics[name]["per_node"] for name in METRICS}


def columns(figures: Figures) -> dict[str, float]:
    """One seed's line: figures by hospital, means over the hospitals that have them, and accuracy over all patients."""
    defined = {name: {node: v for node, v in figures[name].items() if v is not None} for name in METRICS}
    accuracies, aurocs = defined["accuracy"], defined["auroc"]
    means = {name.replace("_", " "): statistics.fmean(values.values()) for name, values in defined.items()}
    everybody = statistics.fmean(accuracies.values(), [TEST_ROWS[node] for node in accuracies])
    return accuracies | means | {"all patients": everybody} | {f"auroc {node}": value for node, value in aurocs.items()}


def line(row: Row, seeds: range = SEEDS, validation: float = 0.0) -> Line:
    """Mean and sample standard deviation over the seeds, by column."""
    found = [columns(measured(row, seed, validation)) for seed in seeds]
    return {key: (statistics.fmean(f[key] for f in found), statistics.stdev(f[key] for f in found)) for key in found[0]}


def markdown(lines: dict[str, Line]) -> str:
    """The two tables of ours in docs/heart-disease.md."""
    every_key = list(next(iter(lines.values())))
    tables = []
    for keys in ([k for k in every_key if not k.startswith("auroc ")], [k for k in every_key if k.startswith("auroc ")]):
        rows = [["models", *keys], ["---"] * (len(keys) + 1)]
        rows += [[label, *("{:.4f} ± {:.4f}".format(*found[key]) for key in keys)] for label, found in lines.items()]
        tables.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(tables)


def choose_all() -> list[dict[str, Any]]:
    """Every row's choice again, beside what the row has and what `p2pfl.simulate` finds on the same validation rows."""
    found = []

    def data(row: Row) -> tuple[str, str]:
        return row.standardise, row.models

    alike = itertools.groupby(sorted((*MIXING_ONLY_ROWS, *CHOSEN_ROWS), key=data), key=data)
    for rows in (list(group) for _, group in alike):
        for row, (best, scores_S2) in zip(rows, best_settings(rows), strict=True):
            again = line(replace(row, setting=best), CHECKED_SEEDS, VALIDATION)
            accuracy, auroc = scores_S2.mean(axis=0)
            checked = scores_S2[: len(CHECKED_SEEDS)].mean(axis=0)
            found.append(
                {
                    "row": row.label,
                    "chosen": best,
                    "as_in_the_table": resolve(row.experiment(0), best) == row.experiment(0) if row in ROWS else None,
                    "validation": {"accuracy": accuracy, "auroc": auroc},
                    "five_of_the_seeds": {"accuracy": checked[0], "auroc": checked[1]},
                    "five_of_the_seeds_simulated": {"accuracy": again["accuracy"][0], "auroc": again["auroc"][0]},
                }
            )
            print(json.dumps(found[-1]), file=sys.stderr)
    return found


def main() -> None:
    """Read the command line, print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help="choose the hyper-parameters again, on validation rows; prints JSON")
    parser.add_argument("--both", action="store_true", help="choose for both targets at once, protocol to the letter; prints JSON")
    parser.add_argument("--json", action="store_true", help="the table as JSON: mean and sample standard deviation by row and column")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.choose:
        print(json.dumps(choose_all(), indent=2))
        return
    if arguments.both:
        print(json.dumps(best_for_both(), indent=2))
        return
    lines: dict[str, Line] = {}
    for row in ROWS:
        lines[row.label] = line(row)
        print(row.label, json.dumps(lines[row.label]), file=sys.stderr)
    print(json.dumps(lines, indent=2) if arguments.json else markdown(lines))


if __name__ == "__main__":
    main()
