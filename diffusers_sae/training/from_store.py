"""Training an SAE on a store of activations; a run that was stopped ends with the weights of an undisturbed one."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..capture import ActivationStore
from ..capture.prefetch import prefetched
from ..errors import InputError
from ..saes import SparseAutoencoder
from .trainer import CHECKPOINT, SAETrainer, TrainingConfig, read_checkpoint, write_checkpoint

SAMPLE = 2**16
"""Rows that centre and scale are taken from."""


def train_on_store(
    store: ActivationStore,
    make_sae: Callable[[int], SparseAutoencoder],
    folder: str | Path,
    config: TrainingConfig,
    *,
    seed: int = 0,
    checkpoint_every: int = 500,
    log_every: int = 20,
    accelerator: Accelerator | None = None,
) -> SparseAutoencoder:
    """Train one SAE on the rows of `store`, again and again until `config.steps` are made.

    A run with the same arguments goes on from the checkpoint in `folder` and, on the CPU with as many threads, ends
    with the same bits as one that was never stopped. The log is `folder/log.jsonl`.

    Args:
        make_sae: function of the width that gives a new SAE.
        seed: of the weights at the start and of the order of the rows.
        accelerator: for several processes, a GPU, or trackers (begun by `init_trackers`), to which figures go too.

    Raises:
        InputError: if the checkpoint is another run's, or the store has fewer rows than a step takes.
        FloatingPointError: if the loss is not finite; the state before that step is kept in the checkpoint.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / CHECKPOINT
    if len(store) < config.batch_size:
        raise InputError(
            f"{store.folder} has {len(store)} rows, fewer than the {config.batch_size} of a step; store more."
        )
    source = {"seed": seed, "shards": [shard["sha256"] for shard in store.manifest["shards"]]}
    count, index = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    if config.batch_size % count:
        raise InputError(f"batch_size={config.batch_size} cannot be shared by {count} processes; make it a multiple.")
    trainer = _begun(store, make_sae, config, checkpoint, source, seed, accelerator)
    epochs = -(-config.steps * config.batch_size // len(store)) + 1  # one more, as rows that fill no batch are left out
    batches = store.batches(config.batch_size, seed=seed, epochs=epochs, skip=trainer.step_count)
    if index == 0:
        _cut_log(folder / "log.jsonl", trainer.step_count)
    if trainer.device.type == "cuda":  # a processor that trains has no time to spare for reading ahead
        batches = prefetched(batches, pin=True)
    remaining = islice(batches, config.steps - trainer.step_count)
    with tqdm(
        remaining, total=config.steps, initial=trainer.step_count, desc="steps", mininterval=1, disable=index > 0
    ) as bar:
        for rows in bar:
            try:
                figures = trainer.step(rows[index::count])
            except FloatingPointError:
                if index == 0:
                    write_checkpoint(checkpoint, {**source, "trainer": trainer.state_dict()})
                raise
            step = trainer.step_count
            if accelerator:
                accelerator.log(figures, step=step)
            if index > 0:
                continue
            if step % log_every == 0 or step == config.steps:
                with (folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps({"step": step, **figures}) + "\n")
                bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()})
            if step % checkpoint_every == 0 or step == config.steps:
                write_checkpoint(checkpoint, {**source, "trainer": trainer.state_dict()})
    return trainer.finish()


def _begun(
    store: ActivationStore,
    make_sae: Callable[[int], SparseAutoencoder],
    config: TrainingConfig,
    checkpoint: Path,
    source: dict[str, object],
    seed: int,
    accelerator: Accelerator | None,
) -> SAETrainer:
    """The trainer of the checkpoint, or a new one."""
    state = read_checkpoint(checkpoint)
    if state is not None:
        if {name: state.get(name) for name in source} != source:
            raise InputError(f"{checkpoint} is of another store or seed; delete it to begin anew.")
        trainer = SAETrainer(make_sae(store.width), config, None, accelerator=accelerator)
        trainer.load_state_dict(state["trainer"])
        return trainer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = make_sae(store.width)
    if not sae.rows_apart:
        raise InputError(
            f"A {type(sae).__name__} takes its rows in order, and those of a store are shuffled; "
            "train it by SAETrainer, on batches of whole images."
        )
    sample = next(store.batches(min(SAMPLE, len(store)), seed=seed))
    return SAETrainer(sae.train(), config, sample, accelerator=accelerator)


def _cut_log(file: Path, steps: int) -> None:
    """Drop what a run that was stopped logged after its last checkpoint."""
    if file.exists():
        lines = [line for line in file.read_text().splitlines() if line.endswith("}")]
        file.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= steps))
