"""The self-check of SAEs, on the shipped ones: it tells a block's output from its update, and a block from others."""

import warnings

import numpy as np
import pytest
import torch
from conftest import SITE, Harness, random_sae
from tiny import EMBEDDED

from diffusers_sae import Directions, InputError, SAESteeringPipeline, Site
from diffusers_sae.adapters.stylegan2 import StyleGAN2Generator
from diffusers_sae.adapters.stylegan2_pipeline import StyleGAN2Pipeline
from diffusers_sae.demo.shipped import MODELS, SITES, load_pipeline
from diffusers_sae.evaluation.checking import SAECheck

CALL = {"num_inference_steps": 4, "guidance_scale": 4.0}
PROMPT = "a panda in 3d style on a green background"


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


def checked(pipe, sae, site) -> SAECheck:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_sae(sae, site=site)
    try:
        return pipe.check_sae(PROMPT, generator=torch.Generator().manual_seed(0), **CALL)
    finally:
        pipe.unload_sae()


@pytest.mark.parametrize("path", SITES)
def test_shipped_saes_fit_their_sites(pipe, path):
    found = checked(pipe, MODELS / "saes" / path, path)
    assert found.fits and found.best == Site(path) and found.verdict.startswith(f"The SAE fits {path}: FVU 0.")
    figures = found.candidates[Site(path)]
    assert {branch for branch, _ in figures.by_step} == {"cond", "uncond"} and len(figures.by_step) == 8
    assert figures.l0 == 32 and 0 < figures.seen < 1 and len(str(found).splitlines()) > 12


@pytest.mark.parametrize("path", SITES)
@pytest.mark.parametrize("kind", ["update", "input"])
def test_another_kind_of_tensor_is_told(pipe, path, kind):
    found = checked(pipe, MODELS / "saes" / path, Site(path, kind=kind))
    assert not found.fits and found.best == Site(path)
    assert f"was not trained on {path}@{kind} but on {path}" in found.verdict
    assert found.verdict.endswith(f"load it with site={path!r}.")


@pytest.mark.parametrize("path", SITES)
def test_another_block_is_told(pipe, path):
    found = checked(pipe, MODELS / "saes" / path, "unet.up_blocks.1.attentions.0")
    assert found.best == Site(path) and "was not trained on unet.up_blocks.1.attentions.0" in found.verdict


def test_what_fits_nowhere_is_told(pipe):
    width = next(iter(pipe.unet.up_blocks[1].attentions)).in_channels
    found = checked(pipe, random_sae(width, 64), SITES[0])
    assert not found.fits and "fits nothing that was tried" in found.verdict


def test_figures_equal_a_restatement(sd, sae):
    sd.pipe.load_sae(sae)
    found = sd.pipe.check_sae("ab", num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    with sd.pipe.capture([SITE]) as activations:
        sd.pipe("ab", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent")
    x = activations[SITE].rows().reshape(-1, sae.d_in).double().numpy()
    x_hat = sae(torch.tensor(x)).detach().double().numpy()
    figures = found.candidates[Site(SITE)]
    assert figures.fvu == pytest.approx(((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-4)
    assert figures.norm == pytest.approx(np.linalg.norm(x.mean(0)), rel=1e-5)
    assert figures.spread == pytest.approx(np.sqrt(((x - x.mean(0)) ** 2).sum(1).mean()), rel=1e-5)


def test_the_plan_rests_and_stays(sd, sae):
    sd.pipe.load_sae(sae)
    bare = sd.pipe.check_sae("ab", num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    sd.pipe.steer({3: 50.0})
    steered = sd.run()
    again = sd.pipe.check_sae("ab", num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    assert again.candidates == bare.candidates
    assert torch.equal(sd.run(), steered)


def test_directions_are_checked_too(sd):
    sd.pipe.load_sae(Directions.of(torch.randn(2, 8)), site=SITE)
    assert sd.pipe.check_sae("ab", num_inference_steps=2).candidates


def test_a_site_that_does_not_run(sd, sae):
    with pytest.raises(InputError, match="No SAE is loaded"):
        sd.pipe.check_sae("ab")


def test_image_embeddings_and_w_have_nothing_nearby():
    harness = Harness("Kandinsky 2.2")
    harness.pipe.load_sae(random_sae(32, 64), site="image_embeds")
    given = {**harness.tiny.arguments, **EMBEDDED[harness.kind](3), "num_inference_steps": 2}
    assert list(harness.pipe.check_sae(**given).candidates) == [Site("image_embeds")]
    pipe = SAESteeringPipeline.from_pipe(StyleGAN2Pipeline(StyleGAN2Generator(16, 0, 8, 8, 3)))
    pipe.load_sae(random_sae(8, 64), site="w")
    found = pipe.check_sae(batch_size=4)
    assert {each.kind for each in found.candidates} == {"output", "input"}  # the update of a module that passes on is 0
