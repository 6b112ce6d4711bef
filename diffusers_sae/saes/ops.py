"""Products with sparse codes that touch active latents alone, forward and backward."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

CHUNK = 2**25
"""Bytes of decoder rows that are gathered at a time."""


def topk_encode(
    x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, b_dec: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices, both `(N, k)`, of the k largest of `ReLU(W_enc (x - b_dec) + b_enc)`, for `x (N, d)`.

    The dense pre-activations `(N, n)` are not kept for the backward pass, in which weight gradients are products with
    the N k active entries, not with N n.
    """
    return _TopKEncode.apply(x, W_enc, b_enc, b_dec, k)


def sparse_decode(
    values: torch.Tensor, indices: torch.Tensor, W_dec: torch.Tensor, b_dec: torch.Tensor
) -> torch.Tensor:
    """`Σ_i values_i W_dec[indices_i] + b_dec`, `(N, d)`, for codes `(N, k)`."""
    return _SparseDecode.apply(values, indices, W_dec) + b_dec


def transposed_product(values: torch.Tensor, indices: torch.Tensor, n: int, x: torch.Tensor) -> torch.Tensor:
    """`Zᵀ x`, `(n, d)`, for the sparse `Z (N, n)` of `values` and `indices (N, k)` and `x (N, d)`."""
    flat = indices.flatten()
    order = flat.argsort(stable=True)  # so that sums are taken in the same order each time
    starts = torch.zeros(n + 1, dtype=torch.long, device=flat.device)
    torch.cumsum(torch.bincount(flat, minlength=n), 0, out=starts[1:])
    rows = torch.div(order, indices.shape[1], rounding_mode="floor")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, rows, values.flatten()[order], (n, len(x)), check_invariants=False) @ x


class _TopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, b_dec: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        centred = x - b_dec
        values, indices = torch.addmm(b_enc, centred, W_enc.T).relu_().topk(k, dim=-1, sorted=False)
        ctx.save_for_backward(centred, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        centred, W_enc, values, indices = ctx.saved_tensors
        grad = grad * (values > 0)
        by_bias = torch.zeros_like(W_enc[:, 0]).index_add_(0, indices.flatten(), grad.flatten())
        by_x = by_weight = None
        if ctx.needs_input_grad[0]:
            by_x = nn.functional.embedding_bag(indices, W_enc, per_sample_weights=grad, mode="sum")
        if ctx.needs_input_grad[1]:
            by_weight = transposed_product(grad, indices, len(W_enc), centred)
        return by_x, by_weight, by_bias, -(by_bias @ W_enc), None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, indices: torch.Tensor, W_dec: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        return nn.functional.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor | None]:  # type: ignore[override]
        values, indices, W_dec = ctx.saved_tensors
        rows = max(1, CHUNK // (indices.shape[1] * W_dec.shape[1] * W_dec.element_size()))
        by_values = torch.empty_like(values)
        for i in range(0, len(values), rows):
            part = slice(i, i + rows)
            torch.bmm(W_dec[indices[part]], grad[part, :, None], out=by_values[part, :, None])
        by_weight = transposed_product(values, indices, len(W_dec), grad) if ctx.needs_input_grad[2] else None
        return by_values, None, by_weight
