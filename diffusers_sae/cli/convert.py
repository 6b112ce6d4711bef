"""`diffusers-sae convert`: an SAE of one layout to another."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..disk import refuse_full_disk
from ..errors import InputError
from .files import check_output_folder

if TYPE_CHECKING:
    from ..sites import Site


def convert(
    source: Annotated[str, typer.Argument(help="Hub repository, folder or weights file.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must be new or empty.")],
    to: Annotated[str, typer.Option(help="Layout to write: diffusers_sae, sparsify or sae_lens.")] = "diffusers_sae",
    subfolder: Annotated[str | None, typer.Option(help="Of the repository or folder.")] = None,
    weight_name: Annotated[str | None, typer.Option(help="Weights file, where there are several.")] = None,
    site: Annotated[
        str | None, typer.Option(help="Site that it was trained at, if the files don't say: unet.mid_block@update.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Of a site by its path: output, input or update.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Model that it was trained on, if they don't say.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="What else they leave out: k=32, again.")] = None,
) -> None:
    """Read an SAE of any known layout and write it in another. Pickles are read without being run."""
    from ..loaders import load_sae
    from ..loaders.formats import FORMATS

    writers = {name: layout.write for name, layout in FORMATS.items() if layout.write is not None}
    if to not in writers:
        raise InputError(f"{to!r} cannot be written; choose one of {', '.join(writers)}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already; choose a new folder.")
    check_output_folder(folder)
    where = site_of(site, kind)
    sae = load_sae(source, subfolder, weight_name, settings_of(set_ or []), inert=True)
    provenance = sae.provenance
    if where is not None:
        provenance["site"] = where.as_dict()
    if base_model is not None:
        provenance["base_model"] = base_model
    sae.register_to_config(provenance=provenance or None)
    sae.fetch()
    with _written_whole(folder) as unfinished:
        writers[to](sae, unfinished)
    typer.echo(f"{type(sae).__name__} of {sae.n_latents:,} latents and width {sae.d_in}: {folder}")


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A folder beside that gets its name when all is written, and is removed if something goes wrong."""
    unfinished = folder.absolute().with_name(f".{folder.absolute().name}.{os.getpid()}")
    try:
        with refuse_full_disk(folder):
            unfinished.mkdir(parents=True)
            yield unfinished
            unfinished.replace(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def site_of(path: str | None, kind: str | None) -> Site | None:
    """The site of `--site` and `--kind`, if one is given; raises `InputError` for a kind without a site."""
    from ..sites import MARK, Site

    if path is None and kind is not None:
        raise InputError(f"--kind {kind} needs --site, whose kind it is; the kind of a site in the files stays.")
    if path is None or kind is None:
        return None if path is None else Site.of(path)
    if MARK in path:
        raise InputError(f"--kind {kind} is for a site by its path alone, not {path}; write the kind there.")
    return Site(path, kind=kind)


def settings_of(settings: list[str]) -> dict[str, Any]:
    """`{name: value}` of settings `name=value`, whose values are JSON or else text; raises `InputError`."""
    found = {}
    for setting in settings:
        name, sign, value = setting.partition("=")
        if not sign or not name:
            raise InputError(f"--set {setting} is not a setting; write --set name=value.")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found
