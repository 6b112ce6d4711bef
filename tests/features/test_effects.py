"""Attribution by gradient against what small ablations really do."""

import torch
from conftest import SITE, Harness, random_sae

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
    harness, sae = Harness(), random_sae()
    effects, timesteps = concept_effect(harness.pipe, {SITE: sae}, ["ab"], ["cd"], **CALL)
    effect = effects[SITE]
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
    harness, sae = Harness(), random_sae()
    bare = harness.run()
    saes = {SITE: sae}
    both = concept_effect(harness.pipe, saes, ["ab", "ef"], ["cd", "gh"], **CALL)[0][SITE]
    one = concept_effect(harness.pipe, saes, ["ab"], ["cd"], **CALL)[0][SITE]
    two = concept_effect(harness.pipe, saes, ["ef"], ["gh"], seed=1, **CALL)[0][SITE]
    torch.testing.assert_close(both, (one + two) / 2, atol=1e-5, rtol=1e-3)
    assert torch.equal(bare, harness.run())
    assert not harness.pipe.unet._forward_pre_hooks
    assert all(p.grad is None for p in harness.pipe.unet.parameters())


def test_sites_measured_together_are_as_measured_alone():
    harness = Harness()
    saes = {"unet.mid_block": random_sae(16), SITE: random_sae()}
    both, timesteps = concept_effect(harness.pipe, saes, ["ab"], ["cd"], **CALL)
    for site, sae in saes.items():
        alone, _ = concept_effect(harness.pipe, {site: sae}, ["ab"], ["cd"], **CALL)
        assert both[site].shape == (len(timesteps), 32)
        torch.testing.assert_close(both[site], alone[site], atol=1e-6, rtol=1e-4)
