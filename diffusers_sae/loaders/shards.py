"""Weights that lie in several files: an index tells which tensor is in which."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .reading import read_json

INDEX = ".index"
SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def is_index(name: str) -> bool:
    """Whether a file of that name is an index: `model.safetensors.index.json`, `model.safetensors.index.fp16.json`."""
    stem, suffix = os.path.splitext(name)
    return suffix == ".json" and re.search(r"\.(safetensors|bin)\.index(\.\w+)?$", stem) is not None


def is_shard(name: str) -> bool:
    """Whether a file of that name is one of several: `model-00001-of-00002.safetensors`."""
    return SHARD.search(os.path.splitext(name)[0]) is not None


def index_of(name: str, variant: str | None = None) -> str:
    """What the index of a weights file in shards is called."""
    return f"{name}{INDEX}.{variant}.json" if variant else f"{name}{INDEX}.json"


def files_of(file: Path) -> dict[Path, Sequence[str] | None]:
    """The files that weights lie in, and the tensors that each must have: of any file but an index, itself and any.

    Raises:
        InputError: the index is none, or names a file that is not there or lies elsewhere.
    """
    if not is_index(file.name):
        return {file: None}
    places = read_json(file).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{file} has no weight_map of tensors to files; fetch or save the SAE again.")
    found: dict[Path, list[str]] = {}
    for tensor, name in places.items():
        if Path(name).name != name:
            raise InputError(f"{file} names {name!r}, which lies in another folder; fetch or save the SAE again.")
        if not (file.parent / name).is_file():
            raise InputError(f"{file} names {name!r}, which is not there; fetch or save the SAE again.")
        found.setdefault(file.parent / name, []).append(tensor)
    return dict(found)
