"""A hospital's CSV file is read as contract and site say, or refused with a sentence; nothing is guessed."""

# ruff: noqa: E501  # a finding is one sentence, and reads best on one line

import csv
import io

import pytest
from contracts import HEADER, ROWS, contract, site, table_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pfl.data.csv_reading import read_csv
from p2pfl.errors import DataError

PLAIN = "\n".join([HEADER, *ROWS, ""])


def columns_of(tmp_path, written, **said):
    return table_of(tmp_path, written, own=site(**said)).columns


def refused(tmp_path, written, **said):
    with pytest.raises(DataError) as caught:
        table_of(tmp_path, written, own=site(**said))
    return list(caught.value.findings)


def test_a_plain_table_is_read_as_texts(tmp_path):
    table = table_of(tmp_path, PLAIN)

    assert table.lines == (2, 3, 4)
    assert table.columns == {
        "patient": ("p1", "p2", "p3"),
        "age": ("60", "71", "NA"),
        "glucose": ("5.5", "7", ""),
        "sex": ("F", "M", "2"),
        "admitted": ("2020-02-29", "2021-03-09", "2022-12-01"),
        "died": ("0", "1", "0"),
    }


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (b"\xef\xbb\xbf" + PLAIN.encode(), {}),
        (PLAIN.encode("utf-16"), {"encoding": "utf-16"}),
        (PLAIN.replace(",", ";"), {"separator": "semicolon"}),
        (PLAIN.replace(",", "\t"), {"separator": "tab"}),
        (PLAIN.replace(",", "|"), {"separator": "bar"}),
        ("sep=;\n" + PLAIN.replace(",", ";"), {"separator": "semicolon"}),
        (PLAIN.replace("\n", "\r\n"), {}),
        (PLAIN.replace("\n", "\n\n"), {}),
        (PLAIN.replace("\n", " \n").replace(",", " , "), {}),
        ('"' + PLAIN.replace(",", '","').strip().replace("\n", '"\n"') + '"\n', {}),
        (PLAIN.rstrip("\n"), {}),
        (PLAIN.replace("age", "Alter (Jahre)"), {"columns": {"age": "Alter (Jahre)"}}),
        (PLAIN.replace("age", "sex"), {"columns": {"age": 2, "sex": 4}}),
        ("\n".join(f"note,{line},note" for line in PLAIN.splitlines()), {}),
    ],
)
def test_each_format_is_read_where_it_is_said(tmp_path, written, said):
    assert columns_of(tmp_path, written, **said) == table_of(tmp_path, PLAIN).columns


@pytest.mark.parametrize("encoding", ["latin-1", "windows-1252", "utf-8"])
def test_letters_are_those_of_the_encoding(tmp_path, encoding):
    written = PLAIN.replace("p1", "Jürgen").encode(encoding.replace("windows-1252", "cp1252"))

    assert columns_of(tmp_path, written, encoding=encoding)["patient"][0] == "Jürgen"


def test_a_line_end_within_quotes_belongs_to_the_field(tmp_path):
    table = table_of(tmp_path, f'note,{HEADER}\n"two\nlines, ""quoted""",{ROWS[0]}\nx,{ROWS[1]}\n')

    assert (table.columns["age"], table.lines) == (("60", "71"), (3, 4))


def test_a_variable_that_the_site_has_not_is_left_out(tmp_path):
    own = site(units={}, absent=["glucose"])

    assert "glucose" not in table_of(tmp_path, "patient,age,sex,admitted,died\np,50,F,2020-01-01,0\n", own=own).columns


