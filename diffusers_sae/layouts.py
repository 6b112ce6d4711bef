"""Layouts: how a site's tensor becomes rows, and how rows become it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """A pair of functions: tensor -> rows `(B, P, d)`, and (rows, the tensor they came from) -> tensor.

    Rows of one place, `(B, 1, d)`, stand for all places; the tensor then broadcasts.
    """

    to_rows: Callable[[torch.Tensor], torch.Tensor]
    from_rows: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _positions_to_rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x  # (B, H*W, C) or (B, N, C)


def _positions_from_rows(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if like.ndim != 4:
        return rows
    channels_first = rows.transpose(1, 2)  # (B, C, P)
    return channels_first.unflatten(2, like.shape[2:]) if rows.shape[1] > 1 else channels_first[..., None]


def _channels_to_rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2) if x.ndim == 4 else x.transpose(1, 2)  # (B, C, H*W) or (B, C, N)


def _channels_from_rows(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return rows.unflatten(2, like.shape[2:]) if like.ndim == 4 else rows.transpose(1, 2)


def _vector_to_rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)[:, None]  # (B, 1, C*H*W) or (B, 1, N*C)


def _vector_from_rows(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return rows[:, 0].unflatten(1, like.shape[1:])


LAYOUTS = {
    "positions": Layout(_positions_to_rows, _positions_from_rows),
    "channels": Layout(_channels_to_rows, _channels_from_rows),
    "vector": Layout(_vector_to_rows, _vector_from_rows),
}
