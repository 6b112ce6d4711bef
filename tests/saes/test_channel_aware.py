"""The channel-aware SAE against equations 6 to 9 of Ijishakin et al. (2024) in float64, and h-space edits with it."""

import json
import warnings

import numpy as np
import pytest
import torch

from diffusers_sae import InputError
from diffusers_sae.loaders import load_sae
from diffusers_sae.saes import ChannelAwareSAE
from diffusers_sae.sites import Site
from diffusers_sae.training import SAETrainer, TrainingConfig, train_on_store

SITE = Site("unet.mid_block", layout="channels")
CHANNELS, MAP, LATENTS, IMAGES = 16, 16, 24, 5
"""Of the tiny pipeline's bottleneck, which is 16 x 4 x 4."""


def random_sae(k=None, d_in=MAP, channels=CHANNELS, **arguments):
    """Random weights in every tensor, so that no term of the formulas is zero."""
    sae = ChannelAwareSAE(
        d_in, LATENTS, channels, images=IMAGES, width=7, k=k, provenance={"site": SITE.as_dict()}, **arguments
    )
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in sae.state_dict().values():
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    return sae.eval()


def by_definition(sae, x, images=None):
    """Codes of `x (images, M, d)` as the paper writes them: two numbers are appended to each channel's map."""
    p = {name: tensor.double().numpy() for name, tensor in sae.state_dict().items()}
    w_eta = np.concatenate([p["W_enc"], p["W_index"]], 1)  # (n, d + 2)
    b_e = p["b_enc"] - p["W_enc"] @ p["b_dec"]
    found = np.zeros((*x.shape[:2], sae.n_latents))
    for n, image in enumerate(x.double().numpy()):
        for m, h in enumerate(image):
            at = np.array([(2 * m + 1) / sae.channels - 1, 0 if images is None else (2 * images[n] + 1) / IMAGES - 1])
            hidden = np.tanh(p["zeta.0.weight"] @ at + p["zeta.0.bias"])
            rho_mu = p["zeta.2.weight"] @ hidden + p["zeta.2.bias"]
            found[n, m] = np.maximum(w_eta @ np.concatenate([h, rho_mu]) + b_e, 0)
        if sae.k is not None:
            tau = min(np.sort(alpha)[-sae.k] for alpha in found[n])
            found[n][found[n] < tau] = 0
    return found


