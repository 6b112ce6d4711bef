"""Checkpoints on disk: written whole or not at all, and read with every byte checked and no code run."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..capture.descriptions import refuse_differences
from ..disk import write_whole
from ..errors import InputError

CHECKPOINT = "checkpoint.pt"
DELETE = "delete it to begin anew"


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint whole, or not at all; raises `InputError` if the disk is full."""

    def save(partial: Path) -> None:
        with partial.open("wb") as file:  # of a path, torch hides why it cannot be written
            torch.save(state, file)

    write_whole(path, save)


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """What was written last, on the CPU, if anything was; raises `InputError` if it cannot be read or is damaged."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch itself does not look at the checksums
        if damaged is None:
            with warnings.catch_warnings(action="ignore"):
                state = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(state, dict):
                return state
    except PermissionError:
        raise InputError(f"{path} may not be read; change its permissions, or choose another folder.") from None
    except MemoryError:
        raise
    except Exception:  # whatever a foreign file makes zipfile and torch raise, whose words advise to run its pickle
        pass
    raise InputError(f"{path} cannot be read as a checkpoint; {DELETE}.")


def check_contents(state: Any, names: Collection[str | int], holder: str) -> None:
    """Raise `InputError` unless a state is a dict with these names."""
    missing = [name for name in names if not isinstance(state, Mapping) or name not in state]
    if missing:
        raise InputError(f"{holder} has no {', '.join(map(str, missing))}, so it is no checkpoint of this; {DELETE}.")


def check_run(state: Mapping[str, Any], run: Mapping[str, Any], path: Path, names: Collection[str]) -> None:
    """Raise `InputError` unless a checkpoint is of the run that is described, and holds what has these names."""
    check_contents(state, names, str(path))
    if not isinstance(state.get("run"), Mapping):
        raise InputError(
            f"{path} was written by an older version of diffusers_sae, without what its run consisted of; {DELETE}."
        )
    check_plain(state["run"], "run")
    refuse_differences(state["run"], run, str(path), "the checkpoint", DELETE)


def check_plain(value: Any, holder: str) -> None:
    """Raise `InputError` unless a value is of numbers, texts, lists and dicts of them, which can be compared."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            check_plain(each, f"{holder}.{name}")
    elif isinstance(value, list | tuple):
        for each in value:
            check_plain(each, holder)
    elif not isinstance(value, str | int | float | None):
        raise InputError(f"{holder} is a {type(value).__name__}, so the checkpoint is damaged; {DELETE}.")


def check_number(what: str, value: Any, kind: Any, least: float, most: float) -> None:
    """Raise `InputError` unless a value is an `int` or a `float`, finite, and from `least` to `most`."""
    if not (type(value) is kind and math.isfinite(value) and least <= value <= most):
        shown = value if isinstance(value, int | float) else f"a {type(value).__name__}"
        raise InputError(f"The checkpoint's {what} is {shown}, so it is damaged; {DELETE}.")


def check_tensors(what: str, tensors: Any, like: Mapping[Any, torch.Tensor], least: float = -math.inf) -> None:
    """Raise `InputError` unless `tensors` has, for each of `like`, a tensor of that shape and dtype, of finite numbers
    that are not below `least`."""
    for name, expected in like.items():
        tensor = tensors.get(name) if isinstance(tensors, Mapping) else None
        if not isinstance(tensor, torch.Tensor) or tensor.shape != expected.shape:
            raise InputError(
                f"The checkpoint has no {what} {name} of shape {tuple(expected.shape)}, so it is damaged; {DELETE}."
            )
        if tensor.dtype != expected.dtype:
            raise InputError(
                f"The checkpoint's {what} {name} is of {tensor.dtype} and not of {expected.dtype}, so it is damaged; "
                f"{DELETE}."
            )
        if not torch.isfinite(tensor).all() or (tensor < least).any():
            raise InputError(
                f"The checkpoint's {what} {name} holds numbers that it cannot have, so it is damaged; {DELETE}."
            )
