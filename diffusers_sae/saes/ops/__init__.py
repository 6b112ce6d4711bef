"""Products with sparse codes that touch active latents alone, forward and backward.

A code of N rows is kept row after row: `values (M,)` and their latents `indices (M,)`, where row i has the entries
`offsets[i]` to `offsets[i + 1]`, `offsets (N + 1,)`. Weight gradients are then products with the M entries, not with
the N n of a dense code.
"""

from __future__ import annotations

from typing import Any

import torch

from .products import gathered, rows_of, sampled

HELD = 2**26
"""Pre-activations that are held at a time: 256 MiB."""
GROUP = 16
"""Pre-activations that are looked at through their largest, in the search of the k largest."""
FEW = 4096
"""Latents up to which such groups gain nothing."""
SPARE = 2
"""How many times k candidates a product in half precision has to give."""


def topk_encode(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    b_dec: torch.Tensor,
    k: int,
    *,
    search_dtype: torch.dtype = torch.float32,
    relu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices, both `(N, k)`, of the k largest of `ReLU(W_enc (x - b_dec) + b_enc)`, for `x (N, d)`;
    without the ReLU if not `relu`.

    The dense pre-activations `(N, n)` are not kept for the backward pass, and made for a few rows at a time if they are
    more than `HELD`. With a `search_dtype` of bfloat16, a product in it names `SPARE` k candidates, whose values are
    then taken in full precision: it may miss a latent that is nearly as large as the k-th, and no more.
    """
    centred = x - b_dec
    with torch.no_grad():
        if search_dtype != torch.float32 and SPARE * k < len(W_enc):
            W, b = W_enc.to(search_dtype), b_enc.to(search_dtype)
            candidates = _largest_products(centred.to(search_dtype), W, b, SPARE * k)[1]
            exact = _sampled(centred, W_enc, b_enc, candidates.flatten(), even(candidates)).view_as(candidates)
            values, places = exact.topk(k, dim=-1, sorted=False)
            indices = candidates.gather(1, places)
        else:
            values, indices = _largest_products(centred, W_enc, b_enc, k)
    found = sampled_linear(centred, W_enc, b_enc, indices.flatten(), even(indices), values.flatten())
    found = found.view_as(indices)
    return (found.relu() if relu else found), indices


def sparse_decode(
    values: torch.Tensor, indices: torch.Tensor, W_dec: torch.Tensor, b_dec: torch.Tensor
) -> torch.Tensor:
    """`Σ_i values_i W_dec[indices_i] + b_dec`, `(N, d)`, for codes `(N, k)`."""
    return ragged_decode(values.flatten(), indices.flatten(), even(indices), W_dec) + b_dec


def ragged_decode(
    values: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, W_dec: torch.Tensor
) -> torch.Tensor:
    """`Σ values W_dec[indices]` over the entries of each row, `(N, d)`."""
    return _RaggedDecode.apply(values, indices, offsets, W_dec)


def sampled_linear(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    values: torch.Tensor | None = None,
) -> torch.Tensor:
    """The entries `(M,)` of `x Wᵀ + b` at the places of a code, for `x (N, d)`, `W (n, d)`.

    `values`: those entries, if they are known already.
    """
    return _SampledLinear.apply(x, W, b, indices, offsets, values)


def _largest_products(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`largest` of `x Wᵀ + b`."""
    found = [largest(torch.addmm(b, rows, W.T), k) for rows in x.split(at_once(len(W)))]
    return torch.cat([values for values, _ in found]), torch.cat([indices for _, indices in found])


def at_once(numbers: int) -> int:
    """How many rows of so many numbers are no more than `HELD`, or 1."""
    return max(1, HELD // numbers)


def largest(pre: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest entries of each row of `pre (N, n)` and where they are, in no order.

    They lie in the k groups whose largest entries are largest, so that few entries have to be compared.
    """
    n = pre.shape[1]
    groups = n // GROUP
    if n <= FEW or groups < k:
        return pre.topk(k, dim=-1, sorted=False)
    best = pre[:, : groups * GROUP].unflatten(1, (GROUP, groups)).amax(1).topk(k, dim=-1, sorted=False).indices
    steps = torch.arange(0, groups * GROUP, groups, device=pre.device)
    rest = torch.arange(groups * GROUP, n, device=pre.device).expand(len(pre), -1)
    candidates = torch.cat([(best[:, None, :] + steps[:, None]).flatten(1), rest], 1)
    values, places = pre.gather(1, candidates).topk(k, dim=-1, sorted=False)
    return values, candidates.gather(1, places)


def largest_of_all(pre: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `count` largest entries of all of `pre (N, n)` as a code: values, indices, offsets.

    A sample of the entries tells above which value to look; if that leaves too few, all are sorted.
    """
    flat = pre.flatten()
    stride = max(1, len(flat) // 2**18) | 1  # odd, so that it does not keep to a few latents
    sample = flat[::stride]
    rank = min(len(sample), 2 * count // stride + 64)
    bound = sample.topk(rank, sorted=True).values[-1]
    places = (flat >= bound).nonzero().flatten()
    if len(places) < count:
        places = torch.arange(len(flat), device=flat.device)
    chosen = flat[places].topk(count, sorted=False).indices
    places = places[chosen].sort().values
    rows = torch.div(places, pre.shape[1], rounding_mode="floor")
    return flat[places], places - rows * pre.shape[1], starts(rows, len(pre))


def transposed_product(
    values: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, n: int, x: torch.Tensor
) -> torch.Tensor:
    """`Zᵀ x`, `(n, d)`, for a code Z `(N, n)` and `x (N, d)`."""
    order = indices.argsort(stable=True)  # so that sums are taken in the same order each time
    return gathered(values[order], rows_of(offsets, len(indices))[order], starts(indices, n), x)


def starts(numbers: torch.Tensor, bins: int) -> torch.Tensor:
    """Where each of the numbers 0 to `bins` - 1 begins once they are sorted, and their count, `(bins + 1,)`."""
    found = torch.zeros(bins + 1, dtype=torch.long, device=numbers.device)
    torch.cumsum(torch.bincount(numbers, minlength=bins), 0, out=found[1:])
    return found


def even(indices: torch.Tensor) -> torch.Tensor:
    """The offsets of rows that have as many entries each, for `indices (N, k)`."""
    k = indices.shape[1]
    return torch.arange(0, indices.numel() + 1, k, device=indices.device)


def _sampled(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, indices: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    found = sampled(x, W, indices, offsets)
    return found if b is None else found + b[indices]


class _SampledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W: torch.Tensor,
        b: torch.Tensor,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        values: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, W, indices, offsets)
        return _sampled(x, W, b, indices, offsets) if values is None else values.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, W, indices, offsets = ctx.saved_tensors
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = gathered(grad, indices, offsets, W)
        if ctx.needs_input_grad[1]:
            by_weight = transposed_product(grad, indices, offsets, len(W), x)
        if ctx.needs_input_grad[2]:
            by_bias = torch.zeros_like(W[:, 0]).index_add_(0, indices, grad)
        return by_x, by_weight, by_bias, None, None, None


class _RaggedDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, W_dec: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(values, indices, offsets, W_dec)
        return gathered(values, indices, offsets, W_dec)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        values, indices, offsets, W_dec = ctx.saved_tensors
        by_values = _sampled(grad, W_dec, None, indices, offsets) if ctx.needs_input_grad[0] else None
        by_weight = None
        if ctx.needs_input_grad[3]:
            by_weight = transposed_product(values, indices, offsets, len(W_dec), grad)
        return by_values, None, None, by_weight
