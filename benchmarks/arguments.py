"""The command line that all benchmarks share."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any


def parse(parser: argparse.ArgumentParser, out: str, **smoke: Any) -> argparse.Namespace:
    """Parses the command line, with two arguments that every benchmark has: `--out` and `--smoke`.

    Args:
        parser: of the benchmark's own arguments.
        out: name of the results file in `benchmarks/results`.
        smoke: values of arguments under `--smoke`, which runs everything at sizes that end within seconds and say
            nothing. What the command line states wins. Results of such a run go to a temporary folder.
    """
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, only to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results") / out)
    if "--smoke" not in sys.argv[1:]:
        return parser.parse_args()
    return parser.parse_args(namespace=argparse.Namespace(out=Path(tempfile.mkdtemp()) / out, **smoke))
