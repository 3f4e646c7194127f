"""A site's log of releases between institutions: over restarts and studies, and nothing is released where it refuses."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
from study_tables import changed, made, write_study
from test_own_analysis import LOGISTIC, Institutions

from commands import run_here
from p2pfl.analyses.policy import RefusedByPolicy
from p2pfl.analyses.release_log import ReleaseLog
from p2pfl.errors import ConfigError
from p2pfl.experiment.loading import load_study
from p2pfl.node.own_analysis import analyse_together
from p2pfl.node.own_sums import memory_of
from p2pfl.node.site import SiteFile
from p2pfl.node.sum_store import SumFolder

AGE = {**LOGISTIC, "formula": "died ~ age"}
DOSE = {**LOGISTIC, "formula": "died ~ age + dose"}
REFUSED = "node-1: refused by policy"


@pytest.fixture
def institutions(tmp_path):
    """Three members; one patient of node-1 has no dose."""
    with ExitStack() as stack:
        found = Institutions(tmp_path, stack)
        write_study(tmp_path, changed(made(num_sites=3), dose=lambda row, place: "" if place == 4 else row["dose"]))
        for place, site in enumerate(found.sites):
            (tmp_path / f"site-{place}.csv").replace(site.with_name("registry.csv"))
        yield found


def log_of(institutions, place):
    keys = SiteFile.load(institutions.sites[place]).keys
    return ReleaseLog.beside(keys).look().analyses


def in_a_second_study(institutions):
    """The same members confirm another study."""
    path = institutions.folder / "study.yaml"
    study = load_study(path)
    other = replace(study, experiment={**study.experiment, "rounds": study.experiment["rounds"] + 1})
    assert other.digest != study.digest
    other.save(institutions.folder / "second.yaml")
    for place in range(3):
        institutions.change(place, study="../../second.yaml", confirmed=other.digest)
    return study.digest, other.digest


def test_one_patient_is_not_told_apart_in_the_next_study_either(institutions, caplog, monkeypatch, capfd):
    age, dose = institutions.written(AGE), institutions.written(DOSE, "dose.yaml")
    assert [each.counts.num_patients for each in institutions.found(age)] == [240] * 3
    first, second = in_a_second_study(institutions)
    num_totals = institutions.num_totals()
    found = institutions.found(dose)

    assert isinstance(found[1], RefusedByPolicy)
    assert str(found[1]) == REFUSED
    said = "node-1: gives no numbers to glm; died ~ 1 + age + dose; binomial: patients and rows: there is no result"
    assert [str(each) for each in found[::2]] == [said] * 2
    assert {type(each) for each in found[::2]} == {ConfigError}
    assert "node-1 refuses: policy.patients_per_cell = 5: with what was released before, fewer than 5 patients" in caplog.text
    assert institutions.num_totals() == num_totals
    assert [each.study for each in log_of(institutions, 1)] == [first]
    code, out, err = run_here("stats", "released", institutions.sites[1], monkeypatch=monkeypatch, capfd=capfd)
    assert (code, err) == (0, "")
    assert f"study {first[:8]}: 80 patients, " in out

    assert [each.counts.num_patients for each in institutions.found(age)] == [240] * 3
    assert [each.study for each in log_of(institutions, 1)] == [first, second]


@pytest.mark.slow
def test_a_log_that_is_gone_or_older_ends_the_analysis_before_anybody_hears_of_it(institutions):
    log = SiteFile.load(institutions.sites[1]).keys.with_name("releases") / "log.jsonl"
    institutions.found(institutions.written(AGE))
    whole = log.read_bytes()
    for content in (None, b"", b"".join(whole.splitlines(keepends=True)[:-1])):
        log.unlink()
        if content is not None:
            log.write_bytes(content)
            log.chmod(0o600)
        with pytest.raises(ConfigError, match="restore the log and its key from their newest backup"):
            analyse_together(institutions.written(DOSE, "dose.yaml"), institutions.sites[1])
        log.write_bytes(whole)


@pytest.mark.slow
def test_a_site_that_its_neighbours_know_to_be_restored_from_a_backup_answers_nothing(institutions, caplog):
    with SumFolder(memory_of(SiteFile.load(institutions.sites[2]))) as folder:
        folder.append_block("5a" * 32, 0)
    found = institutions.found(institutions.written(AGE))

    assert str(found[2]) == "node-2: refused by policy"
    assert {type(each) for each in found[:2]} == {ConfigError}
    assert (
        "node-2 refuses: this site was restored from a backup, and its log of releases may lack what it has released since" in caplog.text
    )
    assert institutions.num_totals() == 0
