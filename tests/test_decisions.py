"""Inversion with rules in the plan: exact with what they decided when the image was made, and refused without."""

import pytest
import torch
from conftest import Harness, random_sae

from diffusers_sae import InputError, Rule, Site, invert
from diffusers_sae.decisions import decide_plans, plan_replaced
from diffusers_sae.inverse_schedulers import InverseSteps
from diffusers_sae.twins import with_components

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
PROMPTS = ["ab", "cd", "ef"]
CALL = {"to": 1.0, "num_inference_steps": 6, "iterations": 12}
MASKS = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))
EDITS = {
    "add": {"features": {3: 20.0}},
    "a strength for each image": {"features": {3: [20.0, -20.0, 9.0], 5: 4.0}},
    "a mask for each image": {"features": {3: 20.0}, "mask": MASKS},
    "set": {"features": {3: 6.0}, "mode": "set"},
    "cap": {"features": {3: 0.1, 5: 0.2}, "mode": "cap"},
}
WATCHED = 3


def loaded(kind: str) -> Harness:
    harness = Harness(kind)
    if hasattr(harness.bare, "unet"):  # random weights answer so strongly that fixed points would not be found
        harness.bare.unet.conv_out.weight.data *= 0.05
    harness.pipe.load_sae(harness.sae(), adapter_name="one")
    return harness


def run(harness, inversion):
    """Latents of the run, and for each image the mean of the watched latent at the first step, before any edit."""
    pipe, site = harness.pipe, harness.tiny.site
    latents = inversion.run(pipe, output_type="latent").images
    pipe.disable_sae()
    with pipe.capture([site]) as seen:
        inversion.run(pipe, output_type="latent")
    pipe.enable_sae()
    rows = seen[site].rows("cond", max(inversion.timesteps))
    return latents, pipe._steering.loaded["one"].sae.encode(rows)[..., WATCHED].mean(1)


def between(means):
    """A bound that the image in the middle and the one above it exceed, or that one alone."""
    ordered = means.sort().values
    return float(ordered[:2].mean()) if ordered[1] - ordered[0] > ordered[2] - ordered[1] else float(ordered[1:].mean())


def of_image(edit, image):
    """The same for a batch of that image alone."""
    strengths = {j: s[image] if isinstance(s, list) else s for j, s in edit["features"].items()}
    return {**edit, "features": strengths, **({"mask": edit["mask"][image]} if "mask" in edit else {})}


def followed_back(pipe, latents, decisions):
    """The noise `(N, C, h, w)` of images that are known by their latents, with the plan in force."""
    twin = with_components(pipe, scheduler=InverseSteps(pipe.scheduler, 1000, CALL["iterations"]))
    call = {"num_inference_steps": 6, "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "latent"}
    noise = torch.empty_like(latents)
    for plan in decide_plans(pipe, decisions, len(latents)):
        prompts = [PROMPTS[i] for i in plan.images]
        with plan_replaced(twin, plan.edits):
            noise[plan.images] = twin(prompts, latents=latents[plan.images], **call).images
    return noise


RUNS = [*(("Stable Diffusion", edit) for edit in EDITS), ("Stable Diffusion 3", "add")]


@pytest.mark.parametrize(("kind", "edit"), RUNS)
def test_a_run_with_a_rule_is_followed_back_by_what_it_decided(kind, edit):
    harness = loaded(kind)
    pipe, start = harness.pipe, invert(harness.bare, IMAGES, PROMPTS, **CALL)
    means = run(harness, start)[1]
    rule = Rule({WATCHED: 1.0}, above=between(means))
    holds = means > rule.above
    assert 0 < int(holds.sum()) < 3
    pipe.steer(**EDITS[edit], when=rule)
    made, plain = (start.run(each, output_type="latent").images for each in (pipe, harness.bare))
    assert torch.equal((made != plain).flatten(1).any(1), holds)
    for decisions, right in ((holds, True), (~holds, False)):
        errors = (followed_back(pipe, made, {("one", 0): decisions}) - start.latents).flatten(1).norm(dim=1)
        assert torch.equal(errors < 0.05, torch.full((3,), right))


@pytest.mark.parametrize("edit", EDITS)
def test_every_image_is_inverted_as_if_it_were_alone(edit):
    harness = loaded("Stable Diffusion")
    pipe, holds, call = harness.pipe, [False, True, True], {"num_inference_steps": 4, "iterations": 2}
    with pipe.steering(**EDITS[edit], when=Rule({WATCHED: 1.0})):
        found = invert(pipe, IMAGES, PROMPTS, **call, edited=True, decisions={("one", 0): holds}).latents
    for i in range(3):
        with pipe.steering(**of_image(EDITS[edit], i)):
            alone = invert(pipe, IMAGES[i], PROMPTS[i], **call, edited=holds[i]).latents
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-3, atol=1e-3)
    unedited = invert(pipe, IMAGES, PROMPTS, **call).latents
    assert ((found - unedited).flatten(1).norm(dim=1) > 1e-2).tolist() == holds


