"""What SAEs, recipes and pipelines were made from, and warnings where that differs."""

from __future__ import annotations

import os
import warnings
from typing import Any

from .saes import SparseAutoencoder
from .sites import Site


def base_model(pipe: Any) -> str | None:
    """Where the pipeline was loaded from, if from anywhere."""
    name = pipe.config.get("_name_or_path")
    return None if name is None else str(name)  # of `from_pretrained(Path(...))`, a path


def warn_of_other_sae(pipe: Any, sae: SparseAutoencoder, place: Site) -> None:
    """Warn if the SAE was trained for another base model or another kind of site than the one it is put at."""
    origin = sae.provenance
    _warn_of_other_model(pipe, origin.get("base_model"), "The SAE was trained on")
    trained = Site.of(origin.get("site", place))
    if trained != place:
        _warn(f"The SAE was trained at {trained} and is loaded at {place}")


def warn_of_other_recipe(pipe: Any, made_on: str | None, made_for: str | None) -> None:
    """Warn if a recipe was made on another base model, or for another class of pipelines."""
    _warn_of_other_model(pipe, made_on, "The recipe was made on")
    if made_for and made_for != type(pipe).__name__:
        _warn(f"The recipe was made for a {made_for} and this is a {type(pipe).__name__}", stacklevel=4)


def _warn_of_other_model(pipe: Any, other: str | None, told: str) -> None:
    loaded = base_model(pipe)
    if other and loaded and _short(other) != _short(loaded):
        _warn(f"{told} {other} and this pipeline is {loaded}")


def _warn(what: str, stacklevel: int = 5) -> None:
    warnings.warn(f"{what}; its features may not mean the same here.", stacklevel=stacklevel)


def _short(name: str) -> str:
    return os.path.basename(os.path.normpath(name)).lower()
