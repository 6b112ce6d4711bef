"""The β-VAE's loss against its definition in float64, and what training must reach."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusers_sae import InputError
from diffusers_sae.evaluation.beta_vae import BetaVAE, train_beta_vae


def relu_layers(state, name, x):
    hidden = (x @ state[f"{name}.0.weight"].T + state[f"{name}.0.bias"]).clamp(min=0)
    return hidden @ state[f"{name}.2.weight"].T + state[f"{name}.2.bias"]


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_loss_equals_the_bound(beta):
    torch.manual_seed(0)
    vae = BetaVAE(6, 3, 5, beta)
    vae.mean, vae.scale = torch.randn(6), torch.tensor(2.5)
    x, noise = 3 * torch.randn(7, 6), torch.randn(7, 3)
    state = {name: value.double() for name, value in vae.state_dict().items()}
    rows = (x.double() - state["mean"]) / 2.5
    mu, log_variance = relu_layers(state, "encoder", rows).split(3, dim=1)
    q = Normal(mu, (log_variance / 2).exp())
    x_hat = relu_layers(state, "decoder", q.mean + q.stddev * noise.double())
    log_likelihood = Normal(x_hat, 1.0).log_prob(rows).sum(1) + 3 * math.log(2 * math.pi)  # 6 / 2 of them
    expected = (beta * kl_divergence(q, Normal(0.0, 1.0)).sum(1) - log_likelihood).mean()
    assert vae.loss(x, noise).item() == pytest.approx(expected.item(), rel=1e-5)
    at_the_mean = 2.5 * relu_layers(state, "decoder", mu) + state["mean"]
    torch.testing.assert_close(vae(x).double(), at_the_mean, atol=1e-5, rtol=1e-5)


def low_rank(count, seed):
    generator = torch.Generator().manual_seed(9)
    mix, offset = torch.randn(3, 20, generator=generator), 4 * torch.randn(20, generator=generator)
    generator.manual_seed(seed)
    noise = 0.1 * torch.randn(count, 20, generator=generator)
    return 5 * torch.randn(count, 3, generator=generator) @ mix + offset + noise


def test_training_finds_the_code_that_rows_have():
    seen, held_out = low_rank(512, 0), low_rank(256, 1)
    state = torch.random.get_rng_state()
    fvu = {}
    for latents, beta in ((3, 1.0), (1, 1.0), (3, 300.0)):
        vae = train_beta_vae(seen, latents, width=64, beta=beta)
        error = (held_out - vae(held_out)).square().sum() / (held_out - seen.mean(0)).square().sum()
        fvu[latents, beta] = error.item()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert fvu[3, 1.0] < 0.15 < fvu[1, 1.0]  # one number can follow a curve at best
    assert fvu[3, 300.0] > 0.9  # the divergence is too dear: the code says nothing


def test_same_seed_same_weights():
    a, b, c = (train_beta_vae(low_rank(32, 0), 2, width=8, steps=5, seed=seed) for seed in (1, 1, 2))
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name])
    assert not torch.equal(a.encoder[0].weight, c.encoder[0].weight)


@pytest.mark.parametrize("rows", [torch.zeros(4), torch.ones(5, 3), torch.randn(1, 3)])
def test_rows_that_do_not_fit(rows):
    with pytest.raises(InputError, match="rows that differ"):
        train_beta_vae(rows, 2)


def test_negative_beta():
    with pytest.raises(InputError, match="0 or more"):
        BetaVAE(4, 2, beta=-1.0)
