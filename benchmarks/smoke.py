"""Runs every benchmark and example at its smallest size: `python benchmarks/smoke.py`.

Scripts are found by themselves, so that a new one fails here as long as it has no `--smoke`. They run in a temporary
folder, two at a time; those that train the demo world's models one after another, since each needs the ones before.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = ("benchmarks/results", "diffusers_sae/demo/models")
"""Folders that a smoke run must leave as they are."""
WORLD = (
    "train_autoencoder", "train_clip", "train_unet", "train_judge", "train_sae", "choose_steering", "train_kandinsky",
    "ship",
)  # fmt: skip
"""Scripts of the demo world in the order in which they need each other; its drawings come first of all."""


def scripts() -> list[Path]:
    """All benchmarks and examples that are run, not imported."""
    files = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*/*.py")])
    return [file for file in files if '__name__ == "__main__"' in file.read_text() and file != Path(__file__)]


def in_groups(files: Iterable[Path]) -> list[list[Path]]:
    """Groups that may run beside each other, each in its order; the longest first."""
    files = list(files)
    world = [file for name in WORLD for file in files if file.stem == name]
    return [group for group in (world, *([file] for file in files if file not in world)) if group]


def run(file: Path, folder: Path) -> bool:
    """Runs one script and says how long it took, or, if it failed, what it printed."""
    name = file.relative_to(ROOT)
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MPLBACKEND": "Agg", "TMPDIR": str(folder)}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(file), "--smoke"], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if done.returncode:
        lines = "\n".join(done.stdout.splitlines()[-40:])
        print(f"FAILED  {name}, exit code {done.returncode} after {seconds:.0f} s\n{lines}", flush=True)
    else:
        print(f"{seconds:5.1f} s  {name}", flush=True)
    return done.returncode == 0


def state() -> dict[Path, int]:
    """Every file that must stay, and when it was written."""
    return {file: file.stat().st_mtime_ns for folder in KEPT for file in (ROOT / folder).rglob("*") if file.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="scripts to run, by name without .py")
    args = parser.parse_args()
    before = state()
    files = [file for file in scripts() if not args.only or file.stem in args.only]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = Path(name)
        first = [file for file in scripts() if file.stem == "sprites"]
        passed = [run(file, folder) for file in first]
        groups = in_groups(file for file in files if file not in first)
        for results in pool.map(lambda group: [run(file, folder) for file in group], groups):
            passed += results
    written = sorted(str(file.relative_to(ROOT)) for file, _ in before.items() ^ state().items())
    if written:
        print(f"FAILED  smoke runs wrote to the tree: {', '.join(dict.fromkeys(written))}")
        passed.append(False)
    print(f"{passed.count(True)} passed, {passed.count(False)} failed")
    if not all(passed) or not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
