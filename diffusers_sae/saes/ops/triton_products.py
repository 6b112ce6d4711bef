"""The products of `products.py` as Triton kernels. Sums are taken in fp32 and in a fixed order, without atomics.

Tested in Triton's interpreter on a CPU; not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]

BLOCK = 256
"""Columns that a program takes at a time, at most."""


def sampled(x: torch.Tensor, W: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The entries `(M,)` of `x Wᵀ` in these `rows (M,)` and columns `indices (M,)`, for `x (N, d)`, `W (n, d)`."""
    x, W = x.contiguous(), W.contiguous()
    found = torch.empty(len(indices), dtype=x.dtype, device=x.device)
    if len(indices):
        d = x.shape[1]
        _sampled[(len(indices),)](x, W, indices, rows, found, d, BLOCK=_block(d))
    return found


def gathered(values: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """`Z W`, `(N, d)`, for a code Z `(N, n)` and `W (n, d)`; rows without entries are 0."""
    values, W, d = values.contiguous(), W.contiguous(), W.shape[1]
    found = torch.empty(len(offsets) - 1, d, dtype=W.dtype, device=W.device)
    if found.numel():
        block = _block(d)
        _gathered[(len(found), triton.cdiv(d, block))](values, indices, offsets, W, found, d, BLOCK=block)
    return found


def _block(d: int) -> int:
    return min(BLOCK, triton.next_power_of_2(d))


@triton.jit
def _sampled(x, W, indices, rows, found, d, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    entry = tl.program_id(0).to(tl.int64)
    row, column = tl.load(rows + entry), tl.load(indices + entry)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, d, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < d
        a = tl.load(x + row * d + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(W + column * d + at, mask=inside, other=0.0).to(tl.float32)
        total += a * b
    tl.store(found + entry, tl.sum(total, axis=0))


@triton.jit
def _gathered(values, indices, offsets, W, found, d, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < d
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for entry in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        weight = tl.load(W + tl.load(indices + entry) * d + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(values + entry).to(tl.float32) * weight
    tl.store(found + row * d + at, total, mask=inside)
