"""The result contract: what a study binds of code and versions, and what a site does that differs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
import zipfile
from contextlib import ExitStack
from hashlib import sha256
from importlib.machinery import PathFinder
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from networks import Institutions, Network, averaging, finish, until
from p2pfl.draws import Purpose, epoch_orders, shuffled, torch_seed
from p2pfl.errors import ConfigError
from p2pfl.experiment.loading import experiment_from, load_study
from p2pfl.governance.result_contract import ARITHMETIC_REVISION, AgreedTask, ResultContract, accepted, differences, public
from p2pfl.governance.study import Study
from p2pfl.launcher.founding import check_result_contract, found_network
from p2pfl.launcher.network import up
from p2pfl.node.own_contract import contract_here
from p2pfl.node.site import SiteFile
from p2pfl.node.start import start
from p2pfl.runs.folder import RunFolder
from p2pfl.simulator import simulate
from p2pfl.tasks.provenance import distribution_of, source_digest, task_code
from p2pfl.wire.messages import SCHEMA
from p2pfl.yaml_files import dump_yaml, load_yaml

SOURCES = {
    "hospital_code/__init__.py": "raise RuntimeError('nobody may import this')\n",
    "hospital_code/heart.py": "import p2pfl\n\n\ndef make():\n    return 1\n",
    "hospital_code/inner/__init__.py": "",
    "hospital_code/inner/deep.py": "VALUE = 2\n",
}
AGREED = ResultContract(p2pfl="0.1.0", wire=4, arithmetic=1, torch="2.12")


def write(folder, sources, end="\n"):
    for path, text in sources.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.replace("\n", end).encode())
    return folder


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """A folder on the path of imports, and a clean list of what was imported."""
    folder = tmp_path / "on-path"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(tmp_path)
    yield folder
    assert not [name for name in sys.modules if name.partition(".")[0] in {"hospital_code", "lone", "wards"}]


def install_wheel(folder, sources, distribution="hospital-code"):
    """A wheel, made and unpacked as an installer does it."""
    wheel = folder.parent / "made-1.0-py3-none-any.whl"
    meta = f"{distribution.replace('-', '_')}-1.0.dist-info"
    texts = {**sources, f"{meta}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"}
    texts[f"{meta}/RECORD"] = "".join(f"{path},,\n" for path in [*texts, f"{meta}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as file:
        for path, text in texts.items():
            file.writestr(path, text)
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)


class EditableFinder:
    """As setuptools installs one for a project whose packages have other names than their folders."""

    def __init__(self, mapping):
        self.mapping = mapping

    def find_spec(self, name, path=None, target=None):
        folder = self.mapping.get(name)
        return None if folder is None else PathFinder.find_spec(folder.name, [str(folder.parent)]) and self._spec(name, folder)

    def _spec(self, name, folder):
        from importlib.util import spec_from_file_location

        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


def install_editable(on_path, project, monkeypatch, distribution="hospital-code"):
    meta = f"{distribution.replace('-', '_')}-1.0.dist-info"
    write(
        on_path,
        {
            f"{meta}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n",
            f"{meta}/RECORD": f"{meta}/METADATA,,\n",
            f"{meta}/direct_url.json": json.dumps({"url": project.as_uri(), "dir_info": {"editable": True}}),
        },
    )
    monkeypatch.setattr(sys, "meta_path", [EditableFinder({"hospital_code": project / "src"}), *sys.meta_path])


def test_a_wheel_an_editable_install_and_a_folder_give_the_same_digest(on_path, tmp_path, monkeypatch):
    install_wheel(on_path, SOURCES)
    (on_path / "hospital_code" / "__pycache__").mkdir()
    (on_path / "hospital_code" / "__pycache__" / "heart.cpython-311.pyc").write_bytes(b"x")
    wheel = task_code("hospital_code.heart:make")
    for path in [on_path / "hospital_code", on_path / "hospital_code-1.0.dist-info"]:
        path.rename(tmp_path / f"was-{path.name}")
    project = write(tmp_path / "project", {path.replace("hospital_code/", "src/"): text for path, text in SOURCES.items()}, "\r\n")
    (project / "src" / ".ipynb_checkpoints").mkdir()
    (project / "src" / ".ipynb_checkpoints" / "heart-checkpoint.py").write_text("old")
    install_editable(on_path, project, monkeypatch)
    editable = task_code("hospital_code.heart:make")
    monkeypatch.undo()
    here = write(tmp_path / "here", SOURCES)
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend("nowhere")
    folder = task_code("hospital_code.heart:make")

    assert wheel is not None
    assert wheel.distribution == "hospital-code"
    assert editable == wheel
    assert folder == dataclasses.replace(wheel, distribution=None)


def test_an_entry_point_is_the_code_that_it_leads_to(on_path):
    points = "[p2pfl.tasks]\nheart = hospital_code.heart:make\n"
    install_wheel(on_path, {**SOURCES, "hospital_code-1.0.dist-info/entry_points.txt": points})

    assert task_code("hospital-code:heart") == dataclasses.replace(task_code("hospital_code.heart:make"), name="hospital-code:heart")
    assert task_code("hospital-code:heart").distribution == "hospital-code"


@pytest.mark.parametrize("path", SOURCES)
def test_any_changed_file_of_the_package_changes_the_digest(on_path, path):
    write(on_path, SOURCES)
    before = task_code("hospital_code.heart:make")
    write(on_path, {path: SOURCES[path] + "# changed\n"})

    assert task_code("hospital_code.heart:make").source != before.source


def test_a_new_and_a_renamed_file_change_the_digest(on_path):
    write(on_path, SOURCES)
    digests = {task_code("hospital_code.heart:make").source}
    write(on_path, {"hospital_code/more.py": ""})
    digests.add(task_code("hospital_code.heart:make").source)
    (on_path / "hospital_code" / "more.py").rename(on_path / "hospital_code" / "most.py")
    digests.add(task_code("hospital_code.heart:make").source)
    write(on_path, {"hospital_code/notes.txt": "not code", "beside.py": "not of the package"})
    digests.add(task_code("hospital_code.heart:make").source)

    assert len(digests) == 3


def test_a_single_module_is_its_own_file(on_path):
    write(on_path, {"lone.py": "A = 1\n", "other.py": "B = 2\n"})
    before = task_code("lone:make")
    write(on_path, {"other.py": "B = 3\n"})

    assert task_code("lone:make") == before
    write(on_path, {"lone.py": "A = 2\n"})
    assert task_code("lone:make") != before


def test_a_namespace_is_left_out_because_others_put_files_there(on_path):
    write(on_path, {"wards/heart/__init__.py": "", "wards/heart/task.py": "A = 1\n", "wards/lung/__init__.py": ""})
    before = task_code("wards.heart.task:make")
    write(on_path, {"wards/lung/__init__.py": "CHANGED = 1\n"})

    assert task_code("wards.heart.task:make") == before
    write(on_path, {"wards/heart/__init__.py": "CHANGED = 1\n"})
    assert task_code("wards.heart.task:make") != before


def test_the_digest_of_given_files_is_fixed(tmp_path):
    write(tmp_path, {"lone.py": "A = 1\r\nB = 2\r"}, "\n")
    content = sha256(b"A = 1\nB = 2\n").hexdigest()

    assert source_digest("lone", tmp_path / "lone.py") == sha256(f'p2pfl task source v1\0[["lone.py","{content}"]]'.encode()).hexdigest()
    write(tmp_path, SOURCES)
    assert (
        source_digest("hospital_code.heart", tmp_path / "hospital_code" / "heart.py")
        == "a941c7e524d68c1cb9aa445a726ea3c42c37ae2be0cde974a2ef92f434827782"
    )  # other people's studies hold it: it must never change


def test_built_in_tasks_are_covered_by_the_arithmetic_revision():
    assert task_code("heart-disease") is None
    assert task_code("p2pfl.tasks.medical:heart_disease") is None


@pytest.mark.parametrize("name", ["nowhere_at_all:task", "sys:exit", "hospital_code.missing:task", "math:sqrt", ":x", "", "..:x"])
def test_code_without_python_source_is_refused_in_a_sentence(on_path, name):
    write(on_path, SOURCES)

    with pytest.raises(ConfigError, match=r"task\.name = "):
        task_code(name)


def test_a_folder_on_the_path_is_of_no_distribution(on_path):
    write(on_path, SOURCES)

    assert distribution_of(on_path / "hospital_code" / "heart.py") is None


# ---- comparing


def test_the_contract_of_this_machine():
    here = contract_here("averaging")

    assert (here.wire, here.arithmetic, here.task) == (SCHEMA, ARITHMETIC_REVISION, None)
    assert importlib.metadata.version("torch").startswith(here.torch + ".")
    assert contract_here("nowhere_at_all:task").task == AgreedTask(name="nowhere_at_all:task")


@pytest.mark.parametrize(("version", "shown"), [("2.12.0+cpu", "2.12"), ("2.13.1", "2.13"), ("2.14.0.dev20260101+cu130", "2.14")])
def test_the_local_part_of_a_version_does_not_count(version, shown):
    assert public(version) == shown


def with_task(**changes):
    return dataclasses.replace(AGREED, task=AgreedTask(**{"name": "a:b", "distribution": "one", "source": "ab" * 32, **changes}))


@pytest.mark.parametrize(
    ("agreed", "here", "kind", "words"),
    [
        (AGREED, dataclasses.replace(AGREED, torch="2.13"), "torch", "torch 2.13 here, 2.12 in the study: install torch 2.12, "),
        (AGREED, dataclasses.replace(AGREED, wire=5), "wire", "wire schema 5 here (p2pfl 0.1.0), 4 in the study: install p2pfl-mesh 0.1.0"),
        (AGREED, dataclasses.replace(AGREED, arithmetic=2), "arithmetic", "arithmetic revision 2 here (p2pfl 0.1.0), 1 in the study: "),
        (with_task(), with_task(source="cd" * 32), "task", "task 'a:b': source cdcdcdcdcdcdcdcd… here, abababababababab… in the study: "),
        (with_task(), with_task(distribution="two"), "task", "task 'a:b': from distribution two here, one in the study: install one"),
        (AGREED, with_task(), "task", "task 'a:b' is not built in here, and is in the study: "),
        (with_task(), AGREED, "task", "task 'a:b' is not built in in the study, and is here: "),
    ],
)
def test_a_difference_is_named_with_its_remedy(agreed, here, kind, words):
    (found,) = differences(agreed, here)

    assert found.kind == kind
    assert str(found).startswith(words)
    assert str(found).endswith(f"accept_differences: [{kind}] in site.yaml, or --accept-difference {kind}")


@pytest.mark.parametrize(
    ("agreed", "here"),
    [
        (AGREED, dataclasses.replace(AGREED, p2pfl="9.9.9")),
        (with_task(), with_task(distribution=None)),
        (with_task(source=None), with_task()),
    ],
)
def test_what_does_not_change_results_is_no_difference(agreed, here):
    assert differences(agreed, here) == []


def test_a_site_accepts_by_kind():
    found = differences(AGREED, dataclasses.replace(AGREED, torch="2.13", wire=5))

    with pytest.raises(ConfigError) as refused:
        accepted(found, ["torch"], "site.yaml")
    assert [finding.split(" ")[0] for finding in refused.value.findings] == ["wire"]
    assert accepted(found, ["torch", "wire"], "site.yaml") == found


# ---- in a study


@pytest.fixture
def site(tmp_path):
    with Institutions(averaging({"name": "path"}, 2), tmp_path) as institutions:
        yield institutions.site("node-0")


def bind(site, **changes):
    """The site's study with a result contract, confirmed."""
    path = site.parent / "bound.yaml"
    study = load_study(site.parent / load_yaml(site)["study"])
    study = study.with_result_contract(dataclasses.replace(contract_here(study.task_name), **changes))
    path.write_text(dump_yaml(study.as_dict()), encoding="utf-8")
    site.write_text(dump_yaml({**load_yaml(site), "study": path.name, "confirmed": study.digest}), encoding="utf-8")
    return study


