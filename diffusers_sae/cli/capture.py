"""`diffusers-sae capture`: the activations of a pipeline, on disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from .call_option import check_seed, read_call
from .configs import Config, record
from .files import check_output_folder
from .prompts import read_prompts
from .sources import Pictures, load_model


def capture(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or hub repository of a diffusers pipeline, or emoji-sd.")],
    prompts: Annotated[Path, typer.Argument(help="Text file, a prompt a line; or .csv, .tsv, .json, .jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder; every site gets a folder in it.")],
    site: Annotated[
        list[str], typer.Option(help="Site, such as unet.mid_block or unet.mid_block@update,channels; once for each.")
    ],
    column: Annotated[str, typer.Option(help="Column of the prompts in a table or in JSON.")] = "prompt",
    pictures: Annotated[
        Path | None, typer.Option(help="Folder of images, one for each prompt: noise is added, nothing is generated.")
    ] = None,
    strength: Annotated[
        list[float] | None, typer.Option(help="Share of noise that pictures get, by default four; once for each.")
    ] = None,
    images: Annotated[int | None, typer.Option(help="Images to generate; by default one for each prompt.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images generated at a time.")] = 16,
    branch: Annotated[list[str], typer.Option(help="Guidance branch; once for each.")] = ["cond"],  # noqa: B006
    timesteps: Annotated[int | None, typer.Option(help="Timesteps to keep, evenly spread; all by default.")] = None,
    places: Annotated[int | None, typer.Option(help="Random places to keep of each map; all by default.")] = None,
    tokens: Annotated[
        str, typer.Option(help="At text encoders: words, padded (all but the one that begins a text) or all.")
    ] = "all",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    max_gb: Annotated[float | None, typer.Option(help="What the store may take; by default, what is free.")] = None,
    seed: Annotated[int, typer.Option(help="Image i starts from the noise of seed + i.")] = 0,
    call: Annotated[str, typer.Option(help="JSON of further arguments of the pipeline.")] = "{}",
    config: Config = None,
) -> None:
    """Generate images and keep what the sites hold. Stopped, it goes on where it was.

    Text encoders read the prompts alone: for their sites, no image is generated.
    """
    import torch

    from ..capture import StoreConfig, store_activations
    from ..capture.calls import CAPTURE_SETS, check_call

    arguments = read_call(call)
    lines = read_prompts(prompts, column)
    check_output_folder(out)
    if strength and pictures is None:
        raise InputError("--strength is of the noise that pictures get; pass --pictures, or leave it out.")
    if max_gb is not None and not 0 < max_gb < math.inf:
        raise InputError(f"max_gb={max_gb} must be a number above 0; leave it out for all that is free.")
    if images is not None and images > len(lines):
        raise InputError(f"There are {len(lines)} prompts for {images} images; give one for each.")
    check_seed(seed)
    budget = None if max_gb is None else int(max_gb * 1e9)
    kept = StoreConfig(
        images=len(lines) if images is None else images,
        batch_size=batch_size,
        branches=tuple(branch),
        timesteps=timesteps,
        places=places,
        dtype=dtype,
        max_bytes=budget,
        seed=seed,
        tokens=tokens,
    )
    noised: dict[str, Any] = {}
    if pictures is not None:
        noised = {"images": Pictures(pictures), **({"strengths": strength} if strength else {})}
        noised["images"].check(kept.images)
    pipe = load_model(model)
    if pictures is not None:
        pipe = _image_to_image(pipe)
    check_call(pipe, arguments, (*CAPTURE_SETS, "image", "strength") if noised else CAPTURE_SETS)
    if torch.cuda.is_available():
        pipe = pipe.to("cuda")
    stores = store_activations(pipe, site, lines, out, kept, **arguments, **noised)
    record(ctx, out)
    for at, store in stores.items():
        size = sum(shard["bytes"] for shard in store.manifest["shards"])
        typer.echo(f"{at}: {len(store):,} rows of width {store.width}, {size / 1e9:.3f} GB, in {store.folder}")


def _image_to_image(pipe: Any) -> Any:
    """The sibling of a pipeline that adds noise to images; raises `InputError` if it has none."""
    from diffusers import AutoPipelineForImage2Image

    from .. import SAESteeringPipeline

    try:
        sibling = SAESteeringPipeline.from_pipe(AutoPipelineForImage2Image.from_pipe(pipe))
    except ValueError as error:
        raise InputError(f"{type(pipe).__name__} has no sibling that takes pictures ({error}).") from error
    sibling.set_progress_bar_config(disable=True)
    return sibling
