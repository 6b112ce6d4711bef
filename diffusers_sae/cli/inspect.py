"""`diffusers-sae inspect`: a picture of an SAE."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .extras import require
from .files import check_output_file


def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of an SAE.")],
    out: Annotated[Path | None, typer.Option(help="Picture to write; by default inspect.png in the folder.")] = None,
) -> None:
    """Draw loss, reconstruction by timestep, and how often and when latents fire."""
    require("matplotlib")
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; pass the folder of an SAE, such as train's --out.")
    path = out or folder / "inspect.png"
    check_output_file(path)
    from ..evaluation.pictures import draw_sae

    for name, value in draw_sae(folder, path).items():
        typer.echo(f"{name}: {value}")
    typer.echo(path)
