"""Any content of a site's section `table:` is a table or findings, and no path of it is a traceback."""

import pytest
from contracts import contract
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.data.cohort_files import frozen_cohort
from p2pfl.data.site_section import SiteSection
from p2pfl.data.table_format import SiteTable
from p2pfl.data.table_reading import read_site_table
from p2pfl.errors import ConfigError, DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("aé1:/@?#[]~\0 ") | st.just("hunter2"),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("a1 ") | st.integers(), inner),
)
SQL = {"url": "sqlite:///a.db", "query": "SELECT 1"}


@given(VALUES)
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize(
    "key", ["table", "file", "parquet", "sql", "url", "query", "password_file", "password_variable", "timeout_s", "pass"]
)
def test_any_value_anywhere_is_a_section_or_a_finding(key, value):
    if key == "table":
        section = value
    elif key in ("file", "parquet", "sql"):
        section = {key: value}
    else:
        section = {"sql": {**SQL, key: value}}
    try:
        found = SiteSection.from_mapping({"table": section}, "site.yaml")
    except ConfigError as error:
        assert error.findings  # noqa: PT017
        assert key in ("file", "parquet", "table", "timeout_s") or "hunter2" not in str(error)  # noqa: PT017
    else:
        assert isinstance(found.table, SiteTable)


@given(st.text("postgresqlite:/@?#[]%=&.:a1") | st.text())
@settings(max_examples=100, deadline=None)
def test_any_url_is_one_that_can_be_taken_apart_or_a_finding(url):
    for written in (url, f"postgresql://{url}", f"sqlite:///{url}"):
        try:
            source = SiteTable.from_mapping({"sql": {**SQL, "url": written}}, "table").sql
        except ConfigError as error:
            assert error.findings  # noqa: PT017
        else:
            assert source.sqlite_file if source.is_sqlite else source.database
            assert source.is_sqlite or (source.server.password is None and source.server.port != 0 and source.settings is not None)


LONG = "x" * 300
ROWS = {"units": {"glucose": "mmol/l"}}


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"file": LONG}, "cannot be read: File name too long"),
        ({"parquet": LONG}, "cannot be read: File name too long"),
        ({"sql": {**SQL, "url": f"sqlite:///{LONG}"}}, "cannot be read: File name too long"),
        ({"sql": {**SQL, "url": "postgresql://a@127.0.0.1/b", "password_file": LONG}}, "cannot be read: File name too long"),
        ({"file": "a\0b"}, "cannot be read: embedded null byte"),
        ({"file": "folder"}, "cannot be read: it is a folder, expected a file"),
        ({"parquet": "folder"}, "cannot be read: it is a folder, expected a file"),
        ({"sql": {**SQL, "url": "sqlite:///folder"}}, "cannot be read: it is a folder, expected a file"),
        ({"file": "file/table.csv"}, "cannot be read: Not a directory"),
    ],
)
def test_a_path_that_cannot_be_opened_is_a_sentence(tmp_path, section, sentence):
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("pyarrow")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()

    with pytest.raises(DataError) as error:
        read_site_table(SiteTable.from_mapping({**section, **ROWS}, "table"), contract(), tmp_path)

    assert sentence in str(error.value)


def test_a_freeze_file_that_cannot_be_seen_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="cannot be looked at: File name too long"):
        frozen_cohort(None, contract(), tmp_path / LONG, tmp_path)
