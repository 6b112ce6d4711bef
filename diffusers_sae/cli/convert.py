"""`diffusers-sae convert`: an SAE of one layout to another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError


def convert(
    source: Annotated[str, typer.Argument(help="Hub repository, folder or weights file.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must be new or empty.")],
    to: Annotated[str, typer.Option(help="Layout to write: diffusers_sae, sparsify or sae_lens.")] = "diffusers_sae",
    subfolder: Annotated[str | None, typer.Option(help="Of the repository or folder.")] = None,
    weight_name: Annotated[str | None, typer.Option(help="Weights file, where there are several.")] = None,
    site: Annotated[str | None, typer.Option(help="Site that it was trained at, if the files don't say.")] = None,
    kind: Annotated[str, typer.Option(help="Of that site: output, input or update.")] = "output",
    base_model: Annotated[str | None, typer.Option(help="Model that it was trained on, if they don't say.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="What else they leave out: k=32, again.")] = None,
) -> None:
    """Read an SAE of any known layout and write it in another. Pickles are read without being run."""
    from ..loaders import load_sae
    from ..loaders.formats import FORMATS
    from ..sites import Site

    writers = {name: layout.write for name, layout in FORMATS.items() if layout.write is not None}
    if to not in writers:
        raise InputError(f"{to!r} cannot be written; choose one of {', '.join(writers)}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already; choose a new folder.")
    sae = load_sae(source, subfolder, weight_name, settings_of(set_ or []), inert=True)
    provenance = sae.provenance
    if site is not None:
        provenance["site"] = Site(site, kind=kind).as_dict()
    if base_model is not None:
        provenance["base_model"] = base_model
    sae.register_to_config(provenance=provenance or None)
    sae.fetch()
    writers[to](sae, folder)
    typer.echo(f"{type(sae).__name__} of {sae.n_latents:,} latents and width {sae.d_in}: {folder}")


def settings_of(settings: list[str]) -> dict[str, Any]:
    """`{name: value}` of settings `name=value`, whose values are JSON or else text; raises `InputError`."""
    found = {}
    for setting in settings:
        name, sign, value = setting.partition("=")
        if not sign:
            raise InputError(f"--set {setting} is not a setting; write --set name=value.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
