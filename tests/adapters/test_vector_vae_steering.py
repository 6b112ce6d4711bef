"""SAEs at the latent of a VAE: one row an image, and the decoder gets what the formula says."""

import numpy as np
import pytest
import torch
from conftest import random_sae
from PIL import Image
from test_vector_vae import small

from diffusers_sae import Directions, InputError, ReLUSAE, SAESteeringPipeline, Site, TopKSAE
from diffusers_sae.adapters.image_embeds import transferred, turned
from diffusers_sae.adapters.vector_vae_pipeline import VectorVAEPipeline
from diffusers_sae.features.sweeps import sweep

WIDTH = 6
LATENTS = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(7))
CALL = {"latents": LATENTS, "output_type": "pt"}


def loaded():
    bare = VectorVAEPipeline(small())
    pipe = SAESteeringPipeline.from_pipe(bare)
    torch.manual_seed(1)
    sae = random_sae(WIDTH, site={"path": "latent"})
    pipe.load_sae(sae, adapter_name="latent")
    return bare, pipe, sae


def latent_of(pipe, **call):
    with pipe.capture(["latent"]) as activations:
        images = pipe(**{**CALL, **call}).images
    return activations["latent"].rows()[:, 0], images


def test_a_plan_that_changes_nothing_changes_no_bit():
    bare, pipe, _ = loaded()
    plain = bare(**CALL).images
    assert torch.equal(pipe(**CALL).images, plain)
    pipe.steer({3: 0.0, 4: 0.0})
    assert torch.equal(pipe(**CALL).images, plain)
    pipe.reset_steering()
    pipe.steer({3: 1.0}, mode="scale")
    assert torch.equal(pipe(**CALL).images, plain)
    pipe.reset_steering()
    pipe.steer({3: 9.0})
    assert not torch.equal(pipe(**CALL).images, plain)
    assert torch.equal(bare(**CALL).images, plain)
    pipe.unload_sae()
    assert torch.equal(pipe(**CALL).images, plain)


@pytest.mark.parametrize(
    ("mode", "strength"), [("add", 9.0), ("set", 2.0), ("scale", 3.0), ("ablate", 1.0), ("cap", 0.1)]
)
@pytest.mark.parametrize("kind", ["TopK", "tied ReLU"])
def test_every_mode_moves_the_latent_by_the_formula(kind, mode, strength):
    bare, pipe, sae = loaded()
    if kind == "tied ReLU":
        pipe.unload_sae()
        sae = ReLUSAE(WIDTH, 32, tied=True).eval()
        pipe.load_sae(sae, site="latent")
    z = sae.encode(LATENTS).detach()
    feature = int(z.mean(0).argmax())
    edited, at = z.clone(), z[:, feature]
    edited[:, feature] = {
        "add": at + strength,
        "set": torch.full_like(at, strength),
        "scale": strength * at,
        "ablate": 0 * at,
        "cap": at.clamp(max=strength),
    }[mode]
    pipe.steer({feature: strength}, mode=mode)
    steered, images = latent_of(pipe)
    expected = LATENTS + sae.decode(edited) - sae.decode(z)
    torch.testing.assert_close(steered, expected.detach(), atol=1e-5, rtol=1e-5)
    assert not torch.equal(steered, LATENTS)
    assert torch.equal(images, bare(latents=steered, output_type="pt").images)
    assert torch.equal(turned(sae, LATENTS, {feature: strength}, mode), steered)


def test_a_strength_for_each_image_and_two_saes():
    _, pipe, sae = loaded()
    pipe.load_sae(Directions.of(torch.eye(WIDTH)[:2]), site="latent", adapter_name="axes")
    pipe.steer({3: [0.0, 4.0, -4.0]}, adapter_name="latent")
    pipe.steer({1: 0.5}, adapter_name="axes")
    steered, _ = latent_of(pipe)
    expected = LATENTS + torch.tensor([0.0, 4.0, -4.0])[:, None] * sae.W_dec[3] + 0.5 * torch.eye(WIDTH)[1]
    torch.testing.assert_close(steered, expected, atol=1e-5, rtol=1e-5)


