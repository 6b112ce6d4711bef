"""The layouts `channels` and `vector`: edits by the formula, and what makes no sense without places."""

import warnings

import numpy as np
import pytest
import torch
from conftest import SITE, Harness, random_sae
from reference import codes, edited

from diffusers_sae import InputError, Rule, SAESteeringPipeline, Site, StrengthMap

PATH = "unet.mid_block"
PLACES = ((1000.0, 0.0), torch.ones(2, 2, 2))


def h_space(harness, layout):
    """The bottleneck of the first step, as rows in a layout, and the image."""
    with harness.pipe.capture([Site(PATH, layout=layout)]) as activations:
        image = harness.run()
    return activations[PATH].rows("cond", timestep=activations[PATH].timestep.max().item()), image


@pytest.fixture(params=["channels", "vector"])
def loaded(request):
    harness = Harness()
    x, bare = h_space(harness, request.param)
    torch.manual_seed(1)
    sae = random_sae(x.shape[-1], site=Site(PATH, layout=request.param).as_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        harness.pipe.load_sae(sae)
    return harness, sae, x, bare, request.param


@pytest.mark.parametrize("mode", ["add", "set", "scale", "cap", "ablate"])
def test_edits_follow_the_formula(loaded, mode):
    harness, sae, x, bare, layout = loaded
    assert torch.equal(harness.run(), bare)
    features = [int(j) for j in codes(sae, x).mean((0, 1)).argsort()[-3:]]
    harness.pipe.steer(dict.fromkeys(features, 0.4), mode=mode)
    found, image = h_space(harness, layout)
    np.testing.assert_allclose(found, edited(sae, x, features, np.full((1, 3), 0.4), mode), atol=5e-5)
    assert not torch.equal(image, bare)


@pytest.mark.parametrize(("mode", "identity"), [("add", 0.0), ("scale", 1.0), ("ablate", 0.0), ("cap", 1e9)])
def test_a_plan_that_changes_nothing_changes_no_bit(loaded, mode, identity):
    harness, _, _, bare, _ = loaded
    harness.pipe.steer({3: identity, 7: identity}, mode=mode)
    assert torch.equal(harness.run(), bare)


def test_each_image_of_a_batch_has_its_strength(loaded):
    harness, sae, _, _, layout = loaded
    with harness.pipe.capture([Site(PATH, layout=layout)]) as activations:
        harness.run(prompt=["ab", "cd"], generator=[torch.Generator().manual_seed(i) for i in (0, 1)])
    seen = activations[PATH]
    x = seen.rows("cond", timestep=seen.timestep.max().item())
    harness.pipe.steer({5: [2.0, 0.0]})
    with harness.pipe.capture([Site(PATH, layout=layout)]) as activations:
        harness.run(prompt=["ab", "cd"], generator=[torch.Generator().manual_seed(i) for i in (0, 1)])
    found = activations[PATH].rows("cond", timestep=seen.timestep.max().item())
    torch.testing.assert_close(found[0], x[0] + 2 * sae.W_dec[5].detach().expand_as(x[0]), atol=5e-5, rtol=0)
    assert torch.equal(found[1], x[1])


def test_a_recipe_brings_the_edits_back(loaded, tmp_path):
    harness, sae, _, _, layout = loaded
    tokens = [2, 9] if layout == "channels" else None
    harness.pipe.steer({5: 3.0}, tokens=tokens, start=0.0, stop=0.5, mode="scale")
    harness.pipe.steer({6: 2.0}, preserve_norm=True, when=Rule({1: 1.0}))
    expected = harness.run()
    harness.pipe.save_recipe(tmp_path / "plan.json")
    other = SAESteeringPipeline.from_pipe(harness.bare)
    other.load_sae(sae)
    other.load_recipe(tmp_path / "plan.json")
    assert torch.equal(harness.run(other), expected)
    third = SAESteeringPipeline.from_pipe(harness.bare)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        third.load_sae(random_sae(16), PATH, adapter_name="default_0")
    sentence = rf"'default_0' at {PATH}@{layout} and it is loaded at {PATH}; load it there"
    with pytest.raises(InputError, match=sentence):
        third.load_recipe(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"mask": torch.ones(4, 4)}, "A mask needs rows that are places, and those of"),
        ({"mode": "replace"}, "mode='replace' needs rows that are places"),
        ({"features": {1: StrengthMap(*PLACES)}}, "A StrengthMap needs rows that are places"),
        ({"when": Rule({1: 1.0}, at="place")}, "A rule at places needs rows that are places"),
    ],
)
def test_what_needs_places_is_refused(loaded, wrong, sentence):
    harness, _, _, bare, layout = loaded
    with pytest.raises(InputError) as error:
        harness.pipe.steer(**{"features": {1: 1.0}, **wrong})
    assert sentence in str(error.value) and f"{PATH}@{layout}" in str(error.value)
    assert str(error.value).endswith(".") and torch.equal(harness.run(), bare)


def test_a_rule_at_places_cannot_look_at_whole_maps(loaded):
    harness, _, _, _, layout = loaded
    harness.pipe.load_sae(random_sae(), SITE, adapter_name="other")
    rule = Rule({1: 1.0}, adapter_name="default_0", at="place")
    with pytest.raises(InputError, match=rf"the rows of {PATH}@{layout} are none; use at='image'"):
        harness.pipe.steer({1: 1.0}, adapter_name="other", when=rule)


def test_tokens_are_channels_where_channels_are_rows(loaded):
    harness, sae, x, _, layout = loaded
    if layout == "vector":
        with pytest.raises(InputError, match="for w and for channels, and .* is none; leave them out"):
            harness.pipe.steer({1: 1.0}, tokens=[3])
        return
    harness.pipe.steer({1: 1.0}, tokens=[3])
    found = h_space(harness, layout)[0]
    torch.testing.assert_close(found[:, 3], x[:, 3] + sae.W_dec[1].detach(), atol=5e-5, rtol=0)
    others = [c for c in range(x.shape[1]) if c != 3]
    assert torch.equal(found[:, others], x[:, others])
    harness.pipe.reset_steering()
    harness.pipe.steer({1: 1.0}, tokens=[x.shape[1]])
    with pytest.raises(InputError, match="is out of range"):
        harness.run()


def test_images_of_another_size_stop_with_a_sentence(loaded):
    harness, *_ = loaded
    harness.pipe.steer({1: 1.0}, mode="scale")
    with pytest.raises(InputError, match="or make images of the size it was trained at"):
        harness.run(height=32, width=32)


def test_captured_rows_that_are_no_places_have_no_grid(loaded):
    harness, _, x, _, layout = loaded
    with harness.pipe.capture([Site(PATH, layout=layout)]) as activations:
        harness.run()
    assert activations[PATH].rows("cond").shape[1:] == x.shape[1:]
    with pytest.raises(InputError, match="are no places, so that it has no grid"):
        _ = activations[PATH].grid
