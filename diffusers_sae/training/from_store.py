"""Training an SAE on a store of activations; a run that was stopped ends with the weights of an undisturbed one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..capture import ActivationStore
from ..capture.descriptions import describe_prompts, describe_sae, digest_weights
from ..capture.prefetch import prefetched
from ..disk import append_to_log, cut_log, hold_folder
from ..errors import InputError
from ..saes import BatchTopKSAE, SparseAutoencoder
from .checkpoints import CHECKPOINT, check_run, read_checkpoint, write_checkpoint
from .config import TrainingConfig
from .processes import check_processes, check_same_step
from .trainer import SAETrainer

LOG = "log.jsonl"
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
        InputError: if the checkpoint is another run's, the store has fewer rows than a step takes, or the rows of a
            step are not finite or all the same.
        FloatingPointError: if the loss is not finite although they are. After either error of a step, the state before
            it is kept in the checkpoint.
    """
    folder = Path(folder)
    if len(store) < config.batch_size:
        raise InputError(
            f"{store.folder} has {len(store)} rows, fewer than the {config.batch_size} of a step; store more."
        )
    check_processes(config.batch_size, accelerator)
    with hold_folder(folder) if accelerator is None or accelerator.is_main_process else nullcontext():
        trainer, run = _begun(store, make_sae, config, folder / CHECKPOINT, seed, accelerator)
        check_same_step(trainer.step_count, accelerator)
        _train(trainer, store, folder, run, seed, checkpoint_every, log_every, accelerator)
    return trainer.finish()


def _train(
    trainer: SAETrainer,
    store: ActivationStore,
    folder: Path,
    run: Mapping[str, Any],
    seed: int,
    checkpoint_every: int,
    log_every: int,
    accelerator: Accelerator | None,
) -> None:
    """Make the steps that are left, with logs and checkpoints."""
    config, checkpoint = trainer.config, folder / CHECKPOINT
    count, index = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    epochs = -(-config.steps * config.batch_size // len(store)) + 1  # one more, as rows that fill no batch are left out
    batches = store.batches(config.batch_size, seed=seed, epochs=epochs, skip=trainer.step_count)
    if index == 0:
        cut_log(folder / LOG, "step", trainer.step_count)
    if trainer.device.type == "cuda":  # a processor that trains has no time to spare for reading ahead
        batches = prefetched(batches, pin=True)
    remaining = islice(batches, config.steps - trainer.step_count)
    with tqdm(
        remaining, total=config.steps, initial=trainer.step_count, desc="steps", mininterval=1, disable=index > 0
    ) as bar:
        for rows in bar:
            try:
                figures = trainer.step(rows[index::count])
            except (FloatingPointError, InputError):
                if index == 0:
                    write_checkpoint(checkpoint, {"run": run, "trainer": trainer.state_dict()})
                raise
            step = trainer.step_count
            if accelerator:
                accelerator.log(figures, step=step)
            if index > 0:
                continue
            if step % log_every == 0 or step == config.steps:
                append_to_log(folder / LOG, {"step": step, **figures})
                bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()})
            if step % checkpoint_every == 0 or step == config.steps:
                write_checkpoint(checkpoint, {"run": run, "trainer": trainer.state_dict()})


def _begun(
    store: ActivationStore,
    make_sae: Callable[[int], SparseAutoencoder],
    config: TrainingConfig,
    checkpoint: Path,
    seed: int,
    accelerator: Accelerator | None,
) -> tuple[SAETrainer, dict[str, Any]]:
    """The trainer of the checkpoint, or a new one, and what the run consists of."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = make_sae(store.width)
    if not sae.rows_apart:
        raise InputError(
            f"A {type(sae).__name__} takes its rows in order, and those of a store are shuffled; "
            "train it by SAETrainer, on batches of whole images."
        )
    run = _describe(store, sae, seed, accelerator)
    state = read_checkpoint(checkpoint)
    if state is None:
        sample = next(store.batches(min(SAMPLE, len(store)), seed=seed))
        return SAETrainer(sae.train(), config, sample, accelerator=accelerator), run
    check_run(state, run, checkpoint, ("trainer",))
    trainer = SAETrainer(sae.train(), config, None, accelerator=accelerator)
    trainer.load_state_dict(state["trainer"])
    return trainer, run


def _describe(
    store: ActivationStore, sae: SparseAutoencoder, seed: int, accelerator: Accelerator | None
) -> dict[str, Any]:
    """What, besides the trainer's settings, two runs must have in common for one to go on where the other stopped."""
    shards = [shard["sha256"] for shard in store.manifest["shards"]]
    run = {
        "seed": seed,
        "store": {"rows": len(store), **describe_prompts(shards)},
        "sae": describe_sae(sae),
        "start": digest_weights(sae),
    }
    if isinstance(sae, BatchTopKSAE):  # what it keeps is chosen among the rows of each process
        run["processes"] = accelerator.num_processes if accelerator else 1
    return run
