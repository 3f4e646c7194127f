"""No file decides which code runs: what a task's name may lead to, and what must be true before anything is imported."""

from __future__ import annotations

import pickle
import shutil
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import dedent

import pytest
import typer

import p2pfl
from p2pfl.cli import app, main
from p2pfl.errors import ConfigError, TaskNotAllowed
from p2pfl.experiment.loading import experiment_from
from p2pfl.experiment.plan import load_sites
from p2pfl.governance.identity import CARD_FILE, Identity
from p2pfl.governance.study import Study
from p2pfl.node.site import SiteFile
from p2pfl.simulator import simulate
from p2pfl.tasks import find_task, load_task
from p2pfl.tasks.permission import find_source
from p2pfl.topology import make, weighted
from p2pfl.yaml_files import dump_yaml, load_yaml

EXPERIMENT = {"name": "lab", "task": {"name": "synthetic-logistic"}, "topology": {"name": "complete"}, "rounds": 1, "baselines": []}
NODES = ("node-0", "node-1")

MODULE = """
from pathlib import Path
import p2pfl
Path({mark!r}).touch()

@p2pfl.task
def stroke(**options):
    return p2pfl.tasks.load_task("synthetic-logistic", nodes=2)

def plain(**options):
    Path({mark!r}).touch()

def main(**options):
    Path({mark!r}).touch()

class Stroke:
    def __init__(self, **options):
        Path({mark!r}).touch()
    run = staticmethod(main)
"""
MODULES = ("module_of_the_current_folder", "module_of_a_distribution")


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (open, (self.place, "w"))


def attacks(marks):
    """What a file's author may write as the task, by what it is; each would leave something in the folder, or take the victim from it."""
    mark = str(marks / "mark")
    return {
        "a shell command": {"name": "os:system", "command": f"touch {mark}"},
        "a command's output": {"name": "subprocess:getoutput", "cmd": f"touch {mark}"},
        "a process": {"name": "subprocess:Popen", "args": ["touch", mark]},
        "source as text": {"name": "timeit:timeit", "stmt": f"open({mark!r}, 'w')", "number": 1},
        "a folder's end": {"name": "shutil:rmtree", "path": str(marks / "victim")},
        "a pickle": {"name": "torch:load", "f": str(marks.parent / "pickle"), "weights_only": False},
        "a console script": {"name": "stroke-tools:stroke-command"},
        "a console script's target": {"name": "module_of_a_distribution:main"},
        "an entry point": {"name": "stroke-tools:stroke"},
        "an entry point's target": {"name": "module_of_a_distribution:stroke"},
        "a module of the current folder": {"name": "module_of_the_current_folder:stroke"},
        "a dotted attribute": {"name": "module_of_the_current_folder:Stroke.run"},
        "a dotted module": {"name": "os.path:os.system", "command": f"touch {mark}"},
        "a builtin": {"name": "builtins:open", "file": mark, "mode": "w"},
        "an import": {"name": "__import__"},
        "a builtin import": {"name": "builtins:__import__"},
        "a relative name": {"name": ".module_of_the_current_folder:stroke"},
        "a parent's module": {"name": "..module_of_the_current_folder:stroke"},
        "a class": {"name": "module_of_the_current_folder:Stroke"},
        "a partial": {"name": "functools:partial", "func": "print"},
        "a script": {"name": "runpy:run_path", "path_name": "module_of_the_current_folder.py"},
    }


ATTACKS = list(attacks(Path("marks")))
MARKED = {"an entry point", "an entry point's target", "a module of the current folder"}
"""What may run once it is allowed."""


@dataclass(frozen=True)
class Lab:
    """The folder from which commands are started, with files that somebody sent."""

    folder: Path

    @property
    def marks(self):
        return self.folder / "marks"

    def assert_untouched(self, what):
        assert [path.name for path in self.marks.iterdir()] == ["victim"], what
        assert not set(MODULES) & sys.modules.keys(), what


