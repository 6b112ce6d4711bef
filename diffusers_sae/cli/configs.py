"""Commands from a file: `--config run.toml`, with flags above it, and a record of what was run."""

from __future__ import annotations

import difflib
import inspect
import json
import tomllib
import typing
from pathlib import Path
from typing import Annotated, Any

import typer

from ..disk import write_whole
from ..errors import InputError
from .files import read_text

RECORD = "run.json"
NOT_IN_FILES = ("config", "debug", "help")
"""Options that a file cannot set."""
TABLES = ("call",)
"""Options that take JSON, for which a file can have a table."""
TOML_TYPES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "a boolean",
    list: "an array",
    dict: "a table",
}


def _from_file(ctx: typer.Context, file: Path | None) -> Path | None:
    if file is None or ctx.resilient_parsing:
        return file
    ctx.default_map = {**(ctx.default_map or {}), **_read_config(file, ctx.command.callback)}
    return file


def _read_config(file: Path, command: Any) -> dict[str, Any]:
    """The options that a TOML file sets, by the names of the command's parameters.

    A table becomes JSON, which `--call` takes; a single value for an option that can be repeated, a list.

    Raises:
        InputError: the file is no TOML, names what the command has not, or gives a value of another type.
    """
    try:
        settings = tomllib.loads(read_text(file))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file} is no TOML ({error}); write lines such as: steps = 5000") from None
    known = typing.get_type_hints(inspect.unwrap(command))
    known = {name: hint for name, hint in known.items() if name not in (*NOT_IN_FILES, "ctx", "return")}
    values: dict[str, Any] = {}
    for name, value in settings.items():
        option = name.replace("-", "_")
        if option in NOT_IN_FILES:
            raise InputError(f"{file} sets {name}, which only the command line can; leave it out.")
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.0)[0]
            raise InputError(
                f"{file} sets {name}, and the command has {', '.join(sorted(known))}; the nearest is {near}."
            )
        if option in values:
            raise InputError(f"{file} sets {option} twice, once with dashes; leave one out.")
        values[option] = _as_option(file, name, value, known[option])
    return values


def _as_option(file: Path, name: str, value: Any, hint: Any) -> Any:
    """A value of a TOML file as typer takes it, or `InputError` if it is of another type than the option's."""
    kinds = {kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)}  # of list[float] | None
    repeated = typing.get_origin(hint) is list or any(typing.get_origin(kind) is list for kind in kinds)
    kinds = {(typing.get_args(kind) or (kind,))[0] for kind in kinds}
    kind = next((kind for kind in (bool, int, float) if kind in kinds), str)  # a path is a string in TOML
    if isinstance(value, dict) and name in TABLES:
        return _as_json(file, name, value)
    entries = value if repeated and isinstance(value, list) else [value]
    for entry in entries:
        if type(entry) is not kind and not (kind is float and type(entry) is int):
            also = ", or an array of them" if repeated else ", or a table" if name in TABLES else ""
            given = TOML_TYPES.get(type(entry), "a date or a time")
            raise InputError(f"{file} sets {name} to {entry!r}, {given}; it takes {TOML_TYPES[kind]}{also}.")
    return entries if repeated else value


def _as_json(file: Path, name: str, table: dict[str, Any]) -> str:
    try:
        return json.dumps(table)
    except TypeError:
        raise InputError(f"{file} has a date or a time in {name}, which JSON has not; write it as a string.") from None


Config = Annotated[
    Path | None,
    typer.Option(help="TOML file of this command's options; flags count more.", is_eager=True, callback=_from_file),
]


def record(ctx: typer.Context, folder: Path, **found: Any) -> None:
    """Print what is run, and write it into a folder as `run.json`; `found` is what the command settled itself."""
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in ctx.params.items()}
    text = json.dumps({"command": ctx.info_name, **asked, **found})
    typer.echo(text, err=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECORD, lambda partial: partial.write_text(text + "\n"))


def read_record(folder: Path) -> dict[str, Any]:
    """What `record` wrote; raises `InputError` if it is not there or cannot be read."""
    try:
        values = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder / RECORD} cannot be read ({error}); delete {folder} to begin anew.") from None
    if not isinstance(values, dict):
        raise InputError(f"{folder / RECORD} holds no record of a run; delete {folder} to begin anew.")
    return values
