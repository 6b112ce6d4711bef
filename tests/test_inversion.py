"""Inversion: exact against independent float64 formulas, blind to edits, and a start for runs that edits act on."""

import copy
import warnings

import numpy as np
import pytest
import torch
from conftest import Harness, random_sae
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from tiny import picture

from diffusers_sae import InputError, Inversion, SAESteeringPipeline, TopKSAE, invert
from diffusers_sae.inverse_schedulers import InverseSteps, LastSteps
from diffusers_sae.schedule import on_training_scale
from diffusers_sae.twins import with_components

KINDS = ["Stable Diffusion", "Stable Diffusion 2.1", "SDXL", "Stable Diffusion 3"]
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
CONFIGS = [
    {"prediction_type": prediction, "timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": one}
    for prediction in ("epsilon", "v_prediction")
    for spacing, offset in (("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0))
    for one in (True, False)
]


@pytest.fixture(params=KINDS)
def harness(request) -> Harness:
    return Harness(request.param)


def ddim(**config) -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, **config)


def follow(scheduler, steps, x, model):
    """What a pipeline's loop does."""
    scheduler.set_timesteps(steps, device="cpu")
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
    return x


def levels(config, steps):
    """(t, alpha, sigma) -> (alpha, sigma) of every DDIM step in float64, from the documentation of its options."""
    betas = np.linspace(np.sqrt(np.float32(1e-4)), np.sqrt(np.float32(0.02)), 1000, dtype=np.float64) ** 2
    products = np.cumprod(1 - betas)
    spacing = config["timestep_spacing"]
    if spacing == "leading":
        ts = np.arange(steps)[::-1] * (1000 // steps) + config["steps_offset"]
    elif spacing == "trailing":
        ts = np.round(np.arange(1000, 0, -1000 / steps)).astype(int) - 1
    else:
        ts = np.linspace(0, 999, steps).round()[::-1].astype(int)
    final = 1.0 if config["set_alpha_to_one"] else products[0]
    return [(int(t), products[t], products[p] if (p := t - 1000 // steps) >= 0 else final) for t in ts]


def angle(product):
    """A noise level as the angle whose cosine is the share of the image, and whose sine is that of the noise."""
    return np.arctan2(np.sqrt(1 - product), np.sqrt(product))


def model_of(kind):
    return {
        "constant": lambda x, t: torch.full_like(x, 0.7) + t / 1000,
        "linear": lambda x, t: 0.4 * x,
    }[kind]


@pytest.mark.parametrize("steps", [10, 30])
@pytest.mark.parametrize("config", CONFIGS)
def test_ddim_inversion_equals_float64_formulas_and_is_undone_by_ddim(config, steps):
    x = torch.linspace(-2, 2, 7)
    inverse = InverseSteps(ddim(**config), 1000)
    found = follow(inverse, steps, x, model_of("constant"))

    expected = x.double().numpy()
    for t, noisy, clean in reversed(levels(config, steps)):
        m = np.float64(np.float32(0.7)) + t / 1000
        if config["prediction_type"] == "epsilon":  # x_t = a x0 + s e,  x0 = (x' - s' e) / a'
            expected = np.sqrt(noisy) * (expected - np.sqrt(1 - clean) * m) / np.sqrt(clean) + np.sqrt(1 - noisy) * m
        else:  # x' = cos(d) x - sin(d) v,  d the angle between the levels
            d = angle(noisy) - angle(clean)
            expected = (expected + np.sin(d) * m) / np.cos(d)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-4, atol=2e-4)

    back = follow(LastSteps(ddim(**config), 1000), steps, found, model_of("constant"))
    np.testing.assert_allclose(back.numpy(), x.numpy(), atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_iterations_converge_to_the_noise_that_ddim_makes_the_image_of(config):
    noise = torch.linspace(-2, 2, 7)
    x = follow(ddim(**config), 10, noise, model_of("linear"))
    errors = []
    for iterations in (1, 4, 12):
        inverse = InverseSteps(ddim(**config), 1000, iterations)
        errors.append((follow(inverse, 10, x, model_of("linear")) - noise).abs().max().item())
    assert errors[0] > 10 * errors[1] > 10 * errors[2]
    assert errors[2] < 1e-4


KNOWN_TO_DIFFUSERS = [  # a velocity it takes for one at the level that the step begins from
    c for c in CONFIGS if c["timestep_spacing"] != "linspace" and c["prediction_type"] == "epsilon"
]


@pytest.mark.parametrize("config", KNOWN_TO_DIFFUSERS)
def test_one_iteration_on_epsilon_is_that_of_diffusers(config):
    x = torch.linspace(-2, 2, 7)
    theirs = follow(DDIMInverseScheduler.from_config(ddim(**config).config), 10, x, model_of("linear"))
    ours = follow(InverseSteps(ddim(**config), 1000), 10, x, model_of("linear"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_followed_back_exactly(shift):
    x, make = torch.linspace(-2, 2, 7), lambda: FlowMatchEulerDiscreteScheduler(shift=shift)
    whole = follow(InverseSteps(make(), 1000), 8, x, lambda x, t: torch.full_like(x, 0.5))
    torch.testing.assert_close(whole, x + 0.5)  # the flow's time goes from 0 to 1
    half = InverseSteps(make(), 500, 20)
    noisy = follow(half, 8, x, model_of("linear"))
    assert max(half.undone) <= 500
    torch.testing.assert_close(follow(LastSteps(make(), 500), 8, noisy, model_of("linear")), x)


def reconstructed(harness, to, iterations, steps=6):
    """Latents of the images, and those that come back."""
    inversion = invert(harness.pipe, IMAGES, ["ab", "cd"], to, num_inference_steps=steps, iterations=iterations)
    latents = inversion.run(harness.pipe, output_type="latent").images
    vae = harness.bare.vae
    with torch.no_grad():
        original = vae.encode(2 * IMAGES - 1).latent_dist.mode()
    return inversion, (original - (vae.config.shift_factor or 0)) * vae.config.scaling_factor, latents


@pytest.mark.parametrize("to", [0.5, 0.7, 1.0])
def test_run_returns_to_the_image(harness, to):
    if hasattr(harness.bare, "unet"):  # random weights answer so strongly that fixed points would not be found
        harness.bare.unet.conv_out.weight.data *= 0.05
    inversion, original, once = reconstructed(harness, to, 1)
    _, _, often = reconstructed(harness, to, 12)
    assert inversion.timesteps[0] <= to * 1000 and len(inversion.timesteps) <= 6
    assert list(inversion.timesteps) == sorted(inversion.timesteps, reverse=True)
    errors = [((each - original).norm() / original.norm()).item() for each in (once, often)]
    assert errors[1] < 2e-3 and errors[1] < errors[0]


def test_statistics_of_an_autoencoder_cost_nothing():
    """13.6 dB where they were ignored."""
    harness = Harness("SDXL")
    harness.bare.unet.conv_out.weight.data *= 0.05
    vae = harness.bare.vae
    with torch.no_grad():
        alone = (vae.decode(vae.encode(2 * IMAGES - 1).latent_dist.mode()).sample / 2 + 0.5).clamp(0, 1)
    statistics = {"latents_mean": [-1.6, 1.5, 1.2, -2.0], "latents_std": [8.4, 5.9, 5.3, 8.5], "scaling_factor": 0.5}
    for config in ({}, statistics):
        vae.register_to_config(**config)
        inversion = invert(harness.bare, IMAGES, "ab", num_inference_steps=6, iterations=12)
        images = inversion.run(harness.bare, output_type="pt").images
        assert -10 * (images - alone).square().mean().log10() > 100


def test_the_decoders_inversion_brings_the_image_nearer(harness):
    if hasattr(harness.bare, "unet"):
        harness.bare.unet.conv_out.weight.data *= 0.05
    call = {"to": 0.5, "num_inference_steps": 6, "iterations": 6}
    plain, near = (invert(harness.bare, IMAGES, "ab", decoder_iterations=n, **call) for n in (0, 15))
    errors = [(each.run(harness.bare, output_type="pt").images - IMAGES).square().mean() for each in (plain, near)]
    assert errors[1] < 0.97 * errors[0]


def test_images_of_every_type_are_read_alike(sd):
    image = Image.fromarray((IMAGES[0].permute(1, 2, 0) * 255).round().byte().numpy())
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    tensor = levels / 255
    deep = (levels.int() * 257).to(torch.uint16)
    kinds = (image, tensor, tensor[None], [image], [tensor], tensor.double(), levels, deep, image.convert("RGBA"))
    found = [invert(sd.pipe, each, "ab", num_inference_steps=3).latents for each in kinds]
    assert all(torch.equal(each, found[0]) for each in found)
    assert not torch.equal(invert(sd.pipe, picture(), "ab", num_inference_steps=3).latents, found[0])


def test_pictures_are_not_taken_for_masks(sd):
    """A picture of 0 and 1 in uint8 is nearly black, one of booleans is not, and a grey one has three equal colours."""
    bits = IMAGES[0] > 0.5
    grey = Image.fromarray((257 * np.arange(256).reshape(16, 16)).astype(np.uint16))
    ramp = (torch.arange(256).reshape(1, 16, 16) / 255).expand(3, -1, -1)
    for image, expected in ((bits.byte(), bits / 255), (bits, bits.float()), (bits.long(), bits.float()), (grey, ramp)):
        latents = (invert(sd.pipe, each, "ab", num_inference_steps=3).latents for each in (image, expected))
        torch.testing.assert_close(*latents, rtol=1e-5, atol=1e-5)


def test_a_batch_is_inverted_as_its_images_are(harness):
    both = invert(harness.pipe, IMAGES, ["ab", "cd"], num_inference_steps=4).latents
    second = invert(harness.pipe, IMAGES[1], "cd", num_inference_steps=4).latents
    torch.testing.assert_close(both[1:], second, rtol=1e-4, atol=1e-4)


def test_half_precision_stays_half_precision(harness):
    exact = invert(harness.pipe, IMAGES, "ab", 0.5, num_inference_steps=4).latents
    harness.pipe.to(torch.bfloat16)
    inversion = invert(harness.pipe, IMAGES, "ab", 0.5, num_inference_steps=4)
    assert inversion.latents.dtype == harness.pipe.vae.dtype == torch.bfloat16
    assert ((inversion.latents - exact).norm() / exact.norm()) < 0.1
    assert inversion.run(harness.pipe, output_type="pt").images.isfinite().all()


def steerable(harness) -> TopKSAE:
    sae = harness.sae()
    harness.pipe.load_sae(sae, adapter_name="one")
    return sae


def test_edits_rest_while_an_image_is_inverted_and_act_in_the_run(harness):
    before = invert(harness.bare, IMAGES, "ab", num_inference_steps=4)
    plain = before.run(harness.bare, output_type="pt").images
    steerable(harness)
    harness.pipe.steer({3: 20.0})
    with harness.pipe.capture([harness.tiny.site]) as seen:
        after = invert(harness.pipe, IMAGES, "ab", num_inference_steps=4)
    assert torch.equal(before.latents, after.latents)
    assert len(seen[harness.tiny.site].timestep) == 0
    steered = after.run(harness.pipe, output_type="pt").images
    assert (steered - plain).abs().max() > 1e-3
    harness.pipe.reset_steering()
    assert torch.equal(after.run(harness.pipe, output_type="pt").images, plain)


def test_an_image_made_with_edits_is_inverted_with_them_or_without(harness):
    if hasattr(harness.bare, "unet"):
        harness.bare.unet.conv_out.weight.data *= 0.05
    steerable(harness)
    harness.pipe.steer({3: 20.0})
    found, images = {}, {}
    for edited in (True, False):
        inversion = invert(harness.pipe, IMAGES, "ab", num_inference_steps=6, iterations=12, edited=edited)
        found[edited] = inversion.latents
        images[edited] = inversion.run(harness.pipe, output_type="latent").images  # with the plan still in force
    with torch.no_grad():
        original = harness.bare.vae.encode(2 * IMAGES - 1).latent_dist.mode()
    config = harness.bare.vae.config
    original = (original - (config.shift_factor or 0)) * config.scaling_factor
    errors = {edited: ((x - original).norm() / original.norm()).item() for edited, x in images.items()}
    assert not torch.equal(found[True], found[False])
    assert errors[True] < 2e-3 and errors[True] < errors[False] / 2


def test_windows_are_fractions_of_the_steps_that_are_run(harness):
    inversion = invert(harness.pipe, IMAGES[0], "ab", 0.7, num_inference_steps=10)
    steerable(harness)
    with harness.pipe.capture([harness.tiny.site]) as seen:
        plain = inversion.run(harness.pipe, output_type="pt").images
    ran = list(dict.fromkeys(seen[harness.tiny.site].timestep.tolist()))
    assert ran == pytest.approx(list(inversion.timesteps))
    seen_by = []
    harness.pipe.steer({3: lambda p: seen_by.append(p) or 20.0})
    everywhere = inversion.run(harness.pipe, output_type="pt").images
    assert seen_by == [i / len(ran) for i in range(len(ran))] and not torch.equal(everywhere, plain)
    harness.pipe.reset_steering()
    harness.pipe.steer({3: 20.0}, start=0.0, stop=1.0)
    assert torch.equal(inversion.run(harness.pipe, output_type="pt").images, everywhere)


@pytest.mark.parametrize(("iterations", "to"), [(1, 1.0), (2, 1.0), (3, 0.6)])
def test_inverse_steps_have_the_numbers_of_the_steps_that_they_undo(harness, iterations, to):
    forwards = LastSteps(harness.bare.scheduler, to * 1000)
    forwards.set_timesteps(8)
    inverse = InverseSteps(harness.bare.scheduler, to * 1000, iterations)
    inverse.set_timesteps(8)
    undone = dict.fromkeys(zip(inverse.timesteps.tolist(), inverse.step_numbers, strict=True))
    assert list(undone) == list(zip(forwards.timesteps.tolist(), range(8), strict=False))[::-1]
    assert len(inverse.step_numbers) == iterations * len(undone)
    assert on_training_scale(inverse) and on_training_scale(forwards)


@pytest.mark.parametrize("step", [None, 0, 2, -1])
def test_a_window_holds_one_step(harness, step):
    inversion = invert(harness.pipe, IMAGES[0], "ab", 0.7, num_inference_steps=10)
    at = None if step is None else inversion.timesteps[step] / 1000
    window = inversion.window(at)
    count, index = len(inversion.timesteps), range(len(inversion.timesteps))[step or 0]
    assert window == {"start": index / count, "stop": (index + 1) / count}

    steerable(harness)
    strengths = []

    def strength(progress):
        strengths.append(progress)
        return 20.0

    plain = inversion.run(harness.pipe, output_type="latent").images
    harness.pipe.steer({3: strength}, **window)
    assert not torch.equal(inversion.run(harness.pipe, output_type="latent").images, plain)
    assert len(set(strengths)) == len(inversion.timesteps)


def test_the_step_nearest_to_a_share_of_noise(sd):
    inversion = invert(sd.pipe, IMAGES[0], "ab", 0.7, num_inference_steps=10)  # timesteps 700 or 601 down to 1 or 0
    count = len(inversion.timesteps)
    for at in (0.7, 0.46, 0.42, 0.001):
        nearest = min(inversion.timesteps, key=lambda t: abs(t - 1000 * at))
        assert inversion.window(at)["start"] == inversion.timesteps.index(nearest) / count


FOLLOWING = {
    "a window": {"features": {3: 20.0}, "start": 0.2, "stop": 0.5},
    "the last steps": {"features": {3: 20.0}, "start": 0.5},
    "a function": {"features": {3: lambda done: 20.0 * done}},
    "of an operation": {"features": {3: 6.0}, "mode": "set", "stop": 0.4},
}


@pytest.mark.parametrize("edit", FOLLOWING)
def test_a_run_is_followed_back_with_edits_at_the_steps_where_they_acted(edit):
    harness = Harness()
    harness.bare.unet.conv_out.weight.data *= 0.05
    pipe, call = harness.pipe, {"num_inference_steps": 8, "iterations": 12}
    start = invert(pipe, IMAGES, "ab", 0.7, **call)
    steerable(harness)
    pipe.steer(**FOLLOWING[edit])
    made = start.run(pipe, output_type="latent").images
    assert not torch.equal(made, start.run(harness.bare, output_type="latent").images)
    twin = with_components(pipe, scheduler=InverseSteps(pipe.scheduler, 700, 12))
    size = {"height": 16, "width": 16, "num_inference_steps": 8, "guidance_scale": 1.0}
    found = twin(["ab"] * 2, latents=made, output_type="latent", **size).images
    assert (found - start.latents).norm() < 1e-3 * start.latents.norm()


def test_steps_that_are_left_out_warn_where_edits_count_them(sd):
    sd.pipe.load_sae(random_sae())
    call = {"num_inference_steps": 4, "edited": True}

    def warned(to=0.7, **edit) -> bool:
        with warnings.catch_warnings(record=True) as caught, sd.pipe.steering(**edit):
            warnings.simplefilter("always")
            invert(sd.pipe, IMAGES, "ab", to, **call)
        return any("so pass to=1" in str(each.message) for each in caught)

    assert warned(features={3: 2.0}, stop=0.5) and warned(features={3: lambda done: done})
    assert not warned(features={3: 2.0}) and not warned(1.0, features={3: 2.0}, stop=0.5)
    call["edited"] = False
    assert not warned(features={3: 2.0}, stop=0.5)


def test_run_takes_another_prompt_and_guidance(sd):
    inversion = invert(sd.pipe, IMAGES, ["ab", "cd"], num_inference_steps=4)
    plain = inversion.run(sd.pipe, output_type="pt").images
    other = inversion.run(sd.pipe, prompt="zz", output_type="pt").images
    guided = inversion.run(sd.pipe, guidance_scale=4.0, output_type="pt").images
    assert plain.shape == other.shape == guided.shape == (2, 3, 16, 16)
    assert not torch.equal(plain, other) and not torch.equal(plain, guided)


BAD = {
    "type": ({"image": "cat.png"}, "PIL image"),
    "size": ({"image": picture(20)}, "multiples of 8"),
    "sizes": ({"image": [picture(16), picture(24)]}, "different sizes"),
    "no image": ({"image": []}, "at least one"),
    "shape": ({"image": torch.rand(16, 16, 3)}, "(N, 3, H, W)"),
    "whole numbers": ({"image": torch.full((3, 16, 16), 7)}, "numbers of type int64 other than 0 and 1"),
    "transparent": ({"image": Image.new("RGBA", (16, 16))}, "transparent places"),
    "range": ({"image": IMAGES * 2 - 1}, "outside 0 to 1"),
    "nan": ({"image": IMAGES * float("nan")}, "NaN"),
    "prompts": ({"prompt": ["a", "b", "c"]}, "3 prompts for 2 images"),
    "prompt": ({"prompt": 7}, "pass a string"),
    "to 0": ({"to": 0.0}, "(0, 1]"),
    "to above 1": ({"to": 1.5}, "(0, 1]"),
    "to nan": ({"to": float("nan")}, "(0, 1]"),
    "to text": ({"to": "noise"}, "(0, 1]"),
    "to below the steps": ({"to": 0.0005}, "larger to"),
    "steps": ({"num_inference_steps": 0}, "1 to 1000"),
    "too many steps": ({"num_inference_steps": 1001}, "1 to 1000"),
    "iterations": ({"iterations": 0}, "from 1 on"),
    "an empty batch": ({"image": torch.zeros(0, 3, 16, 16)}, "is a tensor (0, 3, 16, 16); pass (3, H, W)"),
    "guidance text": ({"guidance_scale": "strong"}, "guidance_scale='strong' is no finite number"),
    "guidance none": ({"guidance_scale": None}, "guidance_scale=None is no finite number"),
    "guidance nan": ({"guidance_scale": float("nan")}, "guidance_scale=nan is no finite number"),
    "decisions of a plan at rest": ({"decisions": {}}, "edited=True"),
    "decisions of no rule": ({"edited": True, "decisions": {("default_0", 0): [True, True]}}, "no edit in force"),
    "decisions": ({"edited": True, "decisions": [True]}, "no mapping"),
    "decoder iterations": ({"decoder_iterations": -1}, "from 0 on"),
}


def state_of(pipe):
    """What must not change."""
    hooks = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in pipe.unet.named_modules()}
    return dict(pipe.config), hooks, pipe.scheduler, copy.deepcopy(vars(pipe.scheduler)), torch.get_rng_state()


def assert_same_state(before, after):
    assert before[0] == after[0] and before[1] == after[1] and before[2] is after[2]
    assert before[3].keys() == after[3].keys()
    assert all(torch.equal(torch.as_tensor(before[3][k]), torch.as_tensor(after[3][k])) for k in ("timesteps", "betas"))
    assert before[3]["num_inference_steps"] == after[3]["num_inference_steps"]
    assert torch.equal(before[4], after[4])


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_said_in_one_sentence_and_changes_nothing(sd, name):
    arguments, said = BAD[name]
    sd.pipe.load_sae(random_sae())
    sd.pipe.steer({3: 2.0})
    before = state_of(sd.pipe)
    with pytest.raises(InputError) as error:
        invert(sd.pipe, **{"image": IMAGES, "prompt": "ab", "num_inference_steps": 4, **arguments})
    assert said in str(error.value) and str(error.value).count(". ") == 0
    assert_same_state(before, state_of(sd.pipe))


def test_nothing_changes_when_it_goes_well(sd):
    sd.pipe.load_sae(random_sae())
    sd.pipe.steer({3: 2.0})
    image = sd.run()
    before = state_of(sd.pipe)
    inversion = invert(sd.pipe, IMAGES, "ab", num_inference_steps=4)
    inversion.run(sd.pipe)
    assert_same_state(before, state_of(sd.pipe))
    assert torch.equal(sd.run(), image)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (lambda: EulerDiscreteScheduler(), "DDIMScheduler.from_config"),
        (lambda: DDIMScheduler(clip_sample=True), "clip_sample=False"),
        (lambda: DDIMScheduler(clip_sample=False, thresholding=True), "thresholding=False"),
        (lambda: DDIMScheduler(clip_sample=False, prediction_type="sample"), "epsilon"),
        (lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling=False"),
    ],
)
def test_schedulers_that_cannot_be_undone_are_refused(sd, scheduler, said):
    sd.pipe.scheduler = scheduler()
    with pytest.raises(InputError, match=said):
        invert(sd.pipe, IMAGES, "ab")


def zero_snr(prediction, beta_schedule="scaled_linear", rescale=True):
    return DDIMScheduler(
        clip_sample=False,
        prediction_type=prediction,
        beta_schedule=beta_schedule,
        rescale_betas_zero_snr=rescale,
        timestep_spacing="trailing",
    )


def test_epsilon_where_nothing_of_the_image_is_left_is_refused(sd):
    """There a prediction of epsilon says nothing about the image, while one of velocity is the image."""
    sd.bare.unet.conv_out.weight.data *= 0.05
    for scheduler in (zero_snr("epsilon"), zero_snr("epsilon", "squaredcos_cap_v2", rescale=False)):
        sd.bare.scheduler = scheduler
        with pytest.raises(InputError, match="At timestep 999 .* pass a smaller to, or use a model of velocity"):
            invert(sd.bare, IMAGES, "ab", 1.0, num_inference_steps=6)
        assert invert(sd.bare, IMAGES, "ab", 0.9, num_inference_steps=6).latents.isfinite().all()
    sd.bare.scheduler = zero_snr("v_prediction")
    inversion = invert(sd.bare, IMAGES, "ab", 1.0, num_inference_steps=6, iterations=12)
    assert inversion.timesteps[0] == 999
    expected = invert(sd.bare, IMAGES, "ab", 0.5, num_inference_steps=6, iterations=12)
    torch.testing.assert_close(
        inversion.run(sd.bare, output_type="pt").images,
        expected.run(sd.bare, output_type="pt").images,
        atol=2e-3,
        rtol=0,
    )


class OwnCall(StableDiffusionPipeline):
    """Denoises in its own way, for all one knows."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class OwnName(StableDiffusionPipeline):
    """Denoises as the class that it inherits from."""


def test_classes_of_users_are_taken_by_their_call(sd):
    expected = invert(sd.bare, IMAGES, "ab", num_inference_steps=3).latents
    sd.bare.__class__ = OwnName
    assert torch.equal(invert(sd.bare, IMAGES, "ab", num_inference_steps=3).latents, expected)
    steerable = SAESteeringPipeline.from_pipe(sd.bare)
    assert torch.equal(invert(steerable, IMAGES, "ab", num_inference_steps=3).latents, expected)
    sd.bare.__class__ = OwnCall
    with pytest.raises(InputError, match="OwnCall denoises by a __call__ of its own"):
        invert(sd.bare, IMAGES, "ab", num_inference_steps=3)


@pytest.mark.parametrize(
    "kind",
    [
        "Flux",
        "Stable Diffusion img2img",
        "SDXL img2img",
        "Stable Diffusion 3 img2img",
        "Stable Diffusion ControlNet",
        "Kandinsky 2.2",
    ],
)
def test_other_pipelines_are_refused(kind):
    with pytest.raises(InputError, match="StableDiffusion3Pipeline"):
        invert(Harness(kind).pipe, IMAGES, "ab")


def test_a_run_refuses_what_the_inversion_decides(sd):
    inversion = invert(sd.pipe, IMAGES, "ab", num_inference_steps=4)
    assert isinstance(inversion, Inversion)
    with pytest.raises(InputError, match="num_inference_steps is decided"):
        inversion.run(sd.pipe, num_inference_steps=8)
    with pytest.raises(InputError, match="2 images"):
        inversion.run(sd.pipe, prompt=["a", "b", "c"])
    with pytest.raises(InputError, match="share of noise"):
        inversion.window(0.9)
    sd.pipe.scheduler = DDIMScheduler.from_config(sd.pipe.scheduler.config, timestep_spacing="trailing")
    with pytest.raises(InputError, match="other timesteps"):
        inversion.run(sd.pipe)


def test_a_step_that_leaves_nothing_of_the_noise_is_refused():
    cosine = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    with pytest.raises(InputError, match="pass more steps"):
        InverseSteps(cosine, 1000).set_timesteps(1)
    InverseSteps(cosine, 1000).set_timesteps(2)