@pytest.fixture
def lab(tmp_path, monkeypatch):
    made = Lab(tmp_path)
    (made.marks / "victim").mkdir(parents=True)
    mark = str(made.marks / "mark")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Touch(mark)))
    (tmp_path / f"{MODULES[0]}.py").write_text(MODULE.format(mark=mark))
    installed = tmp_path / "installed"
    (installed / "stroke_tools-1.0.dist-info").mkdir(parents=True)
    (installed / f"{MODULES[1]}.py").write_text(MODULE.format(mark=mark))
    (installed / "stroke_tools-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: stroke-tools\nVersion: 1.0\n")
    (installed / "stroke_tools-1.0.dist-info" / "entry_points.txt").write_text(
        f"[console_scripts]\nstroke-command = {MODULES[1]}:main\n\n"
        f"[p2pfl.tasks]\nstroke = {MODULES[1]}:stroke\nplain = {MODULES[1]}:plain\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(installed)])
    monkeypatch.chdir(tmp_path)
    yield made
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_task_that_nobody_has_allowed_is_refused_before_anything_runs(lab, attack):
    task = attacks(lab.marks)[attack]
    raw = {**experiment_from(EXPERIMENT).as_dict(), "task": task}
    with pytest.raises(ConfigError) as caught:
        find_task(task["name"])
    with pytest.raises(ConfigError):
        load_task(task["name"], **{key: value for key, value in task.items() if key != "name"})
    with pytest.raises(ConfigError):
        load_sites(experiment_from(raw))

    lab.assert_untouched(attack)
    assert str(caught.value).startswith(f"task.name = {task['name']!r}: ")


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack not in MARKED])
def test_what_is_not_marked_as_a_task_is_refused_though_it_is_allowed(lab, attack):
    task = attacks(lab.marks)[attack]
    with pytest.raises(ConfigError) as caught:
        load_task(task["name"], allow_tasks=[task["name"]], **{key: value for key, value in task.items() if key != "name"})

    lab.assert_untouched(attack)
    assert not isinstance(caught.value, TaskNotAllowed)


@pytest.mark.parametrize("attack", sorted(MARKED))
def test_what_is_marked_and_allowed_runs(lab, attack):
    name = attacks(lab.marks)[attack]["name"]

    assert len(load_task(name, allow_tasks=["other:task", name]).sites) == 2
    assert (lab.marks / "mark").exists()


def test_a_refusal_names_the_file_the_value_and_the_remedies(lab, command):
    (lab.folder / "sent.yaml").write_text(dump_yaml({**EXPERIMENT, "task": {"name": "os:system", "command": "true"}}))
    code, said = command("simulate", "sent.yaml")

    assert code == 2
    assert said.startswith("p2pfl: sent.yaml: task.name = 'os:system': nobody has allowed this code to run here; ")
    assert 'allow_tasks: ["os:system"]' in said
    assert "--allow-task os:system" in said


def test_a_file_cannot_allow_its_own_task(lab):
    name = f"{MODULES[0]}:stroke"
    with pytest.raises(TaskNotAllowed):
        load_sites(experiment_from({"task": {"name": name, "allow_tasks": [name]}}))
    with pytest.raises(TaskNotAllowed):
        load_sites(experiment_from({"task": {"name": name}}), {"allow_tasks": [name]})
    with pytest.raises(ConfigError, match=r"allow_tasks = .*unknown key"):
        experiment_from({"task": {"name": name}, "allow_tasks": [name]})

    lab.assert_untouched(name)


# ---- every command


