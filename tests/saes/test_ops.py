"""Sparse products against dense ones, forward and backward, in float64."""

import pytest
import torch

from diffusers_sae.saes import ops
from diffusers_sae.saes.ops import sparse_decode, topk_encode, transposed_product

N, D, LATENTS, K = 11, 5, 17, 4


@pytest.fixture
def parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (N, D), "W_enc": (LATENTS, D), "b_enc": (LATENTS,), "b_dec": (D,), "W_dec": (LATENTS, D)}
    return {k: torch.randn(s, generator=generator).double().requires_grad_() for k, s in shapes.items()}


def dense(p, k=K):
    """Codes `(N, n)` by a mask on the dense pre-activations."""
    pre = (p["x"] - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    keep = torch.zeros_like(pre).scatter(1, pre.topk(k).indices, 1.0)
    return pre.relu() * keep


def loss_of(x_hat):
    return (x_hat * torch.linspace(-1, 2, x_hat.numel()).view_as(x_hat)).sin().sum()


@pytest.mark.parametrize("chunk", [1, 10**9])
@pytest.mark.parametrize("k", [1, K, LATENTS])
def test_values_and_all_gradients_equal_the_dense_ones(parameters, monkeypatch, chunk, k):
    monkeypatch.setattr(ops, "CHUNK", chunk)
    p = parameters
    expected = dense(p, k) @ p["W_dec"] + p["b_dec"]
    wanted = torch.autograd.grad(loss_of(expected), list(p.values()))
    values, indices = topk_encode(p["x"], p["W_enc"], p["b_enc"], p["b_dec"], k)
    assert values.shape == indices.shape == (N, k)
    found = sparse_decode(values, indices, p["W_dec"], p["b_dec"])
    torch.testing.assert_close(found, expected)
    for name, a, b in zip(p, torch.autograd.grad(loss_of(found), list(p.values())), wanted, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_gradcheck(parameters):
    p = parameters
    assert torch.autograd.gradcheck(
        lambda *a: topk_encode(*a, K)[0], tuple(p[name] for name in ("x", "W_enc", "b_enc", "b_dec"))
    )
    indices = torch.randint(LATENTS, (N, K))  # the same latent may come twice
    values = torch.randn(N, K).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w, b: sparse_decode(v, indices, w, b), (values, p["W_dec"], p["b_dec"]))


def test_dense_pre_activations_are_not_kept(parameters):
    p = parameters
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        topk_encode(p["x"], p["W_enc"], p["b_enc"], p["b_dec"], K)
    assert kept and (N, LATENTS) not in kept


def test_transposed_product():
    indices = torch.randint(LATENTS, (N, K))
    values, x = torch.randn(N, K).double(), torch.randn(N, D).double()
    z = torch.zeros(N, LATENTS).double()
    for i in range(N):
        for j, v in zip(indices[i], values[i], strict=True):
            z[i, j] += v
    torch.testing.assert_close(transposed_product(values, indices, LATENTS, x), z.T @ x)
