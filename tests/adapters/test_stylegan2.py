"""StyleGAN2's generator against a restatement of the published equations, and its pipeline."""

import numpy as np
import pytest
import stylegan_by_definition as definition
import torch
from nvlabs import small
from PIL import Image

from diffusers_sae import InputError
from diffusers_sae.adapters.stylegan2 import StyleGAN2Generator
from diffusers_sae.adapters.stylegan2_pipeline import StyleGAN2Pipeline

CONFIGS = [
    {"img_resolution": 4, "conv_clamp": None},
    {"img_resolution": 8, "channel_base": 32, "num_layers": 3},
    {"img_resolution": 16, "w_dim": 10, "c_dim": 3, "img_channels": 1, "layer_features": 7, "embed_features": 5},
    {"img_resolution": 32, "channel_base": 128, "channel_max": 6, "lr_multiplier": 1.0},
    {"img_resolution": 16, "conv_clamp": 0.9},
]


def by_definition(generator, z, c, psi=1.0, cutoff=None, noise=True):
    """Images of a generator's weights by the restatement."""
    weights = {name: tensor.double().numpy() for name, tensor in generator.state_dict().items()}
    config = generator.config

    def noise_of(layer):
        return weights[f"{layer}.noise_const"] if noise else 0.0

    images = []
    for i in range(len(z)):
        label = None if c is None else c[i].double().numpy()
        w = definition.mapped(weights, z[i].double().numpy(), label, config.num_layers, config.lr_multiplier)
        w = definition.truncated(weights, w, generator.num_ws, psi, cutoff)
        images.append(definition.synthesised(weights, w, config.img_resolution, config.conv_clamp, noise_of))
    return np.stack(images)


def inputs(generator, batch=2):
    torch.manual_seed(5)
    c = torch.eye(generator.config.c_dim)[[2, 0][:batch]] if generator.config.c_dim else None
    return torch.randn(batch, generator.config.z_dim), c


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("call", [{}, {"truncation_psi": 0.6, "truncation_cutoff": 1, "noise_mode": "none"}])
@torch.no_grad()
def test_images_are_those_of_the_equations(config, call):
    generator = small(**config)
    z, c = inputs(generator)
    expected = by_definition(
        generator, z, c, call.get("truncation_psi", 1.0), call.get("truncation_cutoff"), "noise_mode" not in call
    )
    assert np.abs(expected).max() > 0.1
    single = generator(z, c, **call).numpy()
    np.testing.assert_allclose(single, expected, atol=1e-4, rtol=1e-4)
    double = generator.double()(z.double(), None if c is None else c.double(), **call).numpy()
    np.testing.assert_allclose(double, expected, atol=1e-7, rtol=1e-6)  # the filter's taps are exact in fp32


@torch.no_grad()
def test_the_clamp_matters_where_it_is_compared():
    generator = small(**CONFIGS[-1])
    z, c = inputs(generator)
    loose = small(**{**CONFIGS[-1], "conv_clamp": None})
    assert (generator(z, c) - loose(z, c)).abs().max() > 0.01


