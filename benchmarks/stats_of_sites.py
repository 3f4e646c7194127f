"""What a logistic regression over simulated sites costs in seconds: a million rows, 50 sites, 20 variables, reading excluded.

    python benchmarks/stats_of_sites.py [--rows 1000000] [--sites 50] [--variables 20]

Rows are made from a seed, as tables that have been read and checked. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from p2pfl.analyses import stats
from p2pfl.analyses.site_files import AnalysisSite
from p2pfl.data.check import CheckedTable
from p2pfl.data.contract import Contract


def contract(num_variables: int) -> Contract:
    """A contract of numbers, with an outcome of 0 or 1 and one category."""
    numbers = {f"x{k}": {"type": "number", "unit": "1", "range": [-10, 10]} for k in range(num_variables - 1)}
    variables = {
        "patient": {"type": "id"},
        **numbers,
        "sex": {"type": "category", "categories": ["female", "male"]},
        "died": {"type": "integer", "unit": "1", "range": [0, 1]},
    }
    return Contract.from_mapping({"name": "benchmark", "patient": "patient", "outcome": "died", "variables": variables}, "benchmark")


def sites(agreed: Contract, num_rows: int, num_sites: int, num_variables: int) -> list[AnalysisSite]:
    """Tables of all sites."""
    random = np.random.default_rng(1)
    found = []
    for site in range(num_sites):
        size = num_rows // num_sites
        columns_MP = np.clip(random.normal(size=(size, num_variables - 1)), -10, 10)
        is_male = random.random(size) < 0.5  # noqa: PLR2004
        eta = columns_MP @ np.linspace(-0.5, 0.5, num_variables - 1) + 0.3 * is_male - 1
        died = (random.random(size) < 1 / (1 + np.exp(-eta))) * 1.0
        patients = tuple(f"{site}-{row}" for row in range(size))
        columns = {f"x{k}": columns_MP[:, k].copy() for k in range(num_variables - 1)}
        sex = tuple(np.where(is_male, "male", "female").tolist())
        table = CheckedTable(
            columns={**columns, "patient": patients, "sex": sex, "died": died},
            levels=agreed.levels,
            patients=patients,
            lines=tuple(range(2, size + 2)),
        )
        found.append(AnalysisSite(name=f"site-{site}", table=table))
    return found


def main() -> None:
    """Fit the model and print seconds and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--sites", type=int, default=50)
    parser.add_argument("--variables", type=int, default=20)
    asked = parser.parse_args()
    agreed = contract(asked.variables)
    tables = sites(agreed, asked.rows, asked.sites, asked.variables)
    formula = "died ~ " + " + ".join(["sex", *(f"x{k}" for k in range(asked.variables - 1))])
    start_s, cpu_s = time.perf_counter(), time.process_time()
    fit = stats.glm(formula, family="binomial", contract=agreed, sites=tables)
    took_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
    print(f"{asked.rows:,} rows, {asked.sites} sites, {asked.variables} variables: {took_s:.1f} s, {cpu_s:.1f} s of processor")
    print(f"{fit.fit.iterations} iterations, at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
