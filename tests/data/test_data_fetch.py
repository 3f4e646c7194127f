import gzip
import hashlib
import io
import json
import sys
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from p2pfl.cli.data import app
from p2pfl.data import sources
from p2pfl.data.sources import SOURCES, Source, cache_folder, fetch, read
from p2pfl.errors import ConfigError, DataError, StoreError, TransportError
from p2pfl.tasks import load_task

FILES = {"one.data": b"1,2,3\n", "two.data": b"4,5,6\n"}


def zip_of(files, folder=""):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
        for name, content in files.items():
            writer.writestr(folder + name, content)
    return archive.getvalue()


class Server:
    """Serves bytes by path on 127.0.0.1; counts requests."""

    def __init__(self):
        self.answers = {"/whole.zip": zip_of({**FILES, "costs/readme": b"-"}), "/nested.zip": zip_of(FILES, "a/b/")}
        self.answers |= {f"/each/{name}.gz": gzip.compress(content) for name, content in FILES.items()}
        self.cut_off = set()
        self.requests = Counter()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests[self.path] += 1
                if self.path not in outer.answers:
                    self.send_error(404)
                    return
                body = outer.answers[self.path]
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if self.path in outer.cut_off else body)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, name="data server")
        self.thread.start()

    def close(self):
        self.http.shutdown()
        self.thread.join(timeout=10)
        self.http.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def empty_places(tmp_path, monkeypatch):
    monkeypatch.delenv("P2PFL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def source_at(url, **changed):
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in FILES.items()} | changed.pop("md5", {})
    fields = {"name": "tiny", "title": "Tiny", "folder": "tiny", "md5": md5, "licence": "CC0", "citation": "Nobody (2000)"}
    return Source(**{**fields, "url": url, **changed})


def contents_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.mark.parametrize(("path", "packed"), [("/whole.zip", "zip"), ("/nested.zip", "zip"), ("/each/", "gzip")])
def test_the_wanted_files_and_nothing_else_come_to_the_cache(server, path, packed):
    paths = fetch(source_at(server.url + path, packed=packed))

    assert contents_of(cache_folder() / "tiny") == FILES
    assert [path.name for path in paths] == list(FILES)


def test_what_is_there_and_right_is_not_downloaded_again(server, tmp_path):
    source = source_at(server.url + "/whole.zip")
    fetch(source, tmp_path / "here")
    fetch(source, tmp_path / "here")
    assert server.requests == {"/whole.zip": 1}

    (tmp_path / "here" / "two.data").write_bytes(b"changed")
    fetch(source, tmp_path / "here")
    assert contents_of(tmp_path / "here") == FILES


def test_bytes_that_are_not_the_original_are_refused_before_anything_is_written(server):
    source = source_at(server.url + "/whole.zip", md5={"two.data": "0" * 32})

    found = hashlib.md5(FILES["two.data"]).hexdigest()
    with pytest.raises(DataError, match=rf"two\.data has MD5 {found}, the original 00000000") as caught:
        fetch(source)
    assert caught.value.place == server.url + "/whole.zip"
    assert contents_of(cache_folder() / "tiny") == {}


def test_of_files_by_themselves_nothing_is_written_before_every_one_has_been_checked(server):
    source = source_at(server.url + "/each/", packed="gzip", md5={"two.data": "0" * 32})

    with pytest.raises(DataError, match=r"two\.data has MD5 .*, the original 00000000") as caught:
        fetch(source)
    assert caught.value.place == server.url + "/each/two.data.gz"
    assert server.requests == {"/each/one.data.gz": 1, "/each/two.data.gz": 1}
    assert contents_of(cache_folder() / "tiny") == {}


@pytest.mark.parametrize(
    "spoilt",
    [b"<html>please log in</html>", gzip.compress(b"4,5,6\n")[:-9], gzip.compress(b"4,5,6\n")[:-1] + b"x"],
    ids=["a page", "cut short", "another checksum"],  # the bytes themselves hold the time of packing: other names in every process
)
def test_what_is_not_compressed_with_gzip_is_refused(server, spoilt):
    server.answers["/each/two.data.gz"] = spoilt

    with pytest.raises(DataError, match=r"is not compressed with gzip, or not whole: .*; try again") as caught:
        fetch(source_at(server.url + "/each/", packed="gzip"))
    assert caught.value.place == server.url + "/each/two.data.gz"
    assert contents_of(cache_folder() / "tiny") == {}


