"""The denoising context: timestep, progress, and which row of a batch belongs to which image and guidance branch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .errors import InputError
from .rules import Rule

BRANCHES = ("cond", "uncond")
"""The branches an edit can name."""


def _guided(pipe: Any) -> tuple[str, ...]:
    return ("uncond", "cond") if pipe.do_classifier_free_guidance else ("cond",)


def _perturbed_attention(pipe: Any) -> tuple[str, ...]:
    return _guided(pipe) + (("perturbed",) if pipe.do_perturbed_attention_guidance else ())


def _instruct_pix2pix(pipe: Any) -> tuple[str, ...]:
    return ("cond", "image", "uncond") if pipe.do_classifier_free_guidance else ("cond",)


BRANCH_ORDER: dict[str, Callable[[Any], tuple[str, ...]]] = {
    "InstructPix2Pix": _instruct_pix2pix,
    "PAG": _perturbed_attention,
    "": _guided,
}
"""Order of the branches in the batch, by a part of the pipeline's class name; the first that fits, `""` fits all."""


def branch_order(pipe: Any) -> tuple[str, ...]:
    """Guidance branches in the order in which the pipeline concatenates them now.

    Read at every step, since callbacks may switch guidance off in the middle of a run.
    """
    name = type(pipe).__name__
    return next(order for part, order in BRANCH_ORDER.items() if part in name)(pipe)


def check_supported(pipe: Any) -> None:
    """Raise `InputError` for a pipeline whose branches or timesteps could only be guessed."""
    name = type(pipe).__name__
    if not isinstance(getattr(pipe, "unet", None), nn.Module):
        raise InputError(f"{name} has no U-Net, and only U-Net pipelines can be steered so far; load one of those.")
    if not hasattr(type(pipe), "do_classifier_free_guidance"):
        raise InputError(
            f"{name} does not say whether guidance is on, so that branches could not be told apart; use a pipeline "
            "with the property do_classifier_free_guidance, such as StableDiffusionPipeline."
        )


@dataclass
class DenoisingContext:
    """Where a running pipeline is. Filled by a hook on the denoiser before each of its calls.

    `timestep` is the scheduler's, `progress` is 1 - timestep / training timesteps (0 at pure noise, 1 at the finished
    image), `rows` the batch the denoiser sees, `branches` its parts in order, `size` the height and width of the
    latents, `decisions` which images each rule holds for, as far as that is decided.
    """

    timestep: float = 0.0
    progress: float = 0.0
    rows: int = 1
    branches: tuple[str, ...] = ("cond",)
    size: tuple[int, int] = (1, 1)
    calls: int = 0
    decisions: dict[Rule, torch.Tensor] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Images in the batch (prompts times images a prompt)."""
        return self.rows // len(self.branches)

    def rows_of(self, branch: str) -> slice:
        """The rows of one branch, which lie side by side."""
        start = self.branches.index(branch) * self.images
        return slice(start, start + self.images)

    def begin(self) -> None:
        """Forget the run before."""
        self.calls = 0
        self.decisions.clear()

    def update(self, pipe: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Read the denoiser's arguments for the call that is about to run."""
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        self.timestep = float(timestep.flatten()[0] if isinstance(timestep, torch.Tensor) else timestep)
        self.progress = 1 - self.timestep / pipe.scheduler.config.num_train_timesteps
        self.rows, self.size = sample.shape[0], (sample.shape[-2], sample.shape[-1])
        self.branches = branch_order(pipe)
        self.calls += 1
        if self.rows % len(self.branches):
            raise InputError(
                f"A batch of {self.rows} rows cannot hold the branches {', '.join(self.branches)} of "
                f"{type(pipe).__name__}, so none was edited; report the pipeline, or call reset_steering()."
            )
