"""Images to latents: the encoder's own, and those that the decoder's inversion brings nearer to the image."""

import copy

import pytest
import torch
from conftest import Harness
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline
from tiny import tiny_unet

from diffusers_sae import InputError, invert
from diffusers_sae.autoencoding import encode_images, observe_decoder_input
from diffusers_sae.demo.shipped import load_pipeline

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
MEAN, STD = [-1.6574, 1.5322, 1.2317, -2.0108], [8.4927, 5.9022, 5.3132, 8.5278]
"""`latents_mean` and `latents_std` of channels, such as Playground 2.5's autoencoder has."""


@pytest.fixture(params=["Stable Diffusion", "Stable Diffusion 3"])
def pipe(request):
    return Harness(request.param).bare


def decoded(pipe, latents):
    config = pipe.vae.config
    with torch.no_grad():
        return pipe.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0.0)).sample / 2 + 0.5


class Unmoved(DDIMScheduler):
    """Its steps leave latents as they are."""

    def step(self, model_output, timestep, sample, eta=0.0, generator=None, return_dict=False):
        return (sample,)


def decoded_by_pipeline(pipe, latents):
    """The images `(N, 3, H, W)` that the pipeline makes of latents."""
    twin = copy.copy(pipe)
    twin.register_modules(scheduler=Unmoved())
    call = {"height": IMAGES.shape[-2], "width": IMAGES.shape[-1], "num_inference_steps": 1, "guidance_scale": 1.0}
    return twin(["a"] * len(latents), latents=latents, output_type="pt", **call).images.float()


def psnr(images, others):
    return float(-10 * (images.float() - others.float()).square().mean().log10())


def errors(pipe, images, iterations):
    return (decoded(pipe, encode_images(pipe, images, iterations)) - images).square().mean((1, 2, 3))


def test_without_iterations_latents_are_the_encoders(pipe):
    config = pipe.vae.config
    mode = pipe.vae.encode(2 * IMAGES - 1).latent_dist.mode()
    expected = (mode - (config.shift_factor or 0.0)) * config.scaling_factor
    torch.testing.assert_close(encode_images(pipe, IMAGES), expected, rtol=1e-6, atol=1e-6)


CONFIGS = {
    "scaled": {"scaling_factor": 0.13},
    "shifted": {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "statistics": {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.5},
    "mean alone": {"latents_mean": MEAN, "scaling_factor": 0.5},
}
"""Of autoencoders, whichever of them a pipeline attends to."""


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Stable Diffusion", "Stable Diffusion 2.1", "SDXL", "Stable Diffusion 3"])
def test_the_pipeline_decodes_what_was_encoded_whatever_it_does_to_latents(kind, dtype, config):
    pipe = Harness(kind).bare
    channels = pipe.vae.config.latent_channels
    pipe.vae.register_to_config(**{"shift_factor": 0.0, **CONFIGS[config]})
    if channels != len(MEAN):
        pipe.vae.register_to_config(latents_mean=None, latents_std=None)
    pipe.to(dtype)
    latents = encode_images(pipe, IMAGES)
    assert latents.dtype == dtype
    found = decoded_by_pipeline(pipe, latents)
    with torch.no_grad():
        mode = pipe.vae.encode((2 * IMAGES - 1).to(dtype)).latent_dist.mode()
        expected = (pipe.vae.decode(mode).sample / 2 + 0.5).clamp(0, 1)
    assert psnr(found, expected) > (100 if dtype == torch.float32 else 30)


def test_statistics_are_those_of_each_channel():
    pipe = Harness("SDXL").bare
    plain = encode_images(pipe, IMAGES) / pipe.vae.config.scaling_factor
    pipe.vae.register_to_config(latents_mean=MEAN, latents_std=STD, scaling_factor=0.5)
    expected = (plain - torch.tensor(MEAN).view(1, 4, 1, 1)) * 0.5 / torch.tensor(STD).view(1, 4, 1, 1)
    torch.testing.assert_close(encode_images(pipe, IMAGES), expected, rtol=1e-5, atol=1e-5)
    near, far = (psnr(decoded_by_pipeline(pipe, encode_images(pipe, IMAGES, n)), IMAGES) for n in (20, 0))
    assert near > far + 0.1


def tiny_autoencoder(channels=4):
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        upsampling_scaling_factor=2,
        latent_channels=channels,
    ).eval()


@pytest.mark.parametrize("kind", ["Stable Diffusion", "SDXL", "Stable Diffusion 3"])
def test_an_autoencoder_without_a_distribution(kind):
    pipe = Harness(kind).bare
    vae = tiny_autoencoder(pipe.vae.config.latent_channels)
    pipe.register_modules(vae=vae)
    with torch.no_grad():
        alone = (vae.decode(vae.encode(2 * IMAGES - 1).latents).sample / 2 + 0.5).clamp(0, 1)
    assert psnr(decoded_by_pipeline(pipe, encode_images(pipe, IMAGES)), alone) > 90
    near, far = (psnr(decoded_by_pipeline(pipe, encode_images(pipe, IMAGES, n)), IMAGES) for n in (20, 0))
    assert near > far