@pytest.fixture
def command(capfd, monkeypatch):
    """Runs a command in this process; its exit code, and all that it said."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["p2pfl", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capfd.readouterr()
        return end.value.code, said.err + said.out

    return run


def commands(group=None, path=()):
    """Every command of the program by its words, as the program itself lists them; hidden ones, too."""
    group = group if group is not None else typer.main.get_command(app)
    for name, one in group.commands.items():
        if hasattr(one, "commands"):
            yield from commands(one, (*path, name))
        else:
            yield " ".join([*path, name])


TAKES_NO_FILE = {
    "topology list": "takes nothing",
    "keys new": "makes files and reads none",
    "node fork-server": "hears its parent, and forks what other commands here are",
    "data fetch": "takes the name of a data set of ours",
    "data list": "takes nothing",
}

LINES = {
    "up": [
        ["sent.yaml", "--out", "fresh"],
        ["sent.yaml", "--dry-run"],
        ["sent.yaml", "--continues", "run", "--out", "fresh"],
        ["--resume", "interrupted"],
        ["--resume", "run"],
    ],
    "chaos": [
        ["sent.yaml", "--plan", "kill", "--out", "fresh"],
        ["sent.yaml", "--faults", "faults.yaml", "--out", "fresh"],
        ["sent.yaml", "--plan", "kill", "--write-plan", "fresh.faults.yaml"],
    ],
    "simulate": [
        ["sent.yaml", "--out", "fresh"],
        ["sent.yaml", "--dry-run"],
        ["--resume", "interrupted"],
        ["--resume", "interrupted", "--dry-run"],
        ["--replay", "run", "--out", "fresh"],
        ["sent.yaml", "--faults", "faults.yaml", "--out", "fresh"],
    ],
    "sweep": [
        ["sent.yaml", "--seeds", 2, "--out", "fresh"],
        ["sent.yaml", "--seeds", 2, "--dry-run"],
        ["sent.yaml", "--seeds", 2, "--out", "sweep"],
    ],
    "inspect": [["run"], ["run", "--json"], ["run", "--html", "fresh.html"], ["run", "--csv", "fresh-csv"], ["interrupted"], ["sweep"]],
    "dashboard": [["run", "--port", "{taken}"]],
    "predict": [["run", "patients.csv", "--node", "node-0"]],
    "topology show": [["sent.yaml"], ["run/topology.json"]],
    "topology compare": [["sent.yaml", "ring"]],
    "topology advise": [["sent.yaml"]],
    "keys show": [["keys"]],
    "keys card": [["--keys", "keys", "--address", "tcp://127.0.0.1:7704"]],
    "keys describe": [["sent.yaml", "--keys", "keys"]],
    "study new": [
        ["sent.yaml", "--card", "keys/card.yaml", "--card", "other/card.yaml", "--out", "fresh.study.yaml"],
        ["sent.yaml", "--card", "keys/card.yaml", "--card", "other/card.yaml", "--out", "fresh.study.yaml", "--continues", "study.yaml"],
    ],
    "study show": [["study.yaml"]],
    "study join": [["study.yaml", "--keys", "keys", "--confirm", "{digest}", "--out", "fresh.site.yaml"]],
    "node start": [["site.yaml"], ["site.yaml", "--start-anew"], ["site.yaml", "--confirm", "{digest}"]],
    "node status": [["site.yaml"]],
    "node egress": [["site.yaml"]],
    "node probe": [["tcp://127.0.0.1:7705", "--site", "site.yaml"]],
    "doctor": [["site.yaml"]],
    "data check": [["site.yaml"], ["site.yaml", "--contract", "sent.yaml"]],
    "data freeze": [["site.yaml"], ["site.yaml", "--contract", "sent.yaml"]],
    "data prepare": [["sent.yaml"], ["sent.yaml", "--from", "sent.yaml"]],
    "stats describe": [["site.yaml", "--contract", "sent.yaml"]],
    "stats glm": [["y ~ x", "site.yaml", "--contract", "sent.yaml"]],
    "stats cox": [["Surv(t, e) ~ x", "site.yaml", "--contract", "sent.yaml"]],
    "stats km": [["Surv(t, e) ~ x", "site.yaml", "--contract", "sent.yaml"]],
    "stats calibration": [["y ~ x", "site.yaml", "--contract", "sent.yaml"]],
    "stats mixed": [["y ~ x", "site.yaml", "--contract", "sent.yaml"]],
    "stats up": [["sent.yaml", "site.yaml"]],
    "stats compare": [["Surv(t, e) ~ x", "site.yaml", "--contract", "sent.yaml"]],
    "stats released": [["site.yaml"]],
    "stats together": [["sent.yaml", "site.yaml"], ["site.yaml", "site.yaml"]],
}
"""What each command can be given that somebody sent."""

NEEDS_THE_TASK = {"up", "chaos", "node egress", "simulate", "sweep", "predict", "keys describe", "node start"}


NOTHING_TO_DO = (["--resume", "run"], ["sent.yaml", "--continues", "run", "--out", "fresh"])
"""Lines that are over before the task is asked for: the run has ended, or is none of daemons."""


def test_every_command_that_takes_a_file_is_attacked_here():
    assert sorted(commands()) == sorted([*LINES, *TAKES_NO_FILE])


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A run's folder, keys and cards, made in good faith."""
    place = tmp_path_factory.mktemp("honest")
    simulate({**EXPERIMENT, "nodes": 2}, out=place / "run")
    for folder, name in (("keys", "node-0"), ("other", "node-1")):
        identity = Identity.new()
        identity.save(place / folder)
        identity.card(name, f"tcp://127.0.0.1:{7700 + len(folder)}", None).save(place / folder / CARD_FILE)
    return place


