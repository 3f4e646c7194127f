"""Text files from other programs are read right, or refused with the line."""

import pytest

from p2pfl.data.columns import read_columns
from p2pfl.errors import ConfigError, TopologyError, some
from p2pfl.topology import load


def refused(tmp_path, content):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_columns(path, ("age", "chol"))
    return list(caught.value.findings)


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (b'note,age,chol\n"a\nb",1,2\nx,1,?\n', "line 4, column chol: expected a number"),
        (b"age,chol\n\n\n1,2\n1,?\n", "line 5, column chol: expected a number"),
        (b"age;chol\n1;2\n", "line 1: the columns are separated by ';': expected commas; save it with commas and decimal points"),
        (b"age,chol,age\n1,2,3\n", "line 1: the header has age 2 times; expected once"),
        (b"age,chol\n1,2,3\n", "line 2: 3 fields, the header has 2; is a comma a decimal comma? write decimals with a point"),
        (b"age,chol\n1\n", "line 2: 1 fields, the header has 2"),
        (b'age,chol\n1,"2,5"\n', "line 2, column chol: expected a number with a decimal point, not a comma"),
        (b"age,chol\n1_000,2\n", "line 2, column age: expected a number"),
        (b"age,chol\nnan,2\n", "line 2, column age: expected a number"),
        (b"age,chol\n1,\x002\n", "cannot be read: line 2 holds a NUL byte; save it as UTF-8 text"),
        (b"age,chol\n1,\xe9\n", "cannot be read: line 2 holds the byte 0xe9, which is not UTF-8; save it as UTF-8"),
        ("age,chol\n".encode("utf-16"), "cannot be read: line 1 begins with the byte order mark of UTF-16; save it as UTF-8"),
    ],
)
def test_a_table_is_refused_with_its_true_line(tmp_path, content, finding):
    assert refused(tmp_path, content) == [finding]


def test_a_table_with_byte_order_mark_and_other_columns_is_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbfchol,x,age\r\n2.5,?,1e1\r\n")

    assert read_columns(path, ("age", "chol")) == ([[10.0, 2.5]], [2])


def test_many_findings_are_summed_up():
    assert str(ConfigError([f"f{i}" for i in range(2000)], "x")).splitlines()[-1] == "  and 1,990 more"


def test_a_sentence_names_the_first_of_thousands():
    assert some([f"n{i}" for i in range(4000)]) == "n0, n1, n2, n3, n4, n5, n6, n7, ... (4000 in all)"
    assert some(["a", "b"]) == "a, b"


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    path = tmp_path / "ring.edgelist"
    path.write_bytes(b"\xef\xbb\xbfbasel bern\nbern zurich\nzurich basel\n")

    assert load(path).names == ("basel", "bern", "zurich")


@pytest.mark.parametrize(("given", "said"), [('"true"', "'true'"), ("1", "1")])
def test_json_that_says_directed_otherwise_is_refused(tmp_path, given, said):
    path = tmp_path / "net.json"
    path.write_text(f'{{"directed": {given}, "nodes": [], "edges": []}}')
    with pytest.raises(TopologyError) as caught:
        load(path)

    assert caught.value.findings == (f"directed = {said}: expected true or false",)