def test_a_study_with_a_result_contract_survives_its_file(site):
    made = bind(site)

    assert load_study(site.parent / "bound.yaml") == made
    assert made.schema == 3
    assert made.result_contract == contract_here("averaging")


def test_the_digest_binds_every_field_of_the_result_contract(site):
    made = bind(site)
    content = made.as_dict()
    values = {"p2pfl": "9.9", "wire": 99, "arithmetic": 99, "torch": "9.9"}
    digests = {
        Study.from_mapping({**content, "result_contract": {**content["result_contract"], key: value}}, "x").digest
        for key, value in values.items()
    }

    assert len(digests | {made.digest}) == 5


def test_a_study_without_a_result_contract_keeps_its_digest(site):
    old = load_study(site.parent.parent / "study.yaml")

    assert "result_contract" not in old.as_dict()
    assert old.schema == 1
    with pytest.raises(ConfigError, match=r"schema = 3: .*; expected 1"):
        Study.from_mapping({**old.as_dict(), "schema": 3}, "x")


def test_a_result_contract_is_that_of_the_experiments_task(site):
    content = bind(site).as_dict()
    content["result_contract"]["task"] = {"name": "other:task"}

    with pytest.raises(ConfigError, match=r"result_contract\.task\.name = 'other:task': expected 'averaging'"):
        Study.from_mapping(content, "x")


