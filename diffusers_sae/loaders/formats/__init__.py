"""Formats of SAE files, one family a file, recognized by what is in the files."""

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
from .base import Format, Signature

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (
        own, sdxl_unbox, sparsify, clip_kandinsky, re_n_y, stylegan, overcomplete, revelio, sae_lens,
        dictionary_learning, saev, openai, vit_prisma,
    )
}  # fmt: skip
"""Every format by its name."""


def format_of(weights: Weights) -> Format:
    """The format that the config names as `format`, or else the most specific of those that tensors and config match.

    Raises:
        InputError: none matches, or more than one does.
    """
    asked = weights.config.get("format")
    if isinstance(asked, str) and asked in FORMATS:
        return FORMATS[asked]
    if "_class_name" in weights.config:
        return own.FORMAT
    matches = {name: how for name, each in FORMATS.items() if (how := each.specificity(weights)) is not None}
    best = [name for name, how in matches.items() if how == max(matches.values())]
    if len(best) == 1:
        return FORMATS[best[0]]
    names = ", ".join(sorted(weights.tensors)[:8]) or "none"
    if best:
        raise InputError(
            f"{weights.origin} could be of {' or '.join(best)} (tensors {names}); "
            f"pass config={{'format': {best[0]!r}}}, or the other."
        )
    raise InputError(
        f"{weights.origin} is of no known layout (tensors {names}){_nearest(weights)}; pass config={{'format': ...}}, "
        f"one of {', '.join(FORMATS)}, if you know it."
    )


def read(weights: Weights) -> SparseAutoencoder:
    """The SAE that a file of any known format holds; raises `InputError`."""
    return format_of(weights).read(weights)


def _nearest(weights: Weights) -> str:
    """How the file differs from the format that its tensors are nearest to."""
    pairs = [(each, signature) for each in FORMATS.values() for signature in each.signatures]
    layout, nearest = min(pairs, key=lambda pair: (_distance(weights, pair[1]), not pair[0].is_marked(weights)))
    missing, forbidden = nearest.missing(weights), nearest.forbidden(weights)
    if 2 * len(missing) >= len(nearest.required):
        return ", or has no matrix W_dec (latents, width)"
    wrong = [f"has no {', '.join(missing)}"] if missing else []
    wrong += [f"has {', '.join(forbidden)}, which that has no use for"] if forbidden else []
    return f": it is nearest to {layout.name}, but {' and '.join(wrong)}" if wrong else ""


def _distance(weights: Weights, signature: Signature) -> int:
    return 2 * len(signature.missing(weights)) + len(signature.forbidden(weights))


__all__ = ["FORMATS", "Format", "Signature", "format_of", "read"]
