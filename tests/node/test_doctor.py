"""`p2pfl doctor` finds each planted fault, names it and its remedy, and nothing else."""

from __future__ import annotations

import asyncio
import csv
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
import zmq

from commands import run_here
from networks import start_process, wait_until
from p2pfl.compiled import loader
from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.node.doctor import interview, machine, measuring, rows
from p2pfl.node.doctor.checks import CHECKS, Report, examine
from p2pfl.node.doctor.examination import Examination, findings_of
from p2pfl.node.doctor.measuring import measure_edges
from p2pfl.node.own_contract import contract_here
from p2pfl.node.own_probes import own_probes
from p2pfl.node.site import SiteFile
from p2pfl.node.start import own_plan
from p2pfl.node.status import read_status
from p2pfl.protocol.probes import Probes
from p2pfl.transports import Endpoint, ZeroMQTransport, reserve_port, resolver
from p2pfl.yaml_files import dump_yaml, load_yaml
from wire_samples import HELLO

EXAMPLES = Path(__file__).parents[2] / "examples"
TASK = "custom_task:stroke"
LISTENS, DIALS = "hospital-a", "hospital-b"
COLUMNS = ("age", "systolic_pressure", "diabetes", "atrial_fibrillation", "stroke")
OTHER = "cd" * 32
DEADLINE_S = 60.0


