"""The two products that all others are made of, and which back end makes them: torch, or Triton on a GPU.

A code is `values (M,)`, `indices (M,)` and `offsets (N + 1,)`, as everywhere in `saes.ops`.
"""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType

import torch
from torch import nn

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def sampled(x: torch.Tensor, W: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The entries `(M,)` of `x Wᵀ` at the places of a code, for `x (N, d)`, `W (n, d)`."""
    triton = _triton_for(x)
    if triton is not None:
        return triton.sampled(x, W, indices, rows_of(offsets, len(indices)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        zeros = x.new_zeros(len(indices))
        where = torch.sparse_csr_tensor(offsets, indices, zeros, (len(x), len(W)), check_invariants=False)
        return torch.sparse.sampled_addmm(where, x, W.T, beta=0.0).values()


def gathered(values: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """`Z W`, `(N, d)`, for a code Z `(N, n)` and `W (n, d)`: sums of the rows that each row of Z has entries of."""
    triton = _triton_for(W)
    if triton is not None:
        return triton.gathered(values, indices, offsets, W)
    return nn.functional.embedding_bag(indices, W, offsets[:-1], per_sample_weights=values, mode="sum")


def rows_of(offsets: torch.Tensor, entries: int) -> torch.Tensor:
    """The row of each entry, `(M,)`."""
    return torch.repeat_interleave(offsets.diff(), output_size=entries)


def _triton_for(tensor: torch.Tensor) -> ModuleType | None:
    """The Triton back end where it can make products of `tensor`."""
    if tensor.dtype in TRITON_DTYPES and (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return _triton()
    return None


@functools.cache
def _triton() -> ModuleType | None:
    try:
        from . import triton_products
    except ImportError:
        return None
    return triton_products
