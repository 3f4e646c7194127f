"""Make a wheelhouse, from which p2pfl is installed where there is no network.

    python release/wheelhouse.py FOLDER [--extra NAME ...] [--only DISTRIBUTION ...]

FOLDER gets the wheel of this checkout, a wheel of each dependency in the version of constraints.txt, for this machine's Python and system,
and requirements.txt with the SHA-256 of each. Installed it is with

    pip install --no-index --find-links FOLDER --require-hashes -r FOLDER/requirements.txt

--only takes these distributions and none of their dependencies, for a trial that does not move torch's 200 MB.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from packaging.utils import parse_wheel_filename

ROOT: Final = Path(__file__).parents[1]
CONSTRAINTS: Final = ROOT / "constraints.txt"


def pip(*arguments: object) -> None:
    """Run the pip of this Python; its own words say what is wrong."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)], check=True)


def own_wheel(folder: Path) -> Path:
    """Build the wheel of this checkout; what an earlier build left would be in it, too, and goes first."""
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    return next(folder.glob("p2pfl_mesh-*.whl"))


def locked(folder: Path) -> str:
    """Lines of requirements.txt: every wheel of a folder with its version and its hash, sorted by name."""
    lines = []
    for wheel in folder.glob("*.whl"):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        lines.append(f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    return "".join(sorted(lines))


def main(arguments: list[str]) -> None:
    """Make the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Make a wheelhouse for installation without a network.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--extra", action="append", default=[], help="an extra whose dependencies are taken, too")
    parser.add_argument("--only", action="append", default=[], help="take this distribution, and no dependency of any")
    given = parser.parse_args(arguments)
    if given.folder.exists() and any(given.folder.iterdir()):
        parser.error(f"{given.folder} is not empty: old wheels in it would be installed, too")
    given.folder.mkdir(parents=True, exist_ok=True)
    wheel = own_wheel(given.folder)
    wanted = given.only or [f"{wheel}[{','.join(given.extra)}]" if given.extra else wheel]
    no_dependencies = ["--no-deps"] if given.only else []
    pip("download", "--quiet", *no_dependencies, "--only-binary", ":all:", "--constraint", CONSTRAINTS, "--dest", given.folder, *wanted)
    requirements = given.folder / "requirements.txt"
    requirements.write_text(locked(given.folder), encoding="utf-8")
    print(f"{requirements}: {len(list(given.folder.glob('*.whl')))} wheels")


if __name__ == "__main__":
    main(sys.argv[1:])
