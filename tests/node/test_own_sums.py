"""Secure sums from the files of a site, between processes over encrypted links."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from sum_clinics import planned_regression, regression, rows_of
from unmasked_sums import analyse_in_fixed_point

from networks import averaging
from p2pfl.errors import ConfigError
from p2pfl.experiment.loading import load_study
from p2pfl.launcher.founding import found_network
from p2pfl.node.own_sums import analyse_with_others, memory_of, sum_terms
from p2pfl.node.site import SiteFile

DEADLINE_S = 60.0


@pytest.fixture
def network(tmp_path):
    with ExitStack() as stack:
        yield found_network(averaging({"name": "ring"}, 4), tmp_path, stack, {})


def site_of(folder, name):
    return folder / "sites" / name / "site.yaml"


def started(folder, study, place):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("sum_process.py")
    command = [sys.executable, str(script), str(site_of(folder, study.names[place])), str(place)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def num_sent(folder, study, place):
    log = memory_of(SiteFile.load(site_of(folder, study.names[place]))) / "log.jsonl"
    return log.read_bytes().count(b'"kind":"sent"') if log.exists() else 0


@pytest.mark.slow
def test_processes_have_the_exact_fit_though_one_is_killed(tmp_path, network):
    processes = [started(tmp_path, network, place) for place in range(4)]
    try:
        until_s = time.monotonic() + DEADLINE_S
        while num_sent(tmp_path, network, 2) < 3 and time.monotonic() < until_s and processes[2].poll() is None:
            time.sleep(0.002)
        processes[2].kill()
        processes[2].communicate()
        processes[2] = started(tmp_path, network, 2)
        said = [each.communicate(timeout=DEADLINE_S) for each in processes]
    finally:
        for each in processes:
            each.kill()
            each.wait()
    expected = analyse_in_fixed_point(regression(), rows_of(4), planned_regression())

    assert [each.returncode for each in processes] == [0] * 4, said
    assert {out for out, _ in said} == {f"{expected.params.tobytes().hex()} {expected.covariance_PP.tobytes().hex()}\n"}


def test_terms_follow_from_the_study(network):
    terms = sum_terms(network, planned_regression(), participants=network.names[:3], check=True)

    assert (terms.study, terms.names, terms.participants) == (network.digest, network.names, (0, 1, 2))
    assert terms.identities == tuple(network.member(name).identity for name in network.names)


@pytest.mark.parametrize(("participants", "said"), [(["nobody"], "nobody are no members"), (["node-0", "node-1"], "at least 3")])
def test_participants_that_cannot_be_are_refused(network, participants, said):
    with pytest.raises(ConfigError, match=said):
        sum_terms(network, planned_regression(), participants=participants)


def test_a_study_that_was_not_confirmed_begins_no_sum(tmp_path, network):
    path = site_of(tmp_path, network.names[0])
    terms = sum_terms(network, planned_regression())
    with pytest.raises(ConfigError, match="another digest"):
        analyse_with_others(path, load_study(SiteFile.load(path).study), terms, regression(), rows_of(4)[0], confirmed="0" * 64)

    assert not memory_of(SiteFile.load(path)).exists()