def test_tiles_and_slices_are_those_of_the_pipeline(pipe):
    whole = encode_images(pipe, IMAGES)
    pipe.vae.enable_slicing()
    torch.testing.assert_close(encode_images(pipe, IMAGES), whole)
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 8, 4
    tiled = encode_images(pipe, IMAGES)
    assert tiled.shape == whole.shape and not torch.allclose(tiled, whole)


def test_fp16_that_the_pipeline_decodes_in_fp32_is_encoded_in_fp32():
    pipe = Harness("SDXL").bare
    pipe.vae.to(torch.float16).to(torch.float32)  # weights that fp16 holds
    pipe.unet.to(torch.float32)
    expected = encode_images(pipe, IMAGES)
    pipe.vae.to(torch.float16)
    assert pipe.vae.config.force_upcast and observe_decoder_input(pipe, 16, 16).dtype == torch.float32
    assert torch.equal(encode_images(pipe, IMAGES), expected) and pipe.vae.dtype == torch.float16
    pipe.vae.register_to_config(force_upcast=False)
    assert observe_decoder_input(pipe, 16, 16).dtype == torch.float16


def test_nothing_but_the_decoders_input_is_computed(pipe):
    called = []
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module) and name != "vae":
            module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    before, scheduler, state = dict(pipe.config), pipe.scheduler, torch.get_rng_state()
    observe_decoder_input(pipe, 16, 16)
    assert not called
    assert dict(pipe.config) == before and pipe.scheduler is scheduler and torch.equal(torch.get_rng_state(), state)


class Flipped(StableDiffusionPipeline):
    """Latents come to the decoder upside down."""

    def prepare_latents(self, *args, **kwargs):
        return super().prepare_latents(*args, **kwargs).flip(-2)


class Doubled(StableDiffusionPipeline):
    """Latents come to the decoder as twice what was passed."""

    def prepare_latents(self, *args, **kwargs):
        return 2 * super().prepare_latents(*args, **kwargs)


class WithoutLatents(AutoencoderKL):
    """Encodes to a plain tensor, as no autoencoder of diffusers' pipelines does."""

    def encode(self, images):
        return super().encode(images).latent_dist.mode()


def test_a_pipeline_that_does_more_to_latents_is_refused():
    pipe = Harness().bare
    pipe.__class__ = Flipped
    with pytest.raises(InputError, match="does more to latents before it decodes them"):
        encode_images(pipe, IMAGES)
    pipe.__class__ = Doubled
    with pytest.raises(InputError, match="changes the latents that it is given"):
        invert(pipe, IMAGES, "ab", num_inference_steps=3)


def test_an_autoencoder_without_latents_is_refused():
    pipe = Harness().bare
    pipe.vae.__class__ = WithoutLatents
    with pytest.raises(InputError, match="pass a pipeline with an AutoencoderKL or an AutoencoderTiny"):
        encode_images(pipe, IMAGES)


def test_a_denoiser_of_more_than_latents_is_refused():
    pipe = Harness().bare
    pipe.register_modules(unet=tiny_unet(in_channels=9))
    with pytest.raises(InputError, match="4 channels and the denoiser takes 9"):
        encode_images(pipe, IMAGES)


def test_iterations_bring_every_image_nearer(pipe):
    first, some, more = (errors(pipe, IMAGES, n) for n in (0, 5, 40))
    assert (some < first).all() and (more < some).all()


def test_more_of_a_drawing_comes_back_from_the_embedded_model():
    pipe = load_pipeline()
    image = torch.nn.functional.interpolate(IMAGES[:1], 64, mode="bilinear")
    before, after = (-10 * errors(pipe, image, n).log10() for n in (0, 10))
    assert after - before > 1


def test_an_image_has_the_latents_that_it_has_alone(pipe):
    torch.testing.assert_close(
        encode_images(pipe, IMAGES, 3)[1:], encode_images(pipe, IMAGES[1:], 3), rtol=1e-4, atol=1e-4
    )


def test_the_autoencoder_stays_as_it_was(pipe):
    pipe.vae.to(torch.float16)
    before = {name: tensor.clone() for name, tensor in pipe.vae.state_dict().items()}
    encode_images(pipe, IMAGES, 2)
    for name, tensor in pipe.vae.state_dict().items():
        assert tensor.dtype == torch.float16 and torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in pipe.vae.parameters())


def test_half_precision_is_inverted_in_float32(pipe):
    pipe.vae.to(torch.float16)
    found = encode_images(pipe, IMAGES, 3)
    pipe.vae.to(torch.float32)  # the same weights
    assert torch.equal(found, encode_images(pipe, IMAGES, 3))
