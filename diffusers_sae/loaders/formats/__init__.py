"""Layouts of SAE files, one family a file, recognized by what is in the files."""

from __future__ import annotations

from ...errors import InputError
from ...saes import SparseAutoencoder
from ..weights import Weights
from . import (
    clip_kandinsky,
    dictionary_learning,
    openai,
    overcomplete,
    own,
    re_n_y,
    revelio,
    sae_lens,
    saev,
    sdxl_unbox,
    sparsify,
    stylegan,
    vit_prisma,
)
from .base import Format

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (
        own, sdxl_unbox, sparsify, clip_kandinsky, re_n_y, stylegan, overcomplete, revelio, sae_lens,
        dictionary_learning, saev, openai, vit_prisma,
    )
}  # fmt: skip
"""Every layout by its name."""


def format_of(weights: Weights) -> Format:
    """The layout that the config names as `format`, or else the one that tensors and config show.

    Raises:
        InputError: none, or more than one fits.
    """
    asked = weights.config.get("format")
    if asked in FORMATS:
        return FORMATS[asked]
    found = [layout for layout in FORMATS.values() if layout.recognizes(weights)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(sorted(weights.tensors)[:8]) or "none"
    if found:
        raise InputError(
            f"{weights.origin} could be of {' or '.join(layout.name for layout in found)} (tensors {names}); "
            f"pass config={{'format': {found[0].name!r}}}, or the other."
        )
    raise InputError(
        f"{weights.origin} is of no known layout (tensors {names}), or has no matrix W_dec (latents, width); pass "
        f"config={{'format': ...}}, one of {', '.join(FORMATS)}, if you know it."
    )


def read(weights: Weights) -> SparseAutoencoder:
    """The SAE that a file of any known layout holds; raises `InputError`."""
    return format_of(weights).read(weights)


__all__ = ["FORMATS", "Format", "format_of", "read"]
