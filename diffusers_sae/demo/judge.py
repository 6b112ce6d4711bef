"""The judge: a small classifier with one head a factor, trained on real renders only."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from .world import FACTORS


class Residual(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a shortcut; the first may halve the grid."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if stride > 1 or c_in != c_out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(h)))


class Verdict(NamedTuple):
    """What the judge sees in a batch: for every factor the class `(N,)` and its probability `(N,)`."""

    classes: dict[str, torch.Tensor]
    confidence: dict[str, torch.Tensor]


class Judge(ModelMixin, ConfigMixin):
    """Names object, style, background, gender and skin tone of 64 x 64 images.

    `forward` takes images `(N, 3, 64, 64)` in [-1, 1] and returns logits `(N, classes)` for every factor.
    """

    @register_to_config
    def __init__(self, width: int = 32, temperature: float = 1.0, thresholds: dict[str, float] | None = None) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(nn.Conv2d(3, w, 3, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU())  # 32 x 32
        self.body = nn.Sequential(
            Residual(w, w),
            Residual(w, 2 * w, 2),  # 16 x 16
            Residual(2 * w, 2 * w),
            Residual(2 * w, 4 * w, 2),  # 8 x 8
            Residual(4 * w, 4 * w),
            Residual(4 * w, 6 * w, 2),  # 4 x 4
        )
        self.heads = nn.ModuleDict({f: nn.Linear(6 * w, len(values)) for f, values in FACTORS.items()})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.body(self.stem(images)).mean((2, 3))  # (N, 6 w)
        return {factor: head(h) for factor, head in self.heads.items()}

    @torch.no_grad()
    def look(self, images: torch.Tensor) -> Verdict:
        """Classes and their probabilities (softmax) for images `(N, 3, 64, 64)` in [-1, 1].

        The probabilities are not calibrated: of held-out renders the judge names nearly every factor right
        (`held_out.json`), which leaves no errors to fit `temperature` to.
        """
        best = {f: (z.float() / self.config.temperature).softmax(-1).max(-1) for f, z in self(images).items()}
        return Verdict({f: b.indices for f, b in best.items()}, {f: b.values for f, b in best.items()})
