"""Where a pipeline hands image embeddings over outside of any module's arguments: a prior, which returns them, and
unCLIP, which adds noise to them before its U-Net gets them.

There, the site `image_embeds` is a module that passes on what it is given, so that hooks work on it as on any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

BRANCHES = {"KandinskyV22Prior": ("uncond", "cond"), "StableUnCLIP": ("cond",)}
"""The branches whose embeddings are handed over, by a part of the pipeline's class name; unCLIP's others are 0."""


class Handover(nn.Module):
    """Passes rows `(B, 1, d)` of the branches on, which lie side by side."""

    def __init__(self, width: int, branches: tuple[str, ...]) -> None:
        super().__init__()
        self.width, self.branches = width, branches

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


def stock_class(cls: type) -> type:
    """The class of diffusers that a steerable class is made of, by a user or on the fly; `cls` itself if it is none."""
    return next(each for each in cls.__mro__ if not hasattr(each, "_steering"))


def branches_handed_over(cls: type) -> tuple[str, ...] | None:
    """Those of the pipelines of a class, or `None` if they hand nothing over."""
    return next((branches for part, branches in BRANCHES.items() if part in stock_class(cls).__name__), None)


def handover_of(pipe: Any) -> Handover | None:
    """A new handover for a pipeline of such a class."""
    branches = branches_handed_over(type(pipe))
    if branches is None:
        return None
    holder = pipe.image_normalizer if hasattr(pipe, "image_normalizer") else pipe.prior
    return Handover(holder.config.embedding_dim, branches)


def methods_through_handover(cls: Any) -> dict[str, Callable]:
    """The methods of a pipeline's class that make or take embeddings, such that these pass through its handover."""
    if branches_handed_over(cls) is None:
        return {}
    if hasattr(cls, "noise_image_embeddings"):
        return {"noise_image_embeddings": _before(cls.noise_image_embeddings)}
    return {name: _after(getattr(cls, name)) for name in ("__call__", "interpolate")}


def _before(method: Callable) -> Callable:
    """What the method is given passes through the handover."""

    @functools.wraps(method)
    def through(self: Any, image_embeds: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return method(self, self._steering.handover(image_embeds[:, None])[:, 0], *args, **kwargs)

    return through


def _after(method: Callable) -> Callable:
    """What the method returns passes through the handover."""

    @functools.wraps(method)
    def through(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = method(self, *args, **kwargs)
        embeds, negative = output if isinstance(output, tuple) else output.to_tuple()
        rows = torch.cat([torch.as_tensor(negative), torch.as_tensor(embeds)])[:, None]
        edited = self._steering.handover(rows)[:, 0].chunk(2)
        negative, embeds = edited if isinstance(embeds, torch.Tensor) else (each.numpy() for each in edited)
        return (embeds, negative) if isinstance(output, tuple) else type(output)(embeds, negative)

    return through
