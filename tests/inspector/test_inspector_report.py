"""The HTML page and the tables of `p2pfl inspect`, from run folders made by hand."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from html.parser import HTMLParser

import pytest
import typer
from test_inspector_terminal import FIVE, make_run, summary_of
from typer.testing import CliRunner

from p2pfl.cli.inspect import inspect
from p2pfl.errors import StoreError
from p2pfl.inspector import read
from p2pfl.inspector.report import report
from p2pfl.inspector.tables import write_tables
from p2pfl.runs.records import read_run

EDGES = [[i, (i + step) % 5, 1 / 3] for i in range(5) for step in (1, 4)]
STRANGE = "<b>&=zurich</b>"


class Page(HTMLParser):
    """What stands in a page: its text without scripts and styles, its headings, and the addresses that it would load from."""

    def __init__(self, source):
        super().__init__()
        self.text, self.headings, self.tags, self.loads, self._inside = [], [], [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "br", "link", "img", "input"):
            self._inside.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag):
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self._inside):
            self.text.append(data)
            if "h2" in self._inside:
                self.headings.append(data)


def page_of(folder):
    pytest.importorskip("plotly")
    source = report(read_run(folder))
    return Page(source), source


def run_of(path, nodes=FIVE, **options):
    folder = make_run(path, nodes=nodes, summary=summary_of(nodes), **options)
    graph = {"nodes": list(nodes), "edges": EDGES, "lambda_2": 0.5, "lambda_min": -0.2, "laplacian_lambda_2": 1.381966}
    (path / "topology.json").write_text(json.dumps(graph))
    return folder


def test_the_page_tells_what_there_is_and_loads_nothing(tmp_path):
    run_of(tmp_path / "run", skips=[(3, "bern", "basel"), (4, "bern", "basel"), (4, "geneva", "zurich")])
    page, source = page_of(tmp_path / "run")
    text = " ".join(page.text)

    assert page.headings == [
        "In short",
        "Who exchanges with whom",
        "Agreement",
        "Loss",
        "Was it worth it, and for whom",
        "Messages that were waited for in vain, in all rounds recorded here",
        "Events",
        "Cost of a round",
        "The experiment",
    ]
    assert page.loads == []
    assert "The slowest link is basel - bern: 2 of 28 messages over it were missed in rounds 0-13." in text
    assert "It has converged: the nodes agreed to stop after 14 rounds" in text
    assert "+0.033" in text  # zurich's gain, .995 against .962
    assert source.count("Plotly.newPlot") >= 4  # graph, agreement, loss, gains


def test_a_run_in_progress_has_a_page_too(tmp_path):
    make_run(tmp_path / "run", settling=0)
    page, _ = page_of(tmp_path / "run")

    assert "running (last record " in " ".join(page.text)
    assert "Was it worth it, and for whom" not in page.headings


def test_a_strangers_name_is_a_text_and_no_markup(tmp_path):
    nodes = (*FIVE[:4], STRANGE)
    run_of(tmp_path / "run", nodes=nodes, skips=[(2, STRANGE, "basel")])
    page, source = page_of(tmp_path / "run")

    assert STRANGE in page.text
    assert "b" not in page.tags
    assert STRANGE not in re.sub(r"<pre>.*?</pre>", "", source, flags=re.DOTALL)


def test_tables_hold_every_row_flat(tmp_path):
    run_of(tmp_path / "run", skips=[(3, "bern", "basel"), (3, "geneva", "basel")])
    tables, records = read(tmp_path / "run"), read_run(tmp_path / "run")

    assert [row["round"] for row in tables.rounds] == [row["round"] for row in records.rounds]
    assert len(tables.nodes) == len(records.nodes)
    assert len(tables.edges) == len(EDGES)
    basel = next(row for row in tables.nodes if (row["round"], row["node"]) == (3, "basel"))
    assert basel["skipped"] == "bern geneva"
    assert {
        "node": "zurich",
        "metric": "auroc",
        "network": pytest.approx(0.995),
        "alone": 0.962,
        "pooled": pytest.approx(0.998),
        "direction": "higher is better",
    } in tables.sites
    assert all(not isinstance(value, (dict, list)) for rows in tables.named().values() for row in rows for value in row.values())


def test_csv_and_parquet_hold_the_same(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    run_of(tmp_path / "run")
    tables = read(tmp_path / "run")
    csv_files = write_tables(tables, tmp_path / "csv", "csv")
    parquet_files = write_tables(tables, tmp_path / "parquet", "parquet")

    assert [path.stem for path in csv_files] == [path.stem for path in parquet_files] == ["rounds", "nodes", "edges", "sites"]
    for csv_file, parquet_file in zip(csv_files, parquet_files, strict=True):
        with csv_file.open(newline="") as file:
            texts = list(csv.DictReader(file))
        rows = parquet.read_table(parquet_file).to_pylist()
        assert len(rows) == len(texts) == len(tables.named()[csv_file.stem])
        for text, row in zip(texts, rows, strict=True):
            assert text.keys() == row.keys()
            for key, value in row.items():
                assert (
                    (float(text[key]) == pytest.approx(value))
                    if isinstance(value, float)
                    else text[key] == ("" if value is None else str(value))
                )


def test_a_spreadsheet_takes_no_name_for_a_formula(tmp_path):
    run_of(tmp_path / "run", nodes=(*FIVE[:4], "=cmd()"))
    (_, _, _, sites) = write_tables(read(tmp_path / "run"), tmp_path / "csv", "csv")

    assert "'=cmd()" in sites.read_text()
    assert "\n=cmd()" not in sites.read_text()


def test_no_cell_of_a_table_steers_a_terminal(tmp_path):
    run_of(tmp_path / "run", nodes=(*FIVE[:4], "a\x1b]0;mine\x07\x9b2J\u202eb"))
    written = [path.read_text() for path in write_tables(read(tmp_path / "run"), tmp_path / "csv", "csv")]

    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", "".join(written))
    assert "a\\u001b]0;mine" in "".join(written)


def test_the_page_allows_its_own_scripts_alone_and_no_network(tmp_path):
    run_of(tmp_path / "run", nodes=(*FIVE[:4], "<script>x</script>"))
    page, source = page_of(tmp_path / "run")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', source)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    nonce = rules["script-src"].removeprefix("'nonce-").removesuffix("'")

    assert rules["default-src"] == "'none'"
    assert len(nonce) >= 20
    assert page.tags.count("script") == len(re.findall(f'<script nonce="{nonce}"', source)) > 4
    assert source.index("Content-Security-Policy") < source.index("<style")


@pytest.mark.slow
def test_the_page_works_in_a_browser_and_runs_no_script_of_others(tmp_path):
    program = shutil.which("chromium")
    if program is None:
        assert os.environ.get("P2PFL_NEED_CHROMIUM") != "1", "chromium is not installed: apt-get install chromium"
        pytest.skip("needs chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    run_of(tmp_path / "run")
    _, source = page_of(tmp_path / "run")
    injected = "<script>document.title = 'theirs'</script><img src=x onerror=\"document.title = 'theirs'\">"
    said: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"], timeout=60_000)
        for name, text in (("page", source), ("injected", source.replace("<body>", f"<body>{injected}"))):
            (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
            page = browser.new_page()
            page.on("console", lambda message, name=name: said.append(f"{name}: {message.text}"))
            page.on("pageerror", lambda error, name=name: said.append(f"{name}: {error}"))
            page.goto((tmp_path / f"{name}.html").as_uri(), timeout=60_000)
            page.wait_for_selector(".js-plotly-plot .main-svg", timeout=60_000)

            assert page.locator(".js-plotly-plot").count() >= 4
            assert page.title() == "breast-cancer"
            picture = page.evaluate("Plotly.toImage(document.querySelector('.js-plotly-plot'), {format: 'png'})")
            assert picture.startswith("data:image/png")
        browser.close()

    assert [line for line in said if line.startswith("page: ")] == []
    assert any("injected" in line and "Content Security Policy" in line for line in said)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    run_of(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        write_tables(read(tmp_path / "run"), tmp_path / "file" / "csv", "csv")


def test_the_command_writes_what_is_asked_for_and_says_so(tmp_path):
    pytest.importorskip("plotly")
    run_of(tmp_path / "run")
    app = typer.Typer()
    app.command()(inspect)
    arguments = [str(tmp_path / "run"), "--html", str(tmp_path / "run.html"), "--csv", str(tmp_path / "csv")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)

    assert done.exit_code == 0
    written = done.stdout.split()
    assert written[0] == str(tmp_path / "run.html")
    assert written[1:] == [str(tmp_path / "csv" / f"{name}.csv") for name in ("rounds", "nodes", "edges", "sites")]
