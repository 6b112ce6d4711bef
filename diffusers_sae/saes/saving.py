"""Saving an SAE: a folder holds one SAE and nothing of another, and what is uploaded is what was saved."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ..checksums import FILE as CHECKSUMS
from ..checksums import write_checksums
from ..disk import refuse_full_disk
from ..errors import InputError
from ..nulls import nulls_for_nan
from .card import CARD, FIGURES, LABELS, PICTURE, card_of, is_generated, is_local, name_of

if TYPE_CHECKING:
    from .base import SparseAutoencoder

CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.bin", "diffusion_pytorch_model.*.json")
"""Patterns of the names under which diffusers writes weights: whole, of a variant, in shards, and their index."""
DERIVED = ("statistics.safetensors", LABELS, FIGURES, "concepts.safetensors", "detectors.safetensors")
"""What was measured on an SAE and says nothing about another."""
TEMPORARY = ".diffusers_sae_saving_"


def save(
    sae: SparseAutoencoder, folder: Path, write: Callable[[Path], None], figures: Mapping[str, Any] | None
) -> list[str]:
    """Save an SAE in `folder`, in the place of whatever SAE lies there; returns the names of its files.

    Args:
        write: writes config and weights into a folder.
        figures: of rows held out, for the card.

    Files that are no part of an SAE stay. All is written beside the folder's own files first and put in their place
    then, so that a save that fails leaves the folder as it was.

    Raises:
        InputError: labels or statistics are not of this SAE, `folder` is a file, or the disk is full. Nothing is
            written.
    """
    _check(sae, folder, figures)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{TEMPORARY}*"):  # of a save that was killed
        shutil.rmtree(left)
    try:
        with refuse_full_disk(folder), TemporaryDirectory(prefix=TEMPORARY, dir=folder) as fresh:
            write(Path(fresh))
            _publish(Path(fresh) / CONFIG)
            _write_companions(sae, Path(fresh), figures)
            return _install(sae, Path(fresh), folder)
    except BaseException:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise


def upload(folder: Path, names: list[str], message: str, hub: Mapping[str, Any]) -> str:
    """Upload these files of a folder; returns the name of the repository.

    What it holds of an earlier SAE beside them is deleted, but for its weights if only a variant is uploaded.
    """
    from huggingface_hub import HfApi

    stale = DERIVED if all(_variant(name) for name in names if _is_weights(name)) else (*WEIGHTS, *DERIVED)
    api = HfApi(token=hub.get("token"))
    repo = api.create_repo(hub.get("repo_id") or folder.name, private=hub.get("private"), exist_ok=True)
    api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=folder,
        commit_message=hub.get("commit_message") or message,
        create_pr=hub.get("create_pr"),
        allow_patterns=names,
        delete_patterns=list(stale),  # those that are uploaded are kept
    )
    return repo.repo_id


def _check(sae: SparseAutoencoder, folder: Path, figures: Mapping[str, Any] | None) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, and an SAE is saved as a folder; choose another name.")
    for name in (CONFIG, *DERIVED, CHECKSUMS, CARD):
        if (folder / name).is_dir():
            raise InputError(f"{folder / name} is a folder, where an SAE has a file; choose another folder.")
    for feature, label in (sae.labels or {}).items():
        sae.checked_feature(feature)
        if not isinstance(label, str):
            raise InputError(f"The label of feature {feature} is {label!r}; it must be a text.")
    if sae.statistics is not None:
        sae.statistics.check(sae.n_latents, "The SAE's statistics")
    if not isinstance(figures, Mapping | None):
        raise InputError(f"figures are a {type(figures).__name__}; pass a dict of names to numbers.")
    try:
        json.dumps(figures)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"figures cannot be written as JSON ({error}); pass plain numbers.") from None


def _publish(config: Path) -> None:
    """Take out of a saved config where files lay on this machine; of a local base model, its name stays."""
    told = json.loads(config.read_text())
    told.pop("_name_or_path", None)
    provenance = told.get("provenance")
    if isinstance(provenance, dict) and is_local(provenance.get("base_model")):
        provenance["base_model"] = name_of(provenance["base_model"])
    config.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")


def _write_companions(sae: SparseAutoencoder, folder: Path, figures: Mapping[str, Any] | None) -> None:
    if sae.statistics is not None:
        sae.statistics.save(folder)
    if figures is not None:
        (folder / FIGURES).write_text(json.dumps(nulls_for_nan(figures), indent=1, allow_nan=False) + "\n")
    if sae.labels:
        told = {str(int(feature)): label for feature, label in sae.labels.items()}
        (folder / LABELS).write_text(json.dumps(told, indent=1) + "\n")


def _install(sae: SparseAutoencoder, fresh: Path, folder: Path) -> list[str]:
    """Move a complete new save into its folder; what belonged to another SAE, or to an older save, goes."""
    old, new = _weights(folder), _weights(fresh)
    is_another = bool(old) and not _holds(folder, fresh / CONFIG, sae)
    if is_another:
        stale = {*old, *(name for name in DERIVED if (folder / name).is_file())}
        _set_aside_what_people_made(folder)
    else:
        stale = {name for name in old if _variant(name) in {_variant(n) for n in new}}
    card = folder / CARD
    if not card.is_file() or is_generated(card.read_text(errors="replace")):
        (fresh / CARD).write_text(_card(sae, [fresh] if is_another else [fresh, folder], (folder / PICTURE).is_file()))
    for file in sorted(fresh.iterdir()):
        os.replace(file, folder / file.name)
        stale.discard(file.name)
    for name in stale:
        (folder / name).unlink()
    data = [name for name in (CONFIG, *_weights(folder), *DERIVED) if (folder / name).is_file()]
    write_checksums(folder, data)  # last: until then, those of before refuse a folder that is half replaced
    return [*data, CHECKSUMS, *(name for name in (CARD, PICTURE) if (folder / name).is_file())]


def _weights(folder: Path) -> list[str]:
    return sorted({file.name for pattern in WEIGHTS for file in folder.glob(pattern) if file.is_file()})


def _is_weights(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in WEIGHTS)


def _variant(name: str) -> str:
    """`fp16` of `diffusion_pytorch_model.fp16.safetensors`, its shards and their index; else nothing."""
    parts = name.replace(".safetensors", "").replace(".bin", "").replace(".index", "").replace(".json", "").split(".")
    return parts[1].partition("-")[0] if len(parts) > 1 else ""


def _holds(folder: Path, config: Path, sae: SparseAutoencoder) -> bool:
    """Whether a folder holds this very SAE, whatever it was saved as: in half precision, in shards, elsewhere trained.

    Only the provenance may differ.
    """
    try:
        ours, theirs = (json.loads(file.read_text()) for file in (config, folder / CONFIG))
        both = (set(ours) & set(theirs)) - {"provenance", "_diffusers_version"}
        state, seen = sae.state_dict(), set()
        if "_class_name" not in both or any(ours[name] != theirs[name] for name in both):
            return False
        for name, tensor in _saved_tensors(folder):
            if name not in state or not _is_same(tensor, state[name].cpu()):
                return False
            seen.add(name)
        return seen == set(state)
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError):
        return False


def _saved_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in folder.glob(WEIGHTS[0]):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                yield name, opened.get_tensor(name)


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal in the coarser of their dtypes."""
    if a.dtype.itemsize > b.dtype.itemsize:
        a, b = b, a
    return a.shape == b.shape and torch.equal(a, b.to(a.dtype))


