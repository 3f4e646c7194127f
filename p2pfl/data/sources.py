"""Public data sets that do not ship with a library: where they come from, how their files are known, where they lie on this machine."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from p2pfl.errors import DataError, StoreError, TransportError

_SIZE_LIMIT_BYTES = 64 * 1024**2
_GZIP = ".gz"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One data set, published as a zip archive or as files that are compressed one by one."""

    name: str
    title: str

    url: str
    """Address of the archive; for files by themselves the part before each one's NAME.gz."""

    packed: Literal["zip", "gzip"] = "zip"

    folder: str
    """Name of its folder inside P2PFL_DATA and inside the cache."""

    md5: Mapping[str, str]
    """File name to the MD5 of its bytes when unpacked, 32 hexadecimal digits."""

    licence: str
    citation: str


SOURCES: dict[str, Source] = {
    "heart-disease": Source(
        name="heart-disease",
        title="UCI Heart Disease: 920 patients of four hospitals (Cleveland, Hungary, Switzerland, VA Long Beach)",
        url="https://archive.ics.uci.edu/static/public/45/heart+disease.zip",
        folder="heart_disease",
        md5={
            "processed.cleveland.data": "2d91a8ff69cfd9616aa47b59d6f843db",
            "processed.hungarian.data": "22e96bee155b5973568101c93b3705f6",
            "processed.switzerland.data": "9a87f7577310b3917730d06ba9349e20",
            "processed.va.data": "4249d03ca7711e84f4444768c9426170",
        },
        licence="CC BY 4.0",
        citation="Janosi, Steinbrunn, Pfisterer & Detrano (1989). Heart Disease. UCI Machine Learning Repository. doi:10.24432/C52P4X",
    ),
    "mnist": Source(
        name="mnist",
        title="MNIST: handwritten digits of 28 x 28 pixels, 60,000 to train on and 10,000 to test on",
        url="https://ossci-datasets.s3.amazonaws.com/mnist/",
        packed="gzip",
        folder="mnist",
        md5={
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
        licence="CC BY-SA 3.0",
        citation="LeCun, Bottou, Bengio & Haffner (1998). Gradient-based learning applied to document recognition. doi:10.1109/5.726791",
    ),
}


def cache_folder() -> Path:
    """Where downloads are kept: p2pfl/ in XDG_CACHE_HOME, or in ~/.cache where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "p2pfl"


def read(source: Source, names: Iterable[str], folder: str | Path | None = None) -> dict[str, bytes]:
    """The bytes of some of a data set's files, unpacked and checked; NAME.gz does for a file called NAME.

    Args:
        source: of SOURCES.
        names: which files.
        folder: that holds them; None: the source's folder inside P2PFL_DATA, else inside the cache.

    Raises:
        DataError: a file is nowhere, or is not the original; the message names the remedy.
    """
    if folder is not None:
        places = [Path(folder)]
    else:
        places = [Path(root) / source.folder for root in (os.environ.get("P2PFL_DATA"), cache_folder()) if root]
    found = {}
    for name in names:
        candidates = [place / file for place in places for file in (name, f"{name}{_GZIP}")]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            looked_in = " nor in ".join(map(str, places))
            raise DataError(
                f"{name} is not in {looked_in}: run `p2pfl data fetch {source.name}`, or set P2PFL_DATA to a folder with {source.folder}/"
            )
        remedy = f"delete it and run `p2pfl data fetch {source.name}`"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}", place=str(path)) from error
        if path.suffix == _GZIP:
            content = _gunzip(content, place=str(path), remedy=remedy)
        _check(name, content, source, place=str(path), remedy=remedy)
        found[name] = content
    return found


def fetch(source: Source, folder: Path | None = None, *, timeout_s: float = 60.0) -> list[Path]:
    """Download a data set and put its files in place, unpacked.

    Nothing is written before every file's MD5 has been checked, and each file then goes to a temporary name first: what bears its final
    name is whole and original. Files that are there and right are not downloaded again.

    Args:
        source: what to download.
        folder: where to put the files; None: the source's folder inside the cache.
        timeout_s: without a byte from the server.

    Raises:
        TransportError: the server cannot be reached or broke off.
        DataError: what came is not the archive, or not its original bytes.
        StoreError: the folder cannot be written.
    """
    folder = folder or cache_folder() / source.folder
    paths = [folder / name for name in source.md5]
    if all(path.is_file() and _md5(path.read_bytes()) == source.md5[path.name] for path in paths):
        return paths
    contents: dict[str, bytes] = {}
    by_url = {source.url: list(source.md5)} if source.packed == "zip" else {f"{source.url}{name}{_GZIP}": [name] for name in source.md5}
    for url, names in by_url.items():
        packed = _download(url, timeout_s)
        unpacked = _unzip(packed, names, url) if source.packed == "zip" else {name: _gunzip(packed, place=url) for name in names}
        for name, content in unpacked.items():
            _check(name, content, source, place=url, remedy="the publisher has changed it, or something on the way has: do not use it")
        contents |= unpacked
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                with temporary.open("wb") as file:
                    file.write(contents[path.name])
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror or error}") from error
    return paths


def _download(url: str, timeout_s: float) -> bytes:
    import http.client
    import urllib.request

    try:
        # the address is a constant of ours
        with urllib.request.urlopen(url, timeout=timeout_s) as response:  # noqa: S310
            content: bytes = response.read(_SIZE_LIMIT_BYTES + 1)
            announced_bytes = response.headers.get("Content-Length")
    except (OSError, http.client.HTTPException) as error:
        raise TransportError(f"cannot download {url}: {error}; try again, or copy the files from another machine") from error
    if len(content) > _SIZE_LIMIT_BYTES:
        raise DataError(f"{url} is larger than {_SIZE_LIMIT_BYTES} bytes: it is not the archive that was published")
    if announced_bytes is not None and len(content) < int(announced_bytes):
        raise TransportError(f"{url} broke off after {len(content)} of {announced_bytes} bytes: try again")
    return content


def _unzip(archive: bytes, names: Iterable[str], url: str) -> dict[str, bytes]:
    """The wanted files' bytes by name, wherever in the archive they lie."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            members = {PurePosixPath(member.filename).name: member for member in files.infolist()}
            contents = {}
            for name in names:
                if name not in members:
                    raise DataError(f"{name} is not in the archive at {url}")
                with files.open(members[name]) as file:
                    contents[name] = file.read(_SIZE_LIMIT_BYTES)
            return contents
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted, or packed in a way unknown here
        raise DataError(f"what {url} sent is not a zip archive: {error}") from error


def _gunzip(packed: bytes, *, place: str, remedy: str = "try again") -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            return file.read(_SIZE_LIMIT_BYTES)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"is not compressed with gzip, or not whole: {error}; {remedy}", place=place) from error


def _check(name: str, content: bytes, source: Source, *, place: str, remedy: str) -> None:
    if (found := _md5(content)) != source.md5[name]:
        raise DataError(f"{name} has MD5 {found}, the original {source.md5[name]}: {remedy}", place=place)


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
