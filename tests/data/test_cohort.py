"""A commitment binds a site to its rows and tells nobody who is in them; frozen rows stay, later ones are ignored, changed ones stop."""

import hmac
import json
import stat
from hashlib import sha256

import numpy as np
import pytest
from contracts import HEADER, ROWS, contract, site, table_of
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.data.check import CheckedTable, accepted_table
from p2pfl.data.cohort import Freeze, changed_lines, commit, freeze, frozen_rows
from p2pfl.errors import ConfigError, DataError

KEY = bytes(range(32))
LATER = "p0,40,5,M,2022-12-24,0"
SEVERAL = contract(rows="several-per-patient")


@pytest.fixture
def read(tmp_path):
    def table(*rows, agreed=SEVERAL):
        return accepted_table(table_of(tmp_path, "\n".join([HEADER, *rows]), agreed), agreed, site())

    return table


def test_a_commitment_is_an_hmac_that_anybody_with_the_key_can_compute(read):
    found = commit(read("p1,60,5.5,F,2020-02-29,0", "p3,NA,,2,2020-02-29,0"), SEVERAL, KEY)

    names = ["admitted", "age", "died", "glucose", "glucose.absent", "patient", "sex"]
    rows = [[18321.0, 60.0, 0.0, 5.5, 0.0, "p1", "female"], [18321.0, None, 0.0, None, 0.0, "p3", "female"]]
    digests = [sha256(json.dumps([names, row], separators=(",", ":")).encode()).hexdigest() for row in rows]
    message = json.dumps([SEVERAL.digest, 2, 2, [["p1", digests[0]], ["p3", digests[1]]]], separators=(",", ":")).encode()
    assert found.hmac == hmac.new(KEY, b"p2pfl cohort 1 commitment\n" + message, sha256).hexdigest()
    assert found.as_dict() == {"contract": SEVERAL.digest, "rows": 2, "patients": 2, "hmac": found.hmac}


def test_the_order_of_rows_and_their_spelling_do_not_count(read):
    before = commit(read(*ROWS), SEVERAL, KEY)

    assert commit(read(*reversed(ROWS)), SEVERAL, KEY) == before
    assert commit(read(*[row.replace("5.5", "5.50").replace(",2,", ",F,") for row in ROWS]), SEVERAL, KEY) == before


@pytest.mark.parametrize(("old", "new"), [("60", "61"), ("p1", "p4"), ("F", "M"), ("NA", "50"), ("2020-02-29", "2020-03-01"), ("5.5", "")])
def test_any_other_value_is_another_commitment(read, old, new):
    assert commit(read(*ROWS), SEVERAL, KEY).hmac != commit(read(*[row.replace(old, new) for row in ROWS]), SEVERAL, KEY).hmac


def test_another_key_and_another_contract_are_another_commitment(read):
    others = [commit(read(*ROWS), SEVERAL, KEY), commit(read(*ROWS), SEVERAL, KEY[::-1]), commit(read(*ROWS), contract(), KEY)]

    assert len({each.hmac for each in others}) == 3
    with pytest.raises(ValueError, match="a key of 31 bytes: at least 32 are needed"):
        commit(read(*ROWS), SEVERAL, KEY[:31])


def test_a_freeze_is_kept_in_a_file_without_a_patient(read, tmp_path):
    path, frozen = tmp_path / "freeze.json", freeze(read(*ROWS), SEVERAL, KEY)

    frozen.save(path)

    assert Freeze.load(path) == frozen
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [word for word in ("p1", "female", "5.5", "18321") if f'"{word}"' in path.read_text()] == []
    assert sorted(each.name for each in tmp_path.iterdir()) == ["freeze.json", "table.csv"]
    with pytest.raises(ConfigError, match="exists: the rows are frozen already"):
        frozen.save(path)


def test_later_rows_are_ignored_and_the_frozen_order_stays(read):
    frozen = freeze(read(*ROWS), SEVERAL, KEY)

    rows, num_later = frozen_rows(read(LATER, *reversed(ROWS), "p1,61,6,F,2022-01-01,1"), frozen, SEVERAL, KEY)

    assert (rows.patients, num_later) == (("p1", "p2", "p3"), 2)
    np.testing.assert_array_equal(rows.columns["age"], [60.0, 71.0, np.nan])
    assert commit(rows, SEVERAL, KEY) == frozen.commitment


