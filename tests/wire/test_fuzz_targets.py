"""The fuzz targets on their whole corpus: valid inputs, and every input that was once a finding."""

from __future__ import annotations

import pytest

from fuzz.targets import CORPUS, TARGETS, bytes_of, frames_of

INPUTS = [(target, path) for target in TARGETS for path in sorted((CORPUS / target).iterdir())]


@pytest.mark.parametrize(("target", "path"), INPUTS, ids=[f"{target}-{path.name}" for target, path in INPUTS])
def test_an_input_of_the_corpus_gives_no_error_that_is_not_declared(target, path):
    TARGETS[target](path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_no_bytes_give_no_error_that_is_not_declared(target):
    TARGETS[target](b"")


def test_every_target_begins_with_valid_inputs():
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)


def test_messages_survive_the_form_in_which_a_search_changes_them():
    messages = [[b"header"], [b"header", b"payload"], [b"", b"", b""]]
    assert list(frames_of(bytes_of(*messages))) == messages
