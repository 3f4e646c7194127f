"""`p2pfl doctor` finds each planted fault, names it and its remedy, and nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from clinics import DEADLINE_S, DIALS, EXAMPLES, LISTENS, OTHER, TASK, BlackHole, Clinics, founded, neighbour

from commands import run_here
from networks import start_process, wait_until
from p2pfl.compiled import loader
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.node.doctor import interview, machine, measuring, rows
from p2pfl.node.doctor.checks import CHECKS, Report, examine
from p2pfl.node.doctor.examination import Examination, findings_of
from p2pfl.node.own_contract import contract_here
from p2pfl.node.site import SiteFile
from p2pfl.node.status import read_status
from p2pfl.transports import resolver
from p2pfl.yaml_files import dump_yaml, load_yaml
from thorough import first_fast
from wire_samples import HELLO


@pytest.fixture(scope="module", autouse=True)
def task_on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))
    sys.modules.pop("custom_task", None)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Iterator[Clinics]:
    with ExitStack() as ports:
        yield founded(tmp_path_factory.mktemp("founded"), ports)


@pytest.fixture
def clinics(original, tmp_path, monkeypatch) -> Clinics:
    """A copy of the two hospitals, for a test to spoil."""
    monkeypatch.setattr(measuring, "HELLO_WITHIN_S", 0.1)
    monkeypatch.setattr(measuring, "QUIET_S", 0.3)
    shutil.copytree(original.place, tmp_path / "two")
    return Clinics(tmp_path / "two")


def examined(site: Path, wait_s: float = 0.0) -> Report:
    return examine(Examination(path=site, wait_s=wait_s))


def one_finding(report: Report, check: str) -> str:
    """The text of the only finding, which is one of this check."""
    assert [name for name, _ in report.findings] == [check], [found.text for _, found in report.findings]
    found = report.findings[0][1]
    assert found.fault
    assert len(found.remedy.split()) >= 3
    return found.text


def test_a_healthy_site_has_no_finding(clinics):
    report = examined(clinics.site(LISTENS))

    assert [found.text for _, found in report.findings] == []
    assert {fact.what for _, fact in report.facts if not fact.is_known} == {
        *(f"{what} {DIALS}" for what in ("edge to", "clock of", "agreement with", "forward pass at")),
        "round",
    }


def test_every_check_has_something_to_say(clinics):
    said = {name for name, _ in examined(clinics.site(LISTENS)).noted}

    assert {check.name for check in CHECKS} - said == {"names", "table"}  # it dials nobody, and has no data contract


# ---- faults at the site itself


def other_keys(clinics: Clinics, patched: pytest.MonkeyPatch) -> None:
    Identity.new().save(clinics.place / "other")
    clinics.set(LISTENS, keys="../other")


def open_key(clinics: Clinics, patched: pytest.MonkeyPatch) -> None:
    (clinics.place / LISTENS / "keys" / "private.pem").chmod(0o644)


def member_twice(clinics: Clinics, patched: pytest.MonkeyPatch) -> None:
    path = clinics.place / "study.yaml"
    study = load_yaml(path)
    path.write_text(dump_yaml({**study, "members": [*study["members"], study["members"][1]]}))


def other_study(clinics: Clinics, patched: pytest.MonkeyPatch) -> None:
    clinics.set(LISTENS, confirmed=OTHER)


def other_torch(clinics: Clinics, patched: pytest.MonkeyPatch) -> None:
    clinics.make_again(lambda study: study.with_result_contract(replace(contract_here(TASK), torch="1.99")))


def other_code(clinics: Clinics, patched: pytest.MonkeyPatch) -> None:
    agreed = contract_here(TASK)
    assert agreed.task is not None
    clinics.make_again(lambda study: study.with_result_contract(replace(agreed, task=replace(agreed.task, source=OTHER))))


def other_layout(clinics: Clinics, patched: pytest.MonkeyPatch) -> None:
    def wider(study: Study) -> Study:
        assert study.layout is not None
        return study.with_layout([{**row.as_dict(), "shape": [7]} if row.name == "bias" else row.as_dict() for row in study.layout])

    clinics.make_again(wider)


def missing_column(clinics: Clinics, patched: pytest.MonkeyPatch) -> None:
    clinics.rewrite(LISTENS, lambda row: {key: value for key, value in row.items() if key != "diabetes"})


def no_number(clinics: Clinics, patched: pytest.MonkeyPatch) -> None:
    clinics.rewrite(LISTENS, lambda row: {**row, "systolic_pressure": "nan" if row["age"] == "53" else row["systolic_pressure"]})


def little_memory(clinics: Clinics, patched: pytest.MonkeyPatch) -> None:
    (clinics.place / "meminfo").write_text("MemTotal: 2000 kB\nMemAvailable:      1000 kB\n")
    patched.setattr(rows, "MEMINFO", clinics.place / "meminfo")


def little_memory_in_a_container(clinics: Clinics, patched: pytest.MonkeyPatch) -> None:
    (clinics.place / "memory.max").write_text("30000000\n")
    (clinics.place / "memory.current").write_text("29000000\n")
    patched.setattr(rows, "CGROUP", clinics.place)


def slow_disk(clinics: Clinics, patched: pytest.MonkeyPatch) -> None:
    seconds = iter(range(1000))
    patched.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))


def no_extra(clinics: Clinics, patched: pytest.MonkeyPatch) -> None:
    clinics.make_again(
        lambda study: Study.from_mapping({**study.as_dict(), "experiment": {**study.experiment, "compiled": "on"}}, "the study")
    )
    for name in [name for name in sys.modules if name.partition(".")[0] in ("numba", "llvmlite") or name.startswith("p2pfl.compiled.")]:
        patched.delitem(sys.modules, name)
    patched.setitem(sys.modules, "numba", None)
    patched.delenv("NUMBA_DISABLE_JIT", raising=False)
    patched.setattr(loader, "_loaded", cache(loader._loaded.__wrapped__))  # it remembers what other tests have loaded


def nothing_to_read(clinics: Clinics, patched: pytest.MonkeyPatch) -> None:
    clinics.set(LISTENS, treads=2)


def entered_by_others(clinics: Clinics, patched: pytest.MonkeyPatch) -> None:
    (clinics.place / LISTENS / "state").chmod(0o755)


PLANTED = {
    "wrong key": (other_keys, "keys", "not the keys on the card of hospital-a"),
    "0644 key": (open_key, "keys", "mode 0644"),
    "wrong study": (other_study, "study", "has another digest"),
    "other torch": (other_torch, "result contract", "1.99 in the study"),
    "other task digest": (other_code, "result contract", "source"),
    "other layout": (other_layout, "rows and model", "tensor bias"),
    "missing column": (missing_column, "rows and model", "diabetes"),
    "NaN in the data": (no_number, "rows and model", "finite"),
    "too little memory": (little_memory, "memory", "1 MB are left"),
    "too little memory in a container": (little_memory_in_a_container, "memory", "1 MB are left"),
    "slow disk": (slow_disk, "disk", "for an fsync"),
    "missing extra": (no_extra, "rows and model", "p2pfl-mesh[fast]"),
    "mistyped key": (nothing_to_read, "site file", "treads"),
    "state folder that others may enter": (entered_by_others, "state folder", "mode 0755"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_and_nothing_else(name, clinics, monkeypatch):
    plant, check, words = PLANTED[name]
    with monkeypatch.context() as patched:
        plant(clinics, patched)
        text = one_finding(examined(clinics.site(LISTENS)), check)

    assert words in text


def test_a_member_that_stands_in_the_study_twice_is_named(clinics, monkeypatch):
    member_twice(clinics, monkeypatch)
    findings = examined(clinics.site(LISTENS)).findings

    assert findings
    assert all(name == "study" and "stands in 2 cards (hospital-b, hospital-b)" in found.text for name, found in findings)


def test_a_port_in_use_is_found(clinics):
    address = SiteFile.load(clinics.site(LISTENS)).listen
    assert address is not None
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", int(address.rpartition(":")[2])))
        taken.listen()
        report = examined(clinics.site(LISTENS))

    assert "is in use" in one_finding(replace(report, noted=[note for note in report.noted if note[0] != "edges"]), "ports")


def test_a_stale_lock_is_found(clinics):
    with (clinics.place / LISTENS / "state" / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = one_finding(examined(clinics.site(LISTENS)), "state folder")

    assert f"process {os.getpid()}" in text
    assert "no node answers" in text


# ---- faults of an edge


def test_a_healthy_edge_is_measured_from_both_ends(clinics):
    for examinee, beside in ((DIALS, LISTENS), (LISTENS, DIALS)):
        with neighbour(clinics, beside):
            report = examined(clinics.site(examinee), wait_s=DEADLINE_S)

        facts = {fact.what: fact for _, fact in report.facts}
        assert [found.text for _, found in report.findings] == []
        assert [what for what, fact in facts.items() if not fact.is_known] == []
        edge = facts[f"edge to {beside}"].figures
        assert edge["dials"] == (examinee == DIALS)
        assert edge["round_trip_s"] > 0
        assert edge["mbit_s"] > 0
        assert facts[f"forward pass at {beside}"].figures["same"]
        assert facts["round"].figures["bytes"] > 0


def test_a_closed_port_is_found(clinics):
    text = one_finding(examined(clinics.site(DIALS), wait_s=0.5), "edges")

    assert "connection refused" in text
    assert "ask hospital-a to start its node" in text


def test_a_name_without_an_address_is_found(clinics, monkeypatch):
    identity = Identity.load(clinics.place / LISTENS / "keys")
    card = identity.card(LISTENS, "tcp://node.hospital-a.invalid:7700")
    clinics.make_again(
        lambda study: Study.from_mapping({**study.as_dict(), "members": [card.as_dict(), study.member(DIALS).as_dict()]}, "the study")
    )

    def unknown(host: str) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(resolver, "look_up", unknown)
    text = one_finding(examined(clinics.site(DIALS), wait_s=0.5), "names")

    assert "node.hospital-a.invalid" in text
    assert "Name or service not known" in text


def test_a_clock_that_is_off_by_an_hour_is_found(clinics):
    with neighbour(clinics, LISTENS, lambda probes: replace(probes, clock_ms=lambda: probes.clock_ms() + 3_600_000)):
        text = one_finding(examined(clinics.site(DIALS), wait_s=DEADLINE_S), "clocks")

    assert "the clock of hospital-a is 3,600 s ahead of this machine's" in text
    assert "NTP" in text


def test_a_neighbour_that_holds_another_study_is_found(clinics):
    with neighbour(clinics, LISTENS, lambda probes: replace(probes, study=bytes.fromhex(OTHER))):
        text = one_finding(examined(clinics.site(DIALS), wait_s=DEADLINE_S), "agreement")

    assert "hospital-a holds another study" in text


OF_NEIGHBOURS = [check for check in CHECKS if check.name in ("clocks", "agreement", "forward pass")]


@pytest.fixture(scope="module")
def measured(original, tmp_path_factory) -> Examination:
    """An examination of two healthy sites, for tests that change what the neighbour has answered."""
    place = tmp_path_factory.mktemp("measured") / "two"
    shutil.copytree(original.place, place)
    exam = Examination(path=Clinics(place).site(DIALS), wait_s=DEADLINE_S)
    with neighbour(Clinics(place), LISTENS):
        assert examine(exam).findings == []
    return exam


def answered(measured: Examination, **changes: Any) -> Report:
    """What is found where a neighbour answers something else."""
    assert measured.edges is not None
    edge = measured.edges[LISTENS]
    assert edge.answer is not None
    other = replace(edge, answer=replace(edge.answer, **changes))
    return examine(replace(measured, edges={LISTENS: other}), OF_NEIGHBOURS)


@pytest.mark.parametrize(("field", "words"), first_fast([("layout", "another layout"), ("start", "other first parameters")]))
def test_a_neighbour_that_holds_something_else_is_found(measured, field, words):
    assert f"hospital-a holds {words}" in one_finding(answered(measured, **{field: bytes.fromhex(OTHER)}), "agreement")


def test_a_neighbour_that_breaks_the_contract_is_found(measured):
    text = one_finding(answered(measured, torch="1.99"), "agreement")

    assert "hospital-a does not keep the result contract: torch 1.99 there" in text


def test_a_model_that_computes_otherwise_at_the_neighbour_is_found(measured):
    text = one_finding(answered(measured, forward=bytes(32), outputs=(9.0,)), "forward pass")

    assert "gives other numbers at hospital-a" in text


def test_a_difference_in_rounding_is_no_finding(measured):
    report = answered(measured, forward=bytes(32), outputs=tuple(value * (1 + 1e-7) for value in measured.edges[LISTENS].answer.outputs))

    assert report.findings == []
    assert any("but for rounding" in fact.said for _, fact in report.facts)


def test_what_a_neighbour_of_an_earlier_version_does_not_tell_is_unknown(measured):
    silent = replace(measured.edges[LISTENS], hello=HELLO, answer=None, clock_ahead_s=None)
    report = examine(replace(measured, edges={LISTENS: silent}), OF_NEIGHBOURS[:1])

    assert report.findings == []
    assert [fact.is_known for _, fact in report.facts] == [False]


def test_a_refused_key_is_found_at_both_ends(clinics):
    other = zmq.curve_keypair()[0]
    with neighbour(clinics, LISTENS, knows=other):
        text = one_finding(examined(clinics.site(DIALS), wait_s=1.0), "edges")

    assert "does not know the key of hospital-b" in text
    assert "ask hospital-a to take the study" in text


@pytest.mark.slow
def test_a_way_that_swallows_large_packets_is_found(clinics, monkeypatch):
    monkeypatch.setattr(interview, "LARGE_WITHIN_S", 1.0)
    monkeypatch.setattr(interview, "PING_WITHIN_S", 1.0)
    listens = clinics.study.member(LISTENS).address
    assert isinstance(listens, str)
    with BlackHole(listens, lets_through=8192) as hole:
        card = Identity.load(clinics.place / LISTENS / "keys").card(LISTENS, hole.address)
        clinics.make_again(
            lambda study: Study.from_mapping({**study.as_dict(), "members": [card.as_dict(), study.member(DIALS).as_dict()]}, "the study")
        )
        with neighbour(clinics, LISTENS):
            text = one_finding(examined(clinics.site(DIALS), wait_s=DEADLINE_S), "edges")

    assert "MTU black hole" in text


# ---- the command


def test_the_command_says_findings_with_their_remedies_and_its_exit_code_tells(clinics, monkeypatch, capfd):
    code, said, _ = run_here("doctor", clinics.site(LISTENS), "--wait", 0, monkeypatch=monkeypatch, capfd=capfd)
    assert (code, "no finding; 5 things could not be seen" in said) == (0, True)

    code, said, _ = run_here("doctor", clinics.site(LISTENS), "--wait", 0, "--json", monkeypatch=monkeypatch, capfd=capfd)
    document = json.loads(said)
    assert (code, document["healthy"], document["unknown"]) == (0, None, 5)  # nobody knows about the edge

    open_key(clinics, monkeypatch)
    code, said, _ = run_here("doctor", clinics.site(LISTENS), "--wait", 0, monkeypatch=monkeypatch, capfd=capfd)
    assert code == 2
    assert "mode 0644" in said
    assert "→ run: chmod 600" in said

    code, said, _ = run_here("doctor", clinics.site(LISTENS), "--wait", 0, "--json", monkeypatch=monkeypatch, capfd=capfd)
    document = json.loads(said)
    assert (code, document["healthy"], len(document["findings"])) == (2, False, 1)
    assert document["findings"][0]["check"] == "keys"


def test_an_error_without_advice_gets_that_of_its_check():
    from p2pfl.errors import ConfigError

    (plain,) = findings_of(ConfigError("is empty", "a.yaml"), "mend it")
    (advised,) = findings_of(ConfigError("is empty; restore the file", "a.yaml"), "mend it")

    assert (plain.text, advised.text) == ("a.yaml: is empty; mend it", "a.yaml: is empty; restore the file")


IN_A_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def has_namespaces() -> bool:
    try:
        return subprocess.run([*IN_A_NAMESPACE, "true"], check=False, capture_output=True, timeout=DEADLINE_S).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mount", "words"),
    [
        ("mount -t tmpfs -o size=64k,mode=0700 none {}", "MB left"),
        ("mount --bind {0} {0} && mount -o remount,ro,bind {0}", "nothing can be written"),
    ],
    ids=["full disk", "read-only state"],
)
def test_a_disk_that_cannot_be_written_to_is_found(clinics, mount, words):
    if not has_namespaces():
        pytest.skip("this machine lets nobody make a mount namespace")
    state = clinics.place / LISTENS / "state"
    command = f"{mount.format(state)} && exec {sys.executable} -m p2pfl doctor {clinics.site(LISTENS)} --wait 0 --json"
    environment = {**os.environ, "PYTHONPATH": f"{EXAMPLES}:{EXAMPLES.parent}"}
    done = subprocess.run(
        [*IN_A_NAMESPACE, "sh", "-c", command],
        check=False,
        capture_output=True,
        text=True,
        timeout=4 * DEADLINE_S,
        env=environment,
        cwd=EXAMPLES,
    )
    findings = json.loads(done.stdout)["findings"]

    assert (done.returncode, len(findings)) == (2, 1), done.stdout + done.stderr
    assert words in findings[0]["fault"]


@pytest.mark.slow
def test_real_nodes_are_examined_before_they_run_and_while_they_do(clinics, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{EXAMPLES}:{EXAMPLES.parent}")
    monkeypatch.setattr(measuring, "HELLO_WITHIN_S", 10.0)
    nodes = [start_process("node", "start", str(clinics.site(LISTENS)), log=clinics.place / "a.log")]
    try:
        wait_until((clinics.place / LISTENS / "state" / "status.url").exists)
        before = examined(clinics.site(DIALS), wait_s=DEADLINE_S)
        assert [found.text for _, found in before.findings] == []
        assert [fact.what for _, fact in before.facts if not fact.is_known] == []
        assert read_status(clinics.place / LISTENS / "state")["round"] == 0  # a doctor starts nobody

        nodes.append(start_process("node", "start", str(clinics.site(DIALS)), "--log-format", "json", log=clinics.place / "b.log"))
        wait_until(lambda: _round(clinics, DIALS) >= 3)
        during = examined(clinics.site(DIALS), wait_s=1.0)
        facts = {fact.what: fact for _, fact in during.facts}
        assert [found.text for _, found in during.findings] == []
        assert facts["state"].figures["running"]
        assert [what for what, fact in facts.items() if not fact.is_known] == []
        assert facts[f"edge to {LISTENS}"].figures["schema"] == 5
        assert facts[f"edge to {LISTENS}"].figures["mbit_s"] > 0
        assert facts[f"forward pass at {LISTENS}"].figures["same"]
    finally:
        for node in nodes:
            node.send_signal(signal.SIGTERM)
        for node in nodes:
            assert node.wait(DEADLINE_S) == 0
    lines = [json.loads(line) for line in (clinics.place / "b.log").read_text().splitlines()]
    assert lines[-1]["message"] == "stopped: paused"
    assert all(line["time"].endswith("Z") for line in lines)


def _round(clinics: Clinics, name: str) -> int:
    if not (clinics.place / name / "state" / "status.url").exists():
        return -1
    return int(read_status(clinics.place / name / "state")["round"])