def test_a_node_does_not_start_with_another_torch(site):
    bind(site, torch="1.99", wire=SCHEMA + 1)

    with pytest.raises(ConfigError) as refused:
        start(site)
    assert [finding.split(" here")[0] for finding in refused.value.findings] == [
        f"wire schema {SCHEMA}", f"torch {contract_here('averaging').torch}"
    ]  # fmt: skip
    assert not (site.parent / "state" / "run").exists()


def test_another_torch_is_refused_before_any_code_of_the_task_runs(site, monkeypatch):
    bind(site, torch="1.99")
    monkeypatch.setattr("p2pfl.node.start.load_sites", lambda *_, **__: pytest.fail("the task was made"))

    with pytest.raises(ConfigError, match=r"torch .* here, 1\.99 in the study"):
        start(site)


def test_a_difference_may_be_accepted_where_the_node_is_started(site):
    bind(site, torch="1.99", wire=SCHEMA + 1)

    with pytest.raises(ConfigError) as refused:
        start(site, accept_differences=["torch"])
    assert len(refused.value.findings) == 1
    assert refused.value.findings[0].startswith("wire schema")


@pytest.fixture
def interrupted(tmp_path):
    """The folder of a run of `up`, as far as what its institutions agreed on."""
    plan = averaging({"name": "path"}, 2)
    RunFolder.create(tmp_path / "run", plan.experiment.as_dict(), topology=plan.graph_record(), engine="daemons")
    with ExitStack() as stack:
        found_network(plan, tmp_path / "run", stack, {})
    return tmp_path / "run"