REMEDY = "restore them, or freeze the rows anew and tell the other institutions"


@pytest.mark.parametrize(
    ("rows", "sentence", "lines"),
    [
        ([ROWS[0].replace("60", "61"), *ROWS[1:]], f"of 3 frozen rows 1 has changed: {REMEDY}", (2,)),
        ([*ROWS[1:], LATER], f"of 3 frozen rows 1 has gone: {REMEDY}", ()),
        ([ROWS[2], ROWS[1].replace(",M,", ",F,")], f"of 3 frozen rows 1 has changed and 1 has gone: {REMEDY}", (3,)),
        ([LATER], f"of 3 frozen rows 3 have gone: {REMEDY}", ()),
    ],
)
def test_a_frozen_row_that_changed_or_went_stops_with_a_sentence(read, rows, sentence, lines):
    frozen, now = freeze(read(*ROWS), SEVERAL, KEY), read(*rows)

    with pytest.raises(DataError) as caught:
        frozen_rows(now, frozen, SEVERAL, KEY)

    assert list(caught.value.findings) == [sentence]
    assert changed_lines(now, frozen, KEY) == lines


def test_equal_rows_are_counted(read):
    frozen = freeze(read(ROWS[0], ROWS[0]), SEVERAL, KEY)

    assert frozen_rows(read(ROWS[0], ROWS[0], ROWS[0]), frozen, SEVERAL, KEY)[1] == 1
    with pytest.raises(DataError, match="of 2 frozen rows 1 has gone"):
        frozen_rows(read(ROWS[0]), frozen, SEVERAL, KEY)


def test_another_key_contract_or_freeze_file_is_told_apart(read):
    table, frozen = read(*ROWS), freeze(read(*ROWS), SEVERAL, KEY)
    shortened = Freeze(key=frozen.key, commitment=frozen.commitment, tags=frozen.tags[1:])

    for key, agreed, given_freeze, sentence in (
        (KEY[::-1], SEVERAL, frozen, "frozen under another key"),
        (KEY, contract(), frozen, "the data contract has changed since"),
        (KEY, SEVERAL, shortened, "the freeze file itself has been changed"),
    ):
        with pytest.raises(DataError, match=sentence):
            frozen_rows(table, given_freeze, agreed, key)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no such file: freeze the rows first"),
        ("{", "is no freeze file, or not whole"),
        ("[]", "is no freeze file, or not whole"),
        ('{"schema": 2}', "schema = 2: one of 1"),
    ],
)
def test_a_file_that_is_no_freeze_is_refused(tmp_path, content, sentence):
    path = tmp_path / "freeze.json"
    if content is not None:
        path.write_text(content)

    with pytest.raises(DataError, match=sentence):
        Freeze.load(path)


def test_a_freeze_that_cannot_be_read_is_said(tmp_path):
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        Freeze.load(tmp_path)


ROW = st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from([1.0, 2.0, float("nan")]))


@settings(max_examples=60, deadline=None)
@given(before=st.lists(ROW, min_size=1, max_size=6), after=st.lists(ROW, max_size=8))
def test_frozen_rows_are_found_exactly_when_all_are_there(before, after):
    def table(rows):
        columns = {"x": np.array([value for _, value in rows]), "patient": tuple(who for who, _ in rows)}
        return CheckedTable(columns=columns, levels={}, patients=columns["patient"], lines=tuple(range(len(rows))))

    frozen = freeze(table(before), SEVERAL, KEY)
    are_there = all(sum(map(repr(row).__eq__, map(repr, after))) >= sum(map(repr(row).__eq__, map(repr, before))) for row in before)

    try:
        rows, num_later = frozen_rows(table(after), frozen, SEVERAL, KEY)
    except DataError:
        assert not are_there
    else:
        assert are_there
        assert (rows.patients, num_later) == (tuple(who for who, _ in before), len(after) - len(before))
        np.testing.assert_array_equal(rows.columns["x"], [value for _, value in before])
