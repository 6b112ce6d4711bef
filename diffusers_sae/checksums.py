"""SHA-256 of every file of a saved SAE, so that an altered or truncated one is refused before it is read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path

from .errors import InputError
from .nulls import without_nulls

FILE = "checksums.json"
DATA = (".safetensors", ".json", ".bin")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path, names: Iterable[str] | None = None) -> None:
    """Record these files of `folder` in `checksums.json`, or all of its data files (not of its subfolders).

    Cards are left out, since they may be edited later.
    """
    if names is None:
        names = [p.name for p in folder.iterdir() if p.suffix in DATA and p.name != FILE and p.is_file()]
    (folder / FILE).write_text(json.dumps({name: sha256(folder / name) for name in sorted(names)}, indent=1) + "\n")


def verify_checksums(folder: Path, below: float = math.inf) -> None:
    """Raise `InputError` if a recorded file is missing or differs. A folder without `checksums.json` passes.

    Files of `below` bytes or more are not read.
    """
    for name, expected in _recorded(folder / FILE).items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path} is missing although {folder / FILE} lists it; fetch or save the SAE again.")
        if path.stat().st_size < below and sha256(path) != expected:
            raise InputError(
                f"{path} does not have the checksum that {folder / FILE} records, so it is truncated or altered; "
                "fetch or save the SAE again."
            )


def _recorded(record: Path) -> dict[str, str]:
    """`{name of a file: SHA-256}` of a record; empty if there is none."""
    if not record.exists() and not record.is_symlink():
        return {}
    try:
        told = json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{record} cannot be read; fetch or save the SAE again.") from None
    if not isinstance(told, dict) or any(not name or Path(name).name != name for name in told):
        raise InputError(f"{record} must be an object {{file: SHA-256}}; fetch or save the SAE again.")
    return without_nulls(told)
