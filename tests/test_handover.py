"""The site `image_embeds` where a prior returns embeddings, and where unCLIP takes them."""

import copy

import numpy as np
import pytest
import torch
from conftest import Harness, random_sae
from reference import codes, edited
from tiny import kandinsky_prior, picture

from diffusers_sae import InputError, Rule, SAESteeringPipeline

WIDTH = 32
MODES = ["add", "set", "scale", "cap", "ablate"]


@pytest.fixture
def sae():
    torch.manual_seed(1)
    return random_sae(WIDTH, 64, 8, site={"path": "image_embeds"})


@pytest.fixture
def prior():
    torch.manual_seed(0)
    bare = kandinsky_prior()
    bare.set_progress_bar_config(disable=True)
    return SAESteeringPipeline.from_pipe(bare), bare


def made(pipe, prompt="ab", **call):
    found = pipe(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0), **call)
    return (found.image_embeds, found.negative_image_embeds) if hasattr(found, "image_embeds") else found


NEGATIVES = pytest.mark.parametrize("negative", [None, "zz"])


@NEGATIVES
@pytest.mark.parametrize("mode", MODES)
def test_a_priors_embeddings_follow_the_formula_on_the_branch_named(prior, sae, mode, negative):
    pipe, bare = prior
    before = made(bare, negative_prompt=negative)
    pipe.load_sae(sae)
    assert all(torch.equal(a, b) for a, b in zip(made(pipe, negative_prompt=negative), before, strict=True))
    features = [int(j) for j in codes(sae, before[0])[0].argsort()[-3:]]
    strengths = np.full((1, 3), 0.4)
    for branch, moves in (("cond", (True, False)), ("uncond", (False, True)), ("both", (True, True))):
        with pipe.steering(dict.fromkeys(features, 0.4), mode=mode, branch=branch):
            after = made(pipe, negative_prompt=negative)
        for x, y, moved in zip(before, after, moves, strict=True):
            expected = edited(sae, x[None], features, strengths, mode)[0] if moved else x
            np.testing.assert_allclose(y, expected, atol=1e-5)
            assert moved or torch.equal(x, y)
    assert all(torch.equal(a, b) for a, b in zip(made(pipe, negative_prompt=negative), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(made(bare, negative_prompt=negative), before, strict=True))


def test_contrast_pushes_the_negative_embedding_away(prior, sae):
    pipe, bare = prior
    before = made(bare, "a", negative_prompt="b")
    pipe.load_sae(sae)
    pipe.steer({3: 2.0}, branch="contrast")
    after = made(pipe, "a", negative_prompt="b")
    torch.testing.assert_close(after[0] - before[0], 2 * sae.W_dec[3].expand(1, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(after[1] - before[1], -2 * sae.W_dec[3].expand(1, -1), atol=1e-5, rtol=0)


def test_a_prior_keeps_its_kinds_of_output(prior, sae):
    pipe, _ = prior
    pipe.load_sae(sae)
    pipe.steer({3: 2.0})
    tensors = made(pipe)
    assert all(torch.equal(a, b) for a, b in zip(made(pipe, return_dict=False), tensors, strict=True))
    arrays = made(pipe, output_type="np")
    assert type(arrays[0]) is np.ndarray and all((a == b.numpy()).all() for a, b in zip(arrays, tensors, strict=True))
    several = made(pipe, ["ab", "c"], num_images_per_prompt=2)
    assert several[0].shape == several[1].shape == (4, WIDTH)


def test_what_a_prior_interpolates_is_edited_once(prior, sae):
    pipe, bare = prior

    def mixed(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe.interpolate(["ab", picture(), "c"], [0.5, 0.2, 0.7], num_inference_steps=2, generator=generator)

    before = mixed(bare)
    pipe.load_sae(sae)
    assert torch.equal(mixed(pipe).image_embeds, before.image_embeds)
    pipe.steer({3: 2.0})
    after = mixed(pipe)
    change = after.image_embeds - before.image_embeds
    torch.testing.assert_close(change, 2 * sae.W_dec[3].expand(1, -1), atol=1e-5, rtol=0)
    assert torch.equal(after.negative_image_embeds, before.negative_image_embeds)


def test_a_plan_does_the_same_at_the_prior_as_at_the_decoder(sae, tmp_path):
    torch.manual_seed(0)
    combined = Harness("Kandinsky 2.2 combined")
    combined.pipe.load_sae(sae, adapter_name="clip")
    combined.pipe.steer({3: 2.0, 7: -1.0}, branch="contrast")
    combined.pipe.save_recipe(tmp_path / "plan.json")
    at_decoder = combined.run()
    assert not torch.equal(at_decoder, combined.run(combined.bare))
    prior = SAESteeringPipeline.from_pipe(combined.bare.prior_pipe)
    prior.set_progress_bar_config(disable=True)
    prior.load_sae(sae, adapter_name="clip")
    prior.load_recipe(tmp_path / "plan.json")
    combined.bare.prior_pipe = prior
    torch.testing.assert_close(combined.run(combined.bare), at_decoder, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_unclip_is_given_edited_embeddings_before_their_noise(sae, mode):
    unclip = Harness("Stable unCLIP img2img")
    bare = unclip.run(unclip.bare)
    unclip.pipe.load_sae(sae)
    with unclip.pipe.capture(["image_embeds"]) as before:
        assert torch.equal(unclip.run(), bare)
    x = before["image_embeds"].rows("cond")  # (1, 1, d)
    pixels = unclip.bare.feature_extractor(images=picture(), return_tensors="pt").pixel_values
    assert torch.equal(x[0], unclip.bare.image_encoder(pixels).image_embeds)
    features = [int(j) for j in codes(sae, x[0])[0].argsort()[-3:]]
    unclip.pipe.steer(dict.fromkeys(features, 0.4), mode=mode)
    steered = unclip.run()
    by_hand = torch.from_numpy(edited(sae, x, features, np.full((1, 3), 0.4), mode)).float()[0]
    given = unclip.run(unclip.bare, image=None, image_embeds=by_hand)
    torch.testing.assert_close(steered, given, atol=1e-5, rtol=0)
    assert mode == "cap" or not torch.equal(steered, bare)
    unclip.pipe.unload_sae()
    assert torch.equal(unclip.run(), bare) and not unclip.pipe._steering.handover._forward_pre_hooks


def test_rules_units_and_blocks_work_beside_it(sae):
    unclip = Harness("Stable unCLIP img2img")
    unclip.pipe.load_sae(sae, adapter_name="embeds")
    unclip.pipe.load_sae(unclip.sae(), adapter_name="block")
    bare = unclip.run()
    with unclip.pipe.capture(["image_embeds"]) as found:
        unclip.run()
    firing = int(codes(sae, found["image_embeds"].tensor[0])[0].argmax())
    unclip.pipe.steer({1: 3.0}, adapter_name="block", when=Rule({firing: 1.0}, above=1e6, adapter_name="embeds"))
    assert torch.equal(unclip.run(), bare)
    unclip.pipe.reset_steering()
    unclip.pipe.steer({1: 3.0}, adapter_name="block", when=Rule({firing: 1.0}, above=0.0, adapter_name="embeds"))
    assert not torch.equal(unclip.run(), bare)


def test_what_makes_no_sense_is_refused(prior, sae):
    pipe, _ = prior
    unclip = Harness("Stable unCLIP img2img").pipe
    for one in (pipe, unclip):
        one.load_sae(sae)
        for arguments, sentence in (
            ({"mask": torch.ones(4, 4)}, "has one row an image and no places"),
            ({"stop": 0.5}, "runs once, before the denoising, so that start and stop mean nothing"),
        ):
            with pytest.raises(InputError, match=sentence):
                one.steer({3: 5.0}, **arguments)
    for branch in ("uncond", "both", "contrast"):
        with pytest.raises(InputError, match="made for the branch cond alone here"):
            unclip.steer({3: 5.0}, branch=branch)
    with pytest.raises(InputError, match="width 16 and image_embeds has 32"):
        pipe.load_sae(random_sae(16, site={"path": "image_embeds"}))
    with pytest.raises(InputError, match="a path starts with text_encoder, or is image_embeds"):
        pipe.load_sae(sae, "prior.transformer_blocks.0", adapter_name="other")


def test_a_copy_of_a_prior_is_not_steered(prior, sae):
    pipe, bare = prior
    pipe.load_sae(sae)
    pipe.steer({3: 5.0})
    twin = SAESteeringPipeline.from_pipe(pipe)
    assert torch.equal(made(twin)[0], made(bare)[0])
    assert torch.equal(made(copy.copy(bare))[0], made(bare)[0]) and not torch.equal(made(pipe)[0], made(bare)[0])


def test_a_check_tells_whether_an_sae_fits(prior, sae):
    pipe, _ = prior
    pipe.load_sae(sae)
    found = pipe.check_sae(["ab", "c", "d"], num_inference_steps=2)
    assert "image_embeds" in found.verdict
