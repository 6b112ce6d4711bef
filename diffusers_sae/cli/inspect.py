"""`diffusers-sae inspect`: a picture of an SAE."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of an SAE.")],
    out: Annotated[Path | None, typer.Option(help="PNG to write; by default inspect.png in the folder.")] = None,
) -> None:
    """Draw loss, reconstruction by timestep, and how often and when latents fire."""
    from ..evaluation.pictures import draw_sae

    path = out or folder / "inspect.png"
    for name, value in draw_sae(folder, path).items():
        typer.echo(f"{name}: {value}")
    typer.echo(path)
