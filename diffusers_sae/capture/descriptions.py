"""What a run consists of, as plain data: a run goes on where it was stopped only if this is the same."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from diffusers import ConfigMixin, DiffusionPipeline

from ..errors import InputError
from ..saes import SparseAutoencoder

SHOWN = 4
"""Differences that an error names."""
NO_PART = ("safety_checker",)
"""Components that do not act on activations."""
SETTINGS = ("scaling", "active_adapter", "merged_adapters", "disable_adapters", "s1", "s2", "b1", "b2")
"""Attributes of modules that act like weights: of LoRA's layers, and of FreeU's blocks."""

_LASTING = (bool, int, float, str, torch.Tensor, np.ndarray)
"""What a function closes over and a run does not change: containers, such as those of counts, do."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checked_prompts(prompts: Iterable[str], images: int) -> list[str]:
    """The first `images` prompts; raises `InputError` if there are fewer, or some are no strings."""
    if isinstance(prompts, str):
        raise InputError(f"prompts takes a list of prompts; pass [{prompts!r}].")
    wanted = list(islice(iter(prompts), images))
    if len(wanted) < images:
        raise InputError(f"There are {len(wanted)} prompts for {images} images; give one for each.")
    for i, prompt in enumerate(wanted):
        if not isinstance(prompt, str):
            raise InputError(f"Prompt {i} is {prompt!r}, no string; pass a list of strings.")
    return wanted


def describe_pipeline(pipe: Any) -> dict[str, Any]:
    """The class, weights and scheduler of a pipeline; not where its files lie, nor its plan, which rests."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        "pipeline": type(pipe).__name__,
        "dtype": str(getattr(pipe, "dtype", None)),
        "weights": {name: digest_weights(module) for name, module in sorted(modules.items()) if name not in NO_PART},
        "scheduler": describe(getattr(pipe, "scheduler", None)),
    }


def describe_prompts(prompts: Sequence[str]) -> dict[str, Any]:
    return {"count": len(prompts), "sha256": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()}


def describe_call(call: Mapping[str, Any], images: int) -> dict[str, Any]:
    """The arguments of a pipeline's call; of pictures, the first `images`."""
    return {
        name: _pictures(value, images) if name == "images" else describe(value) for name, value in sorted(call.items())
    }


def _pictures(pictures: Any, count: int) -> Any:
    """Pictures by slices, which is all that is asked of such a sequence."""
    if hasattr(pictures, "description"):
        return pictures.description(count)
    digest = hashlib.sha256()
    for i in range(count):
        digest.update(json.dumps(describe(list(pictures[i : i + 1]))).encode())
    return {"count": count, "sha256": digest.hexdigest()}


def describe_sae(sae: SparseAutoencoder) -> dict[str, Any]:
    """Class and config of an SAE, without where it comes from."""
    config = {name: value for name, value in sae.config.items() if name[:1] != "_" and name != "provenance"}
    return {"class": type(sae).__name__, **describe(config)}


def describe(value: Any) -> Any:
    """Any value as JSON that is the same in every process: contents by SHA-256, functions by their code.

    A function's containers and what it reads from outside of it are not compared.
    """
    if isinstance(value, Enum):
        return str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _record(value)
    for kind, described in _KINDS:
        if isinstance(value, kind):
            return described(value)
    if hasattr(value, "tobytes") and hasattr(value, "size"):  # a picture
        return {"picture": list(value.size), "sha256": hashlib.sha256(value.tobytes()).hexdigest()}
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return {"class": type(value).__name__, "value": re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))}


def _mapping(value: Mapping) -> dict[str, Any]:
    return {str(name): describe(each) for name, each in value.items()}


def _sequence(value: Iterable) -> list[Any]:
    return [describe(each) for each in value]


def _set(value: Iterable) -> list[Any]:
    return sorted(_sequence(value), key=json.dumps)


def _array(value: np.ndarray) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    return {"array": list(value.shape), "dtype": str(value.dtype), "sha256": digest}


def _tensor(value: torch.Tensor) -> dict[str, Any]:
    bits = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    digest = hashlib.sha256(bits.numpy().tobytes()).hexdigest()
    return {"tensor": list(value.shape), "dtype": str(value.dtype), "sha256": digest}


def _configured(value: Any) -> dict[str, Any]:
    config = {name: each for name, each in value.config.items() if name[:1] != "_"}
    return {"class": type(value).__name__, **_mapping(config)}


def _module(value: torch.nn.Module) -> dict[str, Any]:
    return {"class": type(value).__name__, "sha256": digest_weights(value)}