def send(lab, honest, task):
    """Everything that somebody can send, with one task in all of it; returns the study's digest."""
    from p2pfl.governance.card import Card

    for name in ("run", "keys", "other"):
        shutil.copytree(honest / name, lab.folder / name)
    content = load_yaml(lab.folder / "run" / "experiment.yaml")
    (lab.folder / "run" / "experiment.yaml").write_text(dump_yaml({**content, "task": task}))
    shutil.copytree(lab.folder / "run", lab.folder / "interrupted")
    (lab.folder / "interrupted" / "summary.json").unlink()
    raw = {**EXPERIMENT, "nodes": 2, "task": task}
    (lab.folder / "sent.yaml").write_text(dump_yaml(raw))
    (lab.folder / "faults.yaml").write_text(dump_yaml({"schema": 1, "faults": []}))
    (lab.folder / "sweep").mkdir()
    grid = {"experiment": {"schema": content["schema"], **raw}, "vary": {}, "seeds": [0, 1]}
    (lab.folder / "sweep" / "sweep.yaml").write_text(dump_yaml(grid))
    (lab.folder / "patients.csv").write_text(",".join(f"x-{i}" for i in range(10)) + "\n" + ",".join("0" * 10) + "\n")
    cards = [Card.load(lab.folder / folder / CARD_FILE) for folder in ("keys", "other")]
    graph = replace(weighted(make("complete", 2), "metropolis"), names=NODES)
    study = Study.create({**content, "task": task}, cards, graph)
    study.save(lab.folder / "study.yaml")
    site = {"member": "node-0", "study": "study.yaml", "keys": "keys", "confirmed": study.digest}
    (lab.folder / "site.yaml").write_text(dump_yaml(site))
    return study.digest


QUICK = {"a module of the current folder"}


@pytest.mark.parametrize("attack", [attack if attack in QUICK else pytest.param(attack, marks=pytest.mark.slow) for attack in ATTACKS])
def test_no_command_runs_what_a_file_asks_for(lab, honest, command, attack):
    task = attacks(lab.marks)[attack]
    digest = send(lab, honest, task)
    with socket.create_server(("127.0.0.1", 0)) as taken:  # the dashboard reads its sources, and then finds its port taken
        known = {"{digest}": digest, "{taken}": str(taken.getsockname()[1])}
        for words, lines in LINES.items():
            for line in lines:
                code, said = command(*words.split(), *[known.get(word, word) for word in line])

                lab.assert_untouched(f"{attack}: {words} {line}: {said}")
                assert not [path for path in (lab.folder / "fresh", lab.folder / "state" / "run") if path.exists()]
                if words in NEEDS_THE_TASK and line not in NOTHING_TO_DO:
                    assert (code, f"task.name = {task['name']!r}" in said or "task.name = " in said) == (2, True), f"{words} {line}: {said}"
                for made in lab.folder.glob("fresh*"):
                    shutil.rmtree(made) if made.is_dir() else made.unlink()


def test_a_finished_run_gives_no_model_of_a_task_that_is_not_allowed(lab, honest):
    send(lab, honest, {"name": f"{MODULES[0]}:stroke"})
    with pytest.raises(TaskNotAllowed, match=r"^run/experiment.yaml: task.name = "):
        p2pfl.load("run", "node-0")

    lab.assert_untouched("load")
    assert p2pfl.load("run", "node-0", allow_tasks=[f"{MODULES[0]}:stroke"]).training is False


def test_site_yaml_allows_a_task_and_a_parent_can_leave_that_out(lab, honest, command):
    name = f"{MODULES[0]}:plain"
    send(lab, honest, {"name": name})
    (lab.folder / "site.yaml").write_text((lab.folder / "site.yaml").read_text() + f"allow_tasks: ['{name}']\n")
    code, said = command("node", "start", "site.yaml", "--only-these-tasks")

    assert code == 2
    assert said.startswith("p2pfl: ")
    assert f"study.yaml: task.name = {name!r}: nobody has allowed" in said
    code, said = command("node", "start", "site.yaml")
    assert code == 2
    assert "plain is not marked as a task" in said
    lab.assert_untouched(name)


@pytest.mark.slow
def test_a_folder_that_is_resumed_allows_nothing(lab, honest, command):
    """Its experiment is harmless, its study is not, and its site files allow what the study asks for."""
    name = f"{MODULES[0]}:stroke"
    send(lab, honest, {"name": name})
    content = load_yaml(lab.folder / "interrupted" / "experiment.yaml")
    (lab.folder / "interrupted" / "experiment.yaml").write_text(dump_yaml({**content, "task": {"name": "synthetic-logistic"}}))
    for node, folder in zip(NODES, ("keys", "other"), strict=True):
        home = lab.folder / "interrupted" / "sites" / node
        shutil.copytree(lab.folder / folder, home / "keys")
        site = {**load_yaml(lab.folder / "site.yaml"), "member": node, "study": str(lab.folder / "study.yaml"), "allow_tasks": [name]}
        (home / "site.yaml").write_text(dump_yaml(site))
    code, said = command("up", "--resume", "interrupted")

    lab.assert_untouched(said)
    assert code == 1
    assert f"study.yaml: task.name = {name!r}: nobody has allowed" in said  # of whichever daemon ended first


