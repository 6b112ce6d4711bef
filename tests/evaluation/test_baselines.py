"""The error terms of other systems, on edits that change nothing and on edits that do."""

import pytest
import torch
from conftest import SITE, Harness, random_sae

from diffusers_sae.evaluation.baselines import load_with_error_term


def site_values(harness):
    with harness.pipe.capture([SITE]) as activations:
        harness.run(num_inference_steps=2)
    site = activations[SITE]
    t = site.timestep[0].item()
    return site.rows("cond", t), site.rows("uncond", t)


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_error_terms(strength):
    sae = random_sae()
    harness = Harness()
    x, uncond = site_values(harness)
    x_hat = sae(x)
    removed = strength * (sae.encode(x) * (torch.arange(32) == 3)) @ sae.W_dec
    for error_term, expected in (
        ("kept", x - removed),
        ("dropped", x_hat - removed),
        ("wrong_sign", 2 * x_hat - x - removed),
    ):
        load_with_error_term(harness.pipe, sae, SITE, "one", error_term)
        harness.pipe.steer({3: strength}, mode="ablate")
        cond, other = site_values(harness)
        torch.testing.assert_close(cond, expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(other, uncond)
        harness.pipe.unload_sae()