def maps(images=3, channels=CHANNELS, d=MAP):
    return torch.randn(images, channels, d, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("k", [None, 1, 3])
@pytest.mark.parametrize("told", [None, [4, 0, 2]])
def test_codes_and_reconstructions_equal_the_paper(k, told):
    sae, x = random_sae(k), maps()
    z = by_definition(sae, x, told)
    assert 0 < (z != 0).mean() < (1 if k is None else 0.5)
    decoded = z @ sae.W_dec.detach().double().numpy() + sae.b_dec.detach().double().numpy()
    some = torch.tensor([23, 0, 7, 7])
    with torch.no_grad(), sae.of_images(torch.tensor(told if told else [2, 2, 2])):  # 2 is the middle of 5
        np.testing.assert_allclose(sae.encode(x), z, atol=1e-5)
        np.testing.assert_allclose(sae.decode(sae.encode(x)), decoded, atol=1e-5)
        np.testing.assert_allclose(sae.decode_sparse(sae.encode_sparse(x)), decoded, atol=1e-5)
        np.testing.assert_allclose(sae(x), decoded, atol=1e-5)
        np.testing.assert_allclose(sae.encode_only(x, some), z[..., some], atol=1e-5)


def test_an_image_without_a_number_is_in_the_middle():
    sae, x = random_sae(2), maps()
    np.testing.assert_allclose(sae.encode(x).detach(), by_definition(sae, x), atol=1e-5)


def test_the_channel_matters_and_images_do_not_mix():
    sae, x = random_sae(2), maps()
    assert not torch.allclose(sae.encode(x.flip(1)), sae.encode(x).flip(1))
    torch.testing.assert_close(sae.encode(x)[1], sae.encode(x[1]))
    torch.testing.assert_close(sae.encode(x.flatten(0, 1)), sae.encode(x).flatten(0, 1))
    torch.testing.assert_close(sae.encode(x[:, None]), sae.encode(x)[:, None])


def test_each_channel_keeps_k_latents_at_least_and_a_higher_k_keeps_more():
    sae, x = random_sae(), maps()
    dense = (sae.encode(x) > 0).sum(-1)
    kept = [(sae.thresholded_(k).encode(x) > 0).sum(-1) for k in (1, 3)]
    assert (kept[0] <= kept[1]).all() and (kept[1] <= dense).all() and (kept[0] < dense).any()
    assert all((seen >= dense.clamp(max=k)).all() for k, seen in zip((1, 3), kept, strict=True))


@pytest.mark.parametrize("factor", [0.01, 3.0])
@pytest.mark.parametrize("k", [None, 2])
def test_an_sae_of_scaled_maps(factor, k):
    sae, x = random_sae(k), maps()
    z, x_hat = sae.encode(x), sae(x)
    sae.scale_input_(factor)
    torch.testing.assert_close(sae.encode(factor * x), factor * z)
    torch.testing.assert_close(sae(factor * x), factor * x_hat)


def test_saved_and_loaded_bit_by_bit(tmp_path):
    sae, x = random_sae().thresholded_(2), maps()
    sae.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["k"] == 2
    for again in (ChannelAwareSAE.from_pretrained(tmp_path), load_sae(tmp_path)):
        assert type(again) is ChannelAwareSAE and again.provenance == sae.provenance and again.k == 2
        assert torch.equal(again.encode(x), sae.encode(x))


def test_bad_input_is_said_in_one_sentence():
    sae = random_sae(2)
    with pytest.raises(InputError, match=r"takes all 16 channels of each image and got 17 rows; pass \(images"):
        sae.encode(torch.zeros(17, MAP))
    with (
        pytest.raises(InputError, match="told 2 images and there are 3; tell all"),
        sae.of_images(torch.tensor([0, 1])),
    ):
        sae.encode(maps())
    for k in (0, LATENTS + 1):
        with pytest.raises(InputError, match="must lie between 1 and n_latents"):
            sae.thresholded_(k)


def test_the_loss_is_that_of_equation_8_over_the_variance():
    from diffusers_sae.training.objectives import objective

    sae, x = random_sae(), maps()
    z = by_definition(sae, x)
    x_hat = z @ sae.W_dec.detach().double().numpy() + sae.b_dec.detach().double().numpy()
    rows = x.flatten(0, 1).double().numpy()
    loss = np.square(x_hat.reshape(rows.shape) - rows).sum(-1).mean() + 0.3 * z.sum(-1).mean()
    variance = np.square(rows - rows.mean(0)).sum(-1).mean()
    found = objective(sae, x.flatten(0, 1), None, 0.3, 0.1)
    np.testing.assert_allclose(found.loss.item(), loss / variance, rtol=1e-5)


def test_training_learns_the_maps_and_what_tells_channels_apart():
    """Maps that are told apart by nothing but their channel: the first half hold feature 0, the others feature 1."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    half = (torch.arange(CHANNELS) >= CHANNELS // 2).long()
    directions = torch.nn.functional.normalize(torch.randn(2, MAP, generator=generator), dim=-1)

    def batch(images):
        amounts = 0.5 + torch.rand(images, CHANNELS, 1, generator=generator)
        return amounts * directions[half] + 0.01 * torch.randn(images, CHANNELS, MAP, generator=generator)

    sae = ChannelAwareSAE(MAP, LATENTS, CHANNELS, images=64)
    before = sae.W_index.detach().clone()
    config = TrainingConfig(steps=300, batch_size=8 * CHANNELS, lr=5e-3, sparsity=0.1)
    trainer = SAETrainer(sae.train(), config, batch(64).flatten(0, 1))
    for _ in range(config.steps):
        with sae.of_images(torch.randint(64, (8,), generator=generator)):
            trainer.step(batch(8).flatten(0, 1))
    x = batch(32)
    with torch.no_grad():
        x_hat = trainer.finish()(x)
    assert (x - x_hat).square().sum() < 0.02 * (x - x.mean((0, 1))).square().sum()
    assert not torch.equal(sae.W_index, before)


def test_a_store_whose_rows_are_shuffled_is_refused(sd, tmp_path):
    from diffusers_sae.capture import StoreConfig, store_activations

    stores = store_activations(sd.pipe, [SITE], ["a"], tmp_path, StoreConfig(1, 1), height=16, width=16)
    with pytest.raises(InputError, match="ChannelAwareSAE takes its rows in order"):
        train_on_store(
            stores[SITE.path], lambda d: random_sae(d_in=d), tmp_path / "out", TrainingConfig(steps=1, batch_size=8)
        )


def captured(sd):
    with sd.pipe.capture([SITE]) as activations:
        image = sd.run()
    return image, activations[SITE.path].rows("cond", timestep=activations[SITE.path].timestep.max().item())


@pytest.mark.parametrize("mode", ["add", "scale", "ablate", "set"])
@pytest.mark.parametrize("channels", [None, [3, 5]])
def test_edits_follow_the_formula_in_all_channels_or_in_some(sd, mode, channels):
    bare, x = captured(sd)
    sae = random_sae(2, d_in=x.shape[-1], channels=x.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.pipe.load_sae(sae)
    assert torch.equal(sd.run(), bare)
    z = by_definition(sae, x)
    j = int(z.mean((0, 1)).argmax())
    sd.pipe.steer({j: 2.0}, mode=mode, tokens=channels)
    found = captured(sd)[1]
    after = {"add": z[..., j] + 2, "scale": 2 * z[..., j], "ablate": -z[..., j], "set": 0 * z[..., j] + 2}[mode]
    change = (after - z[..., j])[..., None] * sae.W_dec[j].detach().double().numpy()
    change[:, [c for c in range(x.shape[1]) if channels is not None and c not in channels]] = 0
    np.testing.assert_allclose(found, x.double().numpy() + change, atol=5e-5)
    if channels is not None:
        others = [c for c in range(x.shape[1]) if c not in channels]
        assert torch.equal(found[:, others], x[:, others])