def test_what_unpacks_to_far_too_much_is_refused(server, monkeypatch):
    monkeypatch.setattr(sources, "_SIZE_LIMIT_BYTES", 100)
    server.answers["/each/two.data.gz"] = gzip.compress(bytes(10**6))[:90]  # downloads have the same limit

    with pytest.raises(DataError, match=r"two\.data has MD5"):
        fetch(source_at(server.url + "/each/", packed="gzip"))


def test_an_archive_without_the_file_is_refused(server):
    with pytest.raises(DataError, match=r"three\.data is not in the archive"):
        fetch(source_at(server.url + "/whole.zip", md5={"three.data": "0" * 32}))


def test_what_is_not_an_archive_is_refused(server):
    server.answers["/page.zip"] = b"<html>please log in</html>"

    with pytest.raises(DataError, match="is not a zip archive"):
        fetch(source_at(server.url + "/page.zip"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda entry: entry.update(flag_bits=1),  # encrypted
        lambda entry: entry.update(compress_type=99),  # a method that nobody has
    ],
)
def test_an_archive_that_cannot_be_unpacked_is_refused(server, monkeypatch, spoil):
    def infolist(archive):
        changed = {}
        spoil(changed)
        for member in archive.filelist:
            for key, value in changed.items():
                setattr(member, key, value)
        return archive.filelist

    monkeypatch.setattr(zipfile.ZipFile, "infolist", infolist)

    with pytest.raises(DataError, match="is not a zip archive"):
        fetch(source_at(server.url + "/whole.zip"))


def test_an_archive_that_is_far_too_large_is_refused(server, monkeypatch):
    monkeypatch.setattr(sources, "_SIZE_LIMIT_BYTES", 100)

    with pytest.raises(DataError, match="larger than 100 bytes"):
        fetch(source_at(server.url + "/whole.zip"))


def test_a_server_that_breaks_off_is_the_networks_fault(server):
    server.cut_off.add("/whole.zip")

    with pytest.raises(TransportError, match=r"broke off|IncompleteRead"):
        fetch(source_at(server.url + "/whole.zip"))
    assert contents_of(cache_folder() / "tiny") == {}


def test_a_page_that_is_not_there_is_the_networks_fault(server):
    with pytest.raises(TransportError, match="404"):
        fetch(source_at(server.url + "/absent.zip"))


def test_a_server_that_does_not_listen_is_the_networks_fault(server):
    url = server.url
    server.http.server_close()

    with pytest.raises(TransportError, match=r"cannot download .*; try again"):
        fetch(source_at(url + "/whole.zip"), timeout_s=5)


