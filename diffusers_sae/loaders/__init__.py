"""Finding, checking and reading SAEs: from a hub repository, a folder, a file, or a state dict."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checksums import sha256, verify_checksums
from ..errors import InputError
from ..nulls import without_nulls
from ..saes import LatentStatistics, SparseAutoencoder
from .formats import FORMATS, format_of
from .hub import Found, download
from .known import record_of, told_by
from .reading import BROKEN, check_file, is_weights, read_config, read_file, read_labels, split_state, unreadable
from .shards import files_of, index_of, is_index, is_shard
from .stored import StoredTensor, stored_tensors
from .weights import Weights

Source = str | os.PathLike | Mapping[str, torch.Tensor] | SparseAutoencoder
WEIGHTS = "diffusion_pytorch_model.safetensors"
NAMES = (
    WEIGHTS, "diffusion_pytorch_model.bin", "sae.safetensors", "sae_weights.safetensors", "model.safetensors",
    "state_dict.pth", "state_dict.pt", "ae.pt", "sae.pt", "model.pt", "weights.pt",
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
        config: what the files leave out (`{"k": 32}`), or a layout (`{"format": "sparsify"}`). A setting that they have
            with another value is refused.
        variant: as in diffusers' loaders, `fp16` for `....fp16.safetensors`.
        inert: read pickles that hold objects of unknown classes too, with an empty shell for each; nothing in them is
            run. For files that `diffusers-sae convert` turns into safetensors.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, ... of `huggingface_hub.snapshot_download`.

    Raises:
        InputError: it is not there, cannot be trusted, was altered or cut off, or does not say what is needed.
    """
    given = _checked_config(config)
    if isinstance(source, Mapping):
        tensors, beside = split_state(source)
        held = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return _made(Weights(held, _completed(without_nulls(beside), given, "The state dict"), "The state dict"))
    for name, value in (("subfolder", subfolder), ("weight_name", weight_name), ("variant", variant)):
        if value is not None and not isinstance(value, str):
            raise InputError(f"{name} is a {type(value).__name__}; pass a name, or leave it out.")
    path = _checked_path(source)
    if path.is_file():
        found, weight_name = Found(path.parent), path.name
    elif path.is_dir():
        found = Found(path / (subfolder or ""))
    else:
        found = download(str(source), subfolder, hub_kwargs)
    if not found.folder.is_dir():
        raise InputError(f"{found.folder} does not exist; its parent holds {_subfolders(found.folder.parent)}.")
    return _from_folder(found, weight_name, given, variant, inert)


def _checked_path(source: Any) -> Path:
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise InputError(
            f"An SAE cannot be loaded from {source!r:.80}; pass a repository, a folder, a file or a state dict."
        )
    path = Path(source)
    try:
        path.is_file()
    except OSError as error:
        raise InputError(f"{str(source)[:80]!r} cannot be looked up ({error.strerror}); pass another path.") from None
    return path


def _checked_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the caller adds to the files' config; raises `InputError` if that names a format that nobody knows."""
    if not isinstance(config or {}, Mapping) or not all(isinstance(name, str) for name in config or {}):
        raise InputError(f"config is {config!r:.80}; pass a dict of names to values, such as {{'k': 32}}.")
    given = without_nulls(config or {})
    if "format" in given and given["format"] not in list(FORMATS):
        raise InputError(f"{given['format']!r} is no format; choose one of {', '.join(FORMATS)}.")
    return given