def _card(sae: SparseAutoencoder, folders: list[Path], picture: bool) -> str:
    """The card, with what was measured as the first of the folders has it; raises `InputError` if that is no object."""

    def find(name: str) -> Path | None:
        return next((folder / name for folder in folders if (folder / name).is_file()), None)

    def read(name: str) -> dict[str, Any]:
        file = find(name)
        return {} if file is None else _read_object(file)

    arguments = {name: value for name, value in sae.config.items() if name[:1] != "_" and name != "provenance"}
    statistics = find(DERIVED[0]) is not None
    kind, provenance = type(sae).__name__, sae.provenance
    return card_of(kind, arguments, provenance, statistics, read(FIGURES), read(LABELS), picture=picture)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file} cannot be read as JSON ({reason}); mend it or delete it, and save again.") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object; mend it or delete it, and save again.")
    return content


def _set_aside_what_people_made(folder: Path) -> None:
    """A card that a person wrote or edited, and the picture that a card shows; one that no card shows yet is newer."""
    card = folder / CARD
    text = card.read_text(errors="replace") if card.is_file() else ""
    if PICTURE in text and (folder / PICTURE).is_file():
        _set_aside(folder / PICTURE)
    if text and not is_generated(text):
        _set_aside(card)


def _set_aside(file: Path) -> None:
    """Rename a person's file, `README.md` to `README.old.md`, to a name that is free."""
    names = (f"{file.stem}.old{i or ''}{file.suffix}" for i in range(10**6))
    file.rename(next(path for name in names if not (path := file.with_name(name)).exists()))