def test_a_folder_that_cannot_be_written_is_the_disks_fault(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(StoreError, match="cannot write to"):
        fetch(source_at(server.url + "/whole.zip"), tmp_path / "file" / "folder")


def test_files_are_read_from_the_given_folder_then_from_the_environment_then_from_the_cache(server, tmp_path, monkeypatch):
    source = source_at(server.url + "/whole.zip")
    fetch(source)
    assert read(source, ["two.data"]) == {"two.data": FILES["two.data"]}

    monkeypatch.setenv("P2PFL_DATA", str(tmp_path / "data"))
    assert read(source, FILES) == FILES
    fetch(source, tmp_path / "data" / "tiny")
    for path in (cache_folder() / "tiny").iterdir():
        path.unlink()
    assert read(source, FILES) == FILES
    with pytest.raises(DataError, match=r"one\.data is not in "):
        read(source, FILES, tmp_path / "elsewhere")
    assert read(source, FILES, tmp_path / "data" / "tiny") == FILES


def test_a_file_does_compressed_as_well(tmp_path):
    source = source_at("http://127.0.0.1:1/", packed="gzip")
    for name, content in FILES.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    assert read(source, FILES, tmp_path) == FILES

    (tmp_path / "one.data.gz").write_bytes(gzip.compress(b"1,2,4\n"))
    with pytest.raises(DataError, match=r"one\.data has MD5 .* delete it and run `p2pfl data fetch tiny`") as caught:
        read(source, FILES, tmp_path)
    assert caught.value.place == str(tmp_path / "one.data.gz")

    (tmp_path / "one.data.gz").write_bytes(b"1,2,3\n")
    with pytest.raises(DataError, match=r"is not compressed with gzip.* delete it and run `p2pfl data fetch tiny`"):
        read(source, FILES, tmp_path)


def test_a_missing_file_is_answered_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("P2PFL_DATA", str(tmp_path))

    with pytest.raises(DataError) as caught:
        load_task("heart-disease")
    assert str(caught.value) == (
        f"processed.cleveland.data is not in {tmp_path}/heart_disease nor in {tmp_path}/cache/p2pfl/heart_disease: "
        "run `p2pfl data fetch heart-disease`, or set P2PFL_DATA to a folder with heart_disease/"
    )


def test_a_changed_file_is_refused_when_it_is_read(server):
    source = source_at(server.url + "/whole.zip")
    path = fetch(source)[0]
    path.write_bytes(b"1,2,4\n")

    with pytest.raises(DataError, match=r"one\.data has MD5 .* delete it and run `p2pfl data fetch tiny`") as caught:
        read(source, ["one.data"])
    assert caught.value.place == str(path)


@pytest.mark.skipif(sys.platform != "linux", reason="a file that even root cannot read")
def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "one.data").symlink_to("/proc/self/mem")

    with pytest.raises(DataError, match="cannot be read: Input/output error") as caught:
        read(source_at("http://127.0.0.1/"), ["one.data"], tmp_path)
    assert caught.value.place == str(tmp_path / "one.data")


def test_the_cache_is_in_the_home_folder_unless_said_otherwise(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path / "cache" / "p2pfl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))

    assert cache_folder() == tmp_path / ".cache" / "p2pfl"


def test_the_command_fetches_and_tells_licence_and_citation(server, tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "tiny", source_at(server.url + "/whole.zip"))
    said = CliRunner().invoke(app, ["fetch", "tiny"])
    assert said.exit_code == 0, said.output
    assert said.stdout == f"Tiny\nLicence: CC0. Please cite: Nobody (2000)\n2 files, checked, in {cache_folder() / 'tiny'}\n"

    said = CliRunner().invoke(app, ["fetch", "tiny", "--folder", str(tmp_path / "here"), "--json"])
    assert json.loads(said.stdout) == {
        "name": "tiny",
        "files": [str(tmp_path / "here" / name) for name in FILES],
        "licence": "CC0",
        "citation": "Nobody (2000)",
    }


def test_the_command_lists_what_there_is():
    assert "heart-disease: UCI Heart Disease" in CliRunner().invoke(app, ["list"]).stdout
    listed = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)

    assert [(source["name"], source["licence"]) for source in listed] == [("heart-disease", "CC BY 4.0"), ("mnist", "CC BY-SA 3.0")]
    assert listed[0]["url"] == "https://archive.ics.uci.edu/static/public/45/heart+disease.zip"
    assert "10.24432/C52P4X" in listed[0]["citation"]


def test_an_unknown_name_is_answered_with_the_known_ones():
    said = CliRunner().invoke(app, ["fetch", "hart"])

    assert isinstance(said.exception, ConfigError)
    assert str(said.exception) == "NAME = 'hart': one of heart-disease, mnist"


def test_a_file_in_the_place_of_the_folder_is_refused_before_anything_is_downloaded(tmp_path):
    place = tmp_path / "file"
    place.write_text("mine")
    said = CliRunner().invoke(app, ["fetch", "heart-disease", "--folder", str(place)])

    assert isinstance(said.exception, ConfigError)
    assert str(said.exception) == f"--folder = '{place}': it is a file, expected a folder"


@pytest.mark.parametrize("command", ["fetch", "list"])
def test_help_has_an_example(command):
    assert f"p2pfl data {command}" in CliRunner().invoke(app, [command, "--help"]).stdout
