"""Seconds of a Newton iteration by secure sums: ``python benchmarks/newton_iterations.py [--members 8] [--graph ring]``.

Each member is a process of its own, with its own keys, rows and files, and links with CURVE on loopback. All fit one logistic regression.
An iteration is timed at each member from one request for its numbers to the next one. A total has then gone round, and all have signed it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from p2pfl.analyses.leading import STATISTICS_FORMAT
from p2pfl.experiment.loading import load_study, resolve
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.launcher.founding import found_network
from p2pfl.node.own_sums import analyse_with_others, sum_terms
from p2pfl.node.site import SiteFile
from p2pfl.privacy.planned_sum import PlannedSum
from p2pfl.statistics.families import FAMILIES
from p2pfl.statistics.glm import DesignRows, fit_glm
from p2pfl.statistics.newton import MOST_ITERATIONS
from p2pfl.statistics.scale import INTERCEPT

HOUR_S = 3600.0
_ITERATION = "information, score and deviance, iteration"


def rows_of(place: int, num_rows: int, num_columns: int) -> DesignRows:
    """Rows of one member."""
    draws = np.random.default_rng(place)
    columns_MP = np.column_stack([np.ones(num_rows), draws.normal(size=(num_rows, num_columns - 1))])
    eta = columns_MP @ np.linspace(-0.5, 0.5, num_columns)
    outcomes = (draws.uniform(size=num_rows) < 1 / (1 + np.exp(-eta))).astype(np.float64)
    return DesignRows(columns_MP=columns_MP, outcomes_M=outcomes, offsets_M=np.zeros(num_rows), weights_M=np.ones(num_rows))


def plan_of(num_columns: int) -> tuple[PlannedSum, ...]:
    """Sums of the regression."""
    shapes = {"rows and means": (1 + num_columns,), "squares around the means": (num_columns,)}
    shapes["missing rows and saturated log-likelihood"] = (3,)
    size = num_columns * (num_columns + 1) // 2 + num_columns + 1
    shapes |= {f"{_ITERATION} {each}": (size,) for each in range(MOST_ITERATIONS + 2)}
    return tuple(
        PlannedSum(statistic=f"benchmark: {name}", shape=shape, number_format=STATISTICS_FORMAT, bound=2.0**40)
        for name, shape in shapes.items()
    )


def timed(analysis: Generator[Any, Any, Any], began_s: dict[str, float]) -> Generator[Any, Any, Any]:
    """Lead an analysis and note when each of its sums was asked for."""
    try:
        request = next(analysis)
        while True:
            began_s[request.statistic] = time.perf_counter()
            request = analysis.send((yield request))
    except StopIteration as end:
        began_s["end"] = time.perf_counter()
        return end.value


def member(site: Path, place: int, num_rows: int, num_columns: int) -> None:
    """Take part as one member and print the seconds of each iteration, of the way to the first one, and of the processor."""
    study = load_study(SiteFile.load(site).study)
    terms = sum_terms(study, plan_of(num_columns))
    names = [INTERCEPT, *(f"x{each}" for each in range(1, num_columns))]
    began_s: dict[str, float] = {"start": time.perf_counter()}
    analysis = timed(fit_glm(names, FAMILIES["binomial"]), began_s)
    fit = analyse_with_others(site, study, terms, analysis, rows_of(place, num_rows, num_columns), patience_s=HOUR_S)
    moments = [began_s[key] for key in began_s if key.startswith(_ITERATION) or key == "end"]
    seconds = np.diff(moments).tolist()
    whole = time.perf_counter() - began_s["start"]
    print(json.dumps({"iterations": seconds, "whole": whole, "processor": time.process_time(), "params": fit.params.tolist()}))


def measure(graph: str, num_members: int, num_rows: int, num_columns: int) -> None:
    """Run all members and print one line of the table."""
    experiment = {"task": {"name": "averaging", "dimension": 1}, "nodes": num_members, "topology": {"name": graph}, "rounds": 1}
    resolved = resolve(experiment, {"baselines": []})
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        study = found_network(make_plan(resolved, load_sites(resolved)), Path(folder), stack, {})
        sites = [Path(folder) / "sites" / name / "site.yaml" for name in study.names]
        sizes = ["--rows", str(num_rows), "--columns", str(num_columns)]
        running = [
            subprocess.Popen(  # noqa: S603 - this file itself
                [sys.executable, __file__, "--site", str(site), "--place", str(place), *sizes],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for place, site in enumerate(sites)
        ]
        found = [json.loads(process.communicate()[0]) for process in running]
    assert all(each["params"] == found[0]["params"] for each in found)
    seconds = np.array([each["iterations"] for each in found])
    processor_s = float(np.mean([each["processor"] for each in found]))
    least, median, most = seconds.min(), np.median(seconds), seconds.max()
    print(f"| {graph} | {num_members} | {seconds.shape[1]} | {least:.2f}, {median:.2f}, {most:.2f} | {processor_s:.1f} |", flush=True)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--rows", type=int, default=10_000, help="of each member")
    parser.add_argument("--columns", type=int, default=20)
    parser.add_argument("--graph", action="append")
    parser.add_argument("--site", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.site is not None:
        member(chosen.site, chosen.place, chosen.rows, chosen.columns)
        return
    print("| graph | members | iterations | seconds of one: least, median, most | processor seconds a member, start included |")
    print("| --- | --- | --- | --- | --- |")
    for graph in chosen.graph or ("ring", "path", "star"):
        measure(graph, chosen.members, chosen.rows, chosen.columns)


if __name__ == "__main__":
    main()
