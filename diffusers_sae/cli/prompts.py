"""Prompts from text, tables and JSON, as other programs write them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError
from .files import lines_of, read_text


def read_prompts(file: Path, column: str) -> list[str]:
    """The prompts of a file, by its ending, in upper or lower case.

    `.csv` and `.tsv`: a column of the table, which has a header. `.json`: a list of strings, or of objects with the
    column. `.jsonl`: the same, one a line. All others: one prompt a line; blank lines are left out.

    Raises:
        InputError: the file cannot be read, holds no prompt, or a row has no text in the column.
    """
    prompts = READERS.get(file.suffix.lower(), _read_lines)(file, read_text(file), column)
    if not prompts:
        raise InputError(f"{file} holds no prompts; write at least one.")
    return prompts


def _read_lines(file: Path, text: str, column: str) -> list[str]:
    return [line for line in lines_of(text) if line.strip()]


def _read_csv(file: Path, text: str, column: str) -> list[str]:
    header = next((line for line in lines_of(text) if line.strip()), "")
    return _read_table(file, text, column, ";" if header.count(";") > header.count(",") else ",")


def _read_tsv(file: Path, text: str, column: str) -> list[str]:
    return _read_table(file, text, column, "\t")


def _read_table(file: Path, text: str, column: str, delimiter: str) -> list[str]:
    reader = csv.DictReader(io.StringIO(text.lstrip("\r\n"), newline=""), delimiter=delimiter, strict=True)
    try:
        if (reader.fieldnames or []).count(column) > 1:
            raise InputError(f"{file} has several columns {column!r}; rename all but one.")
        rows = list(reader)
        for row in rows:  # cells beyond the header's
            if any(row.pop(None, [])):  # type: ignore[call-overload]
                raise InputError(f"{file} has a row with more cells than its header ({row}); quote the text in it.")
    except csv.Error as error:
        raise InputError(
            f"{file} is no table that can be read (after line {reader.line_num}: {error}); mend it."
        ) from None
    return _column_of(file, rows, column)


def _read_json(file: Path, text: str, column: str) -> list[str]:
    try:
        rows = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is no JSON ({error}); write a list of prompts, or name it .jsonl.") from None
    if not isinstance(rows, list):
        raise InputError(f"{file} holds no list but {_kind_of(rows)}; write a list of strings or of objects.")
    return _column_of(file, rows, column)


def _read_json_lines(file: Path, text: str, column: str) -> list[str]:
    rows = []
    for i, line in enumerate(lines_of(text)):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file} is no JSON Lines (line {i + 1}: {error}); write one object a line.") from None
    return _column_of(file, rows, column)


def _column_of(file: Path, rows: list[Any], column: str) -> list[str]:
    """The text of every row, which is a string or an object with that column."""
    prompts: list[Any] = [row.get(column) if isinstance(row, dict) else row for row in rows]
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        if not isinstance(prompt, str):
            has = ", ".join(map(str, row)) if isinstance(row, dict) else _kind_of(row)
            raise InputError(
                f"Row {i + 1} of {file} has no text in the column {column!r}; it has {has or 'none'}; write the prompt "
                "there, or choose another --column."
            )
    return prompts


def _kind_of(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(type(value), "a number")


READERS: dict[str, Callable[[Path, str, str], list[str]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
}
"""How files are read, by their ending."""
