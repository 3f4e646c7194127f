"""docs/security.md: each promise names a test that exists, each limit a reason."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(test_\w+\.py)(?:::(test_\w+))?`")
PROMISES = re.findall(
    r"^\d+\. (?:.*\n)(?:   .*\n)*", PAGE.partition("## What is promised")[2].partition("## What is not promised")[0], re.MULTILINE
)


FILES = {path.name: path for path in TESTS.rglob("test_*.py")}


def names_in(name):
    found = ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8")))
    return {node.name for node in found if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(("file", "test"), sorted(set(NAMED.findall(PAGE))))
def test_a_test_that_is_named_is_there(file, test):
    assert file in FILES
    assert not test or test in names_in(file)


def test_each_promise_names_a_test():
    assert len(PROMISES) >= 18
    assert [promise for promise in PROMISES if not NAMED.search(promise)] == []


def test_each_limit_has_its_reason():
    rows = re.findall(r"^\| (.*) \|$", PAGE.partition("## What is not promised")[2], re.MULTILINE)[2:]
    assert len(rows) >= 15
    assert [row for row in rows if not all(len(cell.strip()) > 20 for cell in row.split(" | ")) or row.count(" | ") != 1] == []


def test_whoever_looks_for_it_finds_it():
    assert "docs/security.md" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "docs/security.md" in readme
    assert "SECURITY.md" in readme
