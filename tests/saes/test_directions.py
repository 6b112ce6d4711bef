"""Directions without an SAE: edits by the formula, saved and loaded, and what is none."""

import numpy as np
import pytest
import torch
from conftest import SITE, Harness

from diffusers_sae import Directions, InputError
from diffusers_sae.loaders import load_sae


@pytest.fixture
def directions():
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(2)) * torch.tensor([[1.0], [2.0], [0.3]])


@pytest.mark.parametrize("mode", ["add", "set", "scale", "cap", "ablate"])
def test_edits_follow_the_formula(directions, mode):
    harness = Harness()
    with harness.pipe.capture([SITE]) as activations:
        bare = harness.run()
    x = activations[SITE].rows("cond")[0].double().numpy()
    harness.pipe.load_sae(Directions.of(directions), SITE)
    assert torch.equal(harness.run(), bare)
    harness.pipe.steer({1: 0.4}, mode=mode)
    with harness.pipe.capture([SITE]) as activations:
        harness.run()
    d = directions[1].double().numpy()
    z = x @ d / (d @ d)
    after = {"add": z + 0.4, "set": 0.4 + 0 * z, "scale": 0.4 * z, "cap": np.minimum(z, 0.4), "ablate": 0.6 * z}[mode]
    found = activations[SITE].rows("cond")[0].numpy()
    np.testing.assert_allclose(found, x + (after - z)[..., None] * d, atol=5e-5)


def test_what_is_ablated_is_gone_and_the_rest_stays(directions):
    one = Directions.of(directions[0])
    x = torch.randn(20, 8)
    left = x - one(x)
    torch.testing.assert_close(one.encode(left), torch.zeros(20, 1), atol=1e-6, rtol=0)
    other = torch.linalg.svd(directions[:1])[2][1:]  # the directions at right angles to it
    torch.testing.assert_close(left @ other.T, x @ other.T, atol=1e-5, rtol=1e-5)


def test_saved_and_loaded(directions, tmp_path):
    one = Directions.of(directions, site={"path": SITE}, made_from="a probe")
    one.save_pretrained(tmp_path)
    x = torch.randn(4, 5, 8)
    state = load_sae({"W_dec": directions}, config={"_class_name": "Directions"})
    for again in (Directions.from_pretrained(tmp_path), load_sae(tmp_path), state):
        assert torch.equal(again.encode(x), one.encode(x))
        torch.testing.assert_close(again.decode_sparse(again.encode_sparse(x)), again.decode(again.encode(x)))
    assert load_sae(tmp_path).provenance["made_from"] == "a probe"


def test_a_recipe_round_trip(directions, tmp_path):
    harness = Harness()
    harness.pipe.load_sae(Directions.of(directions), SITE, adapter_name="mine")
    harness.pipe.steer({0: 3.0, 2: -1.0}, stop=0.5)
    images = harness.run()
    harness.pipe.save_recipe(tmp_path / "recipe.json")
    harness.pipe.reset_steering()
    harness.pipe.load_recipe(tmp_path / "recipe.json")
    assert torch.equal(harness.run(), images)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (torch.zeros(8), "is zero or not finite"),
        (torch.full((8,), float("nan")), "is zero or not finite"),
        (torch.zeros(2, 2, 8), r"have shape \(2, 2, 8\); pass \(width,\)"),
        (torch.zeros(0, 8), r"have shape \(0, 8\)"),
    ],
)
def test_what_is_no_direction(bad, sentence):
    with pytest.raises(InputError, match=sentence):
        Directions.of(bad)