def test_up_makes_a_study_with_a_result_contract(interrupted):
    assert load_study(interrupted / "study.yaml").result_contract == contract_here("averaging")


def test_a_run_that_is_resumed_with_another_torch_is_refused_before_any_daemon_starts(interrupted, monkeypatch):
    other = dataclasses.replace(contract_here("averaging"), torch="1.99")
    monkeypatch.setattr("p2pfl.node.own_contract.contract_here", lambda _: other)
    monkeypatch.setattr("p2pfl.launcher.network.ForkServer", lambda: pytest.fail("daemons were started"))
    monkeypatch.setattr("p2pfl.launcher.network.load_sites", lambda *_, **__: pytest.fail("the task was made"))

    with pytest.raises(ConfigError, match=r"torch 1\.99 here, .* in the study: .*--accept-difference torch"):
        up("", resume=interrupted)


def test_a_resumed_run_accepts_a_difference_in_every_site_file(interrupted, monkeypatch):
    other = dataclasses.replace(contract_here("averaging"), torch="1.99")
    monkeypatch.setattr("p2pfl.node.own_contract.contract_here", lambda _: other)
    check_result_contract(interrupted, ["torch"])
    sites = [SiteFile.load(path) for path in sorted((interrupted / "sites").glob("*/site.yaml"))]

    assert [site.accept_differences for site in sites] == [("torch",)] * 2
    check_result_contract(interrupted, [])


