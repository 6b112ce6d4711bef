"""Sparse products against dense ones, forward and backward, in float64."""

import pytest
import torch

from diffusers_sae.saes import ops
from diffusers_sae.saes.ops import (
    by_latent,
    gathered,
    largest,
    largest_of_all,
    ragged_decode,
    sampled_linear,
    sparse_decode,
    starts,
    topk_encode,
    topk_reconstruct,
)

N, D, LATENTS, K = 11, 5, 17, 4


@pytest.fixture
def parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (N, D), "W_enc": (LATENTS, D), "b_enc": (LATENTS,), "b_dec": (D,), "W_dec": (LATENTS, D)}
    return {k: torch.randn(s, generator=generator).double().requires_grad_() for k, s in shapes.items()}


@pytest.fixture
def ragged():
    """A code whose rows have 0 to 5 entries, the same latent twice at times: indices, offsets."""
    counts = torch.tensor([3, 0, 5, 1, 2, 0, 4, 1, 1, 5, 0])
    indices = torch.randint(LATENTS, (int(counts.sum()),), generator=torch.Generator().manual_seed(1))
    return indices, torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])


def dense(p, k=K):
    """Codes `(N, n)` by a mask on the dense pre-activations."""
    pre = (p["x"] - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    keep = torch.zeros_like(pre).scatter(1, pre.topk(k).indices, 1.0)
    return pre.relu() * keep


def dense_code(values, indices, offsets):
    z = values.new_zeros(len(offsets) - 1, LATENTS)
    for i in range(len(z)):
        for at in range(offsets[i], offsets[i + 1]):
            z[i, indices[at]] += values[at]
    return z


def loss_of(x_hat):
    return (x_hat * torch.linspace(-1, 2, x_hat.numel()).view_as(x_hat)).sin().sum()


@pytest.mark.parametrize("k", [1, K, LATENTS])
def test_values_and_all_gradients_equal_the_dense_ones(parameters, k):
    p = parameters
    expected = dense(p, k) @ p["W_dec"] + p["b_dec"]
    wanted = torch.autograd.grad(loss_of(expected), list(p.values()))
    values, indices = topk_encode(p["x"], p["W_enc"], p["b_enc"], p["b_dec"], k)
    assert values.shape == indices.shape == (N, k)
    together = topk_reconstruct(p["x"], p["W_enc"], p["b_enc"], p["W_dec"], p["b_dec"], k)
    assert torch.equal(together[0], values) and torch.equal(together[1], indices)
    for found in (sparse_decode(values, indices, p["W_dec"], p["b_dec"]), together[2]):
        torch.testing.assert_close(found, expected)
        for name, a, b in zip(p, torch.autograd.grad(loss_of(found), list(p.values())), wanted, strict=True):
            torch.testing.assert_close(a, b, msg=name)


def test_gradcheck(parameters, ragged):
    p = parameters
    assert torch.autograd.gradcheck(
        lambda *a: topk_encode(*a, K)[0], tuple(p[name] for name in ("x", "W_enc", "b_enc", "b_dec"))
    )
    indices, offsets = ragged
    values = torch.randn(len(indices)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w: ragged_decode(v, indices, offsets, w), (values, p["W_dec"]))
    assert torch.autograd.gradcheck(
        lambda x, w, b: sampled_linear(x, w, b, indices, offsets), (p["x"], p["W_enc"], p["b_enc"])
    )


def test_ragged_products_equal_dense_ones(parameters, ragged):
    p, (indices, offsets) = {name: t.detach() for name, t in parameters.items()}, ragged
    values = torch.randn(len(indices)).double()
    z = dense_code(values, indices, offsets)
    torch.testing.assert_close(ragged_decode(values, indices, offsets, p["W_dec"]), z @ p["W_dec"])
    order, latent_rows, begins = by_latent(indices, offsets, LATENTS)
    torch.testing.assert_close(gathered(values[order], latent_rows, begins, p["x"]), z.T @ p["x"])
    pre = p["x"] @ p["W_enc"].T + p["b_enc"]
    rows = torch.repeat_interleave(offsets.diff())
    found = sampled_linear(p["x"], p["W_enc"], p["b_enc"], indices, offsets)
    torch.testing.assert_close(found, pre[rows, indices])
    known = torch.randn(len(indices)).double()
    assert torch.equal(sampled_linear(p["x"], p["W_enc"], p["b_enc"], indices, offsets, known), known)


def test_dense_pre_activations_are_not_kept(parameters):
    p = parameters
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        topk_encode(p["x"], p["W_enc"], p["b_enc"], p["b_dec"], K)
    assert kept and (N, LATENTS) not in kept


@pytest.mark.parametrize("n", [ops.FEW, ops.FEW + 1, 9 * ops.FEW + ops.GROUP * 7 + 3])
@pytest.mark.parametrize("k", [1, 32, 100])
def test_the_largest_are_found_through_groups(n, k):
    generator = torch.Generator().manual_seed(n + k)
    pre = torch.randn(6, n, generator=generator)
    pre[0, -40:] += 9  # among those that fill no group, too
    pre[1] = 0.5  # all alike
    pre[2, 5::1] = -1.0
    values, indices = largest(pre, k)
    assert torch.equal(values.sort().values, pre.topk(k).values.sort().values)
    assert torch.equal(pre.gather(1, indices), values)
    assert all(len(set(row.tolist())) == k for row in indices)


@pytest.mark.parametrize(("shape", "count"), [((7, 30), 1), ((7, 30), 210), ((64, 20_000), 64 * 32), ((3, 4097), 5000)])
def test_the_largest_of_all_are_a_code(shape, count):
    generator = torch.Generator().manual_seed(count)
    for pre in (torch.randn(shape, generator=generator), torch.zeros(shape), torch.arange(shape[0] * shape[1]) * 1.0):
        pre = pre.view(shape)
        values, indices, offsets = largest_of_all(pre, count)
        assert len(values) == len(indices) == count == offsets[-1] and len(offsets) == shape[0] + 1
        assert torch.equal(values.sort().values, pre.flatten().topk(count).values.sort().values)
        rows = torch.repeat_interleave(offsets.diff())
        assert torch.equal(pre[rows, indices], values)
        assert len(set(zip(rows.tolist(), indices.tolist(), strict=True))) == count


def test_a_sample_that_misleads_loses_nothing():
    """All large entries lie where the sample does not look, or it sees nothing but the large ones."""
    pre = torch.zeros(8, 2**18)
    pre[:, 1::2] = torch.rand(8, 2**17)
    seen = torch.zeros(pre.numel(), dtype=torch.bool)
    seen[:: (pre.numel() // 2**18) | 1] = True
    for flat in (torch.where(seen, -1.0, pre.flatten()), torch.where(seen, pre.flatten() + 5, pre.flatten())):
        values, _, _ = largest_of_all(flat.view_as(pre), 300_000)
        assert torch.equal(values.sort().values, flat.topk(300_000).values.sort().values)


def test_starts():
    assert starts(torch.tensor([2, 0, 2, 4]), 6).tolist() == [0, 1, 1, 3, 3, 4, 4]


def test_a_search_in_bfloat16_gives_exact_values_and_misses_little():
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(200, 64, generator=generator), torch.randn(3000, 64, generator=generator)
    b, b_dec = torch.randn(3000, generator=generator), torch.randn(64, generator=generator)
    values, indices, x_hat = topk_reconstruct(x, W, b, W, b_dec, 16, search_dtype=torch.bfloat16)
    torch.testing.assert_close(x_hat, sparse_decode(values, indices, W, b_dec))
    pre = ((x - b_dec) @ W.T + b).relu()
    torch.testing.assert_close(values, pre.gather(1, indices))
    kth = pre.topk(16).values[:, -1:]
    missed = values < kth * (1 - 1e-6)  # taken in place of one that is larger, by less than bfloat16 tells apart
    assert missed.float().mean() < 0.02 and (values > kth - 2e-2 * pre.amax()).all()
