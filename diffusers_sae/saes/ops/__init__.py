"""Products with sparse codes that touch active latents alone, forward and backward.

A code of N rows is kept row after row: `values (M,)` and their latents `indices (M,)`, where row i has the entries
`offsets[i]` to `offsets[i + 1]`, `offsets (N + 1,)`. Weight gradients are then products with the M entries, not with
the N n of a dense code.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .products import gathered, rows_of, sampled

HELD = 2**26
"""Pre-activations that are held at a time: 256 MiB."""
CACHED = 512
"""Rows whose product a processor keeps in its cache."""
GROUP = 4
"""Numbers that are represented by their largest, in the search for the k largest."""
FEW = 128
"""Numbers up to which such groups gain nothing."""


def topk_encode(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    b_dec: torch.Tensor,
    k: int,
    *,
    relu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices, both `(N, k)`, of the k largest of `ReLU(W_enc (x - b_dec) + b_enc)`, for `x (N, d)`;
    without the ReLU if not `relu`.

    The dense pre-activations `(N, n)` are not kept for the backward pass, and made for a few rows at a time.
    """
    values, places = _topk_values(x, W_enc, b_enc, b_dec, k, torch.float32, relu)
    return values, places.indices.view_as(values)


def topk_reconstruct(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    k: int,
    *,
    search_dtype: torch.dtype = torch.float32,
    relu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The values and indices of `topk_encode` and their `sparse_decode`, `(N, d)`, for training.

    The entries are put in order once for all gradients. With a `search_dtype` of bfloat16 the latents are chosen by a
    product in that dtype and their values are then computed in the dtype of `x`: it may choose a latent that is nearly
    as large as the k-th in place of that, and no more.
    """
    values, places = _topk_values(x, W_enc, b_enc, b_dec, k, search_dtype, relu)
    x_hat = _RaggedDecode.apply(values.flatten(), places, W_dec) + b_dec
    return values, places.indices.view_as(values), x_hat


def _topk_values(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    b_dec: torch.Tensor,
    k: int,
    search_dtype: torch.dtype,
    relu: bool,
) -> tuple[torch.Tensor, _Places]:
    """The values `(N, k)` of `topk_encode`, and their places."""
    with torch.no_grad():
        centred, W, b = x - b_dec, W_enc, b_enc
        if approximate := search_dtype != torch.float32:
            centred, W, b = centred.to(search_dtype), W.to(search_dtype), b.to(search_dtype)
        pre, indices = _largest_products(centred, W, b, k)
        known = None if approximate else pre.flatten()
    places = _Places(indices.flatten(), even(indices), len(W_enc))
    values = _SampledLinear.apply(x, b_dec, W_enc, b_enc, places, known).view_as(indices)
    return (values.relu() if relu else values), places


def sparse_decode(
    values: torch.Tensor, indices: torch.Tensor, W_dec: torch.Tensor, b_dec: torch.Tensor
) -> torch.Tensor:
    """`Σ_i values_i W_dec[indices_i] + b_dec`, `(N, d)`, for codes `(N, k)`."""
    return ragged_decode(values.flatten(), indices.flatten(), even(indices), W_dec) + b_dec


def ragged_decode(
    values: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, W_dec: torch.Tensor
) -> torch.Tensor:
    """`Σ values W_dec[indices]` over the entries of each row, `(N, d)`."""
    return _RaggedDecode.apply(values, _Places(indices, offsets, len(W_dec)), W_dec)


def sampled_linear(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    values: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """The entries `(M,)` of `(x - shift) Wᵀ + b` at the places of a code, for `x (N, d)`, `W (n, d)`.

    Args:
        values: those entries, if they are known already.
        shift: `(d,)`; zero if it is not given.
    """
    return _SampledLinear.apply(x, shift, W, b, _Places(indices, offsets, len(W)), values)


def _largest_products(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`largest` of `x Wᵀ + b`."""
    parts = [largest(_affine(rows, W, b), k) for rows in x.split(at_once(len(W)))]
    return torch.cat([values for values, _ in parts]), torch.cat([indices for _, indices in parts])


def at_once(numbers: int) -> int:
    """How many rows of so many numbers are no more than `HELD`, or 1."""
    return max(1, HELD // numbers)


def _affine(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`x Wᵀ + b`. On a processor, a product in bfloat16 takes longer with a bias than without and its addition."""
    return torch.addmm(b, x, W.T) if W.dtype == torch.float32 else torch.mm(x, W.T).add_(b)


def row_dots(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The dot product of each row of `a (n, d)` with that of `b (n, d)`, `(n,)`."""
    size = CACHED if a.device.type == "cpu" else len(a)  # no product as large as the matrices is written to memory
    return torch.cat([(x * y).sum(-1) for x, y in zip(a.split(size), b.split(size), strict=True)])


def largest(pre: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest entries of each row of `pre (N, n)` and where they are, in no order.

    They lie in the k groups whose largest entries are largest, which are searched for in the same way.
    """
    n = pre.shape[1]
    groups = n // GROUP
    if n <= FEW or groups < k:
        return pre.topk(k, dim=-1, sorted=False)
    best = largest(pre[:, : groups * GROUP].unflatten(1, (GROUP, groups)).amax(1), k)[1]
    steps = torch.arange(0, groups * GROUP, groups, device=pre.device)
    candidates = (best[:, :, None] + steps).flatten(1)
    if rest := n - groups * GROUP:
        candidates = torch.cat([candidates, torch.arange(n - rest, n, device=pre.device).expand(len(pre), -1)], 1)
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


def by_latent(indices: torch.Tensor, offsets: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The entries of a code, latent after latent: their order `(M,)`, their rows in it `(M,)`, and where in it the
    entries of each latent begin, `(n + 1,)`."""
    order = indices.argsort(stable=True)  # so that sums are taken in the same order each time
    return order, rows_of(offsets, len(indices))[order], starts(indices, n)


def starts(numbers: torch.Tensor, bins: int) -> torch.Tensor:
    """Where each of the numbers 0 to `bins` - 1 begins once they are sorted, and their count, `(bins + 1,)`."""
    found = torch.zeros(bins + 1, dtype=torch.long, device=numbers.device)
    torch.cumsum(torch.bincount(numbers, minlength=bins), 0, out=found[1:])
    return found


def even(indices: torch.Tensor) -> torch.Tensor:
    """The offsets of rows that have as many entries each, for `indices (N, k)`."""
    k = indices.shape[1]
    return torch.arange(0, indices.numel() + 1, k, device=indices.device)


class _Places:
    """Where the entries of a code of `n` latents are: `indices (M,)`, `offsets (N + 1,)`, and, once needed, their order
    latent after latent."""

    def __init__(self, indices: torch.Tensor, offsets: torch.Tensor, n: int) -> None:
        self.indices, self.offsets, self.n = indices, offsets, n

    @functools.cached_property
    def by_latent(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return by_latent(self.indices, self.offsets, self.n)


def _sampled(x: torch.Tensor, W: torch.Tensor, places: _Places) -> torch.Tensor:
    """The entries `(M,)` of `x Wᵀ` at the places of a code.

    Latent after latent, each row of W is read once, and the rows of x stay in the cache.
    """
    order, rows, begins = places.by_latent
    entries = sampled(W, x, rows, begins)
    return torch.empty_like(entries).index_put_((order,), entries)


def _gathered_by_latent(values: torch.Tensor, places: _Places, x: torch.Tensor) -> torch.Tensor:
    """`Zᵀ x`, `(n, d)`, for a code Z `(N, n)` and `x (N, d)`."""
    order, rows, begins = places.by_latent
    return gathered(values[order], rows, begins, x)


class _SampledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        shift: torch.Tensor | None,
        W: torch.Tensor,
        b: torch.Tensor,
        places: _Places,
        values: torch.Tensor | None,
    ) -> torch.Tensor:
        x = x if shift is None else x - shift
        ctx.save_for_backward(x, W)
        ctx.places = places
        return _sampled(x, W, places).add_(b[places.indices]) if values is None else values.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (x, W), places = ctx.saved_tensors, ctx.places
        by_x = by_shift = by_weight = None
        by_bias = torch.zeros_like(W[:, 0]).index_add_(0, places.indices, grad)
        if ctx.needs_input_grad[0]:
            by_x = gathered(grad, places.indices, places.offsets, W)
        if ctx.needs_input_grad[1]:
            by_shift = -(by_bias @ W)  # the sum over the rows of `by_x`
        if ctx.needs_input_grad[2]:
            by_weight = _gathered_by_latent(grad, places, x)
        return by_x, by_shift, by_weight, by_bias, None, None


class _RaggedDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, places: _Places, W_dec: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.places = places
        return gathered(values, places.indices, places.offsets, W_dec)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (values, W_dec), places = ctx.saved_tensors, ctx.places
        by_values = _sampled(grad, W_dec, places) if ctx.needs_input_grad[0] else None
        by_weight = _gathered_by_latent(values, places, grad) if ctx.needs_input_grad[2] else None
        return by_values, None, by_weight
