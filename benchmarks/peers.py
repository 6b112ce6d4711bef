"""Other libraries' TopK SAEs under one face, each trained by its own code, and ours beside them.

python -m venv peers && peers/bin/pip install -r benchmarks/peers.txt -e .
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Task:
    """A TopK SAE of `n_latents` latents for rows of width `d`, trained for `steps` steps of `rows` rows.

    `rate` multiplies each library's own rate.
    """

    d: int
    n_latents: int
    k: int
    rows: int
    steps: int
    rate: float = 1.0

    @property
    def warmup(self) -> int:
        return max(1, self.steps // 50)

    @property
    def published_rate(self) -> float:
        """2e-4 for 2^14 latents, and by one over the root of their number (2406.04093, figure 3)."""
        return self.rate * 2e-4 / (self.n_latents / 2**14) ** 0.5


class Side(Protocol):
    def __init__(self, task: Task, sample: torch.Tensor) -> None: ...

    def step(self, rows: torch.Tensor) -> Any:
        """One optimiser step on rows `(N, d)`."""

    def reconstruct(self, rows: torch.Tensor) -> torch.Tensor: ...

    def directions(self) -> torch.Tensor:
        """`(n, d)`."""


class Ours:
    def __init__(self, task: Task, sample: torch.Tensor) -> None:
        from diffusers_sae import TopKSAE
        from diffusers_sae.training import TrainingConfig
        from diffusers_sae.training.trainer import SAETrainer

        standard = TrainingConfig(steps=task.steps)
        config = TrainingConfig(steps=task.steps, batch_size=task.rows, lr=standard.lr * task.rate)
        self._trainer = SAETrainer(TopKSAE(task.d, task.n_latents, task.k), config, sample)

    def step(self, rows: torch.Tensor) -> Any:
        return self._trainer.step(rows)

    def reconstruct(self, rows: torch.Tensor) -> torch.Tensor:
        scale = self._trainer.scale
        return self._trainer.sae(rows * scale) / scale

    def directions(self) -> torch.Tensor:
        return self._trainer.sae.W_dec


class Sparsify:
    """Its trainer wants a language model, so the loop is written as in its `trainer.py`, with Adam."""

    def __init__(self, task: Task, sample: torch.Tensor) -> None:
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
        from sparsify.config import SparseCoderConfig
        from sparsify.sparse_coder import SparseCoder

        self._sae = SparseCoder(task.d, SparseCoderConfig(num_latents=task.n_latents, k=task.k))
        self._sae.b_dec.data = sample.mean(0)
        self._optimizer = torch.optim.Adam(self._sae.parameters(), lr=task.published_rate)
        self._schedule = _linear(self._optimizer, task)

    def step(self, rows: torch.Tensor) -> Any:
        self._sae.set_decoder_norm_to_unit_norm()
        found = self._sae(rows)
        found.fvu.backward()
        self._sae.remove_gradient_parallel_to_decoder_directions()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()
        return float(found.fvu.detach())

    def reconstruct(self, rows: torch.Tensor) -> torch.Tensor:
        return self._sae(rows).sae_out

    def directions(self) -> torch.Tensor:
        return self._sae.W_dec


class DictionaryLearning:
    def __init__(self, task: Task, sample: torch.Tensor) -> None:
        from dictionary_learning.trainers.top_k import TopKTrainer

        self._trainer = TopKTrainer(
            task.steps, task.d, task.n_latents, task.k, layer=0, lm_name="none", lr=task.published_rate,
            warmup_steps=task.warmup, decay_start=task.steps * 4 // 5, device="cpu",
        )  # fmt: skip
        self._steps = 0

    def step(self, rows: torch.Tensor) -> Any:
        loss = self._trainer.update(self._steps, rows)
        self._steps += 1
        return loss

    def reconstruct(self, rows: torch.Tensor) -> torch.Tensor:
        return self._trainer.ae(rows)

    def directions(self) -> torch.Tensor:
        return self._trainer.ae.decoder.weight.T


class SAELens:
    def __init__(self, task: Task, sample: torch.Tensor) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        config = SAETrainerConfig(
            total_training_samples=task.steps * task.rows,
            train_batch_size_samples=task.rows,
            lr=3e-4 * task.rate,
            lr_end=3e-5 * task.rate,
            lr_warm_up_steps=task.warmup,
            lr_decay_steps=task.steps // 5,
        )
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=task.d, d_sae=task.n_latents, k=task.k))
        self._sae, self._trainer = sae, SAETrainer(config, sae, iter(()))

    def step(self, rows: torch.Tensor) -> Any:
        found = self._trainer.step(rows)
        self._trainer.n_training_steps += 1
        return float(found.loss)

    def reconstruct(self, rows: torch.Tensor) -> torch.Tensor:
        return self._sae(rows)

    def directions(self) -> torch.Tensor:
        return self._sae.W_dec


class Overcomplete:
    """Its import of torchvision, for image models that its SAEs don't use, finds an empty module."""

    def __init__(self, task: Task, sample: torch.Tensor) -> None:
        sys.modules.setdefault("torchvision", ModuleType("torchvision")).transforms = None  # type: ignore[attr-defined]
        from overcomplete.sae import TopKSAE

        self._sae = TopKSAE(task.d, task.n_latents, task.k)
        self._optimizer = torch.optim.Adam(self._sae.parameters(), lr=5e-4 * task.rate)
        self._schedule = _linear(self._optimizer, task)

    def step(self, rows: torch.Tensor) -> Any:
        from overcomplete.sae import train_sae

        return train_sae(
            self._sae, [rows], _mean_square, self._optimizer, self._schedule, nb_epochs=1, monitoring=0, device="cpu"
        )

    def reconstruct(self, rows: torch.Tensor) -> torch.Tensor:
        return self._sae.eval()(rows)[2]

    def directions(self) -> torch.Tensor:
        return self._sae.get_dictionary()


SIDES: dict[str, Callable[[Task, torch.Tensor], Side]] = {
    "diffusers_sae": Ours,
    "sparsify": Sparsify,
    "dictionary_learning": DictionaryLearning,
    "sae_lens": SAELens,
    "overcomplete": Overcomplete,
}


def _mean_square(x: torch.Tensor, x_hat: torch.Tensor, *_: Any) -> torch.Tensor:
    return (x - x_hat).square().mean()


def _linear(optimizer: torch.optim.Optimizer, task: Task) -> Any:
    """Up in the warm-up, then down to 0 at the end, as sparsify has it."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / task.warmup, max(0.0, (task.steps - step) / (task.steps - task.warmup))),
    )
