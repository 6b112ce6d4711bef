"""A store of activations on disk: shards of rows with their labels, and a manifest that says what they are."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..checksums import sha256
from ..errors import InputError
from ..sites import Site

SCHEMA = 1
MANIFEST = "manifest.json"
CONTENTS = ("site", "model", "scheduler", "prompts", "call", "config", "complete", "shards")
OF_A_SHARD = {"file", "rows", "images", "bytes", "sha256"}


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a store says of itself; raises `InputError` if it says nothing, or not all that it must."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        schema = manifest["schema"]
    except FileNotFoundError:
        raise InputError(f"{folder} holds no store of activations; store_activations makes one.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({error}); store the activations again.") from None
    if schema != SCHEMA:
        raise InputError(f"{file} has schema {schema}, and this version reads {SCHEMA}; store the activations again.")
    if missing := [name for name in CONTENTS if name not in manifest]:
        raise InputError(f"{file} does not say {', '.join(missing)}; store the activations again.")
    shards = manifest["shards"]
    if not isinstance(shards, list) or any(not isinstance(one, dict) or OF_A_SHARD - set(one) for one in shards):
        raise InputError(f"{file} does not say what its shards are; store the activations again.")
    return manifest


def check_shards(folder: Path, manifest: dict[str, Any], *, verify: bool = False) -> None:
    """Raise `InputError` unless all shards are there and whole; with `verify`, unless they are unaltered."""
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        if not file.is_file():
            raise InputError(f"{file} is missing; store the activations again, or fetch them whole.")
        if file.stat().st_size != shard["bytes"] or (verify and sha256(file) != shard["sha256"]):
            raise InputError(f"{file} is truncated or altered; store the activations again, or fetch them whole.")


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
