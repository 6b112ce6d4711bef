"""Finding, checking and reading SAEs: from a hub repository, a folder, a file, or a state dict."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checksums import sha256, verify_checksums
from ..errors import InputError
from ..saes import LatentStatistics, SparseAutoencoder
from .formats import format_of
from .hub import Found, download
from .known import record_of, told_by
from .reading import BROKEN, is_weights, read_config, read_file, read_labels, unreadable
from .stored import stored_tensors
from .weights import Weights

Source = str | os.PathLike | Mapping[str, torch.Tensor] | SparseAutoencoder
WEIGHTS = "diffusion_pytorch_model.safetensors"
NAMES = (
    WEIGHTS, "sae.safetensors", "sae_weights.safetensors", "model.safetensors", "state_dict.pth", "state_dict.pt",
    "ae.pt", "sae.pt", "model.pt", "weights.pt",
)  # fmt: skip
"""What weights files are called, from the most to the least preferred."""
COMPANIONS = {
    "statistics.safetensors", "concepts.safetensors", "detectors.safetensors", "sparsity.safetensors", "mean.pt",
    "std.pt", "optimizer.pt", "optimizer.pth", "merged_feature_sums.pt", "base_embeds.pt", "zero_embed.pt",
}  # fmt: skip
"""What lies beside an SAE's weights and is none of them."""
LARGE = 2**28
"""Bytes from which on a file is left on disk until all of it is needed."""


def load_sae(
    source: str | os.PathLike | Mapping[str, torch.Tensor],
    subfolder: str | None = None,
    weight_name: str | None = None,
    config: Mapping[str, Any] | None = None,
    variant: str | None = None,
    inert: bool = False,
    **hub_kwargs: Any,
) -> SparseAutoencoder:
    """Read an SAE of any known layout, with its statistics if they lie beside it.

    Args:
        source: hub repository, folder, weights file, or state dict.
        subfolder: of the repository or folder; or the authors' nickname of one, for repositories that are known.
        weight_name: the weights file, where there are several.
        config: what the files leave out (`{"k": 32}`), or a layout (`{"format": "sparsify"}`).
        variant: as in diffusers' loaders, `fp16` for `....fp16.safetensors`.
        inert: read pickles that hold objects of unknown classes too, with an empty shell for each; nothing in them is
            run. For files that `diffusers-sae convert` turns into safetensors.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, ... of `huggingface_hub.snapshot_download`.

    Raises:
        InputError: it is not there, cannot be trusted, was altered or cut off, or does not say what is needed.
    """
    if isinstance(source, Mapping):
        held = {key: tensor.clone() for key, tensor in source.items()}
        return _made(Weights(held, config or {}, "The state dict"))
    path = Path(source)
    if path.is_file():
        found, weight_name = Found(path.parent), path.name
    elif path.is_dir():
        found = Found(path / (subfolder or ""))
    else:
        found = download(str(source), subfolder, hub_kwargs)
    if not found.folder.is_dir():
        raise InputError(f"{found.folder} does not exist; its parent holds {_subfolders(found.folder.parent)}.")
    return _from_folder(found, weight_name, config or {}, variant, inert)


def _from_folder(
    found: Found, weight_name: str | None, config: Mapping[str, Any], variant: str | None, inert: bool
) -> SparseAutoencoder:
    folder = found.folder
    verify_checksums(folder, below=LARGE)
    file = folder / (weight_name or _weights_in(folder, variant))
    told = {**read_config(folder), **config}
    if file.suffix == ".safetensors" and file.is_file() and file.stat().st_size >= LARGE:
        sae = _left_on_disk(file, told)
    else:
        tensors, beside = read_file(file, inert=inert)
        sae = _made(Weights(tensors, {**beside, **told}, str(file), folder))
    statistics = LatentStatistics.load(folder)
    sae.statistics = sae.statistics if statistics is None else statistics
    sae.labels = read_labels(folder, sae.n_latents)
    if "_class_name" not in told:
        _remember(sae, found, file)
    return sae


def _made(weights: Weights) -> SparseAutoencoder:
    sae = format_of(weights).read(weights)
    if "provenance" in weights.config and not sae.provenance:
        sae.register_to_config(provenance=dict(weights.config["provenance"]))
    return sae


def _left_on_disk(file: Path, config: Mapping[str, Any]) -> SparseAutoencoder:
    """An SAE whose weights stay in the file, if that has its directions as rows; what needs all reads them then."""
    try:
        stored = stored_tensors(file)
    except BROKEN as error:
        raise unreadable(file, error) from None

    def weights(tensors: Mapping[str, torch.Tensor]) -> Weights:
        return Weights(tensors, config, str(file), file.parent)

    shapes = weights({n: torch.empty(each.shape, dtype=each.dtype, device="meta") for n, each in stored.items()})
    layout = format_of(shapes)
    sae = layout.read(shapes)
    rows = stored.get(layout.rows or "")
    if rows is None or tuple(rows.shape) != (sae.n_latents, sae.d_in):
        return _made(weights(read_file(file)[0]))

    def read() -> Mapping[str, torch.Tensor]:
        verify_checksums(file.parent)
        return layout.read(weights(read_file(file)[0])).state_dict()

    def read_rows(features: Sequence[int]) -> torch.Tensor:
        found = rows.rows(features).float()
        if not torch.isfinite(found).all():
            raise InputError(f"{file} has weights that are not finite; fetch or train the SAE again.")
        return found

    sae.read_later(read, read_rows)
    return sae


def _remember(sae: SparseAutoencoder, found: Found, file: Path) -> None:
    """Write into an SAE of others where it came from, and what is known of that place."""
    provenance = {**sae.provenance}
    if found.repository is not None:
        record = record_of(found.repository)
        if record is not None:
            provenance = {**told_by(record, found.repository, found.subfolder), **provenance}
        revision = next((p.name for p in file.parents if p.parent.name == "snapshots"), None)
        provenance |= {"repository": found.repository, "subfolder": found.subfolder, "revision": revision}
    provenance["file"] = file.name
    if not sae.W_dec.is_meta:  # what is left on disk is not read for this
        provenance["sha256"] = sha256(file)
    sae.register_to_config(provenance=provenance)


def _weights_in(folder: Path, variant: str | None) -> str:
    files = sorted(p.name for p in folder.iterdir() if is_weights(p) and p.name not in COMPANIONS)
    names = [_variant_of(name, variant) for name in NAMES]
    preferred = [name for name in names if name in files]
    if preferred:
        return preferred[0]
    if variant is not None:
        raise InputError(f"{folder} holds no weights of variant {variant!r}; it holds {', '.join(files) or 'none'}.")
    for suffix in (".safetensors", ""):
        fitting = [name for name in files if name.endswith(suffix)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise InputError(f"{folder} holds several weights files ({', '.join(fitting)}); pass weight_name.")
    raise InputError(f"{folder} holds no SAE; pass subfolder, one of: {_subfolders(folder)}.")


def _variant_of(name: str, variant: str | None) -> str:
    stem, suffix = os.path.splitext(name)
    return f"{stem}.{variant}{suffix}" if variant else name


def _subfolders(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    return ", ".join(names) or "none"


__all__ = ["LARGE", "Source", "load_sae"]
