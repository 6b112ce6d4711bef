"""Writing a store of activations: whole shards only, in the order of the images, so that a stopped run goes on."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..activations import SiteActivations
from ..disk import hold_folder
from ..errors import InputError
from ..layouts import LAYOUTS
from ..site_mapping import SiteMapping, distinct_sites
from ..sites import Site, resolve
from ..widths import check_update
from .descriptions import (
    checked_prompts,
    describe,
    describe_call,
    describe_pipeline,
    describe_prompts,
)
from .places import random_places
from .store import SCHEMA, ActivationStore, folder_of
from .store_writer import StoreWriter
from .stream import STRENGTHS, StreamBatch, check_images, stream_activations
from .text import KEEP
from .text_rows import TextRows, check_text_sites, text_arguments

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreConfig:
    """What is kept of the activations of a run.

    Args:
        images: images to generate.
        batch_size: images generated at a time; a shard holds the rows of one such batch.
        branches: guidance branches.
        timesteps: how many of the run's timesteps, evenly spread; all of them by default.
        places: how many random places of each image, branch and timestep; all of them by default.
        dtype: `float16`, `bfloat16` or `float32`.
        max_bytes: what all sites together may take on the disk; by default, what is free.
        seed: image i starts from the noise of seed `seed + i`.
        tokens: at sites of text encoders, whose rows are kept: those of `words`; `padded`, all but the one that begins
            the text; or `all`.
    """

    images: int
    batch_size: int = 16
    branches: tuple[str, ...] = ("cond",)
    timesteps: int | None = None
    places: int | None = None
    dtype: str = "float16"
    max_bytes: int | None = None
    seed: int = 0
    tokens: str = "all"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype={self.dtype!r} is none of {', '.join(DTYPES)}; choose one of them.")
        if self.tokens not in KEEP:
            raise InputError(f"tokens={self.tokens!r} is no choice of tokens; choose one of {', '.join(KEEP)}.")
        for name in ("images", "batch_size", "timesteps", "places"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value} must be at least 1.")


def store_activations(
    pipe: Any, sites: Sequence[Site | str], prompts: Iterable[str], folder: str | Path, config: StoreConfig, **call: Any
) -> SiteMapping[ActivationStore]:
    """Generate `config.images` images and keep what the sites hold, in `folder/<text of the site>`.

    All sites are filled in one pass, and the plan rests. With `images=` in `call`, one for each prompt, activations are
    those of the images with noise (see `stream_activations`), and nothing is generated.

    Every shard is whole or not there: a run that was
    stopped, by whatever means, goes on after its last whole shard and ends with the files that an undisturbed run
    writes. `call` goes to the pipeline. Returns `{site: store}`.

    Sites in text encoders are filled first, by the text encoders alone, one row for each token that is kept: the
    denoiser runs for other sites only. Their rows have the timestep 0.

    Raises:
        InputError: if a site held a number that is not finite or exceeds the range of `config.dtype`, which is found
            before its batch is written, the folder holds another run's activations, or the disk has too little room.
    """
    places, wanted = distinct_sites(sites), checked_prompts(prompts, config.images)
    if config.tokens != "all" and not any(at.is_text_encoder for at in places):
        raise InputError(f"tokens={config.tokens!r} is of text encoders, and no site lies in one; leave it out.")
    if "images" in call:
        check_images(pipe, call.get("strengths", STRENGTHS), call)
        if len(call["images"]) < config.images:
            raise InputError(f"There are {len(call['images'])} pictures for {config.images} images; give one for each.")
    texts, others = [at for at in places if at.is_text_encoder], [at for at in places if not at.is_text_encoder]
    for at in others:
        check_update(resolve(pipe, at), at)
    encode = _text_arguments(pipe, texts, others, config, call) if texts else {}
    plans = [
        _Plan(texts, encode, partial(_text_batches, pipe, texts, wanted, config, encode)),
        _Plan(others, call, partial(_denoiser_batches, pipe, others, wanted, config, call)),
    ]
    pipeline, left = describe_pipeline(pipe), config.max_bytes
    folders = {at: folder_of(Path(folder), at) for at in places}
    with ExitStack() as held:
        for own in folders.values():
            held.enter_context(hold_folder(own))
        writers = []
        for plan in plans:
            runs = {at: _describe(pipe, pipeline, at, wanted, config, plan.call) for at in plan.sites}
            writers.append({at: StoreWriter(folders[at], run) for at, run in runs.items()})
        for plan, filled in zip(plans, writers, strict=True):
            _fill(Path(folder), filled, plan.batches, config.images, left)
            left = None if left is None else left - sum(writer.bytes for writer in filled.values())
    return SiteMapping((at, ActivationStore(folders[at], verify=False)) for at in places)


class _Plan(NamedTuple):
    """Sites that are filled in one pass: what of the call acts on them, and the batches from an image on."""

    sites: Sequence[Site]
    call: Mapping[str, Any]
    batches: Callable[[int], Iterator[_Batch]]


_Batch = tuple[int, int, dict[Site, dict[str, torch.Tensor]]]
"""The number of the first image, how many images, and `{site: tensors of a shard}`."""


def _fill(
    folder: Path,
    writers: Mapping[Site, StoreWriter],
    batches: Callable[[int], Iterator[_Batch]],
    images: int,
    max_bytes: int | None,
) -> None:
    """Write the batches that are missing."""
    first = min((writer.images for writer in writers.values()), default=images)
    if first < images:
        with tqdm(total=images, initial=first, desc="images", mininterval=5) as bar:
            for first_image, count, tensors in batches(first):
                if first_image == first:
                    _check_budget(folder, tensors, count, images - first, max_bytes)
                for site, writer in writers.items():
                    if first_image >= writer.images:  # else it was written before the run was stopped
                        writer.add(tensors[site], count)
                bar.update(count)
    for site, writer in writers.items():
        if writer.rows == 0:
            writer.discard()
            raise InputError(f"No prompt has a token that is kept at {site}; pass other prompts, or tokens='all'.")
        writer.finish()


def _denoiser_batches(
    pipe: Any, sites: Sequence[Site], prompts: Sequence[str], config: StoreConfig, call: Mapping[str, Any], first: int
) -> Iterator[_Batch]:
    size, seed = config.batch_size, config.seed
    for batch in stream_activations(pipe, sites, prompts, batch_size=size, seed=seed, skip=first, **call):
        tensors = {at: _rows_of(batch.sites[at], batch, config) for at in sites}
        yield batch.first_image, len(batch.prompts), tensors


def _text_arguments(
    pipe: Any, texts: Sequence[Site], others: Sequence[Site], config: StoreConfig, call: Mapping[str, Any]
) -> dict[str, Any]:
    """What of the call acts on text encoders; raises `InputError` if something was asked for that acts on nothing."""
    check_text_sites(pipe, texts, config.tokens, config.branches)
    encode = text_arguments(pipe, call)
    idle = [] if others else [name for name in call if name not in encode]
    if not others and config.timesteps is not None:
        idle.append("timesteps")
    if idle:
        raise InputError(
            f"{', '.join(idle)} would do nothing: the denoiser does not run for sites of text encoders; leave it out."
        )
    return encode


def _text_batches(
    pipe: Any, sites: Sequence[Site], prompts: Sequence[str], config: StoreConfig, encode: Mapping[str, Any], first: int
) -> Iterator[_Batch]:
    read = TextRows(config.tokens, config.places, config.seed)
    for first_image, count, tensors in read.stream(pipe, sites, prompts, config.batch_size, first, encode):
        for site, held in tensors.items():
            held["rows"] = _cast(held["rows"], config.dtype, site)
        yield first_image, count, tensors


def _describe(
    pipe: Any,
    pipeline: Mapping[str, Any],
    site: Site,
    prompts: Sequence[str],
    config: StoreConfig,
    call: Mapping[str, Any],
) -> dict[str, Any]:
    """What two runs must have in common for one to go on where the other stopped."""
    kept = describe(asdict(config))
    del kept["max_bytes"]
    del kept["timesteps" if site.is_text_encoder else "tokens"]  # what does not act on the site
    name = pipe.config.get("_name_or_path")
    model = {"name": name if name is None else str(name), **pipeline}  # the name may be a path
    if site.is_text_encoder:
        weights = {part: digest for part, digest in pipeline["weights"].items() if part.startswith("text_encoder")}
        model |= {"weights": weights, "scheduler": None}
    return {
        "schema": SCHEMA,
        "site": site.as_dict(),
        "model": model,
        "scheduler": None if site.is_text_encoder else type(pipe.scheduler).__name__,
        "prompts": describe_prompts(prompts),
        "call": describe_call(call, config.images),
        "config": kept,
    }


def _rows_of(seen: SiteActivations, batch: StreamBatch, config: StoreConfig) -> dict[str, torch.Tensor]:
    """What is kept of one batch, `rows (N, d)` and its labels `(N,)`, in the order image, timestep, branch, place."""
    rows = LAYOUTS[seen.site.layout].to_rows(seen.tensor)  # (calls x rows, P, d)
    if rows.ndim != 3:
        shape = tuple(seen.tensor.shape)
        raise InputError(f"{seen.site} holds a tensor of shape {shape}, neither maps nor tokens; choose a block.")
    timesteps = list(dict.fromkeys(seen.timestep.tolist()))
    kept_steps = set(timesteps)
    if config.timesteps is not None and config.timesteps < len(timesteps):
        spread = torch.linspace(0, len(timesteps) - 1, config.timesteps).round().long().tolist()
        kept_steps = {timesteps[i] for i in spread}
    images = seen.image - seen.image.min() + batch.first_image
    branches = torch.tensor([config.branches.index(b) if b in config.branches else -1 for b in seen.branch])
    missing = set(range(len(config.branches))) - set(branches.tolist())
    if missing:
        names = ", ".join(config.branches[i] for i in sorted(missing))
        raise InputError(f"{seen.site} held no rows of {names}; it held {', '.join(sorted(set(seen.branch)))}.")
    kept = [i for i, t in enumerate(seen.timestep.tolist()) if t in kept_steps and branches[i] >= 0]
    kept.sort(key=lambda i: int(images[i]))  # stable, so timesteps and branches keep their order
    count = rows.shape[1] if config.places is None else min(config.places, rows.shape[1])
    each = len(kept) // len(batch.prompts)  # entries of an image
    places = torch.stack(
        [random_places((config.seed, int(images[i]), j % each), rows.shape[1], count) for j, i in enumerate(kept)]
    )
    index = torch.tensor(kept)
    return {
        "rows": _cast(rows[index[:, None], places].flatten(0, 1), config.dtype, seen.site),
        "timestep": seen.timestep[index].float().repeat_interleave(count),
        "branch": branches[index].to(torch.uint8).repeat_interleave(count),
        "image": images[index].int().repeat_interleave(count),
        "place": places.flatten().int(),
    }


def _cast(rows: torch.Tensor, dtype: str, site: Site) -> torch.Tensor:
    """Rows `(N, d)` in the store's dtype; raises `InputError` if one is not finite, there or to begin with."""
    stored = rows.to(DTYPES[dtype])
    if torch.isfinite(stored).all():
        return stored
    if not torch.isfinite(rows).all():
        raise InputError(f"{site} held numbers that are not finite; run the pipeline in fp32 or bfloat16.")
    largest, limit = float(rows.abs().max()), torch.finfo(stored.dtype).max
    raise InputError(
        f"{site} held {largest:,.0f}, and {dtype} ends at {limit:,.0f}; store with dtype='bfloat16' or 'float32'."
    )


def _check_budget(
    folder: Path, tensors: Mapping[Site, Mapping[str, torch.Tensor]], images: int, left: int, max_bytes: int | None
) -> None:
    """Log what the run will take on the disk, before it writes anything; raise `InputError` if it is too much."""
    size = sum(tensor.nbytes for held in tensors.values() for tensor in held.values())
    needed = -(-size * left // images)
    free = shutil.disk_usage(folder).free
    log.info("%s images take %.2f GB in %s, where %.2f GB are free.", left, needed / 1e9, folder, free / 1e9)
    allowed = free if max_bytes is None else min(free, max_bytes)
    if needed > allowed:
        limit = "are free there" if allowed == free else "are allowed (max_bytes)"
        raise InputError(
            f"{left} images take {needed:,} bytes in {folder} and {allowed:,} {limit}; keep fewer images, timesteps or "
            "places, or choose another disk."
        )