def _record(value: Any) -> dict[str, Any]:
    fields = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"class": type(value).__name__, **fields}


def _partial(value: functools.partial) -> dict[str, Any]:
    return {"partial": describe(value.func), "args": describe(value.args), "kwargs": describe(value.keywords)}


def _method(value: types.MethodType) -> dict[str, Any]:
    return {"method": value.__qualname__, "sha256": _code(value.__func__.__code__)}


def _function(value: types.FunctionType) -> dict[str, Any]:
    return {
        "function": value.__qualname__,
        "sha256": _code(value.__code__),
        "defaults": describe([value.__defaults__, value.__kwdefaults__]),
        "closure": [_cell(cell) for cell in value.__closure__ or ()],
    }


def _cell(cell: types.CellType) -> Any:
    """What a function closes over; of a further function its code alone, as two may close over each other."""
    try:
        value = cell.cell_contents
    except ValueError:
        return "empty"
    if isinstance(value, types.FunctionType):
        return _code(value.__code__)
    return describe(value) if isinstance(value, _LASTING) else type(value).__name__


def _code(code: types.CodeType) -> str:
    """SHA-256 of what a function does, wherever its source lies."""
    digest = hashlib.sha256(code.co_code)
    for constant in code.co_consts:
        nested = _code(constant) if isinstance(constant, types.CodeType) else repr(_ordered(constant))
        digest.update(nested.encode())
    digest.update(repr((code.co_names, code.co_varnames)).encode())
    return digest.hexdigest()


def _ordered(constant: Any) -> Any:
    return sorted(constant, key=repr) if isinstance(constant, frozenset) else constant


_KINDS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (torch.Tensor, _tensor),
    (np.ndarray, _array),
    (np.generic, lambda value: describe(value.item())),
    ((Path, torch.dtype, torch.device), str),
    (DiffusionPipeline, describe_pipeline),
    (torch.nn.Module, _module),
    (ConfigMixin, _configured),
    (Mapping, _mapping),
    (Set, _set),
    ((list, tuple), _sequence),
    (functools.partial, _partial),
    (types.MethodType, _method),
    (types.FunctionType, _function),
)
"""Kinds of values, the special ones before the general ones."""


@torch.no_grad()
def digest_weights(module: torch.nn.Module) -> str:
    """SHA-256 of all weights' names, types, shapes, first values, and sums of their bits, which are the same anywhere.

    A sum of bits reads as fast as the memory does, where hashing gigabytes would take a minute.
    """
    state = module.state_dict()
    if any(isinstance(tensor, torch.Tensor) and tensor.is_meta for tensor in state.values()):  # offloaded
        state = get_state_dict_offloaded_model(module)
    digest = hashlib.sha256()
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}  # compiled or not
    for name, tensor in sorted(plain.items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        bits = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        bits = bits.detach().view(_INTEGERS[bits.element_size()])
        first = bits.flatten()[:64].cpu().tolist()
        digest.update(
            f"{name} {tuple(tensor.shape)} {tensor.dtype} {int(bits.sum(dtype=torch.int64))} {first}".encode()
        )
    for name, part in sorted(module.named_modules()):
        settings = {setting: getattr(part, setting, None) for setting in SETTINGS}
        settings["scale"] = getattr(getattr(part, "processor", None), "scale", None)  # of an IP-Adapter
        if settings := {setting: value for setting, value in settings.items() if value is not None}:
            digest.update(f"{name.replace('_orig_mod.', '')} {settings}".encode())
    return digest.hexdigest()


def refuse_differences(there: Any, here: Any, holder: str, where: str, remedy: str) -> None:
    """Raise `InputError` unless two descriptions are the same.

    Args:
        there, here: of the run on disk, and of the one that is to go on with it.
        holder: what is refused, such as a checkpoint's path.
        where: what `there` was read from, such as `the checkpoint`.
        remedy: what to do.
    """
    different = list(_differences(there, here, "", where))
    if not different:
        return
    more = len(different) - SHOWN
    rest = f"; and {more} more" if more > 0 else ""
    raise InputError(f"{holder} is of another run: {'; '.join(different[:SHOWN])}{rest}; {remedy}.")


def _differences(there: Any, here: Any, path: str, where: str) -> Iterable[str]:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for name in {**here, **there}:
            yield from _differences(there.get(name), here.get(name), f"{path}.{name}".lstrip("."), where)
    elif there != here and _is_digest(there) and _is_digest(here):
        yield f"{path.removesuffix('.sha256')} has other contents"
    elif there != here:
        yield f"{path} is {_shown(there)} in {where} and {_shown(here)} here"


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