@dataclass
class Clinics:
    """Two hospitals that have joined a study, hospital-b to dial hospital-a; nothing runs."""

    place: Path

    def site(self, name: str) -> Path:
        return self.place / name / "site.yaml"

    def set(self, name: str, **keys: Any) -> None:
        path = self.site(name)
        path.write_text(dump_yaml({**load_yaml(path), **keys}))

    @property
    def study(self) -> Study:
        return Study.read(self.place / "study.yaml")

    def make_again(self, change: Callable[[Study], Study]) -> None:
        """The study is another one, and everybody has confirmed it."""
        study = change(self.study)
        (self.place / "study.yaml").unlink()
        study.save(self.place / "study.yaml")
        for name in (LISTENS, DIALS):
            self.set(name, confirmed=study.digest)

    def table(self, name: str) -> Path:
        return self.place / name / "data" / f"{name}.csv"

    def rewrite(self, name: str, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
        """Put other rows into a hospital's table."""
        with self.table(name).open() as file:
            content = [change(row) for row in csv.DictReader(file)]
        with self.table(name).open("w") as file:
            writer = csv.DictWriter(file, fieldnames=list(content[0]))
            writer.writeheader()
            writer.writerows(content)


def founded(place: Path, ports: ExitStack, **experiment: Any) -> Clinics:
    for number, name in enumerate((LISTENS, DIALS)):
        (place / name / "data").mkdir(parents=True)
        lines = [f"{50 + row + number},{120 + row},{row % 2}.0,{row % 3 // 2}.0,{row % 2}.0" for row in range(24)]
        (place / name / "data" / f"{name}.csv").write_text("\n".join([",".join(COLUMNS), *lines]) + "\n")
    everything = place / "all"
    everything.mkdir()
    for name in (LISTENS, DIALS):
        shutil.copy(place / name / "data" / f"{name}.csv", everything)
    resolved = experiment_from(
        {"task": {"name": TASK, "data": str(everything)}, "rounds": 2000, "baselines": [], "topology": {"name": "path"}, **experiment}
    )
    plan = make_plan(resolved, load_sites(resolved, allow_tasks=[TASK]))
    cards, listens = [], {}
    for name in plan.names:
        listens[name] = ports.enter_context(reserve_port()).address
        identity = Identity.new()
        identity.save(place / name / "keys")
        cards.append(identity.card(name, listens[name]))
    content = resolved.as_dict() | {"task": {"name": TASK}}
    study = Study.create(content, cards, plan.topology).with_result_contract(contract_here(TASK)).with_layout(plan.layout.table())
    study.save(place / "study.yaml")
    for name in plan.names:
        (place / name / "state").mkdir(mode=0o700)
        site = {"member": name, "study": "../study.yaml", "confirmed": study.digest, "listen": listens[name], "heartbeat_s": 1}
        site |= {"allow_tasks": [TASK], "task": {"data": "./data"}, "round_at_least_s": 0.02}
        (place / name / "site.yaml").write_text(dump_yaml(site))
    return Clinics(place)


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
    assert {fact.what for _, fact in report.facts if not fact.is_known} == {f"edge to {DIALS}", "round"}


def test_every_check_has_something_to_say(clinics):
    said = {name for name, _ in examined(clinics.site(LISTENS)).noted}

    assert {check.name for check in CHECKS} - said == {"names", "clocks", "agreement", "forward pass"}  # nobody was there


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


@contextmanager
def neighbour(
    clinics: Clinics,
    name: str,
    change: Callable[[Probes], Probes] = lambda probes: probes,
    knows: bytes | None = None,
    via: str | None = None,
) -> Iterator[None]:
    """A doctor at the other hospital, while the block lasts; it may tell other facts, or hold another key of its neighbour."""
    site, study = SiteFile.load(clinics.site(name)), clinics.study
    other = LISTENS if name == DIALS else DIALS
    own, theirs = study.member(name), study.member(other)
    probes = change(own_probes(own_plan(site, study, clinics.site(name), [TASK]), name, study.digest))
    transport = ZeroMQTransport(
        Endpoint(own.name, own.address, own.curve.encode()),
        Identity.load(site.keys).curve_secret,
        [Endpoint(other, theirs.address, knows or theirs.curve.encode())],
        listen=site.listens_at(own),
        heartbeat_s=1,
    )
    dialled = {other: theirs.addresses} if name == DIALS else {}
    loop, is_over = asyncio.new_event_loop(), asyncio.Event()

    async def attend() -> None:
        measuring_all = asyncio.create_task(measure_edges(transport, dialled, [other], probes, DEADLINE_S))
        await is_over.wait()
        measuring_all.cancel()
        await asyncio.gather(measuring_all, return_exceptions=True)

    thread = threading.Thread(target=lambda: loop.run_until_complete(attend()))
    thread.start()
    try:
        if name == LISTENS:
            wait_until(lambda: transport.bound_address is not None)
        yield
    finally:
        loop.call_soon_threadsafe(is_over.set)
        thread.join(DEADLINE_S)
        loop.close()


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


@pytest.mark.parametrize(("field", "words"), [("layout", "another layout"), ("start", "other first parameters")])
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


class BlackHole:
    """A TCP proxy on a thread of its own, through which so many bytes come from the dialler, and then none; nothing is ever closed."""

    def __init__(self, leads_to: str, lets_through: int) -> None:
        self._host, self._port = leads_to.removeprefix("tcp://").split(":")
        self._lets_through = lets_through
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self.address = ""

    def __enter__(self) -> Self:
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._lead, "127.0.0.1", 0), self._loop)
        self._server = starting.result(DEADLINE_S)
        self.address = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        async def end() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(DEADLINE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        self._loop.close()

    async def _lead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(self._host, int(self._port))
        try:
            await asyncio.gather(self._pump(reader, inner_writer, self._lets_through), self._pump(inner_reader, writer, 2**40))
        finally:
            writer.close()
            inner_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: int) -> None:
        while some := await reader.read(65536):
            if len(some) <= left:
                writer.write(some)
                await writer.drain()
            left = left - len(some) if len(some) <= left else 0


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
    assert (code, "no finding; 2 things could not be seen" in said) == (0, True)

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
    *lines, last = (clinics.place / "b.log").read_text().splitlines()
    assert last == "stopped: paused"
    assert all(json.loads(line)["time"].endswith("Z") for line in lines)


def _round(clinics: Clinics, name: str) -> int:
    if not (clinics.place / name / "state" / "status.url").exists():
        return -1
    return int(read_status(clinics.place / name / "state")["round"])
