"""Search for inputs that a parser does not survive: ``PYTHONPATH=tests python -m fuzz.drive --seconds 60 [TARGET ...]``.

Each target has a process of its own, in which libFuzzer changes inputs, guided by the lines of p2pfl that they reach. An error that is not
declared, ten seconds for one input, or a gigabyte of memory is a finding: its input is kept and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MOST_SECONDS_PER_INPUT = 10
MOST_MEMORY_MIB = 1024
MOST_INPUT_BYTES = 16 * 1024
HOSTILE = (
    *(
        b"null",
        b"true",
        b"NaN",
        b"1e999",
        b"-1",
        b"[]",
        b"{}",
        b"[",
        b"{",
        b"&a",
        b"*a",
        b"<<",
        b"!!int ",
        b"!!binary ",
        b"!!python/name:os",
    ),
    *(b"\x1b[2J", b"\xe2\x80\xae", b"\xff", b"\0", b"9" * 40, b"2026-01-01", b"0x1f", b"<!DOCTYPE", b"<!ENTITY a 'b'>", b"&a;", b"../"),
)


def main() -> int:
    """Run the targets, as many at once as there are processors: 1 where one has a finding, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of searching, for all targets together; each takes some more to start")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the changes to inputs, to make the same ones again; 0: another one each time"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="where what was found is kept")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all where none is named")
    chosen = parser.parse_args()
    if chosen.one:
        return search(chosen.one, chosen.out / chosen.one, int(chosen.seconds), chosen.seed)
    from fuzz.targets import TARGETS  # not before a search: there it is imported under libFuzzer's eyes

    names = chosen.targets or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(TARGETS)}")
    at_once = min(len(names), os.cpu_count() or 1)
    each_s = max(1, round(chosen.seconds * at_once / len(names)))
    with ThreadPoolExecutor(at_once) as pool:
        well = list(pool.map(lambda name: passes(name, each_s, chosen.seed, chosen.out), names))
    failed = [name for name, is_well in zip(names, well, strict=True) if not is_well]
    for name in failed:
        print(f"{name}: a finding; its input is in {chosen.out / name}, the end of what was said in {chosen.out / name / 'log'}")
    return 1 if failed else 0


def passes(name: str, seconds: int, seed: int, out: Path) -> bool:
    """Whether a search through one target finds nothing."""
    folder = out / name
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    log = folder / "log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "fuzz.drive", "--one", name, "--seconds", str(seconds), "--seed", str(seed), "--out", str(out)]
        ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    said = log.read_text(errors="replace")
    executed = re.findall(r"stat::number_of_executed_units: (\d+)", said)
    slowest = re.findall(r"stat::slowest_unit_time_sec: +(\d+)", said)
    peak = re.findall(r"stat::peak_rss_mb: +(\d+)", said)
    figures = f"{executed[-1]} inputs, slowest {slowest[-1]} s, {peak[-1]} MiB" if executed and slowest and peak else "no figures"
    print(f"{name}: {figures}, {'nothing found' if ended.returncode == 0 else 'FINDING'}", flush=True)
    return ended.returncode == 0


def search(name: str, folder: Path, seconds: int, seed: int) -> int:
    """Search through one target in this process; does not come back."""
    import atheris

    with atheris.instrument_imports(include=["p2pfl", "yaml"]):
        from fuzz.targets import CORPUS, TARGETS

    words = {word for path in (CORPUS / name).iterdir() for word in re.findall(rb"[A-Za-z_][A-Za-z0-9_.-]{2,30}", path.read_bytes())}
    dictionary = folder / "dictionary"
    entries = ("".join(f"\\x{byte:02x}" for byte in word) for word in (*HOSTILE, *sorted(words)[:500]))
    dictionary.write_text("".join(f'"{entry}"\n' for entry in entries))
    options = {
        "max_total_time": seconds,
        "seed": seed,
        "timeout": MOST_SECONDS_PER_INPUT,
        "rss_limit_mb": MOST_MEMORY_MIB,
        "max_len": MOST_INPUT_BYTES,
        "artifact_prefix": f"{folder}/",
        "dict": dictionary,
        "print_final_stats": 1,
    }
    atheris.Setup(
        [sys.argv[0], *(f"-{key}={value}" for key, value in options.items()), str(folder / "corpus"), str(CORPUS / name)], TARGETS[name]
    )
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
