"""Attribution by gradient against what small ablations really do."""

import pytest
import torch
from conftest import SITE, Harness, random_sae

from diffusers_sae import Site
from diffusers_sae.features.effects import concept_effect

CALL = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16}


def predictions(pipe, **kwargs):
    """The denoiser's first output, `[neutral, concept]`."""
    outputs = []
    handle = pipe.unet.register_forward_hook(lambda m, a, o: outputs.append(o[0].clone()))
    pipe("ab", negative_prompt="cd", generator=torch.Generator().manual_seed(0), output_type="latent", **CALL, **kwargs)
    handle.remove()
    return outputs[0]


def test_effect_is_the_derivative_of_the_share_by_the_latent():
    harness, sae = Harness("sd"), random_sae()
    effect, timesteps = concept_effect(harness.pipe, sae, Site(SITE), ["ab"], ["cd"], **CALL)
    assert timesteps.tolist() == harness.pipe.scheduler.timesteps.tolist()
    without, with_concept = predictions(harness.pipe)
    towards = with_concept - without
    harness.pipe.load_sae(sae)
    epsilon = 0.05
    measured = []
    for j in range(32):
        harness.pipe.reset_steering()
        harness.pipe.steer({j: epsilon}, mode="ablate")
        moved = with_concept - predictions(harness.pipe)[1]
        measured.append(((moved * towards).sum() / towards.square().sum() / epsilon).item())
    measured = torch.tensor(measured)
    assert measured.abs().max() > 1e-3
    torch.testing.assert_close(effect[0], measured, atol=0.05 * measured.abs().max().item(), rtol=0.05)


def test_effects_of_a_batch_are_averaged_and_the_pipeline_is_left_alone():
    harness, sae = Harness("sd"), random_sae()
    bare = harness.run()
    both, _ = concept_effect(harness.pipe, sae, Site(SITE), ["ab", "ef"], ["cd", "gh"], **CALL)
    one, _ = concept_effect(harness.pipe, sae, Site(SITE), ["ab"], ["cd"], **CALL)
    two, _ = concept_effect(harness.pipe, sae, Site(SITE), ["ef"], ["gh"], seed=1, **CALL)
    torch.testing.assert_close(both, (one + two) / 2, atol=1e-5, rtol=1e-3)
    assert torch.equal(bare, harness.run())
    assert not harness.pipe.unet._forward_pre_hooks
    assert all(p.grad is None for p in harness.pipe.unet.parameters())


@pytest.mark.parametrize("n", [1])
def test_shapes(n):
    harness, sae = Harness("sd"), random_sae()
    effect, timesteps = concept_effect(harness.pipe, sae, Site(SITE), ["ab"] * n, ["cd"] * n, **CALL)
    assert effect.shape == (len(timesteps), sae.n_latents)
