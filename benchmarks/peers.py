"""Other libraries' SAEs under one face, each trained by its own code, and ours beside them.

They need an environment of their own, which `make extras` makes in `.venv-peers`; then
`.venv-peers/bin/python benchmarks/training_speed.py` and the like.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar, Protocol

import torch


@dataclass(frozen=True)
class Task:
    """An SAE of `n_latents` latents for rows of width `d`, trained for `steps` steps of `rows` rows.

    `rate` multiplies each library's own rate; `kind` is named as on our command line.
    """

    d: int
    n_latents: int
    k: int
    rows: int
    steps: int
    rate: float = 1.0
    kind: str = "topk"
    sparsity: float = 1.0

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

    def fired(self, rows: torch.Tensor) -> torch.Tensor:
        """Which latents fire, `(N, n)`."""

    def directions(self) -> torch.Tensor:
        """`(n, d)`."""


class Ours:
    def __init__(self, task: Task, sample: torch.Tensor) -> None:
        from diffusers_sae.saes import ARCHITECTURES
        from diffusers_sae.training import SAETrainer, TrainingConfig

        lr = TrainingConfig(steps=task.steps).lr * task.rate
        config = TrainingConfig(
            steps=task.steps, batch_size=task.rows, lr=lr, sparsity=task.sparsity, dead_after=100_000
        )
        (make,) = (cls for name, cls in ARCHITECTURES.items() if name.lower() == task.kind + "sae")
        own = (task.k,) if "topk" in task.kind or task.kind == "matryoshka" else ()
        self._trainer = SAETrainer(make(task.d, task.n_latents, *own).train(), config, sample)

    def step(self, rows: torch.Tensor) -> Any:
        return self._trainer.step(rows)

    def reconstruct(self, rows: torch.Tensor) -> torch.Tensor:
        scale = self._trainer.scale
        return self._trainer.sae(rows * scale) / scale

    def fired(self, rows: torch.Tensor) -> torch.Tensor:
        return self._trainer.sae.encode(rows * self._trainer.scale) > 0

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

    def fired(self, rows: torch.Tensor) -> torch.Tensor:
        values, indices, _ = self._sae.encode(rows)
        return torch.zeros(len(rows), self._sae.num_latents).scatter_(1, indices, values) > 0

    def directions(self) -> torch.Tensor:
        return self._sae.W_dec


class DictionaryLearning:
    TRAINERS: ClassVar = {
        "topk": ("top_k", "TopKTrainer"),
        "batchtopk": ("batch_top_k", "BatchTopKTrainer"),
        "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer"),
        "jumprelu": ("jumprelu", "JumpReluTrainer"),
        "gated": ("gdm", "GatedSAETrainer"),
        "relu": ("standard", "StandardTrainer"),
    }

    def __init__(self, task: Task, sample: torch.Tensor) -> None:
        file, trainer = self.TRAINERS[task.kind]
        own: dict[str, Any] = {"topk": {"k": task.k}, "batchtopk": {"k": task.k}}.get(task.kind, {})
        if task.kind == "matryoshka":
            own = {"k": task.k, "group_fractions": [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]}
        if task.kind in ("jumprelu", "gated", "relu"):
            own = {"sparsity_warmup_steps": task.steps // 10}
        if task.kind == "jumprelu":
            own |= {"target_l0": task.k, "lr": 7e-5 * task.rate}
        else:
            own |= {"lr": task.published_rate}
        if "k" in own:
            own |= {"threshold_start_step": task.steps // 10}
        self._trainer = getattr(import_module(f"dictionary_learning.trainers.{file}"), trainer)(
            steps=task.steps, activation_dim=task.d, dict_size=task.n_latents, layer=0, lm_name="none",
            warmup_steps=task.warmup, decay_start=task.steps * 4 // 5, device="cpu", **own,
        )  # fmt: skip
        self._steps = 0

    def step(self, rows: torch.Tensor) -> Any:
        loss = self._trainer.update(self._steps, rows)
        self._steps += 1
        return loss

    def reconstruct(self, rows: torch.Tensor) -> torch.Tensor:
        return self._trainer.ae(rows)

    def fired(self, rows: torch.Tensor) -> torch.Tensor:
        return self._trainer.ae.encode(rows) > 0

    def directions(self) -> torch.Tensor:
        ae = self._trainer.ae
        return ae.W_dec if hasattr(ae, "W_dec") else ae.decoder.weight.T


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

    def fired(self, rows: torch.Tensor) -> torch.Tensor:
        return self._sae.encode(rows) > 0

    def directions(self) -> torch.Tensor:
        return self._sae.W_dec


def stand_in_for_torchvision() -> None:
    """An empty module, for overcomplete, which imports torchvision for image models that its SAEs don't use."""
    empty = sys.modules.setdefault("torchvision", ModuleType("torchvision"))
    empty.transforms = None  # type: ignore[attr-defined]
    empty.__spec__ = ModuleSpec("torchvision", None)  # transformers asks for it


class Overcomplete:
    def __init__(self, task: Task, sample: torch.Tensor) -> None:
        stand_in_for_torchvision()
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

    def fired(self, rows: torch.Tensor) -> torch.Tensor:
        return self._sae.eval()(rows)[1] > 0

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
