"""Bytes of a file to tensors and plain data; nothing is run, and no memory taken that the file does not fill."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import InputError
from ..nulls import without_nulls
from ..saes.card import LABELS
from .stored import stored_tensors

CONFIGS = ("config.json", "cfg.json")
LARGEST_CONFIG = 2**24
BROKEN = (
    SafetensorError, RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError,
    RecursionError, MemoryError, OverflowError, AssertionError, zipfile.BadZipFile,
)  # fmt: skip
"""What reading a file that is damaged, or made to do damage, may raise."""
HOSTILE = (
    "builtins", "__builtin__", "os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "runpy", "importlib",
    "ctypes", "pty", "code", "pip", "webbrowser", "operator", "functools",
)  # fmt: skip
"""Modules from which no weights need anything."""


def read_config(folder: Path) -> dict[str, Any]:
    """What the folder's `config.json` or `cfg.json` tells, or nothing where there is none."""
    for name in CONFIGS:
        if (folder / name).exists() or (folder / name).is_symlink():
            return read_json(folder / name)
    return {}


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds, without the fields that are null; raises `InputError`."""
    if not file.is_file():
        raise InputError(f"{file} is no file, or a link to one that is not there; fetch or save the SAE again.")
    if file.stat().st_size > LARGEST_CONFIG:
        raise InputError(f"{file} has {file.stat().st_size:,} bytes, too many for a config; fetch it again.")
    try:
        return _json(file.read_bytes(), file)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({_first_line(error)}); fetch or save the SAE again.") from None


def check_file(file: Path) -> None:
    """Raise `InputError` if there is no weights file of that name."""
    if file.is_dir():
        raise InputError(f"{file} is a folder, where a weights file should be; pass weight_name, or fetch it again.")
    if not file.is_file():
        raise InputError(f"{file} does not exist; pass weight_name, the name of the weights file in that folder.")


def read_file(file: Path, *, inert: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors by name, and the plain data that lies beside them in the same file.

    A torch file is read by the weights-only loader. With `inert`, it puts an empty shell in the place of every class
    that it does not know, and still calls nothing.
    """
    check_file(file)
    try:
        if file.suffix == ".safetensors":
            stored_tensors(file)  # its header tells the truth about its size
            return dict(load_file(file)), {}
        return _read_torch(file, inert)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} is a pickle that could run code, so it was not read ({_first_line(error)}); if you trust it, "
            f"convert it: diffusers-sae convert {file.name} FOLDER."
        ) from None
    except InputError:
        raise
    except BROKEN as error:
        raise unreadable(file, error) from None


def unreadable(file: Path, error: Exception) -> InputError:
    told = _first_line(error) or type(error).__name__
    return InputError(f"{file} cannot be read ({told}); it is truncated or no weights file: fetch it again.")


def _read_torch(file: Path, inert: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        told = _json(opened.readline(LARGEST_CONFIG), file) if opened.peek(1)[:1] == b"{" else {}
        begins = opened.tell()
    source: Any = file if begins == 0 else io.BytesIO(file.read_bytes()[begins:])
    zipped = zipfile.is_zipfile(source)
    if zipped:
        _check_zip(source, size)
    if begins:
        source.seek(0)
    with _shells(source) if inert else nullcontext():
        found = torch.load(source, weights_only=True, map_location="cpu", mmap=zipped and begins == 0)
    tensors, beside = split_state(found)
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > size:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} cannot lie in a file of {size:,} bytes")
    return tensors, {**told, **beside}


def _check_zip(source: Any, size: int) -> None:
    """Torch compresses nothing, so that what an archive claims to hold must lie in it."""
    with zipfile.ZipFile(source) as archive:
        claimed = sum(each.file_size for each in archive.infolist())
    if claimed > size:
        raise ValueError(f"it claims {claimed:,} bytes and has {size:,}")


def _shells(source: Any) -> AbstractContextManager:
    """For the weights-only loader, an empty class in the place of every name that a file asks for beyond its list."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(source)
    for name in names:
        if name.partition(".")[0] in HOSTILE:
            raise ValueError(f"it asks for {name}, which no weights need, and may be hostile")
    if isinstance(source, io.BytesIO):
        source.seek(0)
    return torch.serialization.safe_globals([(_shell(name), name) for name in names])


def _shell(name: str) -> type:
    def nothing(self: Any, *args: Any, **kwargs: Any) -> None:
        """A shell takes whatever its class took."""

    return type(name.rpartition(".")[2], (), {"__init__": nothing, "__module__": name.rpartition(".")[0]})


def split_state(found: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, and what is none, of what a torch file held: a state dict, one in a dict, or a module's shell."""
    if isinstance(found, torch.Tensor):
        return {"": found}, {}
    if not isinstance(found, Mapping):
        state = vars(found) if hasattr(found, "__dict__") else {}
        if "_parameters" not in state:
            raise ValueError(f"it holds a {type(found).__name__} and no tensors by name")
        return _parameters(state), _plain(state)
    tensors, beside = _split(found)
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(beside.get(name), Mapping):
            tensors, inner = _split(beside.pop(name))
            beside |= inner
    for name in ("cfg", "config"):
        told = beside.pop(name, None)
        beside |= dict(told) if isinstance(told, Mapping) else _plain(getattr(told, "__dict__", {}))
    return tensors, beside


def _split(found: Mapping[Any, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
    return tensors, {str(name): value for name, value in found.items() if str(name) not in tensors}


def _parameters(state: Mapping[str, Any], prefix: str = "", depth: int = 0) -> dict[str, torch.Tensor]:
    """The state dict of a pickled module, from the attributes of its shell."""
    if depth > 20:
        raise ValueError("its modules are nested too deeply")
    found = {}
    for group in ("_parameters", "_buffers"):
        for name, tensor in (state.get(group) or {}).items():
            if isinstance(tensor, torch.Tensor):
                found[prefix + name] = tensor
    for name, module in (state.get("_modules") or {}).items():
        found |= _parameters(getattr(module, "__dict__", {}), f"{prefix}{name}.", depth + 1)
    return found


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if isinstance(value, (int, float, str, bool))}


def read_labels(folder: Path, n_latents: int) -> dict[int, str] | None:
    """`{feature: label}` of the folder's `labels.json`, or `None`; raises `InputError` if it names no features."""
    file = folder / LABELS
    if not file.exists() and not file.is_symlink():
        return None
    told = read_json(file)
    if not all(name.isdecimal() and int(name) < n_latents and isinstance(told[name], str) for name in told):
        raise InputError(f"{file} must be an object {{feature: label}} of features 0 to {n_latents - 1}; mend it.")
    return {int(name): label for name, label in told.items()}


def _json(data: bytes, file: Path) -> dict[str, Any]:
    try:
        told = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read ({_first_line(error)}); fetch or save the SAE again.") from None
    if not isinstance(told, dict):
        raise InputError(f"{file} holds a {type(told).__name__}, where a config is an object; fetch the SAE again.")
    return without_nulls(told)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else ""


def is_weights(name: str | os.PathLike) -> bool:
    """Whether a file of that name could hold weights."""
    return Path(name).suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
