"""SAEs of w: rows that are drawn, and one that trains, is measured and acts."""

import pytest
import torch
from nvlabs import small

from diffusers_sae import InputError, SAESteeringPipeline, Site, TopKSAE
from diffusers_sae.adapters.stylegan2_pipeline import StyleGAN2Pipeline
from diffusers_sae.adapters.stylegan2_training import SITE, measured_on_w, sampled_w, train_on_w
from diffusers_sae.features.ranking import most_active
from diffusers_sae.training import TrainingConfig


def test_rows_are_what_the_pipeline_uses_and_new_each_time():
    generator = small()
    batches = sampled_w(generator, 4, seed=3)
    one, two = next(batches), next(batches)
    assert one.shape == (4, 16) and not torch.equal(one, two)
    assert torch.equal(next(sampled_w(generator, 4, seed=3)), one)
    z = torch.randn(4, 12, generator=torch.Generator().manual_seed(3))
    pipe = SAESteeringPipeline.from_pipe(StyleGAN2Pipeline(generator))
    with pipe.capture([Site.of(SITE)]) as activations:
        pipe(latents=z)
    torch.testing.assert_close(activations["w"].rows()[:, 5], one)


def test_rows_of_labelled_data_are_of_all_classes():
    generator = small(c_dim=3)
    z = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    by_class = torch.stack([generator.mapping(z, torch.eye(3)[[c] * 64])[:, 0] for c in range(3)])
    matches = (by_class - next(sampled_w(generator, 64))).abs().amax(-1).detach() < 1e-5  # (classes, rows)
    assert matches.any(0).all() and matches.any(1).all()


def test_an_sae_trains_and_steers():
    generator = small()
    torch.manual_seed(0)
    sae = TopKSAE(16, 64, 6, provenance={"site": SITE})
    _, before = measured_on_w(generator, sae, rows=2048)
    sae = train_on_w(generator, sae, TrainingConfig(steps=150, batch_size=256))
    statistics, figures = measured_on_w(generator, sae, rows=4096)
    assert figures["fvu"] < 0.4 * before["fvu"] and figures["rows"] == 4096
    pipe = SAESteeringPipeline.from_pipe(StyleGAN2Pipeline(generator))
    pipe.load_sae(sae)
    pipe.steer({most_active(statistics, 1)[0]: 3.0})
    assert not torch.equal(*(p(seeds=[1], output_type="pt").images for p in (pipe, StyleGAN2Pipeline(generator))))


def test_another_width():
    with pytest.raises(InputError, match="d_in=8 and w a width of 16"):
        train_on_w(small(), TopKSAE(8, 32, 4), TrainingConfig(steps=1))
