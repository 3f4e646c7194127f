"""docs/design.md: its rooms are those of the package, and its pictures are the code's own imports; every page: its links lead somewhere."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from test_layers import PACKAGE, ROWS, imports_of

PAGES = [*sorted(PACKAGE.parent.glob("*.md")), *sorted((PACKAGE.parent / "docs").glob("*.md"))]
PAGE = (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^([a-z_/]+\.py) +(?:\S+ )+? +([a-z_/]+\.py)$", PAGE, re.MULTILINE)


def test_the_table_of_rooms_is_that_of_the_layers():
    table = [
        set(re.split(r" · ", row)) for row in re.findall(r"^\| ([a-z]+(?: · [a-z]+)*) \| ", PAGE.partition("## Rooms")[2], re.MULTILINE)
    ]

    assert [rooms for rooms in table if rooms != {"rooms"}] == [
        rooms for rooms in reversed(ROWS) if not rooms & {"errors", "params", "__main__"}
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_is_there(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))

    assert [link for link in links if not (page.parent / link).exists()] == []


def test_there_are_pictures():
    assert len(STEPS) >= 20


@pytest.mark.parametrize(("above", "below"), STEPS, ids=str)
def test_a_step_of_a_picture_is_an_import_of_the_code(above, below):
    name = "p2pfl." + below.removesuffix(".py").replace("/", ".")
    imported = imports_of(Path(above))
    room = import_module(name.rpartition(".")[0])

    is_re_exported = room.__name__ in imported and name in {
        getattr(getattr(room, each), "__module__", None) for each in getattr(room, "__all__", ())
    }
    assert name in imported or is_re_exported
