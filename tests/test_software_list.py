"""The list of software that is released with p2pfl: what it keeps, and what it is refused for."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("sbom", ROOT / "release" / "sbom.py")
sbom = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sbom)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDS = {"torch": ["sympy"], "sympy": ["mpmath"], "matplotlib": ["pillow", "sympy"], "pytest": ["pluggy"]}


def listed(*names):
    return {
        "metadata": {"component": {"bom-ref": "root"}},
        "components": [{"name": name, "bom-ref": f"{name}==1"} for name in names],
        "dependencies": [],
    }


def test_what_only_extras_need_is_optional_and_what_only_tests_need_is_left_out():
    bom = listed("torch", "sympy", "mpmath", "matplotlib", "pillow", "pytest", "pluggy")
    found = sbom.reduced(bom, {"torch"}, {"matplotlib"}, lambda name: NEEDS.get(name, []))
    assert {part["name"]: part["scope"] for part in found["components"]} == {
        "torch": "required",
        "sympy": "required",
        "mpmath": "required",
        "matplotlib": "optional",
        "pillow": "optional",
    }
    assert found["dependencies"][0] == {"ref": "root", "dependsOn": ["matplotlib==1", "torch==1"]}
    assert {"ref": "matplotlib==1", "dependsOn": ["pillow==1", "sympy==1"]} in found["dependencies"]


def test_a_list_that_lacks_a_dependency_is_refused():
    with pytest.raises(ValueError, match="lacks torch"):
        sbom.reduced(listed("numpy"), {"torch", "numpy"}, set(), lambda _: [])


def test_every_dependency_of_the_project_is_asked_for_and_those_of_all_extras():
    core = sbom.requirements(PROJECT)
    assert core == {canonicalize_name(text.partition(">=")[0]) for text in PROJECT["dependencies"]}
    assert {"matplotlib", "nicegui", "tensorboard"} <= sbom.requirements(PROJECT, "all")
    assert not {"pytest", "ruff", "ray"} & sbom.requirements(PROJECT, "all")
