"""SHA-256 of every file of a saved SAE, so that an altered or truncated one is refused before it is read."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

from .errors import InputError

FILE = "checksums.json"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Record the data files of `folder` (not of its subfolders) in `checksums.json`; cards may be edited later."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json") and p.name != FILE)
    (folder / FILE).write_text(json.dumps({p.name: sha256(p) for p in files}, indent=1) + "\n")


def verify_checksums(folder: Path, below: float = math.inf) -> None:
    """Raise `InputError` if a recorded file is missing or differs. A folder without `checksums.json` passes.

    Files of `below` bytes or more are not read.
    """
    record = folder / FILE
    if not record.exists():
        return
    for name, expected in json.loads(record.read_text()).items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path} is missing although {record} lists it; fetch or save the SAE again.")
        if path.stat().st_size < below and sha256(path) != expected:
            raise InputError(
                f"{path} does not have the checksum that {record} records, so it is truncated or altered; "
                "fetch or save the SAE again."
            )
