"""`p2pfl up`, `p2pfl simulate` and `p2pfl predict`: an experiment from its file to its result."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pfl.cli.long_runs import pausable, terminal_bar
from p2pfl.cli.options import AcceptDifference, AllowTask, Nodes, Rounds, Set
from p2pfl.errors import ConfigError
from p2pfl.runs.events import EventKind, departures_in, exit_code_of

if TYPE_CHECKING:
    from p2pfl.evaluation.progress import Progress
    from p2pfl.evaluation.results import Run
    from p2pfl.governance.result_contract import Kind

ExperimentFile = Annotated[Path | None, typer.Argument(metavar="EXPERIMENT", help="A YAML file, see examples/; left out with --resume.")]
Out = Annotated[Path | None, typer.Option("--out", help="New folder for the run. Default: runs/NAME, by the experiment's name.")]
Resume = Annotated[Path | None, typer.Option("--resume", help="Folder of an interrupted run to continue.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would run, and stop.")]
JsonSummary = Annotated[bool, typer.Option("--json", help="Print summary.json and nothing else.")]
_EVERY_S = 5.0


def up(
    experiment: ExperimentFile = None,
    nodes: Nodes = None,
    rounds: Rounds = None,
    assignments: Set = None,
    out: Out = None,
    resume: Resume = None,
    continues: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="An earlier run of `p2pfl up`: nodes of the same names go on from their models of it."),
    ] = None,
    allow_task: AllowTask = None,
    accept_difference: AcceptDifference = None,
    dry_run: DryRun = False,
    as_json: JsonSummary = False,
) -> None:
    """Run an experiment with real node daemons on this machine. Each node is a process with its own keys, and encrypts its links.

    Example: p2pfl up examples/breast_cancer.yaml
    """
    overrides = overrides_from(nodes, rounds, assignments)
    given = _given(experiment, resume, changed=bool(overrides or out))
    if resume is not None and continues is not None:
        raise ConfigError("--continues begins a new run with the models of another one: leave it out where --resume continues a run")
    kinds = checked_kinds(accept_difference)
    if dry_run:
        _say_plan(given, overrides, allow_task or (), as_json=as_json, simulated=False, recorded=experiment is None)
        return
    from p2pfl.launcher.processes import ForkServer, can_fork
    from p2pfl.runs.stopwatch import process_age_s

    with (
        of_file(given),
        pausable(),
        _progress(enabled=not as_json) as progress,
        ForkServer() if can_fork() else nullcontext(enter_result=False) as fork,
    ):
        from p2pfl.launcher import up as run_up  # after the fork server has begun to import the same

        waited_s = process_age_s()
        run = run_up(
            given,
            overrides=overrides,
            out=out,
            resume=resume,
            continues=continues,
            accept_differences=kinds,
            progress=progress,
            fork=fork,
            waited_s=waited_s,
            say=None,
            allow_tasks=allow_task or (),
        )
    _say_result(run, as_json=as_json)


def simulate(
    experiment: ExperimentFile = None,
    nodes: Nodes = None,
    rounds: Rounds = None,
    assignments: Set = None,
    out: Out = None,
    resume: Resume = None,
    replay: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Compute an asynchronous or pairwise run of `p2pfl up` again, from its records.")
    ] = None,
    faults: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Faults of nodes and edges, as p2pfl chaos --write-plan writes them; what cannot be simulated is said."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Device to compute on: cpu, cuda, cuda:1, ...")] = "cpu",
    allow_task: AllowTask = None,
    dry_run: DryRun = False,
    as_json: JsonSummary = False,
) -> None:
    """Simulate all nodes of an experiment without a network. Models are those that daemons would get; torchrun divides the work.

    Example: p2pfl simulate examples/breast_cancer.yaml --set topology.name=complete

    Example: torchrun --nproc-per-node 2 -m p2pfl simulate examples/breast_cancer.yaml
    """
    from p2pfl.faults.plan_file import FaultPlan

    is_first = os.environ.get("RANK", "0") == "0"  # of those that torchrun has started; the others have the same to say
    overrides = overrides_from(nodes, rounds, assignments)
    if faults is not None and (replay is not None or resume is not None):
        raise ConfigError("--faults belongs to a new run: leave out --resume and --replay")
    if replay is not None:
        if experiment is not None or resume is not None or overrides:
            raise ConfigError("--replay takes everything from the run: leave out EXPERIMENT, --resume, --nodes, --rounds and --set")
        given = replay / "experiment.yaml"
    else:
        given = _given(experiment, resume, changed=bool(overrides or out))
    planned = FaultPlan.load(faults) if faults is not None else None
    if dry_run:
        if is_first:
            _say_plan(given, overrides, allow_task or (), as_json=as_json, simulated=True, recorded=experiment is None)
        return
    from p2pfl.experiment.loading import resolve
    from p2pfl.runs.stopwatch import process_age_s
    from p2pfl.simulator import simulate as run_simulation

    with of_file(given), _of_faults(faults), pausable(hears=True), _progress(enabled=is_first and not as_json) as progress:
        resolved = resolve(given, overrides)
        run = run_simulation(
            resolved,
            out=out,
            resume=resume,
            replay=replay,
            device=device,
            faults=planned,
            progress=progress,
            waited_s=process_age_s(),
            allow_tasks=allow_task or (),
        )
    if is_first:
        _say_result(run, as_json=as_json)


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV file with a header, whose columns are named as the task's inputs.")],
    node: Annotated[str, typer.Option(help="Name of the node whose model and standardisation are used.")],
    allow_task: AllowTask = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list of lists instead of CSV.")] = False,
) -> None:
    """Apply a node's final model to new rows. It prints one line for each row: probabilities of the classes, or the model's outputs.

    Example: p2pfl predict runs/breast-cancer --node hospital-0 patients.csv
    """
    from p2pfl.evaluation.results import predict_file

    rows = predict_file(run, node, file, allow_task or ())
    if as_json:
        sys.stdout.write(json.dumps(rows) + "\n")
    else:
        for row in rows:
            sys.stdout.write(",".join(f"{value:.6g}" for value in row) + "\n")


def checked_kinds(given: list[str] | None) -> list[Kind]:
    """The kinds of differences that a command line accepts.

    Raises:
        ConfigError: one is no kind.
    """
    from p2pfl.governance.result_contract import KINDS

    kinds = list(dict.fromkeys(given or ()))
    if strange := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigError([f"{kind!r}: expected one of {', '.join(KINDS)}" for kind in strange], "--accept-difference")
    return [kind for kind in KINDS if kind in kinds]


def _given(experiment: Path | None, resume: Path | None, *, changed: bool) -> Path:
    if (experiment is None) == (resume is None):
        raise ConfigError("give an EXPERIMENT to start, or --resume RUN to continue one; not both")
    if resume is not None and changed:
        raise ConfigError("--resume continues a run as it was begun, in its own folder: leave out --out, --nodes, --rounds and --set")
    return experiment if experiment is not None else Path(str(resume)) / "experiment.yaml"


@contextmanager
def of_file(path: Path) -> Iterator[None]:
    """Name the file in errors that are found after it was read."""
    try:
        yield
    except ConfigError as error:
        if error.place is not None:
            raise
        raise ConfigError(error.findings, str(path)) from error


@contextmanager
def _of_faults(path: Path | None) -> Iterator[None]:
    """Name the file of the faults in errors on what it says."""
    try:
        yield
    except ConfigError as error:
        if path is None or error.place != "faults":
            raise
        raise ConfigError(error.findings, str(path)) from error


def overrides_from(nodes: int | None, rounds: int | None, assignments: list[str] | None) -> dict[str, Any]:
    """Values that --nodes, --rounds and --set ask for, by dotted key."""
    from p2pfl.experiment.loading import parse_assignment

    overrides = dict(parse_assignment(text) for text in assignments or [])
    if nodes is not None:
        overrides["nodes"] = nodes
    if rounds is not None:
        overrides["rounds"] = rounds
    return overrides


def _say_plan(
    experiment: Path, overrides: Mapping[str, Any], allow_tasks: Collection[str], *, as_json: bool, simulated: bool, recorded: bool
) -> None:
    import torch

    from p2pfl.experiment.loading import recorded_experiment, resolve
    from p2pfl.experiment.plan import load_sites, make_plan
    from p2pfl.topology import describe, is_spectrum_quick
    from p2pfl.yaml_files import dump_yaml, load_yaml

    with of_file(experiment):
        resolved = recorded_experiment(load_yaml(experiment), str(experiment)) if recorded else resolve(experiment, overrides)
        plan = make_plan(resolved, load_sites(resolved, allow_tasks=allow_tasks))
    graph = describe(plan.topology) if is_spectrum_quick(plan.topology) else None
    facts: dict[str, Any] = {
        "nodes": list(plan.names),
        "parameters": plan.layout.size,
        "bytes_per_model": plan.layout.shared_bytes,
        "bytes_per_round": plan.layout.shared_bytes * len(plan.topology.senders),
        "population_bytes": len(plan.names) * plan.layout.size_bytes,
        "topology": graph,
        "most_rounds": resolved.last_possible_round,
    }
    said = [
        f"{len(plan.names)} nodes: {', '.join(plan.names[:8])}{', ...' if len(plan.names) > 8 else ''}",  # noqa: PLR2004
        f"{plan.layout.size:,} parameters, {plan.layout.shared_bytes:,} bytes a model, {facts['bytes_per_round']:,} bytes a round in all",
    ]
    if graph is not None:
        gap, rounds = f"spectral gap {graph['spectral_gap']:.6f}", f"about {graph['rounds_to_1e-6']} rounds to 1e-6"
        said.append(f"{gap}, {rounds}, diameter {graph['diameter']}")
    said.append(f"at most {resolved.last_possible_round} rounds")
    if simulated:
        from p2pfl.simulator.forecast import forecast_memory, forecast_seconds
        from p2pfl.simulator.sharding.ranks import ranks_here, started
        from p2pfl.simulator.sharding.shard import partition_record

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        ranks = started()[1]
        memory, seconds = forecast_memory(plan, ranks, ranks_here()), forecast_seconds(plan, threads) / ranks
        facts |= {"memory": asdict(memory), "seconds": seconds}
        if ranks > 1:
            parts = facts["parts"] = partition_record(plan.topology, ranks)
            sizes, links = f"{min(parts['nodes']):,} to {max(parts['nodes']):,} nodes", f"{plan.topology.num_edges:,} links between ranks"
            said.append(f"{parts['ranks']} ranks of {sizes}, {parts['crossing']:,} of {links}")
        there = f" of {memory.available_bytes / 2**30:,.1f} GiB" if memory.available_bytes is not None else ""
        said.append(f"about {seconds:,.1f} s of training and mixing, {memory.peak_bytes / 2**30:,.2f}{there} of memory")
    else:
        from p2pfl.node.memory import forecast_node
        from p2pfl.node.site import SPILL_MB

        busiest = max(plan.names, key=lambda name: len(plan.neighbours(name)))
        node = forecast_node(plan, plan.population([busiest]), len(plan.neighbours(busiest)), spill_mb=SPILL_MB)
        facts["memory"] = {**asdict(node), "peak_bytes": node.peak_bytes, "models": node.models}
        said.append(f"memory of a node: {node.text}")
    content = plan.experiment.as_dict()
    shown = json.dumps({"experiment": content, **facts}) if as_json else "\n".join([dump_yaml(content), *said])
    sys.stdout.write(shown + "\n")


def _say_result(run: Run, *, as_json: bool) -> None:
    """Print how a run ended; typer.Exit with code 3, where it was not as agreed."""
    if as_json:
        sys.stdout.write(json.dumps(run.summary, indent=2) + "\n")
    elif run.summary["stop_reason"] != "diverged":
        _say_metrics(run)
    if run.summary["stop_reason"] == "diverged":
        sys.stderr.write(
            f"p2pfl: {run.path} has diverged: at every node the last training became non-finite and was rolled back; "
            "lower optimizer.lr or set optimizer.clip_norm\n"
        )
    say_departures(run.summary)


def say_departures(summary: Mapping[str, Any] | None) -> None:
    """Say on standard error what was not as agreed, a line each.

    Raises:
        typer.Exit: with code 3, where there is anything to say.
    """
    for sentence in departures_in(summary):
        sys.stderr.write(f"p2pfl: not as agreed: {sentence}\n")
    if code := exit_code_of(summary):
        raise typer.Exit(code)


def _say_metrics(run: Run) -> None:
    from p2pfl.cli.terminal import open_console
    from p2pfl.inspector.cells import hospital_table

    console = open_console()
    summary = run.summary
    if summary["metrics"]:
        console.print(hospital_table(summary))
    reason = {"converged": "converged", "rounds": "at its cap of rounds"}.get(summary["stop_reason"], summary["stop_reason"])
    distance = summary["relative_consensus"]
    apart = f", relative consensus distance {distance:.2g}" if distance is not None else ""
    ended = f"{summary['nodes']} nodes, {summary['rounds']} rounds, {reason}{apart}, {summary['bytes_sent']:,} bytes sent"
    console.print(ended, soft_wrap=True)
    if any(event["event"] == EventKind.DIVERGED for event in run.events):
        console.print("where training became non-finite: lower optimizer.lr or set optimizer.clip_norm")
    console.print(f"more: p2pfl inspect {run.path}", soft_wrap=True)


@contextmanager
def _progress(*, enabled: bool) -> Iterator[Progress]:
    """A bar on a terminal; otherwise a line every tenth of the way and every five seconds. Nothing where the output is for a machine."""
    with terminal_bar("round {task.completed}", width=24, enabled=enabled) as show:
        said, said_s = -1, monotonic()

        def tell(round: int, most: int, row: Mapping[str, Any]) -> None:
            nonlocal said, said_s
            if show is not None:
                show(round, most, _note(row))
            elif enabled and (round * 10 // max(most, 1) > said or monotonic() - said_s >= _EVERY_S):
                said, said_s = round * 10 // max(most, 1), monotonic()
                sys.stderr.write(f"round {round}: {_note(row)}\n")
                sys.stderr.flush()

        yield tell


def _note(row: Mapping[str, Any]) -> str:
    """The loss and the disagreement after a round."""
    loss, exact = row.get("loss"), row.get("rms_disagreement")
    bound = row.get("bound_high") if exact is None else exact
    parts = [f"loss {loss:.4f}" if loss is not None else row.get("kind", "")]
    if bound is not None:
        parts.append(f"disagreement {bound:.2e}")
    elif row.get("consensus_distance") is not None:  # at the nodes' own pace only what came of mixing is known
        parts.append(f"consensus distance {row['consensus_distance']:.2e}")
    return ", ".join(part for part in parts if part)
