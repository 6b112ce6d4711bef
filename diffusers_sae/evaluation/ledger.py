"""A record of finished pieces of a long evaluation, so that a stopped one goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError

BEGINNING = '{"settings": '


class Ledger:
    """Results by key, one JSON object a line.

    A line that a kill cut short is dropped when the file is read. A file that was made with other settings is
    refused, so that results never mix.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self._results: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []
        if lines and not (lines[0].startswith(BEGINNING) or BEGINNING.startswith(lines[0])):
            raise InputError(f"{path} is no record of an evaluation; delete it, or pass another --work folder.")
        whole = [line for line in map(_parse, lines) if line is not None]
        if whole and whole[0].get("settings") != settings:
            raise InputError(
                f"{path} was made with other settings or weights; delete it, or pass another --work folder."
            )
        self._results = {line["key"]: line["result"] for line in whole[1:]}
        if len(whole) != len(lines) or not whole:
            path.write_text("".join(json.dumps(line) + "\n" for line in whole or [{"settings": settings}]))

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The result of `key`, computed and recorded unless it is there."""
        if key not in self._results:
            self._results[key] = json.loads(json.dumps(compute()))
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key, "result": self._results[key]}) + "\n")
        return self._results[key]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and ("settings" in value or {"key", "result"} <= set(value)) else None