def test_a_difference_that_a_site_accepts_goes_on_record_once(tmp_path):
    found = differences(AGREED, dataclasses.replace(AGREED, torch="2.13"))

    async def run():
        async with Network(averaging({"name": "path"}, 2), tmp_path) as network:
            network.start("node-0", accepted_differences=found)
            network.start("node-1")
            events = network.states["node-0"] / "run" / "events.jsonl"
            await until(lambda: events.exists() and "difference_accepted" in events.read_text())
            await network.kill("node-0")
            network.start("node-0", accepted_differences=found)
            await network.ended()
            return network

    network = finish(run())
    record = {"node": "node-0", "kind": "torch", "detail": "torch 2.13 here, 2.12 in the study"}

    assert network.events("node-0").count("difference_accepted") == 1
    assert network.summary("node-0")["accepted_differences"] == [record]
    assert network.summary("node-0")["departures"] == []
    assert "accepted_differences" not in network.summary("node-1")


# ---- the arithmetic revision

PINNED = {
    1: {
        "logistic": [-0.7121269049740692, 2.649889839252537],
        "momentum": [23.413392475937503, 46.87053288478401],
        "compressed": [27.441998604932024, 33.29669133111742],
        "partitioned": [-31.04118194728644, 18.610535628077486],
        "shuffled": [6, 5, 2, 4, 0, 1, 7, 3],
        "orders": [[[4, 0, 3, 2, 1], [0, 3, 1, 4, 2]], [[2, 0, 1, 3, 4], [0, 1, 3, 2, 4]]],
        "seed": 1073881907642574011,
    },
}
"""What some small runs end with, by revision. Keep those of earlier revisions: a number is never used twice."""

RUNS = {
    "logistic": {"task": {"name": "synthetic-logistic", "features": 3}, "algorithm": {"name": "dpsgd", "local_steps": 2, "batch_size": 4}},
    "momentum": {
        "task": {"name": "quadratic", "dimension": 3},
        "algorithm": {"name": "qg-dsgdm", "local_steps": 2},
        "optimizer": {"lr": 0.05, "momentum": 0.9},
    },
    "compressed": {
        "task": {"name": "quadratic", "dimension": 6},
        "algorithm": {"name": "choco"},
        "compressor": {"name": "random-k", "share": 0.5},
    },
    "partitioned": {"task": {"name": "breast-cancer"}, "partition": {"name": "dirichlet", "alpha": 0.5}, "optimizer": {"name": "adam"}},
}


def results_of(name):
    """The sum of the final models, and of their squares, in float64."""
    plan = {"nodes": 4, "rounds": 3, "dtype": "float64", "stop": None, "baselines": [], "seed": 7, "compiled": "off", **RUNS[name]}
    with TemporaryDirectory() as folder:
        x_NP = torch.stack(list(simulate(experiment_from(plan), out=Path(folder) / "run").models.values()))
    return [float(x_NP.sum()), float((x_NP**2).sum())]


MEANT = (
    "Results have changed. If that is meant, raise ARITHMETIC_REVISION in p2pfl/governance/result_contract.py by one, and pin "
    "the new results here under the new number, so that no study mixes both."
)


@pytest.mark.parametrize("name", RUNS)
def test_the_arithmetic_revision_is_raised_where_results_change(name):
    assert results_of(name) == pytest.approx(PINNED[ARITHMETIC_REVISION][name], rel=1e-9, abs=1e-9), MEANT


def test_the_arithmetic_revision_is_raised_where_draws_change():
    pinned = PINNED[ARITHMETIC_REVISION]
    orders = epoch_orders(7, torch.tensor([0, 3]), torch.tensor([5, 4]), torch.tensor([[0, 1], [2, 3]]))

    assert shuffled(7, Purpose.PARTNER, 8, node=2, round=3) == pinned["shuffled"], MEANT
    assert orders.tolist() == pinned["orders"], MEANT
    assert torch_seed(7, Purpose.MODEL, node=1) == pinned["seed"], MEANT


def test_every_revision_up_to_the_current_one_is_pinned():
    assert sorted(PINNED) == list(range(1, ARITHMETIC_REVISION + 1))
