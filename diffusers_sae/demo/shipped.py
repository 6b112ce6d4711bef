"""The models that ship with the package, and how images of the demo world are made and looked at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..features.concepts import ConceptScores
from ..features.detectors import ConceptDetectors
from ..pipelines import SAESteeringPipeline
from .judge import Judge
from .world import FACTORS

MODELS = Path(__file__).parent / "models"
SITES = ("unet.up_blocks.1.attentions.1", "unet.down_blocks.1.attentions.0")
STEPS = 20
GUIDANCE = 4.0
CALL: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}


def load_pipeline(folder: Path = MODELS / "emoji-sd") -> Any:
    """emoji-sd, steerable, in fp32 on the CPU."""
    pipe = SAESteeringPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_scores(folder: Path = MODELS / "saes") -> dict[str, ConceptScores]:
    """The concept scores of the SAE of every site."""
    return {site: ConceptScores.load(folder / site) for site in SITES}


def load_detectors(folder: Path = MODELS / "saes") -> ConceptDetectors:
    """What tells which concepts a prompt asks for, from the SAE of the first site."""
    return ConceptDetectors.load(folder / SITES[0])


def load_judge(folder: Path = MODELS / "judge") -> Judge:
    return Judge.from_pretrained(folder).eval()


def generate(
    pipe: Any, prompts: Iterable[str], seeds: Iterable[int], *, batch_size: int = 32, **call: Any
) -> Iterator[torch.Tensor]:
    """Images `(3, 64, 64)` in [-1, 1], one a prompt; each starts from the noise of its own seed, whatever the batch."""
    pairs = iter(zip(prompts, seeds, strict=True))
    while batch := list(islice(pairs, batch_size)):
        generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
        images = pipe([p for p, _ in batch], generator=generators, output_type="pt", **{**CALL, **call}).images
        yield from images.float() * 2 - 1


Seen = dict[str, tuple[str, float]]
"""What the judge sees in an image: value and confidence of every factor."""


def look(judge: Judge, images: Sequence[torch.Tensor]) -> list[Seen]:
    """The judge's verdict on each image `(3, 64, 64)` in [-1, 1]."""
    verdict = judge.look(torch.stack(list(images)))
    return [
        {f: (FACTORS[f][int(verdict.classes[f][i])], float(verdict.confidence[f][i])) for f in FACTORS}
        for i in range(len(images))
    ]
