"""Memory that a node takes: daemons that are all neighbours of each other, over encrypted links on loopback. Prints JSON.

    python benchmarks/memory.py                                      # 25 million float32 parameters, plain SGD, two neighbours
    python benchmarks/memory.py --neighbours 4 --spill-mb 0          # their updates lie in files
    python benchmarks/memory.py --parameters 4000000 --optimizer adam --model residual
    python benchmarks/memory.py --algorithm relaysgd --topology star --order deaf
    python benchmarks/memory.py --algorithm choco --set '{"compressor": {"name": "top-k", "share": 0.01}}'

Each node is a process of its own, as `p2pfl node start` runs it. Looked at every two milliseconds is RssAnon of /proc: memory that belongs
to the process alone, not files or libraries. `before` is just before the model is made, `peak` the most from then on, in all and by what
the node was doing; `models` is the difference between the two in sizes of one model, `foretold` the difference that the node's own
forecast gives.

How much is there at once depends on the order of events. With `--order deaf` no node hears its neighbours from when it begins to mix until
it sends again: all flows stay open while it trains, and the queues of its links fill. With `--order early` the first node has its
neighbours' next updates before it mixes the last ones, but for the last exchange.
"""

# ruff: noqa: SLF001  # it looks at a node from inside; a slow test runs it

from __future__ import annotations

import argparse
import asyncio
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p2pfl.tasks import Site, Task, task

TASK = "memory:network"
MOST_NODES = 16
CLASSES = 10
LOOK_S = 0.002
MODELS = ("chain", "frozen", "one", "residual", "point")
DEADLINE_S = 600.0
ORDERS = ("any", "deaf", "early")
EARLY_WITHIN_S = 60.0


class Residual(nn.Module):
    """A layer whose output is added to its input: nothing that is written out by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, W) to the same."""
        return inputs + F.gelu(self.inner(inputs))


