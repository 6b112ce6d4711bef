"""How a stream of activations feeds the trainers: every setting, its default and the values that it may have."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from ..ranges import Range, check_ranges
from .config import COUNT, POSITIVE

RANGES = {
    "images": COUNT,
    "batch_size": COUNT,
    "rows": Range(2, whole=True),
    "reuse": POSITIVE,
    "buffer": COUNT,
    "emphasis": Range(0),
    "first_steps": Range(0, whole=True),
    "checkpoint_every": COUNT,
    "seed": Range(whole=True),
}


@dataclass(frozen=True)
class StreamingConfig:
    """How a stream feeds the trainers.

    Args:
        images: images to generate; the run ends after them.
        batch_size: images generated at a time.
        rows: rows of an optimiser step.
        reuse: how often a row is drawn, on average.
        buffer: rows that each site's shuffle buffer holds, at least `rows`. A batch of images that gives more goes
            through it in parts, with training steps in between: each part holds all timesteps at a random choice of
            images and places, so that every row comes in and every timestep is trained on alike.
        branch: guidance branch whose rows are learned.
        balance: whether rows are weighted by one over the variance of their timestep, so that every timestep counts
            alike; timesteps whose rows are all the same in a batch have the weight 1.
        emphasis: power of a timestep's FVU, over the mean one, that its weight is multiplied by; above 0, timesteps
            that are hard to reconstruct count more.
        first_steps: how many further noises of each prompt go through the first step alone. What a site holds of pure
            noise is the most varied, and such rows cost one step.
        checkpoint_every: images between checkpoints.
        seed: image i starts from the noise of seed `seed + i`.

    Raises:
        InputError: if a setting has a value that it may not have.
    """

    images: int
    batch_size: int = 16
    rows: int = 1024
    reuse: float = 1.0
    buffer: int = 2**17
    branch: str = "cond"
    balance: bool = True
    emphasis: float = 0.0
    first_steps: int = 0
    checkpoint_every: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        if self.buffer < self.rows:
            raise InputError(f"buffer={self.buffer} holds fewer rows than a step takes (rows={self.rows}); raise it.")