def test_several_rules_of_two_saes_and_edits_without_one(sd):
    pipe = sd.pipe
    for name in ("one", "other"):
        pipe.load_sae(random_sae(), adapter_name=name)
    pipe.steer({1: 2.0}, adapter_name="one")
    pipe.steer({2: [1.0, 2.0, 3.0]}, adapter_name="one", when=Rule({0: 1.0}))
    pipe.steer({3: 4.0}, adapter_name="other", mask=MASKS, when=Rule({0: 1.0}, adapter_name="one"))
    decisions = {("one", 1): torch.tensor([True, False, True]), ("other", 0): [False, True, False]}
    first, second = decide_plans(pipe, decisions, 3)
    assert (first.images, second.images) == ([0, 2], [1])
    assert [(e.features, e.strengths) for e in first.edits["one"]] == [((1,), (2.0,)), ((2,), ([1.0, 3.0],))]
    assert [e.features for e in second.edits["one"]] == [(1,)] and first.edits["other"] == []
    [edit] = second.edits["other"]
    assert edit.when is None and torch.equal(edit.mask, MASKS[1].reshape(1, 1, 8, 8))

    before = [list(loaded.edits) for loaded in pipe._steering.loaded.values()]
    found = invert(pipe, IMAGES, "ab", num_inference_steps=3, edited=True, decisions=decisions)
    assert found.latents.isfinite().all()
    assert before == [list(loaded.edits) for loaded in pipe._steering.loaded.values()]
    pipe.disable_sae("other")  # whose rule decides nothing then
    [_, _] = decide_plans(pipe, {("one", 1): decisions["one", 1]}, 3)


def test_a_rule_about_the_prompt_is_decided_before_the_denoising(sd):
    pipe = sd.pipe
    pipe.load_sae(random_sae(), adapter_name="one")
    pipe.load_sae(random_sae(16), Site("text_encoder.text_model.encoder.layers.0"), adapter_name="text")
    pipe.steer({1: 2.0}, adapter_name="one", when=Rule({0: 1.0}, adapter_name="text"))
    [first, second] = decide_plans(pipe, {("one", 0): [True, False]}, 2)
    assert len(first.edits["one"]) == 1 and not second.edits["one"]
    pipe.reset_steering()
    pipe.steer({1: 2.0}, adapter_name="text", when=Rule({0: 1.0}, adapter_name="one"))
    with pytest.raises(InputError, match="at another site"):
        decide_plans(pipe, {("text", 0): [True, False]}, 2)


@pytest.mark.parametrize(
    ("decisions", "said"),
    [
        (None, "Edit 1 of 'one' has a rule, which decided when the image was made"),
        ({}, "decisions={('one', 1): bool for each image}"),
        ({("one", 0): [True] * 3, ("one", 1): [True] * 3}, "('one', 0), where no edit in force has a rule"),
        ({("one", 1): [True] * 2}, "torch.bool of shape (2,); pass one bool for each of the 3 images"),
        ({("one", 1): True}, "torch.bool of shape ()"),
        ({("one", 1): [1, 0, 1]}, "torch.int64 of shape (3,)"),
        ({("one", 1): "yes"}, "pass one bool for each of the 3 images"),
        ({("one", 1): None}, "pass one bool for each of the 3 images"),
    ],
)
def test_decisions_that_do_not_fit_are_refused(sd, decisions, said):
    pipe = sd.pipe
    pipe.load_sae(random_sae(), adapter_name="one")
    pipe.steer({1: 2.0})
    pipe.steer({2: 2.0}, when=Rule({0: 1.0}))
    with pytest.raises(InputError) as error:
        invert(pipe, IMAGES, "ab", num_inference_steps=3, edited=True, decisions=decisions)
    assert said in str(error.value) and str(error.value).count(". ") == 0
    invert(pipe, IMAGES, "ab", num_inference_steps=3)  # in which the plan rests


@pytest.mark.parametrize(
    ("rule", "said"),
    [(Rule({0: 1.0}, at="place"), "a rule at places"), (Rule({0: 1.0}, adapter_name="other"), "at another site")],
)
def test_rules_that_a_run_backwards_cannot_follow_are_refused(sd, rule, said):
    pipe = sd.pipe
    pipe.load_sae(random_sae(), adapter_name="one")
    pipe.load_sae(random_sae(16), "unet.up_blocks.0", adapter_name="other")
    pipe.steer({1: 2.0}, adapter_name="one", when=rule)
    with pytest.raises(InputError, match=said):
        invert(pipe, IMAGES, "ab", num_inference_steps=3, edited=True, decisions={("one", 0): [True] * 3})


def test_what_a_run_decided_is_what_its_inversion_takes():
    harness = loaded("Stable Diffusion")
    pipe, start = harness.pipe, invert(harness.bare, IMAGES, PROMPTS, **CALL)
    pipe.steer({3: 20.0}, when=Rule({WATCHED: 1.0}, above=between(run(harness, start)[1])))
    made = start.run(pipe, output_type="latent").images
    decisions = pipe.rule_decisions()
    assert list(decisions) == [("one", 0)] and 0 < int(decisions["one", 0].sum()) < 3
    assert (followed_back(pipe, made, decisions) - start.latents).flatten(1).norm(dim=1).max() < 0.05
    with pytest.raises(InputError, match=r"as pipe.rule_decisions\(\) tells after that run"):
        invert(pipe, IMAGES, PROMPTS, **CALL, edited=True)
    call = {"num_inference_steps": 2, "to": 1.0, "edited": True}
    first, again = (invert(pipe, IMAGES, PROMPTS, **call, decisions=pipe.rule_decisions()) for _ in range(2))
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(pipe.rule_decisions()["one", 0], decisions["one", 0])
