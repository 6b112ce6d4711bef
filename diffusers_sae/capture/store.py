"""A store of activations on disk: shards of rows with their labels, and a manifest that says what they are."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..checksums import sha256
from ..errors import InputError
from ..sites import Site

SCHEMA = 1
MANIFEST = "manifest.json"


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_model(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name", 0), str | None)


def _is_config(value: Any) -> bool:
    branches = value.get("branches") if isinstance(value, dict) else None
    return isinstance(branches, list) and all(isinstance(each, str) for each in branches)


CONTENTS: dict[str, Callable[[Any], bool]] = {
    "site": lambda value: isinstance(value, dict) and isinstance(value.get("path"), str),
    "model": _is_model,
    "scheduler": lambda value: isinstance(value, str | None),
    "prompts": lambda value: isinstance(value, dict),
    "call": lambda value: isinstance(value, dict),
    "config": _is_config,
    "complete": lambda value: isinstance(value, bool),
    "shards": lambda value: isinstance(value, list) and all(isinstance(shard, dict) for shard in value),
}
"""What a manifest must say, and whether a value can be that."""
OF_A_SHARD = {"rows": _is_count, "images": _is_count, "bytes": _is_count, "sha256": _is_sha256}


def shard_name(i: int) -> str:
    """The file of the i-th shard, counted from 0."""
    return f"{i:06}.safetensors"


def folder_of(folder: Path, site: Site) -> Path:
    """Where a capture into a folder keeps a site: under the site's text, or where there is a store of it already, which
    earlier versions named by the path as it was written."""
    named = folder / str(site)
    manifests = [named / MANIFEST, *sorted(folder.glob(f"*/{MANIFEST}"))]
    return next((manifest.parent for manifest in manifests if _site_in(manifest) == site), named)


def _site_in(manifest: Path) -> Site | None:
    """The site that a manifest is of, if it can be told."""
    try:
        return Site.of(json.loads(manifest.read_text())["site"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # an InputError is a ValueError
        return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a store says of itself; raises `InputError` if it says nothing, or not all that it must."""
    file, remedy = folder / MANIFEST, f"delete {folder} and store the activations again"
    try:
        manifest = json.loads(file.read_text())
        schema = manifest["schema"]
    except FileNotFoundError:
        raise InputError(f"{folder} holds no store of activations; store_activations makes one.") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file} cannot be read ({error}); {remedy}.") from None
    if schema != SCHEMA:
        raise InputError(f"{file} has schema {schema}, and this version reads {SCHEMA}; {remedy}.")
    if missing := [name for name in CONTENTS if name not in manifest]:
        raise InputError(f"{file} does not say {', '.join(missing)}; {remedy}.")
    if wrong := [name for name, is_valid in CONTENTS.items() if not is_valid(manifest[name])]:
        raise InputError(f"{file} has contents that no store has in {', '.join(wrong)}; {remedy}.")
    for i, shard in enumerate(manifest["shards"]):
        wrong = [name for name, is_valid in OF_A_SHARD.items() if not is_valid(shard.get(name))]
        if shard.get("file") != shard_name(i):  # each once, in the order of the images
            wrong.append("file")
        if wrong:
            raise InputError(f"{file} does not say what its shards are: of shard {i}, {', '.join(wrong)}; {remedy}.")
    images, wanted = sum(shard["images"] for shard in manifest["shards"]), manifest["config"].get("images")
    if manifest["complete"] and images != wanted:
        raise InputError(f"{file} lists shards of {images} images, and the run was of {wanted}; {remedy}.")
    return manifest


