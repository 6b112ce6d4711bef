"""Repositories whose files leave out what they were trained on, and what their authors say of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Any, NamedTuple


class Record(NamedTuple):
    """What is known of a repository.

    Args:
        site: of a subfolder (and the name of the repository): a dict with path, kind and stream, or `None`.
        base_model: what it was trained on.
        nicknames: the authors' names of subfolders, as patterns.
        note: what else a user should know.
    """

    site: Callable[[str, str], dict[str, str] | None]
    base_model: str | None = None
    nicknames: Mapping[str, str] = {}
    note: str | None = None


def _at(path: str, kind: str = "output", **more: str) -> Callable[[str, str], dict[str, str] | None]:
    return lambda repository, subfolder: {"path": path, "kind": kind, **more}


def _named_by_folder(kind: str) -> Callable[[str, str], dict[str, str] | None]:
    """The site that a part of the subfolder is named by, before `_k` and what follows."""

    def site(repository: str, subfolder: str) -> dict[str, str] | None:
        found = re.search(r"(?:^|/)((?:unet|transformer)\.[\w.]*?\d)(?=_k\d|/|$)", subfolder)
        return {"path": found[1], "kind": kind} if found else None

    return site


def _of_flux_block(repository: str, subfolder: str) -> dict[str, str] | None:
    """`cc3m-transformer_blocks.18-1`: the block, and which of its outputs: 0 is the text stream, 1 the image stream."""
    found = re.search(r"((?:single_)?transformer_blocks\.\d+)(?:-([01]))?$", repository)
    if not found:
        return None
    return {"path": f"transformer.{found[1]}", "kind": "output", "stream": "text" if found[2] == "0" else "image"}


SDXL_BLOCKS = {
    "composition": "unet.down_blocks.2.attentions.1_*",
    "middle": "unet.mid_block.attentions.0_*",
    "details": "unet.up_blocks.0.attentions.0_*",
    "style": "unet.up_blocks.0.attentions.1_*",
}
RECORDS: dict[str, Record] = {
    "surokpro2/sdxl-saes": Record(_named_by_folder("update"), "stabilityai/sdxl-turbo", SDXL_BLOCKS),
    "antoniomari/SAE_flux_18": Record(_at("transformer.transformer_blocks.18", "update")),
    "bcywinski/SAeUron": Record(
        _named_by_folder("output"),
        None,
        {"objects": "unet.up_blocks.1.attentions.1", "styles": "unet.up_blocks.1.attentions.2"},
        "trained on UnlearnCanvas' fine-tune of Stable Diffusion 1.5",
    ),
    "bcywinski/SAeUron_coco": Record(_named_by_folder("output"), "CompVis/stable-diffusion-v1-4"),
    "leno3003/SAEmnesia": Record(
        _at("unet.up_blocks.1.attentions.1"),
        note="trained on UnlearnCanvas' fine-tune of Stable Diffusion 1.5",
    ),
    "ItD-anonymous/SAE": Record(_at("text_encoder.text_model.encoder.layers.8")),
    "gytdau/clip-sae-128": Record(_at("image_embeds"), "kandinsky-community/kandinsky-2-2-prior"),
    "RE-N-Y/cc3m-*transformer_blocks*": Record(
        _of_flux_block,
        "black-forest-labs/FLUX.1-schnell",
        note="trained at 256 pixels and one step, and called ineffective for steering by its author",
    ),
    "jrsh/sd-control-and-representation": Record(
        _at("unet.up_blocks.1.attentions.1.transformer_blocks.0"), "stable-diffusion-v1-5/stable-diffusion-v1-5"
    ),
}
"""By name, in which `*` stands for anything."""


def record_of(repository: str) -> Record | None:
    return next((record for name, record in RECORDS.items() if fnmatch(repository, name)), None)


def told_by(record: Record, repository: str, subfolder: str) -> dict[str, Any]:
    """What a record adds to the provenance of an SAE."""
    told = {"site": record.site(repository, subfolder), "base_model": record.base_model, "note": record.note}
    return {name: value for name, value in told.items() if value is not None}
