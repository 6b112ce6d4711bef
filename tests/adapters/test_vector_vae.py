"""The vector-latent VAE: its shapes, its posterior, what it starts from and minimises, and its files."""

import pytest
import torch

from diffusers_sae import InputError
from diffusers_sae.adapters.vector_vae import VectorGaussian, VectorVAE
from diffusers_sae.adapters.vector_vae_training import analysed, negative_elbo, start_at_principal_components


def small(**sizes):
    torch.manual_seed(0)
    return VectorVAE(**{"sample_size": 8, "latent_dim": 6, "components": 12, "hidden": 16, **sizes}).eval()


def images(count=40, seed=0):
    """Images in [-1, 1] that are far from white noise, so that few components hold most of them."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(20, 3 * 8 * 8, generator=generator) * torch.logspace(0, -2, 20)[:, None]
    return (torch.randn(count, 20, generator=generator) @ basis).tanh().unflatten(1, (3, 8, 8))


@pytest.mark.parametrize("sizes", [{}, {"in_channels": 1, "sample_size": 4}])
def test_shapes(sizes):
    vae = small(**sizes)
    x = torch.rand(5, vae.config.in_channels, vae.config.sample_size, vae.config.sample_size)
    dist = vae.encode(x).latent_dist
    assert dist.mean.shape == dist.logvar.shape == dist.sample().shape == (5, 6)
    assert dist.kl().shape == (5,)
    assert vae.decode(dist.mean).sample.shape == x.shape
    assert torch.equal(vae(x), vae.decode(dist.mean).sample)
    assert torch.equal(vae(z=dist.mean), vae(x))


def test_the_divergence_is_that_of_the_formula_and_of_torch():
    torch.manual_seed(1)
    one, two = (VectorGaussian(torch.randn(7, 10)) for _ in "ab")
    mean, logvar = one.mean.double(), one.logvar.double()
    expected = -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(1)  # 1312.6114, appendix B
    torch.testing.assert_close(one.kl().double(), expected, rtol=1e-5, atol=1e-6)
    normals = [torch.distributions.Normal(d.mean.double(), d.std.double()) for d in (one, two)]
    torch.testing.assert_close(
        one.kl(two).double(), torch.distributions.kl_divergence(*normals).sum(1), rtol=1e-5, atol=1e-6
    )
    standard = VectorGaussian(torch.zeros(3, 10))
    assert torch.equal(standard.kl(), torch.zeros(3))


def test_samples_have_the_mean_and_the_deviation_of_the_posterior():
    dist = VectorGaussian(torch.tensor([[2.0, -1.0, 0.0, -2.0]]).repeat(20_000, 1))
    drawn = dist.sample(torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(drawn.mean(0), torch.tensor([2.0, -1.0]).double(), atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.std(0), torch.tensor([0.0, -2.0]).mul(0.5).exp().double(), atol=0.02, rtol=0)


def test_saved_and_loaded(tmp_path):
    vae, x = small(), images(3)
    vae.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    again = VectorVAE.from_pretrained(tmp_path)
    assert dict(again.config)["latent_dim"] == 6 and not again.training
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), again.parameters(), strict=True))
    assert torch.equal(again.encode(x).latent_dist.parameters, vae.encode(x).latent_dist.parameters)
    assert torch.equal(again(x), vae(x))


def test_it_starts_at_principal_components():
    vae, x = small(components=12), images(200)
    start_at_principal_components(vae, x)
    components, outside = analysed(vae, x)
    torch.testing.assert_close(components.mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(components.T.cov(), torch.eye(12), atol=0.02, rtol=0)
    exact = x.flatten(1).double()
    _, singular, directions = torch.linalg.svd(exact - exact.mean(0), full_matrices=False)
    left = float(singular[12:].square().sum() / len(x))
    assert left <= outside <= 1.05 * left
    again = exact.mean(0) + (exact - exact.mean(0)) @ directions[:12].T @ directions[:12]
    gap = (vae.synthesis(components).double() - again).square().mean() / (exact - exact.mean(0)).square().mean()
    assert gap < 0.01
    assert {n for n, p in vae.named_parameters() if not p.requires_grad} == {
        f"{layer}.{what}" for layer in ("analysis", "synthesis") for what in ("weight", "bias")
    }


def test_the_loss_is_that_of_the_pixels():
    vae, x = small(), images(200)
    start_at_principal_components(vae, x)
    components, outside = analysed(vae, x)
    torch.manual_seed(3)
    found = negative_elbo(vae, components, outside)
    torch.manual_seed(3)
    dist = vae.encode(x).latent_dist
    y = vae.decode(dist.sample()).sample
    mse, kl = (y - x).double().square().mean(), dist.kl().double().mean()
    torch.testing.assert_close(found["mse"].double(), mse, rtol=1e-3, atol=0)
    torch.testing.assert_close(found["kl"].double(), kl, rtol=1e-4, atol=0)
    expected = 0.5 * mse.log() + kl / x[0].numel()
    torch.testing.assert_close(found["loss"].double(), expected, rtol=1e-3, atol=1e-4)


def test_it_learns():
    vae, x = small(), images(200)
    start_at_principal_components(vae, x)
    components, outside = analysed(vae, x)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, 3e-3)
    before = float((vae(x) - x).detach().square().mean())
    for _ in range(150):
        negative_elbo(vae, components, outside)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    spread = float((x - x.mean(0)).square().mean())
    assert float((vae(x) - x).detach().square().mean()) < 0.5 * min(before, spread)


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda: small().encode(torch.zeros(2, 3, 9, 9)), r"shape \(2, 3, 9, 9\); this VAE takes \(N, 3, 8, 8\)"),
        (lambda: small().decode(torch.zeros(2, 5)), r"shape \(2, 5\); this VAE takes \(N, 6\)"),
        (lambda: small(latent_dim=0), "latent_dim=0 is no size"),
        (lambda: start_at_principal_components(small(), images(23)), "23 images cannot tell 12 components; pass 24"),
    ],
)
def test_bad_input_gets_a_sentence(act, sentence):
    with pytest.raises(InputError, match=sentence):
        act()