def _completed(known: Mapping[str, Any], given: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """What files say, and what the caller adds to it; raises `InputError` where the two contradict each other.

    Statistics, labels and figures beside the weights are those of the settings that the files say.
    """
    for name, value in given.items():
        if name != "format" and name in known and known[name] != (list(value) if isinstance(value, tuple) else value):
            raise InputError(
                f"{whose} says {name} = {known[name]!r:.80}, and {name} = {value!r:.80} was passed; leave it out, "
                "since only what the files leave out can be set."
            )
    return {**known, **given}


def _from_folder(
    found: Found, weight_name: str | None, config: Mapping[str, Any], variant: str | None, inert: bool
) -> SparseAutoencoder:
    folder = found.folder
    verify_checksums(folder, below=LARGE)
    file = folder / (weight_name or _weights_in(folder, variant))
    told = _completed(read_config(folder), config, f"The config in {folder}")
    check_file(file)
    files = files_of(file)
    is_large = sum(each.stat().st_size for each in files) >= LARGE
    if is_large and all(each.suffix == ".safetensors" for each in files):
        sae = _left_on_disk(file, files, told)
    else:
        tensors, beside = _read_all(files, inert)
        beside = _completed(without_nulls(beside), config, str(file))
        sae = _made(Weights(tensors, {**beside, **told}, str(file), folder))
    statistics = LatentStatistics.load(folder)
    if statistics is not None:
        statistics.check(sae.n_latents, f"The statistics in {folder}")
        sae.statistics = statistics
    sae.labels = read_labels(folder, sae.n_latents)
    if "_class_name" not in told:
        _remember(sae, found, file)
    return sae


def _read_all(
    files: Mapping[Path, Sequence[str] | None], inert: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of one file or of several, and what lies beside them."""
    tensors: dict[str, torch.Tensor] = {}
    beside: dict[str, Any] = {}
    for file, names in files.items():
        here, more = read_file(file, inert=inert)
        _check_shard(file, here, names)
        tensors |= here
        beside |= more
    return tensors, beside


def _check_shard(file: Path, tensors: Mapping[str, Any], names: Sequence[str] | None) -> None:
    if names is not None and set(names) != set(tensors):
        raise InputError(
            f"{file} does not hold the tensors that the index beside it tells ({', '.join(sorted(names))}); "
            "fetch or save the SAE again."
        )


def _made(weights: Weights) -> SparseAutoencoder:
    sae = format_of(weights).read(weights)
    provenance = weights.section("provenance").config
    if not isinstance(provenance.get("base_model", ""), str):
        raise weights.refuse(f"comes with base_model = {provenance['base_model']!r:.80}, which must be a model's name")
    if provenance and not sae.provenance:
        sae.register_to_config(provenance=dict(provenance))
    return sae


def _left_on_disk(
    file: Path, files: Mapping[Path, Sequence[str] | None], config: Mapping[str, Any]
) -> SparseAutoencoder:
    """An SAE whose weights stay in its files, if those have its directions as rows; what needs all reads them then."""
    stored: dict[str, StoredTensor] = {}
    for each, names in files.items():
        try:
            here = stored_tensors(each)
        except BROKEN as error:
            raise unreadable(each, error) from None
        _check_shard(each, here, names)
        stored |= here

    def weights(tensors: Mapping[str, torch.Tensor]) -> Weights:
        return Weights(tensors, config, str(file), file.parent)

    shapes = weights({n: torch.empty(each.shape, dtype=each.dtype, device="meta") for n, each in stored.items()})
    layout = format_of(shapes)
    sae = _made(shapes)
    rows = stored.get(layout.rows or "")
    if rows is None or tuple(rows.shape) != (sae.n_latents, sae.d_in):
        return _made(weights(_read_all(files)[0]))

    def read() -> Mapping[str, torch.Tensor]:
        verify_checksums(file.parent)
        return layout.read(weights(_read_all(files)[0])).state_dict()

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
    if not sae.W_dec.is_meta and not is_index(file.name):  # what is left on disk is not read for this
        provenance["sha256"] = sha256(file)
    sae.register_to_config(provenance=provenance)


def _weights_in(folder: Path, variant: str | None) -> str:
    files = sorted(p.name for p in folder.iterdir() if p.name not in COMPANIONS and not is_shard(p.name))
    files = [name for name in files if is_weights(name) or is_index(name)]
    for name in NAMES:
        for wanted in (index_of(name, variant), _variant_of(name, variant)):
            if wanted in files:
                return wanted
    if variant is not None:
        raise InputError(f"{folder} holds no weights of variant {variant!r}; it holds {', '.join(files) or 'none'}.")
    for kinds in ((".safetensors", ".safetensors.index.json"), ("",)):
        fitting = [name for name in files if name.endswith(kinds)]
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
