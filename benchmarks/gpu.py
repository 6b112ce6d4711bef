"""Everything that wants a GPU, in one command: `python benchmarks/gpu.py`, or `make gpu`.

Tests first, then the GPU halves of the benchmarks. Without a GPU it prints what it would run, and ends well.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "-m pytest -m gpu tests/test_gpu.py -v",
    "-m pytest tests/saes/test_ops_triton.py -v",
    "benchmarks/steering_overhead.py --parts c --out benchmarks/results/steering_overhead_gpu.json",
)
"""Arguments of Python, from the project's root."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="only print what would be run")
    args = parser.parse_args()
    commands = [[sys.executable, *shlex.split(command)] for command in COMMANDS]
    if args.smoke or not torch.cuda.is_available():
        print("No GPU is used here. With one, this runs:")
        print("\n".join(f"  python {command}" for command in COMMANDS))
        collect = [*commands[0], "--collect-only", "-q"]
        subprocess.run(collect, cwd=ROOT, check=True)
        return
    failed = [" ".join(command) for command in commands if subprocess.run(command, cwd=ROOT).returncode]
    print("\n".join(f"FAILED  {command}" for command in failed))
    print(f"{len(commands) - len(failed)} passed, {len(failed)} failed")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
