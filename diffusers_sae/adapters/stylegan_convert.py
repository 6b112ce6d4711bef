"""From NVlabs' StyleGAN2 pickles to a folder that `from_pretrained` loads."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr
from typing import Any

import torch

from ..errors import InputError
from .stylegan2 import StyleGAN2Generator
from .stylegan2_pipeline import StyleGAN2Pipeline
from .stylegan_pickle import StoredObject, StoredTensor, read_pickle

KNOWN = {"architecture": ("skip",), "activation": ("lrelu", "linear")}
"""What modules may be set to; NVlabs' code knows more."""
MOST_MODULES = 1000
"""In one network; a StyleGAN2 of 1024 x 1024 pixels has about 90."""


def convert(pickle_file: str | os.PathLike, folder: str | os.PathLike) -> StyleGAN2Pipeline:
    """Write the generator of an NVlabs `.pkl` as a pipeline's folder with safetensors, and return the pipeline.

    Raises `InputError` as `read_generator` does; nothing is written then.
    """
    pipe = StyleGAN2Pipeline(read_generator(pickle_file))
    pipe.save_pretrained(folder)
    return pipe


def read_generator(pickle_file: str | os.PathLike) -> StyleGAN2Generator:
    """The generator `G_ema` of a `.pkl` of stylegan2-ada-pytorch, or of stylegan3's StyleGAN2; no code in it runs.

    Raises:
        InputError: the file cannot be read safely, is another network, or its tensors have wrong shapes.
    """
    file = Path(pickle_file)
    network = read_pickle(file).get("G_ema")
    if not isinstance(network, StoredObject):
        raise InputError(f"{file} has no generator G_ema; pass a .pkl file of stylegan2-ada-pytorch or stylegan3.")
    modules = _modules(network, file)
    tensors = {f"{path}.{name}": t for path, module in modules.items() for name, t in _tensors(module)}
    return _filled(_described(modules, tensors, file), tensors, file)


def _modules(network: StoredObject, file: Path) -> dict[str, StoredObject]:
    """Every module by its path. A file may hold modules that hold each other, so that their number is bounded."""
    found, waiting = {"": network}, [("", network)]
    while waiting:
        path, module = waiting.pop()
        children = module.state.get("_modules")
        for name, child in children.items() if isinstance(children, dict) else ():
            if isinstance(child, StoredObject) and _is_name(name):
                below = f"{path}.{name}" if path else name
                found[below] = child
                waiting.append((below, child))
            if len(found) > MOST_MODULES:
                raise InputError(
                    f"{file} has more than {MOST_MODULES} modules, as no StyleGAN2 has; pass another file."
                )
    return found


def _is_name(name: Any) -> bool:
    """Whether a module's or tensor's name is one that a message can hold."""
    return isinstance(name, str) and name.isidentifier() and len(name) <= 64


def _tensors(module: StoredObject) -> Iterator[tuple[str, StoredTensor]]:
    for kind in ("_parameters", "_buffers"):
        held = module.state.get(kind)
        for name, tensor in held.items() if isinstance(held, dict) else ():
            if isinstance(tensor, StoredTensor) and _is_name(name):
                yield name, tensor


def _described(
    modules: Mapping[str, StoredObject], tensors: Mapping[str, StoredTensor], file: Path
) -> StyleGAN2Generator:
    """The generator that the modules' attributes and the tensors' shapes tell of, without weights."""
    missing = [path for path in ("mapping.fc0", "synthesis.b4.conv1") if path not in modules]
    if missing:
        raise InputError(f"{file} holds a network without {missing[0]}, which StyleGAN2 has; pass a StyleGAN2's file.")
    for path, module in modules.items():
        for name, known in KNOWN.items():
            value = module.state.get(name, known[0])
            if value not in known:
                raise InputError(
                    f"{file} has {name}={repr(value)} in {path}, not {' or '.join(known)}; pass another file."
                )
    top, first = modules[""].state, modules["mapping.fc0"].state
    resolution = _whole(top, "img_resolution", file, 4, 4096)
    top_width = _rows(tensors, f"synthesis.b{resolution}.conv1.weight", file)
    layers = _whole(modules["mapping"].state, "num_layers", file, 1, 64)
    with torch.device("meta"):
        return StyleGAN2Generator(
            z_dim=_whole(top, "z_dim", file),
            c_dim=_whole(top, "c_dim", file, low=0),
            w_dim=_whole(top, "w_dim", file),
            img_resolution=resolution,
            img_channels=_whole(top, "img_channels", file),
            num_layers=layers,
            lr_multiplier=_number(first, "bias_gain", file),
            channel_base=top_width * resolution,
            channel_max=_rows(tensors, "synthesis.b4.conv1.weight", file),
            conv_clamp=_number(modules["synthesis.b4.conv1"].state, "conv_clamp", file, optional=True),
            embed_features=_rows(tensors, "mapping.embed.weight", file) if "mapping.embed" in modules else None,
            layer_features=_rows(tensors, "mapping.fc0.weight", file) if layers > 1 else None,
        )


def _filled(generator: StyleGAN2Generator, tensors: Mapping[str, StoredTensor], file: Path) -> StyleGAN2Generator:
    """The generator with its weights; raises `InputError` unless names, shapes and values are as they should be."""
    wanted = {name: tuple(tensor.shape) for name, tensor in generator.state_dict().items()}
    odd = sorted(wanted.keys() ^ tensors.keys())
    if odd:
        has = "lacks" if odd[0] in wanted else "has"
        raise InputError(f"{file} {has} {odd[0]}, unlike a StyleGAN2 of its size; pass a StyleGAN2's file.")
    for name, shape in wanted.items():
        if tensors[name].size != shape:
            raise InputError(f"{file} has a {name} of shape {tensors[name].size} instead of {shape}; fetch it again.")
    if 2 * sum(math.prod(shape) for shape in wanted.values()) > file.stat().st_size:
        raise InputError(f"{file} is too small for the weights that it tells of; fetch it again.")
    weights = {name: tensors[name].tensor() for name in wanted}
    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise InputError(f"{file} has a {bad[0]} that is not finite; fetch it again.")
    generator.load_state_dict(weights, assign=True)
    return generator.eval().requires_grad_(False)


def _whole(state: Mapping[str, Any], name: str, file: Path, low: int = 1, high: int = 2**16) -> int:
    value = state.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(
            f"{file} has {name}={repr(value)} and not a whole number from {low} to {high}; fetch it again."
        )
    return value


def _number(state: Mapping[str, Any], name: str, file: Path, optional: bool = False) -> Any:
    value = state.get(name)
    if value is None and optional:
        return None
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"{file} has {name}={repr(value)} and not a number above 0; fetch it again.")
    return value


def _rows(tensors: Mapping[str, StoredTensor], name: str, file: Path) -> int:
    if name not in tensors or not tensors[name].size or not 0 < tensors[name].size[0] <= 2**16:
        raise InputError(f"{file} has no {name}, which a StyleGAN2 of its size has; pass a StyleGAN2's file.")
    return tensors[name].size[0]