def model_of(kind: str, parameters: int) -> nn.Module:
    """A network of about so many parameters: 24 layers, of which half may be frozen, or one."""
    if kind == "point":
        from p2pfl.tasks.synthetic import Point

        return Point(parameters)
    layers = 1 if kind == "one" else 24
    width = round(math.sqrt(parameters / layers))
    inner = [Residual(width) if kind == "residual" else nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)]
    for layer in inner[: layers // 2] if kind == "frozen" else ():
        layer.requires_grad_(False)
    return nn.Sequential(*inner, nn.Linear(width, CLASSES))


def names_of(nodes: int) -> list[str]:
    """Names of so many nodes."""
    return [f"node-{i:02d}" for i in range(nodes)]


@task
def network(parameters: int, kind: str, nodes: int) -> Task:
    """A few random rows at each node, of ten classes."""
    width = 1 if kind == "point" else next(iter(model_of(kind, parameters).parameters())).shape[1]
    generator = torch.Generator().manual_seed(0)
    sites = []
    for name in names_of(nodes):
        inputs, classes = torch.randn(40, width, generator=generator), torch.randint(0, CLASSES, (40,), generator=generator)
        train, test = (inputs[:32], classes[:32]), (inputs[32:], classes[32:])
        sites.append(Site(name=name, train=None if kind == "point" else train, test=None if kind == "point" else test))
    learns = kind != "point"
    metrics = {"loss": lambda outputs, targets: float(F.cross_entropy(outputs, targets))} if learns else {}
    return Task(
        name="memory", model=partial(model_of, kind, parameters), loss=F.cross_entropy if learns else None, metrics=metrics, sites=sites
    )


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


class Watch:
    """The most memory of this process, in all and by what it was doing."""

    def __init__(self) -> None:
        self.before_bytes = self.model_bytes = 0
        self.foretold_bytes: int | None = None
        self.stage = "start"
        self.peaks: dict[str, int] = {}

    def run(self) -> None:
        """Look again and again."""
        while True:
            self.look()
            time.sleep(LOOK_S)

    def look(self) -> None:
        """Look once."""
        now_bytes = anonymous_bytes()
        self.peaks[self.stage] = max(self.peaks.get(self.stage, 0), now_bytes)

    def during(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, noted as a stage while it runs."""

        def noted(*arguments: Any, **options: Any) -> Any:
            before, self.stage = self.stage, stage
            try:
                return function(*arguments, **options)
            finally:
                self.look()  # a stage may be over before anybody has looked
                self.stage = before

        return noted


class Order:
    """Makes the order of events in one node certain.

    Args:
        name: one of ORDERS.
        delays: whether this is the node that lets the others go ahead, where one does.
    """

    def __init__(self, name: str, *, delays: bool) -> None:
        self._is_deaf, self._delays = name == "deaf", name == "early" and delays
        self._hears = asyncio.Event()
        self._hears.set()

    def arrange(self) -> None:
        """Put this order into the classes of the node."""
        from p2pfl.node.daemon import Daemon
        from p2pfl.node.mixing import Mixing
        from p2pfl.transports.zeromq import ZeroMQTransport

        exchange, merge, receive = Daemon._exchange, Mixing.merge, ZeroMQTransport.receive

        async def exchanging(daemon: Daemon, *arguments: Any) -> Any:
            self._hears.set()
            return await exchange(daemon, *arguments)

        async def merging(mixing: Mixing, due: Any, *arguments: Any, **options: Any) -> None:
            if self._delays:
                await self._others_go_ahead(mixing._protocol)
            protocol = mixing._protocol
            if self._is_deaf and protocol.edges.exchange + 1 < protocol._num_exchanges:
                self._hears.clear()
            await merge(mixing, due, *arguments, **options)

        async def receiving(transport: ZeroMQTransport) -> Any:
            await self._hears.wait()
            return await receive(transport)

        Daemon._exchange, Mixing.merge, ZeroMQTransport.receive = exchanging, merging, receiving

    async def _others_go_ahead(self, protocol: Any) -> None:
        """Wait until the next update of each neighbour is here, or there is none."""
        following, until_s = protocol.edges.exchange + 1, time.monotonic() + EARLY_WITHIN_S
        sessions = [neighbour.session for neighbour in protocol.neighbours.values()]
        while not all(session.has(following, full=False) for session in sessions):
            if following >= protocol._num_exchanges or time.monotonic() > until_s:
                return
            await asyncio.sleep(LOOK_S)


def node(site: Path, order: str) -> None:
    """Run one node and print what it took."""
    from p2pfl.experiment import plan as plans
    from p2pfl.node import conclusion, daemon
    from p2pfl.node.memory import NodeMemory
    from p2pfl.node.mixing import Mixing
    from p2pfl.node.start import start
    from p2pfl.runs import checkpoint
    from p2pfl.training import Population

    watch = Watch()
    Order(order, delays=site.parent.name == names_of(1)[0]).arrange()
    build = plans.build_model

    def watched(*arguments: Any) -> nn.Module:
        watch.before_bytes = anonymous_bytes()
        threading.Thread(target=watch.run, daemon=True).start()
        model = build(*arguments)
        watch.model_bytes = sum(parameter.nbytes for parameter in model.parameters())
        return model

    plans.build_model = watched
    for name in ("train", "evaluate"):
        setattr(Population, name, watch.during(name, getattr(Population, name)))
    checkpoint.write_checkpoint = watch.during("checkpoint", checkpoint.write_checkpoint)
    for owner, name, stage in ((conclusion, "write_result", "finish"), (Mixing, "pack", "send"), (Mixing, "_unpack", "merge")):
        setattr(owner, name, watch.during(stage, getattr(owner, name)))
    run = daemon.Daemon.run

    async def running(self: daemon.Daemon) -> str:
        watch.stage = "wait"
        algorithm = type(self.node.plan.recipe.algorithm)
        algorithm.merge = watch.during("merge", algorithm.merge)
        return await run(self)

    daemon.Daemon.run = running
    forecast = daemon.Daemon.memory

    def foretelling(self: daemon.Daemon) -> NodeMemory:
        found = forecast(self)
        watch.foretold_bytes = found.peak_bytes
        return found

    daemon.Daemon.memory = foretelling
    reason = start(site)
    one = watch.model_bytes
    found = {
        "before_bytes": watch.before_bytes,
        "model_bytes": one,
        "peak_bytes": max(watch.peaks.values()),
        "models": round((max(watch.peaks.values()) - watch.before_bytes) / one, 2),
        "foretold": None if watch.foretold_bytes is None else round(watch.foretold_bytes / one, 2),
        "by_stage": {stage: round((peak - watch.before_bytes) / one, 2) for stage, peak in watch.peaks.items()},
        "ended": reason,
    }
    print(json.dumps(found))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each node with what it took."""
    from p2pfl.experiment.loading import experiment_from
    from p2pfl.experiment.plan import load_sites, make_plan
    from p2pfl.governance.identity import Identity
    from p2pfl.governance.study import Study
    from p2pfl.transports import reserve_port
    from p2pfl.yaml_files import dump_yaml

    small = experiment_from(
        {
            "task": {"name": TASK, "parameters": arguments.parameters, "kind": arguments.model, "nodes": arguments.neighbours + 1},
            "topology": {"name": arguments.topology},
            "algorithm": {"name": arguments.algorithm, "local_steps": 2, "batch_size": 8},
            "optimizer": {"name": "sgd", "momentum": 0.9} if arguments.optimizer == "momentum" else {"name": arguments.optimizer},
            **({"weights": "push-sum"} if arguments.algorithm == "push-sum" else {}),
            **({"compressor": {"name": arguments.compressor}} if arguments.compressor else {}),
            "rounds": 0 if arguments.model == "point" else arguments.rounds,
            "stop": {"relative_consensus": 1e-300, "settle": arguments.rounds} if arguments.model == "point" else None,
            "baselines": [],
            "dtype": "float32",
            **arguments.set,
        }
    )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ports:
        place = Path(folder)
        cards, addresses = [], {}
        names = names_of(arguments.neighbours + 1)
        for name in names:
            addresses[name] = ports.enter_context(reserve_port()).address
            identity = Identity.new()
            identity.save(place / name / "keys")
            cards.append(identity.card(name, addresses[name], 32))
        plan = make_plan(small, load_sites(small, allow_tasks=[TASK]))
        study = Study.create(plan.experiment.as_dict(), cards, plan.topology)
        study.save(place / "study.yaml")
        processes = []
        for name in names:
            site = {
                "member": name,
                "study": "../study.yaml",
                "confirmed": study.digest,
                "listen": addresses[name],
                "linger_s": 5,
                "spill_mb": arguments.spill_mb,
                "allow_tasks": [TASK],
            }
            path = place / name / "site.yaml"
            path.write_text(dump_yaml(site), encoding="utf-8")
            command = [sys.executable, __file__, "--node", str(path), "--order", arguments.order]
            processes.append(subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True))  # noqa: S603  # our own command
        outputs = [process.communicate(timeout=DEADLINE_S)[0] for process in processes]
    return {"parameters": plan.layout.size, "nodes": [json.loads(output.splitlines()[-1]) for output in outputs]}


def main() -> None:
    """Read the command line, print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=25_000_000)
    parser.add_argument("--model", choices=MODELS, default="chain", help="24 layers, half of them frozen, one, or blocks")
    parser.add_argument("--algorithm", default="dpsgd")
    parser.add_argument("--compressor", help="of algorithms that send compressed differences")
    parser.add_argument("--optimizer", default="sgd", help="as in experiment.yaml, or momentum: sgd with one")
    parser.add_argument("--neighbours", type=int, default=2, choices=range(1, MOST_NODES))
    parser.add_argument("--spill-mb", type=float, help="memory that neighbours' updates may take; default: all that they want")
    parser.add_argument("--topology", default="complete", help="star: the first node alone has all neighbours")
    parser.add_argument("--set", type=json.loads, default={}, help="more keys of experiment.yaml, as JSON")
    parser.add_argument("--order", choices=ORDERS, default="any", help="of events; by default as it comes")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--node", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.node is not None:
        node(arguments.node, arguments.order)
    else:
        print(json.dumps(measure(arguments), indent=2))


if __name__ == "__main__":
    main()