@pytest.mark.slow
def test_modules_beside_an_experiment_take_the_place_of_none_in_the_processes_that_are_started(lab, command):
    for name in ("json", "numpy", "pydantic", "torch", "typing", "yaml", "zmq"):
        (lab.folder / f"{name}.py").write_text(f"from pathlib import Path\nPath({str(lab.marks / name)!r}).touch()\n")
    (lab.folder / "sent.yaml").write_text(dump_yaml({**EXPERIMENT, "nodes": 2, "stop": None}))
    for words in (["up", "sent.yaml", "--out", "fresh"], ["sweep", "sent.yaml", "--seeds", 2, "--jobs", 1, "--out", "sweep"]):
        code, said = command(*words)

        lab.assert_untouched(f"{words}: {said}")
        assert code == 0, said


def test_a_wrong_name_in_a_list_of_allowed_tasks_is_told(tmp_path):
    (tmp_path / "site.yaml").write_text("member: a\nstudy: s.yaml\nallow_tasks: ['os', 'a.b:c.d', 'fine:name']\n")
    with pytest.raises(ConfigError) as caught:
        SiteFile.load(tmp_path / "site.yaml")

    assert caught.value.findings == (
        "allow_tasks.0 = 'os': expected distribution:entry or module:function",
        "allow_tasks.1 = 'a.b:c.d': expected distribution:entry or module:function",
    )
    with pytest.raises(ConfigError, match="expected a list of names"):
        load_task("nowhere:stroke", allow_tasks="nowhere:stroke")
    with pytest.raises(ConfigError, match=r"allow_tasks: 'os': expected distribution:entry or module:function"):
        load_task("nowhere:stroke", allow_tasks=["os"])


# ---- the mark


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes modules into the current folder, by their paths; they are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)

    def write(**modules):
        for name, source in modules.items():
            path = tmp_path / f"{name.replace('__in__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dedent(source))

    yield write
    for name in set(sys.modules) - before:
        if "ward" in name:
            del sys.modules[name]


BODY = "def stroke(): return p2pfl.tasks.load_task('quadratic')\nimport p2pfl\n"


@pytest.mark.parametrize(
    ("imported", "mark"),
    [
        ("import p2pfl", "p2pfl.task"),
        ("import p2pfl as fl", "fl.task"),
        ("from p2pfl import task", "task"),
        ("from p2pfl import task as mark", "mark"),
        ("from p2pfl.tasks import Site, task", "task"),
        ("from p2pfl import tasks", "tasks.task"),
        ("import p2pfl.tasks", "p2pfl.tasks.task"),
        ("import p2pfl.tasks as of", "of.task"),
    ],
)
def test_the_mark_is_seen_under_every_name_that_it_has(written, imported, mark):
    written(a_ward=f"{imported}\n@{mark}\n{BODY}")

    assert len(load_task("a_ward:stroke", allow_tasks=["a_ward:stroke"]).sites) > 1


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from elsewhere import task\n@task\ndef stroke(): ...\n", "is not marked"),
        ("import p2pfl\np2pfl.task\ndef stroke(): ...\n", "is not marked"),
        ("import p2pfl\n@p2pfl.task()\ndef stroke(): ...\n", "is not marked"),
        ("import p2pfl, functools\n@functools.cache\n@p2pfl.task\ndef stroke(): ...\n", "is not marked"),
        ("import p2pfl\nclass Ward:\n    @p2pfl.task\n    def stroke(): ...\n", "has no function stroke"),
        ("import p2pfl\ndef ward():\n    @p2pfl.task\n    def stroke(): ...\n", "has no function stroke"),
        ("import p2pfl\n@p2pfl.task\nclass stroke: ...\n", "is not a plain function"),
        ("import p2pfl\n@p2pfl.task\nasync def stroke(): ...\n", "is not a plain function"),
        ("import p2pfl\n@p2pfl.task\ndef stroke(): ...\ndef stroke(): ...\n", ":4: stroke is not marked"),
        ("from ward import stroke\n", "has no function stroke"),
        ("stroke = print\n", "has no function stroke"),
        ("", "has no function stroke"),
    ],
)
def test_without_the_mark_on_the_function_itself_nothing_is_imported(written, source, fault):
    written(a_ward=f"{source}raise SystemExit('it ran')\n")
    with pytest.raises(ConfigError, match=fault) as caught:
        load_task("a_ward:stroke", allow_tasks=["a_ward:stroke"])

    assert "@p2pfl.task" in str(caught.value) or "plain function" in str(caught.value)
    assert "a_ward" not in sys.modules


