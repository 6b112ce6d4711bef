"""The writer of a site's store: whole shards, and a manifest that names them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..checksums import sha256
from ..disk import write_whole
from ..errors import InputError
from ..sites import Site
from .descriptions import refuse_differences
from .store import MANIFEST, check_shards, read_manifest, shard_name

SHARD = re.compile(r"\d{6}\.safetensors(\.part)?")


class StoreWriter:
    """One site's folder: shards that were written whole, in the order of the images. Nothing is written before one."""

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        self.folder, self._run = folder, run
        self._shards: list[dict[str, Any]] = []
        self._begun = self._complete = False
        if (folder / MANIFEST).exists():
            old = read_manifest(folder)
            self._refuse_another(old)
            check_shards(folder, old, verify=True)
            self._run = {**run, "model": old["model"], "site": old["site"]}  # wherever it lies, however it is spelt now
            self._shards, self._complete = old["shards"], old["complete"]
        elif any(entry.name != f"{MANIFEST}.part" for entry in folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no store; choose another folder.")

    def _refuse_another(self, old: Mapping[str, Any]) -> None:
        """Raise `InputError` if the manifest is another run's."""
        if not isinstance(old["model"], dict) or "pipeline" not in old["model"]:
            raise InputError(
                f"{self.folder} holds activations that an older version of diffusers_sae stored, without what their "
                "run consisted of; choose another folder, or delete it."
            )
        there, here = (
            {**run, "model": {**run["model"], "name": None}, "site": str(Site.of(run["site"]))}
            for run in (old, self._run)
        )
        there = {name: value for name, value in there.items() if name not in ("complete", "shards")}
        refuse_differences(there, here, str(self.folder), "the store", "choose another folder, or delete it")

    def _begin(self) -> None:
        """Write the manifest, and remove what a run left that stopped between a shard and the manifest."""
        self._begun = True
        self._write_manifest(complete=False)
        known = {shard["file"] for shard in self._shards}
        for stray in self.folder.iterdir():
            if SHARD.fullmatch(stray.name) and stray.name not in known:
                stray.unlink()

    @property
    def images(self) -> int:
        """Images whose rows are all on disk."""
        return sum(shard["images"] for shard in self._shards)

    @property
    def rows(self) -> int:
        return sum(shard["rows"] for shard in self._shards)

    @property
    def bytes(self) -> int:
        return sum(shard["bytes"] for shard in self._shards)

    def add(self, tensors: Mapping[str, torch.Tensor], images: int) -> None:
        if not self._begun:
            self._begin()
        file = self.folder / shard_name(len(self._shards))
        shard = {key: tensor.contiguous() for key, tensor in tensors.items()}
        write_whole(file, lambda partial: save_file(shard, partial))
        self._shards.append(
            {
                "file": file.name,
                "rows": len(tensors["rows"]),
                "images": images,
                "bytes": file.stat().st_size,
                "sha256": sha256(file),
            }
        )
        self._write_manifest(complete=False)

    def discard(self) -> None:
        """Remove a store without rows, so that its folder can be filled otherwise."""
        for shard in self._shards:
            (self.folder / shard["file"]).unlink()
        (self.folder / MANIFEST).unlink(missing_ok=True)

    def finish(self) -> None:
        if not self._complete:
            self._write_manifest(complete=True)

    def _write_manifest(self, complete: bool) -> None:
        text = json.dumps({**self._run, "complete": complete, "shards": self._shards}, indent=1) + "\n"
        write_whole(self.folder / MANIFEST, lambda partial: partial.write_text(text))
