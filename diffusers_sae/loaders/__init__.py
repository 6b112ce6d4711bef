"""Finding, checking and reading SAE weights: a hub repository, a folder, a file, or a state dict."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..checksums import verify_checksums
from ..errors import InputError
from ..saes import ARCHITECTURES, LatentStatistics, SparseAutoencoder
from .stored import stored_tensors

Source = str | os.PathLike | Mapping[str, torch.Tensor] | SparseAutoencoder
COMPANIONS = ("statistics.safetensors", "concepts.safetensors", "detectors.safetensors")
"""What lies beside an SAE's weights and is none of them."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
LARGE = 2**28
"""Bytes from which on a file is left on disk until all of it is needed."""


def load_source(
    source: str | os.PathLike | Mapping[str, torch.Tensor],
    *,
    subfolder: str | None = None,
    weight_name: str | None = None,
    config: Mapping[str, Any] | None = None,
    **hub_kwargs: Any,
) -> tuple[SparseAutoencoder, LatentStatistics | None]:
    """Read an SAE and, if they lie beside it, its statistics; raises `InputError` if it cannot be trusted or read."""
    if isinstance(source, Mapping):
        return build({key: tensor.clone() for key, tensor in source.items()}, config or {}, "The state dict"), None
    path = Path(source)
    if path.is_file():
        folder, weight_name = path.parent, path.name
    else:
        folder = (path if path.is_dir() else download(str(source), subfolder, hub_kwargs)) / (subfolder or "")
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; its parent holds {_subfolders(folder.parent)}.")
    verify_checksums(folder, below=LARGE)
    file = folder / (weight_name or _weights_in(folder))
    arguments = {**read_config(folder), **(config or {})}
    if file.suffix == ".safetensors" and file.is_file() and file.stat().st_size >= LARGE:
        return open_lazily(folder, file, arguments), LatentStatistics.load(folder)
    return build(read_tensors(file), arguments, str(file)), LatentStatistics.load(folder)


def open_lazily(folder: Path, file: Path, config: Mapping[str, Any]) -> SparseAutoencoder:
    """An SAE whose weights stay in the file; what needs them all reads, and checks, them then."""
    try:
        tensors = stored_tensors(file)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise _unreadable(file, error) from None
    sae = _described({key: tensor.shape for key, tensor in tensors.items()}, config, str(file))

    def read() -> Mapping[str, torch.Tensor]:
        verify_checksums(folder)
        return build(read_tensors(file), config, str(file)).state_dict()

    def read_rows(features: Sequence[int]) -> torch.Tensor:
        found = tensors["W_dec"].rows(features).float()
        if not torch.isfinite(found).all():
            raise InputError(f"{file} has weights that are not finite; fetch or train the SAE again.")
        return found

    sae.read_later(read, read_rows)
    return sae


def download(repository: str, subfolder: str | None, hub_kwargs: Mapping[str, Any]) -> Path:
    """Fetch the repository, or one folder of it, and return where it lies."""
    try:
        return Path(snapshot_download(repository, allow_patterns=f"{subfolder}/*" if subfolder else None, **hub_kwargs))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{repository!r} is no folder or file here and could not be fetched from the hub ({reason}); "
            "check the name, the network and the token."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`, or nothing where there is none."""
    file = folder / "config.json"
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise InputError(f"{file} cannot be read ({error}); fetch or save the SAE again.") from None


def read_tensors(file: Path) -> Mapping[str, torch.Tensor]:
    """Tensors of a safetensors file, or of a torch file that the weights-only loader accepts."""
    if not file.is_file():
        raise InputError(f"{file} does not exist; pass weight_name, the name of the weights file in that folder.")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise InputError(
            f"{file} is a pickle that could run code, so it was not read; convert it to safetensors where you trust it."
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise _unreadable(file, error) from None
    return tensors.get("state_dict", tensors)


def _unreadable(file: Path, error: Exception) -> InputError:
    return InputError(f"{file} cannot be read ({error}); it is truncated or no weights file: fetch it again.")


def build(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], origin: str) -> SparseAutoencoder:
    """An SAE from its tensors and its config; raises `InputError` unless they agree."""
    sae = _described({key: tuple(tensor.shape) for key, tensor in tensors.items()}, config, origin)
    own = {key: tensors[key].detach().float() for key in sae.state_dict()}
    if not all(torch.isfinite(tensor).all() for tensor in own.values()):
        raise InputError(f"{origin} has weights that are not finite; fetch or train the SAE again.")
    sae.load_state_dict(own, assign=True)
    return sae


def _described(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], origin: str) -> SparseAutoencoder:
    """The SAE that a config and the shapes of its tensors tell of, without weights (on the meta device)."""
    name = config.get("_class_name", "TopKSAE")
    if name not in ARCHITECTURES:
        raise InputError(f"{origin} is a {name}, which is not known; known are {', '.join(ARCHITECTURES)}.")
    if len(shapes.get("W_dec", ())) != 2:
        raise InputError(f"{origin} has no matrix W_dec (latents, width), whose rows are the features' directions.")
    n, d = shapes["W_dec"]
    arguments = {k: v for k, v in config.items() if not k.startswith("_")} | {"d_in": d, "n_latents": n}
    try:
        with torch.device("meta"):
            sae = ARCHITECTURES[name](**arguments)
    except TypeError as error:
        raise InputError(
            f"{origin} cannot be made a {name} ({error}); pass what is missing as config={{...}}."
        ) from None
    wanted = {key: tuple(tensor.shape) for key, tensor in sae.state_dict().items()}
    missing = [key for key in wanted if key not in shapes]
    if missing:
        raise InputError(f"{origin} has no {', '.join(missing)}; a {name} has the tensors {', '.join(wanted)}.")
    for key, shape in wanted.items():
        if shapes[key] != shape:
            raise InputError(f"{origin} has a {key} of shape {shapes[key]}; with W_dec ({n}, {d}) it must be {shape}.")
    return sae


def _weights_in(folder: Path) -> str:
    files = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in COMPANIONS)
    if WEIGHTS in files:
        return WEIGHTS
    if len(files) == 1:
        return files[0]
    if files:
        raise InputError(f"{folder} holds several weights files ({', '.join(files)}); pass weight_name.")
    raise InputError(f"{folder} holds no SAE; pass subfolder, one of: {_subfolders(folder)}.")


def _subfolders(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    return ", ".join(names) or "none"