@pytest.mark.parametrize(
    "after",
    [
        "stroke = print",
        "import functools\nstroke = functools.partial(stroke)",
        "import functools\nstroke = functools.wraps(stroke)(lambda: print())",
        "import subprocess\nfrom subprocess import getoutput as stroke",
        "class stroke: ...\ndel stroke\nfrom os import system as stroke",
    ],
)
def test_what_takes_the_place_of_a_marked_function_is_refused(written, after):
    written(a_ward=f"import p2pfl\n@p2pfl.task\ndef stroke(): ...\n{after}\n")
    with pytest.raises(ConfigError, match=r"no longer the function under @p2pfl.task|is not a plain function"):
        load_task("a_ward:stroke", allow_tasks=["a_ward:stroke"])


def test_only_a_function_can_be_marked():
    for value in (print, int, pytest, lambda: None):
        if value.__class__.__name__ == "function":
            assert p2pfl.task(value) is value
        else:
            with pytest.raises(TypeError, match="marks a function"):
                p2pfl.task(value)


# ---- where it lies


def test_the_packages_around_a_module_are_not_imported_to_find_it(written):
    written(
        a_ward__in____init__="raise SystemExit('it ran')\n",
        a_ward__in__deep__in____init__="raise SystemExit('it ran')\n",
        a_ward__in__deep__in__stroke="def stroke(): ...\n",
    )

    assert find_source("a_ward.deep.stroke:stroke").file == Path.cwd() / "a_ward" / "deep" / "stroke.py"
    with pytest.raises(ConfigError, match="is not marked"):
        load_task("a_ward.deep.stroke:stroke", allow_tasks=["a_ward.deep.stroke:stroke"])
    assert not [name for name in sys.modules if name.startswith("a_ward")]


def test_a_module_in_folders_without_init_is_found(written):
    written(b_ward__in__deep__in__stroke=f"import p2pfl\n@p2pfl.task\n{BODY}")

    assert find_source("b_ward.deep.stroke:stroke").file.name == "stroke.py"
    assert len(load_task("b_ward.deep.stroke:stroke", allow_tasks=["b_ward.deep.stroke:stroke"]).sites) > 1


def test_a_name_is_told_with_what_is_missing(written):
    written(c_ward__in____init__="", d_ward="")
    for name, fault in {
        "c_ward.deep:stroke": r"no module c_ward\.deep is",
        "d_ward.deep:stroke": r"no module d_ward\.deep is",
        "sys:stroke": "the module sys has no Python source file",
        "no-such-tools:stroke": r"no installed distribution no-such-tools has an entry point stroke of the group p2pfl\.tasks",
    }.items():
        with pytest.raises(ConfigError, match=fault):
            find_source(name)


def test_an_entry_point_leads_to_its_function_without_an_import(lab):
    found = find_source("stroke-tools:stroke")

    assert (found.module, found.function, found.distribution, found.entry) == (MODULES[1], "stroke", "stroke-tools", "stroke")
    assert found.file == lab.folder / "installed" / f"{MODULES[1]}.py"
    with pytest.raises(ConfigError, match="plain is not marked as a task"):
        load_task("stroke-tools:plain", allow_tasks=["stroke-tools:plain"])
    lab.assert_untouched("entry points")


def test_the_current_folder_is_only_looked_in_where_it_holds_the_module(lab):
    load_task("stroke-tools:stroke", allow_tasks=["stroke-tools:stroke"])

    assert str(lab.folder) not in sys.path


def test_a_file_that_python_does_not_import_is_not_taken_for_the_module(written, tmp_path):
    written(e_ward=f"import p2pfl\n@p2pfl.task\n{BODY}")
    name = "e_ward:stroke"
    load_task(name, allow_tasks=[name])
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "e_ward.py", tmp_path / "other" / "e_ward.py")
    sys.path.insert(0, str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="rename one of them"):
        load_task(name, allow_tasks=[name])