@pytest.mark.parametrize(
    ("written", "said", "finding"),
    [
        (PLAIN.replace("p1", "Jürgen").encode("latin-1"), {}, "line 2 holds the byte 0xfc, which is not utf-8; say table.encoding, such as latin-1 or windows-1252"),
        (PLAIN.replace("p1", "Jürgen"), {"encoding": "latin-1"}, "all its bytes are UTF-8, and table.encoding is latin-1: say utf-8"),
        (PLAIN.replace("p1", "€").encode("cp1252"), {"encoding": "latin-1"}, "line 2 holds the byte 0x80, which is no letter of latin-1: is it windows-1252 or utf-8?"),
        (PLAIN.encode().replace(b"p1", b"\x81"), {"encoding": "windows-1252"}, "line 2 holds the byte 0x81, which is not windows-1252"),
        (b"\xef\xbb\xbf" + PLAIN.encode(), {"encoding": "latin-1"}, "begins with the byte order mark of utf-8, and table.encoding is latin-1: say utf-8"),
        (PLAIN.encode("utf-16"), {}, "begins with the byte order mark of utf-16, and table.encoding is not said: say utf-16"),
        (PLAIN.encode("utf-16-le"), {}, "line 1 holds a NUL: it is no text in utf-8"),
        (PLAIN.encode("utf-16-le"), {"encoding": "utf-16"}, "has no byte order mark, which says how UTF-16 is meant: save it with one, or as UTF-8"),
        (PLAIN.replace(",", ";"), {}, "the header is one field, which holds semicolon: say table.separator: semicolon, if it separates the columns"),
        (PLAIN.replace(",", "\t"), {}, "the header is one field, which holds tab: say table.separator: tab, if it separates the columns"),
        (PLAIN, {"separator": "semicolon"}, "the header is one field, which holds comma: say table.separator: comma, if it separates the columns"),
        ("sep=;\n" + PLAIN.replace(",", ";"), {}, "line 1: it says that fields are separated by semicolon: say it as table.separator"),
        ("\n".join(f"{line},age" for line in PLAIN.split()), {}, "the header has 'age' 2 times: say which one by its position, such as table.columns.age: 2"),
        (PLAIN.replace("sex", "Sex"), {}, "the header lacks sex: say in table.columns what the column is called, or in table.absent that there is none"),
        (PLAIN, {"columns": {"sex": "Geschlecht"}}, "the header lacks Geschlecht: say in table.columns what the column is called, or in table.absent that there is none"),
        (PLAIN, {"columns": {"sex": 7}}, "table.columns.sex = 7: the header has 6 columns"),
        (PLAIN, {"columns": {"sex": 2}}, "table.columns: age and sex are the same column, 2"),
        (PLAIN, {"units": {}, "absent": ["glucose"]}, "table.absent has glucose, and the header has it as well: expected one of both"),
        (PLAIN.replace("5.5", "5,5"), {}, "line 2: not 6 fields, as the header has: a separator within a field, such as a decimal comma, needs quotes around the field"),
        (PLAIN.replace(",F", ""), {}, "line 2: not 6 fields, as the header has: a field is lost, or a line end within a field has no quotes around the field"),
        (PLAIN + ",,,,,\n", {}, "line 5: all fields are empty: leave the line out"),
        (PLAIN.replace("p3", '"p3'), {}, "line 4: cannot be read as CSV (unexpected end of data): a quoted field ends with a quote, and a quote within it is written twice"),
        (PLAIN.replace("p1", '"p"1'), {}, "line 2: cannot be read as CSV (',' expected after '\"'): a quoted field ends with a quote, and a quote within it is written twice"),
        (HEADER + "\n", {}, "has no rows below its header"),
        ("", {}, "is empty: expected a header and rows"),
        (PLAIN, {"units": {}}, "units.glucose: required, but missing: sites have it in different units; expected one of mmol/l, mg/dl"),
    ],
)  # fmt: skip
def test_what_nobody_has_said_is_refused_with_a_sentence(tmp_path, written, said, finding):
    assert refused(tmp_path, written, **said) == [finding]


def test_lines_are_named_by_what_is_wrong_in_them(tmp_path):
    written = PLAIN + "".join(f"p{i},1\n" for i in range(4, 12)) + ",,,,,\n"

    assert refused(tmp_path, written) == [
        "lines 5, 6, 7, 8, 9 and 3 more: not 6 fields, as the header has: a field is lost, or a line end within a field has no quotes around the field",
        "line 13: all fields are empty: leave the line out",
    ]


def test_no_finding_shows_a_value_of_the_table(tmp_path):
    for written in (
        "secret;1\n",
        "secret\n",
        '"secret',
        "patient\nsecret,1\n",
        PLAIN.replace("p1", 'x,"secret"z'),
        "secret,secret\nsecret",
    ):
        assert "secret" not in " ".join(refused(tmp_path, written))


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_csv(tmp_path / "table.csv", contract(), site())
    with pytest.raises(DataError, match="cannot be read: it is a folder, expected a file"):
        read_csv(tmp_path, contract(), site())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ids=st.lists(st.text("aé1,;\t|\"'\n ", max_size=6), min_size=1, max_size=4),
    sign=st.sampled_from([(",", "comma"), (";", "semicolon"), ("\t", "tab"), ("|", "bar")]),
    encoding=st.sampled_from(["utf-8", "utf-16"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    line_end=st.sampled_from(["\n", "\r\n"]),
)
def test_what_a_program_writes_is_read_back(tmp_path, ids, sign, encoding, quoting, line_end):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=sign[0], quoting=quoting, lineterminator=line_end)
    writer.writerows([HEADER.split(","), *([text, "50", "5", "F", "2020-01-01", "0"] for text in ids)])

    columns = columns_of(tmp_path, file.getvalue().encode(encoding), separator=sign[1], encoding=encoding)

    assert columns["patient"] == tuple(text.strip() for text in ids)
    assert columns["died"] == ("0",) * len(ids)