@torch.no_grad()
def test_a_filter_that_is_not_symmetric_is_convolved():
    """The filter of a file counts, and it is a convolution, not a correlation."""
    generator = small(img_resolution=8)
    lopsided = torch.tensor([[1.0, 2, 0, 0], [0, 3, 0, 1], [0, 0, 4, 0], [5, 0, 0, 0]]) / 16
    for name, buffer in generator.named_buffers():
        if name.endswith("resample_filter"):
            buffer.copy_(lopsided)
    z, c = inputs(generator)
    before, definition.FILTER = definition.FILTER, lopsided.double().numpy()
    try:
        expected = by_definition(generator, z, c)
    finally:
        definition.FILTER = before
    np.testing.assert_allclose(generator(z, c).numpy(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_noise_modes():
    generator = small()
    z, _ = inputs(generator)
    none, const = generator(z, noise_mode="none"), generator(z)
    drawn = [generator(z, noise_mode="random", generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(none, const)
    for layer in generator.modules():
        if hasattr(layer, "noise_const"):
            layer.noise_const.zero_()
    assert torch.equal(generator(z), none)


@torch.no_grad()
def test_truncation_of_nothing_and_of_all():
    generator = small()
    z, _ = inputs(generator)
    assert torch.equal(generator.mapping(z, truncation_psi=1), generator.mapping(z))
    average = generator.mapping(z, truncation_psi=0)
    assert torch.equal(average, generator.w_avg.expand_as(average))
    part = generator.mapping(z, truncation_psi=0, truncation_cutoff=2)
    assert torch.equal(part[:, 2:], generator.mapping(z)[:, 2:])
    assert torch.equal(part[:, :2], average[:, :2])
    assert torch.equal(generator.mapping(z, truncation_psi=0.3, truncation_cutoff=0), generator.mapping(z))


def pipeline(**config):
    return StyleGAN2Pipeline(small(**config))


def test_seeds_are_those_of_numpy():
    pipe = pipeline()
    z = torch.from_numpy(np.stack([np.random.RandomState(s).randn(12) for s in (7, 8)])).float()
    by_seed = pipe(seeds=[7, 8], output_type="pt").images
    assert torch.equal(by_seed, pipe(latents=z, output_type="pt").images)
    assert torch.allclose(by_seed[1:], pipe(seeds=[8], output_type="pt").images, atol=1e-5)


def test_w_instead_of_latents():
    pipe = pipeline()
    z, _ = inputs(pipe.generator)
    expected = pipe(latents=z, truncation_psi=0.4, output_type="pt").images
    w = pipe.generator.mapping(z, truncation_psi=0.4)
    assert torch.equal(pipe(w=w, output_type="pt").images, expected)
    assert torch.equal(pipe(w=w[:, 0], output_type="pt").images, expected)
    average = pipe(w=pipe.generator.w_avg, output_type="pt").images
    assert torch.equal(average, pipe(seeds=[1], truncation_psi=0, output_type="pt").images)


def test_output_types_and_batches():
    pipe = pipeline()
    drawn = [pipe(3, generator=torch.Generator().manual_seed(1), output_type=t).images for t in ("pt", "np", "pil")]
    assert drawn[0].shape == (3, 3, 16, 16) and drawn[1].shape == (3, 16, 16, 3)
    assert np.allclose(drawn[0].permute(0, 2, 3, 1).numpy(), drawn[1])
    assert len(drawn[2]) == 3 and isinstance(drawn[2][0], Image.Image) and drawn[2][0].size == (16, 16)
    assert isinstance(pipe(seeds=[1], return_dict=False), tuple)


def test_classes():
    pipe = pipeline(c_dim=3)
    one, other = (pipe(seeds=[1], class_labels=c, output_type="pt").images for c in (0, 2))
    assert not torch.equal(one, other)
    both = pipe(seeds=[1, 1], class_labels=[0, 2], output_type="pt").images
    assert torch.allclose(both, torch.cat([one, other]), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "call", "sentence"),
    [
        ({}, {"noise_mode": "off"}, "noise_mode='off' is unknown; choose one of const, random, none"),
        ({}, {"output_type": "latent"}, "output_type='latent' is unknown"),
        ({}, {"seeds": [1], "batch_size": 2}, "batch_size=2 does not fit seeds for 1 images"),
        ({}, {"batch_size": 0}, "batch_size=0 makes no image"),
        ({}, {"seeds": [1], "w": torch.zeros(16)}, "seeds and w were passed; pass one"),
        ({}, {"seeds": []}, "seeds=\\[\\] are no whole numbers"),
        ({}, {"seeds": [-1]}, "are no whole numbers"),
        ({}, {"latents": torch.zeros(2, 13)}, "latents must be a tensor \\(images, 12\\), not \\(2, 13\\)"),
        ({}, {"latents": [1.0]}, "not list"),
        ({}, {"w": torch.zeros(1, 3, 16)}, "w must be a tensor"),
        ({}, {"truncation_psi": float("nan")}, "truncation_psi=nan is no number"),
        ({}, {"truncation_cutoff": 9}, "truncation_cutoff=9 is out of range; this generator has 0 to 6"),
        ({}, {"class_labels": 1}, "has no classes"),
        ({"c_dim": 3}, {"seeds": [1]}, "needs a class from 0 to 2"),
        ({"c_dim": 3}, {"class_labels": [0, 1]}, "or one for each of the 1."),
        ({"c_dim": 3}, {"class_labels": 3}, "class_labels=3 does not fit"),
    ],
)
def test_bad_calls_get_a_sentence(config, call, sentence):
    with pytest.raises(InputError, match=sentence):
        pipeline(**config)(**call)


def test_the_size_that_was_published():
    """StyleGAN2 of 1024 x 1024 pixels (config F) has 30,370,060 trainable numbers in NVlabs' own count."""
    with torch.device("meta"):
        generator = StyleGAN2Generator()
    assert sum(parameter.numel() for parameter in generator.parameters()) == 30_370_060
    assert generator.num_ws == 18


def test_a_resolution_that_is_no_power_of_2():
    with pytest.raises(InputError, match="img_resolution=24 is no power of 2"):
        StyleGAN2Generator(img_resolution=24)