def test_images_given_are_encoded_and_edited():
    bare, pipe, _ = loaded()
    x = torch.rand(2, 3, 8, 8)
    z = bare.autoencoder.encode(2 * x - 1).latent_dist.mean
    torch.testing.assert_close(bare.encode(x), z)
    torch.testing.assert_close(latent_of(pipe, image=x, latents=None)[0], z)
    pixels = (x * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pils = [Image.fromarray(one) for one in pixels]
    torch.testing.assert_close(bare.encode(pils), bare.encode(pixels.astype(np.float32) / 255))
    assert bare(image=pils[0].resize((20, 14))).images[0].size == (8, 8)
    pipe.steer({3: 9.0})
    assert not torch.equal(pipe(image=x, output_type="pt").images, bare(image=x, output_type="pt").images)


def test_numbers_of_images_mean_what_their_type_says():
    bare, _, _ = loaded()
    levels = np.arange(192, dtype=np.uint16).reshape(8, 8, 3)
    expected = bare.encode(levels.astype(np.float32) / 255)
    for image in (
        levels.astype(np.uint8),
        257 * levels,
        [levels.astype(np.uint8)],
        torch.from_numpy(levels.astype(np.uint8)).permute(2, 0, 1),
        Image.fromarray(levels.astype(np.uint8)),
    ):
        torch.testing.assert_close(bare.encode(image), expected)
    grey = levels[..., 0]
    deep, plain = Image.fromarray(257 * grey), Image.fromarray(grey.astype(np.uint8))
    assert deep.mode == "I;16"
    torch.testing.assert_close(bare.encode(deep), bare.encode(plain))


def test_drawn_latents_follow_the_generator():
    bare, _, _ = loaded()
    one, two, other = (
        bare(batch_size=2, generator=torch.manual_seed(seed), output_type="pt").images for seed in (0, 0, 1)
    )
    assert one.shape == (2, 3, 8, 8) and torch.equal(one, two) and not torch.equal(one, other)


def test_units_recipes_files_and_sweeps(tmp_path):
    bare, pipe, sae = loaded()
    pipe.steer({3: 9.0})
    expected = pipe(**CALL).images
    pipe.save_recipe(tmp_path / "recipe.json")
    pipe.save_pretrained(tmp_path / "pipe")
    sae.save_pretrained(tmp_path / "sae")
    assert type(VectorVAEPipeline.from_pretrained(tmp_path / "pipe")) is VectorVAEPipeline
    again = SAESteeringPipeline.from_pretrained(tmp_path / "pipe")
    assert isinstance(again, VectorVAEPipeline)
    assert torch.equal(again(**CALL).images, bare(**CALL).images)
    again.load_sae(tmp_path / "sae", adapter_name="latent")
    again.load_recipe(tmp_path / "recipe.json")
    assert torch.equal(again(**CALL).images, expected)
    pipe.reset_steering()
    swept = sweep(pipe, 3, [0.0, 9.0], **CALL)
    assert torch.equal(torch.stack([row[0] for row in swept]), bare(**CALL).images)
    assert torch.equal(torch.stack([row[1] for row in swept]), expected)


def test_interpolating_in_the_code_is_a_straight_line_between_reconstructions():
    _, _, sae = loaded()
    source, target = LATENTS[:1], LATENTS[1:2]
    z, w = sae.encode(source), sae.encode(target)
    line = torch.lerp(sae.decode(z), sae.decode(w), 0.3)
    torch.testing.assert_close(sae.decode(torch.lerp(z, w, 0.3)), line)
    kept = transferred(sae, source, target, share=0.3)
    torch.testing.assert_close(kept, (line + source - sae.decode(z)).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"start": 0.5}, "autoencoder.latent runs once, as nothing is denoised, so that start and stop mean nothing"),
        ({"mask": torch.ones(4, 4)}, "autoencoder.latent has one row an image and no places; leave mask= out"),
        ({"mode": "replace"}, "one row an image and no places"),
        ({"tokens": [0]}, "autoencoder.latent is none; leave them out"),
        ({"features": {32: 1.0}}, "0 to 31"),
    ],
)
def test_bad_edits_get_a_sentence(arguments, sentence):
    bare, pipe, _ = loaded()
    with pytest.raises(InputError, match=sentence):
        pipe.steer(**{"features": {3: 1.0}, **arguments})
    assert torch.equal(pipe(**CALL).images, bare(**CALL).images)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"latents": torch.zeros(2, 5)}, r"latents must be a tensor \(6,\) or \(images, 6\), not a tensor \(2, 5\)"),
        ({"latents": [1.0]}, "not a list"),
        ({"latents": torch.full((1, 6), torch.nan)}, "not finite"),
        ({"image": "cat.png"}, "image is a str; pass a PIL image"),
        ({"image": []}, "image is a list; pass a PIL image"),
        ({"image": torch.full((1, 3, 8, 8), torch.nan)}, "(or NaN)"),
        ({"image": torch.full((1, 3, 8, 8), -1.0)}, "outside 0 to 1"),
        ({"image": np.full((8, 8, 3), 255, np.int32)}, "of type int32"),
        ({"image": Image.new("RGBA", (8, 8))}, "transparent places"),
        ({"image": torch.zeros(1, 1, 8, 8)}, r"this VAE takes \(N, 3, 8, 8\)"),
        ({"image": torch.zeros(1, 3, 8, 8), "latents": LATENTS}, "image and latents were passed; pass one"),
        ({"batch_size": 0}, "batch_size=0 makes no image"),
        ({"output_type": "jpg"}, "output_type='jpg' is unknown"),
    ],
)
def test_bad_calls_get_a_sentence(arguments, sentence):
    bare, _, _ = loaded()
    with pytest.raises(InputError, match=sentence):
        bare(**arguments)


def test_sites_and_widths_that_are_not_there():
    _, pipe, _ = loaded()
    assert Site("latent") == Site("autoencoder.latent")
    with pytest.raises(InputError, match="a path starts with autoencoder"):
        pipe.load_sae(TopKSAE(6, 32, 4), site="unet.mid_block")
    with pytest.raises(InputError, match="width 12 and autoencoder.latent has 6"):
        pipe.load_sae(TopKSAE(12, 32, 4), site="latent")
