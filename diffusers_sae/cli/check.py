"""`diffusers-sae check`: whether an SAE fits a tensor of a pipeline."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import InputError
from .convert import settings_of, site_of
from .sources import load_model


def check(
    model: Annotated[str, typer.Argument(help="Folder or hub repository of a pipeline, or emoji-sd.")],
    sae: Annotated[str, typer.Argument(help="SAE: hub repository, folder or weights file.")],
    prompt: Annotated[str, typer.Option(help="To generate from.")] = "a photo of a cat",
    site: Annotated[
        str | None, typer.Option(help="Where to put it, if its files don't say, such as unet.mid_block@update.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Of a site by its path: output, input or update.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Of the SAE.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the denoising.")] = 20,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's by default.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="What the files leave out: k=32, again.")] = None,
) -> None:
    """Run a pipeline once and tell which of its tensors an SAE was trained on."""
    if steps < 1:
        raise InputError(f"steps={steps} must be at least 1.")
    settings = settings_of(set_ or [])
    where = site_of(site, kind)
    pipe = load_model(model)
    pipe.load_sae(sae, where, subfolder=subfolder, config=settings)
    call = {"num_inference_steps": steps, **({} if guidance is None else {"guidance_scale": guidance})}
    typer.echo(pipe.check_sae(prompt, **call))
