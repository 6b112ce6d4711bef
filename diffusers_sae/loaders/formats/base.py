"""What a layout of SAE files tells of itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ...saes import SparseAutoencoder
from ..weights import Weights

TRANSFORMER_LENS = ("W_enc", "b_enc", "W_dec", "b_dec")
"""Names of the tensors among those who come from TransformerLens; their `W_enc` is `(d, n)`."""


class Format(NamedTuple):
    """One layout.

    Args:
        name: as in `config={"format": name}` and `diffusers-sae convert --to name`.
        whose: projects that write it.
        rule: how they get codes, in one line.
        recognizes: whether a file is of this layout.
        read: makes an SAE of ours of it.
        rows: the tensor whose rows are the features' directions as they are, if there is one.
        write: writes an SAE of ours as a folder in it, where that can be done.
    """

    name: str
    whose: str
    rule: str
    recognizes: Callable[[Weights], bool]
    read: Callable[[Weights], SparseAutoencoder]
    rows: str | None = None
    write: Callable[[SparseAutoencoder, Path], None] | None = None
