"""Two hospitals that have joined a study, for a doctor to look at; and a neighbour's doctor, and a way that swallows large packets."""

from __future__ import annotations

import asyncio
import csv
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from networks import wait_until
from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import load_sites, make_plan
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.node.doctor.measuring import measure_edges
from p2pfl.node.own_contract import contract_here
from p2pfl.node.own_probes import own_probes
from p2pfl.node.site import SiteFile
from p2pfl.node.start import own_plan
from p2pfl.protocol.probes import Probes
from p2pfl.transports import Endpoint, ZeroMQTransport, reserve_port
from p2pfl.yaml_files import dump_yaml, load_yaml

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
