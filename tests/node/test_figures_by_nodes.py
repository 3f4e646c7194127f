"""Published figures of pooled rows by secure sums between nodes: on any graph, and though one of them is killed and comes back."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack

import networkx as nx
import pytest
from pooled_fits import assert_pooled
from study_tables import ANY, cnsim, infections, lung, stays, write_study
from sum_clinics import SumClinics
from test_exact_figures import COX, FIRST, GLM, LUNG, MERGED, STAYS
from test_sum_node import HOUR_S, with_one_killed

from commands import start_command
from networks import averaging
from p2pfl.analyses.floors import at_sites
from p2pfl.analyses.run import conversation, run_analysis
from p2pfl.analyses.site_files import load_sites
from p2pfl.analyses.spec import AnalysisSpec
from p2pfl.analyses.sum_plan import planned_sums
from p2pfl.data.contract import Contract
from p2pfl.launcher.founding import found_network
from p2pfl.node.own_sums import memory_of
from p2pfl.node.site import SiteFile
from p2pfl.yaml_files import dump_yaml, load_yaml
from virtual_time import run_virtually

pytestmark = pytest.mark.slow

LAST_DIGIT = 1.1e-10
LAST_DIGITS_OF_DIABETES = 6e-10
DEADLINE_S = 60.0


class Asked:
    """Analyses of one study, one after the other in one plan, with the rows of each site."""

    def __init__(self, folder, study, analyses, policy):
        contract, sites = write_study(folder, study(), policy=policy)
        self.contract = Contract.load(contract)
        self.specs = [AnalysisSpec.from_mapping({**each, **(policy or {})}) for each in analyses]
        self.sites = load_sites(sites, self.contract)
        for spec in self.specs:
            spec.check(self.contract)
            assert [[*site.policy.refusals(spec, self.contract)] for site in self.sites] == [[]] * len(self.sites)

    @property
    def sums(self):
        return tuple(each for spec in self.specs for each in planned_sums(spec, self.contract))

    def rows(self):
        rows_of = [conversation(spec, self.contract)[1] for spec in self.specs]
        return [[of(site.table) for of in rows_of] for site in self.sites]

    def all_of_them(self):
        results = []
        for place, spec in enumerate(self.specs):
            results.append((yield from at_sites(conversation(spec, self.contract)[0], lambda site, place=place: site[place])))
        return results

    def by_nodes(self, folder, graph, *, killed, after):
        """Results that all nodes have, of which one was killed in the middle; they are those of simulated sites, bit for bit."""
        clinics = SumClinics(folder, graph, sums=self.sums, analysis=self.all_of_them, rows=self.rows(), presence_s=0.5)
        found = run_virtually(with_one_killed(clinics, killed, after), seed=killed, at_most_s=HOUR_S, work_s=(0.0005, 0.005))
        simulated = [json.dumps(run_analysis(spec, self.contract, self.sites).as_dict()) for spec in self.specs]

        assert [[json.dumps(each.as_dict()) for each in results] for results in found] == [simulated] * len(graph)
        return found[0]


def assert_published(found, name):
    _, _, family, params, errors, others = GLM[name]
    last_digit = LAST_DIGITS_OF_DIABETES if name == "diabetes" else LAST_DIGIT

    assert found.spec.family == family
    assert found.params == pytest.approx(params, rel=0, abs=last_digit)
    assert found.bse == pytest.approx(errors, rel=0, abs=last_digit)
    assert {key: getattr(found.fit, key) for key in others} == pytest.approx(others, rel=3e-12)
    assert_pooled(found, name)


def assert_published_cox(found, name, pooled):
    _, _, _, _, log_likelihood, params, errors = COX[name]

    assert found.fit.log_likelihood == pytest.approx(log_likelihood, rel=0, abs=LAST_DIGIT)
    assert found.params == pytest.approx(params, rel=0, abs=LAST_DIGIT)
    assert found.bse == pytest.approx(errors, rel=0, abs=LAST_DIGIT)
    if pooled is not None:
        assert_pooled(found, pooled)


def glm(name):
    _, formula, family, *_ = GLM[name]
    return {"kind": "glm", "formula": formula, "family": family}


def test_regressions_of_three_studies(tmp_path):
    asked = Asked(tmp_path, cnsim, [glm("lipids"), glm("diabetes")], policy=None)
    found = asked.by_nodes(tmp_path, nx.path_graph(3), killed=1, after=7)

    assert_published(found[0], "lipids")
    assert_published(found[1], "diabetes")


def test_regressions_and_a_meta_analysis_of_stays(tmp_path):
    meta = {"kind": "compare", "formula": STAYS, "family": "gaussian", "coefficient": "sexM"}
    asked = Asked(tmp_path, stays, [glm("stays"), glm("stays, poisson"), meta], policy=None)
    *models, meta = asked.by_nodes(tmp_path, nx.cycle_graph(3), killed=0, after=9)

    for found, name in zip(models, ("stays", "stays, poisson"), strict=True):
        assert_published(found, name)
    found = meta.meta
    assert (found.fixed, found.fixed_bse) == pytest.approx((0.4347091192, 0.2559161448), rel=0, abs=LAST_DIGIT)
    assert (found.q, found.q_pvalue, found.i_squared) == pytest.approx((3.0054989535, 0.2225175116, 0.3345530872), rel=0, abs=LAST_DIGIT)
    assert (found.tau_squared, found.random, found.random_bse) == pytest.approx(
        (0.1132093677, 0.4174883829, 0.3328704344), rel=0, abs=LAST_DIGIT
    )


GRAPHS = {"path": nx.path_graph(13), "star": nx.star_graph(12), "random": nx.gnp_random_graph(13, 0.18, seed=21)}


@pytest.mark.parametrize(("graph", "killed"), [("path", 6), ("star", 0)])
def test_infections_at_thirteen_hospitals(graph, killed, tmp_path):
    found = Asked(tmp_path, infections, [glm("infections")], policy=None).by_nodes(tmp_path, GRAPHS[graph], killed=killed, after=5)

    assert_published(found[0], "infections")


def test_infections_and_the_first_ones_at_thirteen_hospitals_of_a_random_graph(tmp_path):
    by_treatment = {"kind": "compare", "formula": "Surv(time, event) ~ treat"}
    survival = [{"kind": "cox", "formula": FIRST, "grid": 1}, {"kind": "cox", "formula": FIRST}, {**by_treatment, "grid": 1}, by_treatment]
    asked = Asked(tmp_path, infections, [glm("infections"), *survival], policy=ANY)
    assert nx.is_connected(GRAPHS["random"])
    regression, *found = asked.by_nodes(tmp_path, GRAPHS["random"], killed=3, after=15)

    assert_published(regression, "infections")
    assert_published_cox(found[0], "infections", "first infection")
    assert_published_cox(found[1], "infections, by site", "first infection, by site")
    assert [each.test.statistic for each in found[2:]] == pytest.approx([11.7425108689, 12.2422776285], rel=0, abs=LAST_DIGIT)
    assert [each.test.pvalue for each in found[2:]] == pytest.approx([6.108855e-4, 4.671877e-4], rel=1e-6)


def test_one_baseline_for_lung_cancer_on_grids(tmp_path):
    names = ["lung", "lung, breslow", "lung, 30 days", "lung, 30 days, breslow"]
    asked = [{"kind": "cox", "formula": LUNG, **COX[name][2]} for name in names]
    found = Asked(tmp_path, lung, asked, policy=ANY).by_nodes(tmp_path, nx.path_graph(3), killed=1, after=20)

    for name, each in zip(names, found, strict=True):
        assert_published_cox(each, name, None if "breslow" in name else name)


def test_one_baseline_for_lung_cancer_under_the_default_floors(tmp_path):
    asked = [{"kind": "cox", "formula": LUNG, "ends": MERGED}, {"kind": "cox", "formula": LUNG, "grid": 30}]
    found, merged = Asked(tmp_path, lung, asked, policy=None).by_nodes(tmp_path, nx.path_graph(3), killed=2, after=10)

    assert_published_cox(found, "lung, wide cells", "lung, wide cells")
    assert (len(merged.cells.ends_T), merged.cells.num_agreed) == (12, 35)


def test_survival_with_lung_cancer(tmp_path):
    days = {"formula": "Surv(time, status) ~ sex", "grid": 1}
    asked = [{"kind": "cox", "formula": LUNG}, {"kind": "km", **days, "formula": "Surv(time, status) ~ 1"}, {"kind": "compare", **days}]
    model, curves, log_rank = Asked(tmp_path, lung, asked, policy=ANY).by_nodes(tmp_path, nx.star_graph(2), killed=2, after=6)

    assert_published_cox(model, "lung, by site", "lung, by site")
    whole = curves.curves["all"]
    assert whole.median() == 310
    assert [whole.at(time) for time in (100, 200, 365, 730)] == pytest.approx(
        [0.8639689676, 0.6802728622, 0.4092416245, 0.1156930983], rel=0, abs=LAST_DIGIT
    )
    assert log_rank.test.statistic == pytest.approx(10.3267419549, rel=0, abs=LAST_DIGIT)
    assert log_rank.test.pvalue == pytest.approx(0.0013111645, rel=1e-6)


def start_member(folder, site):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return start_command("stats", "together", folder / "analysis.yaml", site, "--json", cwd=folder, env=environment)


def test_stays_by_processes_of_which_one_is_killed(tmp_path):
    contract, own = write_study(tmp_path, stays())
    with ExitStack() as stack:
        study = found_network(averaging({"name": "path"}, 3), tmp_path, stack, {})
    sites = [tmp_path / "sites" / name / "site.yaml" for name in study.names]
    for site, table in zip(sites, own, strict=True):
        site.write_text(dump_yaml({**load_yaml(site), "table": {"file": str(table.with_suffix(".csv"))}}))
    (tmp_path / "analysis.yaml").write_text(dump_yaml({**glm("stays, poisson"), "contract": contract.name}))
    log = memory_of(SiteFile.load(sites[1])) / "log.jsonl"
    running = [start_member(tmp_path, site) for site in sites]
    try:
        until_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < until_s and not (log.exists() and log.read_bytes().count(b'"kind":"sent"') >= 4):
            time.sleep(0.002)
        running[1].kill()
        running[1].communicate()
        running[1] = start_member(tmp_path, sites[1])
        said = [each.communicate(timeout=DEADLINE_S) for each in running]
    finally:
        for each in running:
            each.kill()
            each.wait()

    assert [each.returncode for each in running] == [0] * 3, said
    agreed = Contract.load(contract)
    expected = run_analysis(AnalysisSpec.from_mapping(glm("stays, poisson")), agreed, load_sites(sites, agreed))
    assert [json.loads(out) for out, _ in said] == [json.loads(json.dumps(expected.as_dict()))] * 3
    assert_published(expected, "stays, poisson")
