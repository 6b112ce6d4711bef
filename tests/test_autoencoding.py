"""Images to latents: the encoder's own, and those that the decoder's inversion brings nearer to the image."""

import pytest
import torch
from conftest import Harness

from diffusers_sae.autoencoding import encoded
from diffusers_sae.demo.shipped import load_pipeline

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["Stable Diffusion", "Stable Diffusion 3"])
def pipe(request):
    return Harness(request.param).bare


def decoded(pipe, latents):
    config = pipe.vae.config
    with torch.no_grad():
        return pipe.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0.0)).sample / 2 + 0.5


def errors(pipe, images, iterations):
    return (decoded(pipe, encoded(pipe, images, iterations)) - images).square().mean((1, 2, 3))


def test_without_iterations_latents_are_the_encoders(pipe):
    config = pipe.vae.config
    mode = pipe.vae.encode(2 * IMAGES - 1).latent_dist.mode()
    assert torch.equal(encoded(pipe, IMAGES), (mode - (config.shift_factor or 0.0)) * config.scaling_factor)


def test_iterations_bring_every_image_nearer(pipe):
    first, some, more = (errors(pipe, IMAGES, n) for n in (0, 5, 40))
    assert (some < first).all() and (more < some).all()


def test_more_of_a_drawing_comes_back_from_the_embedded_model():
    pipe = load_pipeline()
    image = torch.nn.functional.interpolate(IMAGES[:1], 64, mode="bilinear")
    before, after = (-10 * errors(pipe, image, n).log10() for n in (0, 10))
    assert after - before > 1


def test_an_image_has_the_latents_that_it_has_alone(pipe):
    torch.testing.assert_close(encoded(pipe, IMAGES, 3)[1:], encoded(pipe, IMAGES[1:], 3), rtol=1e-4, atol=1e-4)


def test_the_autoencoder_stays_as_it_was(pipe):
    pipe.vae.to(torch.float16)
    before = {name: tensor.clone() for name, tensor in pipe.vae.state_dict().items()}
    encoded(pipe, IMAGES, 2)
    for name, tensor in pipe.vae.state_dict().items():
        assert tensor.dtype == torch.float16 and torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in pipe.vae.parameters())


def test_half_precision_is_inverted_in_float32(pipe):
    pipe.vae.to(torch.float16)
    found = encoded(pipe, IMAGES, 3)
    pipe.vae.to(torch.float32)  # the same weights
    assert torch.equal(found, encoded(pipe, IMAGES, 3))
