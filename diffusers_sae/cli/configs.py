"""Commands from a file: `--config run.toml`, with flags above it, and a record of what was run."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError

RECORD = "run.json"


def _from_file(ctx: typer.Context, file: Path | None) -> Path | None:
    if file is None or ctx.resilient_parsing:
        return file
    try:
        told = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file} is no TOML ({error}); write lines such as: steps = 5000") from None
    told = {name.replace("-", "_"): value for name, value in told.items()}
    known = {str(parameter.name) for parameter in ctx.command.params} - {"config"}
    if unknown := set(told) - known:
        raise InputError(f"{file} sets {', '.join(sorted(unknown))}, and the command has {', '.join(sorted(known))}.")
    ctx.default_map = {**(ctx.default_map or {}), **told}
    return file


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
    (folder / RECORD).write_text(text + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """What `record` wrote; raises `InputError` if it is not there or cannot be read."""
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / RECORD} cannot be read ({error}); delete {folder} to begin anew.") from None