def check_shards(folder: Path, manifest: dict[str, Any], *, verify: bool = False) -> None:
    """Raise `InputError` unless all shards are there and whole; with `verify`, unless they are unaltered."""
    remedy, widths = f"fetch the store whole, or delete {folder} and store the activations again", set()
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        if not file.is_file():
            raise InputError(f"{file} is missing; {remedy}.")
        if file.stat().st_size != shard["bytes"] or (verify and sha256(file) != shard["sha256"]):
            raise InputError(f"{file} is truncated or altered; {remedy}.")
        shape = _shape_of_rows(file)
        if len(shape) != 2 or shape[0] != shard["rows"]:
            raise InputError(
                f"{file} holds rows of shape {shape}, where {MANIFEST} says that there are {shard['rows']}; {remedy}."
            )
        widths.add(shape[1])
    if len(widths) > 1:
        raise InputError(f"The shards of {folder} hold rows of different widths; {remedy}.")


def _shape_of_rows(file: Path) -> tuple[int, ...]:
    """Of a shard's rows, from its header; empty if it holds none."""
    try:
        with safe_open(file, "pt") as opened:
            return tuple(opened.get_slice("rows").get_shape())
    except SafetensorError:
        return ()


class ActivationStore:
    """The activations of one site, on disk.

    `manifest` tells where they come from. Raises `InputError` unless all shards are there, whole and unaltered;
    `verify=False` looks at their sizes alone.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if not self.manifest["complete"]:
            raise InputError(f"{self.folder} is not complete; run store_activations as before, which goes on with it.")
        check_shards(self.folder, self.manifest, verify=verify)
        self._open()

    def _open(self) -> None:
        files = [self.folder / shard["file"] for shard in self.manifest["shards"]]
        self._load = lru_cache(maxsize=64)(lambda i: load_file(files[i]))
        self.shard_rows = [shard["rows"] for shard in self.manifest["shards"]]

    def part(self, start: int | None = None, stop: int | None = None) -> ActivationStore:
        """Some of the shards as a store of their own, counted as in a slice."""
        part = copy.copy(self)
        part.manifest = {**self.manifest, "shards": self.manifest["shards"][start:stop]}
        part._open()
        return part

    def __len__(self) -> int:
        return sum(self.shard_rows)

    @property
    def site(self) -> Site:
        return Site.of(self.manifest["site"])

    @property
    def width(self) -> int:
        return self._load(0)["rows"].shape[1]

    def shard(self, i: int) -> dict[str, torch.Tensor]:
        """`rows (N, d)` of the i-th shard as they are stored, and `timestep`, `branch`, `image` and `place`, `(N,)`.

        `branch` counts in `manifest["config"]["branches"]`.
        """
        return self._load(i)

    def batches(
        self, batch_size: int, *, seed: int = 0, epochs: int = 1, pool: int = 16, skip: int = 0
    ) -> Iterator[torch.Tensor]:
        """Shuffled rows `(batch_size, d)` in fp32; every row once an epoch, but for the last that fill no batch.

        Rows are mixed over `pool` random shards at a time. The order follows from `seed`, so that `skip` batches can
        be left out, unread, to go on where a run was stopped.
        """
        left, held = skip * batch_size, torch.empty(0, 2, dtype=torch.long)
        for epoch in range(epochs):
            generator = torch.Generator().manual_seed(seed + epoch)
            order = torch.randperm(len(self.shard_rows), generator=generator)
            for shards in order.split(pool):
                entries = torch.cat([_entries(int(s), self.shard_rows[int(s)]) for s in shards])  # (N, 2)
                held = torch.cat([held, entries[torch.randperm(len(entries), generator=generator)]])
                unread = min(left, len(held) // batch_size * batch_size)
                left, held = left - unread, held[unread:]
                while len(held) >= batch_size:
                    yield self._gather(held[:batch_size])
                    held = held[batch_size:]

    def _gather(self, entries: torch.Tensor) -> torch.Tensor:
        found = torch.empty(len(entries), self.width)
        for shard in entries[:, 0].unique().tolist():
            here = entries[:, 0] == shard
            found[here] = self._load(shard)["rows"][entries[here, 1]].float()
        return found


def _entries(shard: int, rows: int) -> torch.Tensor:
    """`(rows, 2)`: the shard's number and each of its rows'."""
    return torch.stack([torch.full((rows,), shard), torch.arange(rows)], -1)
