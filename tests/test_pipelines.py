"""Exactness of the public face on tiny real pipelines: nothing changes that was not asked to."""

import copy
import inspect
import warnings
from functools import partial

import pytest
import torch
from conftest import SITE, Harness, random_sae
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    LEditsPPPipelineStableDiffusion,
    StableDiffusionPipeline,
)
from tiny import picture
from tiny import sd as tiny_sd

from diffusers_sae import SAESteeringPipeline, Site


def test_disabled_sae_changes_no_bit(sd, sae):
    sd.pipe.load_sae(sae, adapter_name="one")
    sd.pipe.steer({3: 9.0})
    steered = sd.run()
    sd.pipe.disable_sae("one")
    assert torch.equal(sd.run(sd.bare), sd.run())
    sd.pipe.enable_sae()
    assert torch.equal(steered, sd.run())


def test_pipelines_that_share_the_unet_are_not_touched(sd, sae):
    sibling = SAESteeringPipeline.from_pipe(sd.pipe)
    before = sd.run(sd.bare)
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: 9.0})
    assert not torch.equal(before, sd.run())
    assert torch.equal(before, sd.run(sd.bare))
    assert torch.equal(before, sd.run(sibling))
    assert sibling.get_list_saes() == {}


def test_two_calls_in_a_row_equal_two_fresh_ones(sd, sae):
    def fresh():
        harness = Harness()
        harness.pipe.load_sae(sae)
        harness.pipe.steer({3: 9.0}, stop=0.6)
        return harness

    one = fresh()
    first, second = one.run(prompt="ab"), one.run(prompt="cd", num_inference_steps=3)
    assert torch.equal(first, fresh().run(prompt="ab"))
    assert torch.equal(second, fresh().run(prompt="cd", num_inference_steps=3))


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize("mode", ["add", "set", "scale", "ablate"])
def test_a_batch_equals_single_runs(sd, sae, guidance_scale, mode):
    sd.pipe.load_sae(sae)
    strengths = [3.0, -2.0, 0.5, 1.0]
    prompts = ["ab", "cd", "ef", "gh"]
    seeds = [torch.Generator().manual_seed(i) for i in range(4)]
    sd.pipe.steer(dict.fromkeys(range(8), strengths), mode=mode)
    batch = sd.run(prompt=prompts, generator=seeds, guidance_scale=guidance_scale)
    for i, prompt in enumerate(prompts):
        sd.pipe.reset_steering()
        sd.pipe.steer(dict.fromkeys(range(8), strengths[i]), mode=mode)
        single = sd.run(prompt=prompt, generator=torch.Generator().manual_seed(i), guidance_scale=guidance_scale)
        torch.testing.assert_close(batch[i : i + 1], single, atol=2e-5, rtol=0)


def test_images_per_prompt_are_images_of_the_batch(sd, sae):
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: [8.0, 0.0, 0.0, 8.0]})
    steered = sd.run(prompt=["ab", "cd"], num_images_per_prompt=2)
    bare = sd.run(sd.bare, prompt=["ab", "cd"], num_images_per_prompt=2)
    assert [bool((a != b).any()) for a, b in zip(steered, bare, strict=True)] == [True, False, False, True]


@pytest.mark.parametrize("size", [(16, 32), (32, 16)])
def test_non_square_images(sd, sae, size):
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: 8.0})
    steered = sd.run(height=size[0], width=size[1])
    assert steered.shape[-2:] == size
    assert not torch.equal(steered, sd.run(sd.bare, height=size[0], width=size[1]))


def test_guidance_off_has_one_branch(sd):
    with sd.pipe.capture(["unet.mid_block"]) as activations:
        sd.run(guidance_scale=1.0)
    assert set(activations["unet.mid_block"].branch) == {"cond"}


def test_guidance_that_a_callback_switches_off_is_noticed(sd, sae):
    def off(pipe, step, timestep, kwargs):
        if step == 1:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: 8.0})
    with sd.pipe.capture([SITE]) as activations:
        sd.run(callback_on_step_end=off, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert activations[SITE].branch == ["uncond", "cond", "uncond", "cond", "cond", "cond"]


@pytest.mark.parametrize(("start", "stop"), [(0.0, 0.5), (0.5, 1.0), (0.25, 0.75)])
def test_edits_act_only_inside_their_window(sd, sae, start, stop):
    """An edit with a window equals a callable that is 0 outside of it."""
    sd.pipe.load_sae(sae)

    def inside(progress):
        return 5.0 if start <= progress < stop else 0.0

    with sd.pipe.steering({3: inside}):
        expected = sd.run(num_inference_steps=8)
    with sd.pipe.steering({3: 5.0}):
        assert not torch.equal(sd.run(num_inference_steps=8), expected)
    with sd.pipe.steering({3: 5.0}, start=start, stop=stop):
        assert torch.equal(sd.run(num_inference_steps=8), expected)


def test_a_callable_is_asked_at_every_step_of_the_run(sd, sae):
    sd.pipe.load_sae(sae)
    seen = []
    sd.pipe.steer({3: lambda progress: seen.append(progress) or 0.0})
    sd.run(num_inference_steps=8)
    assert seen == [i / 8 for i in range(8)]


def test_steps_before_the_window_are_untouched(sd, sae):
    sd.pipe.load_sae(sae)
    with sd.pipe.capture([SITE]) as bare:
        sd.run()
    sd.pipe.steer({3: 8.0}, start=0.5)
    with sd.pipe.capture([SITE]) as steered:
        sd.run()
    a, b = bare[SITE], steered[SITE]
    same = (a.tensor == b.tensor).flatten(1).all(1)
    early = a.timestep > 500
    assert same[early].all() and not same[~early].all()


def test_a_mask_keeps_the_other_places(sd, sae):
    mask = torch.zeros(16, 16)
    mask[:, :8] = 1
    sd.pipe.load_sae(sae)
    with sd.pipe.capture([SITE]) as bare:
        sd.run()
    sd.pipe.steer({3: 8.0}, mask=mask)
    with sd.pipe.capture([SITE]) as steered:
        sd.run()
    a, b = (x[SITE].select("cond", timestep=bare[SITE].timestep[0].item()) for x in (bare, steered))
    assert torch.equal(a[..., 4:], b[..., 4:]) and (a[..., :4] != b[..., :4]).any()


def test_steering_is_scoped(sd, sae):
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: 2.0})
    outside = sd.run()
    with sd.pipe.steering({5: 9.0}):
        assert not torch.equal(outside, sd.run())
    assert torch.equal(outside, sd.run())
    with pytest.raises(ZeroDivisionError), sd.pipe.steering({5: 9.0}):
        raise ZeroDivisionError
    assert torch.equal(outside, sd.run())


def test_saes_at_one_site_and_at_several_add_up(sd):
    """Deltas of SAEs at one site are taken from the tensor that the model made, so that their order is of no matter."""
    a, b = random_sae(), random_sae()
    other = "unet.down_blocks.0.attentions.0"

    def run(order):
        harness = Harness()
        for name in order:
            harness.pipe.load_sae({"a": a, "b": b, "c": b}[name], other if name == "c" else SITE, adapter_name=name)
        for name in order:
            harness.pipe.steer({3: 0.5}, adapter_name=name, mode="scale")
        return harness.run()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(run("abc"), run("cba"), atol=1e-6, rtol=0)
        assert not torch.equal(run("abc"), run("ab")) and not torch.equal(run("ab"), run("a"))


def test_delete_keeps_the_others(sd):
    sd.pipe.load_sae(random_sae(), adapter_name="a")
    sd.pipe.load_sae(random_sae(), adapter_name="b")
    sd.pipe.steer({1: 4.0}, adapter_name="a")
    only_a = sd.run()
    sd.pipe.steer({1: 4.0}, adapter_name="b")
    sd.pipe.delete_saes("b")
    assert torch.equal(only_a, sd.run())
    assert list(sd.pipe.get_list_saes()) == ["a"]


def test_an_sae_that_is_named_twice_is_deleted_once(sd):
    for name in ("a", "b"):
        sd.pipe.load_sae(random_sae(), adapter_name=name)
    sd.pipe.delete_saes(["a", "a"])
    assert list(sd.pipe.get_list_saes()) == ["b"]


@pytest.mark.parametrize("kind", ["output", "update"])
def test_output_and_update_sites_move_the_output(sd, sae, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sd.pipe.load_sae(sae, Site(SITE, kind=kind))
    with sd.pipe.capture([SITE]) as bare:
        sd.run()
    sd.pipe.steer({3: 8.0})
    with sd.pipe.capture([SITE]) as steered:
        sd.run()
    t = bare[SITE].timestep[0].item()
    moved = steered[SITE].rows("cond", t) - bare[SITE].rows("cond", t)
    torch.testing.assert_close(moved, (8.0 * sae.W_dec[3]).expand_as(moved), atol=1e-5, rtol=1e-5)


def test_an_update_site_encodes_output_minus_input(sd, sae):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sd.pipe.load_sae(sae, Site(SITE, kind="update"))
    with sd.pipe.capture([Site(SITE, kind="update")]) as updates:
        sd.run()
    with sd.pipe.capture([SITE]) as bare:
        sd.run()
    sd.pipe.steer(dict.fromkeys(range(32), 1.0), mode="ablate")
    with sd.pipe.capture([SITE]) as steered:
        sd.run()
    t = bare[SITE].timestep[0].item()
    u = updates[SITE].rows("cond", t)
    expected = bare[SITE].rows("cond", t) - sae.encode(u) @ sae.W_dec
    torch.testing.assert_close(steered[SITE].rows("cond", t), expected, atol=1e-5, rtol=1e-5)


def test_output_and_update_saes_at_one_module_each_act_once(sd):
    def run(*kinds):
        harness = Harness()
        for seed, kind in enumerate(kinds):
            torch.manual_seed(seed)
            sae = random_sae(site=Site(SITE, kind=kind).as_dict())
            harness.pipe.load_sae(sae, adapter_name=kind)
            harness.pipe.steer({3: 2.0}, kind)
        with harness.pipe.capture([SITE]) as activations:
            harness.run()
        return activations[SITE].rows("cond", activations[SITE].timestep[0].item())

    bare, both = run(), run("output", "update")
    torch.manual_seed(0)
    first = random_sae().W_dec[3]
    torch.manual_seed(1)
    second = random_sae().W_dec[3]
    torch.testing.assert_close(both - bare, (2 * (first + second)).expand_as(bare), atol=1e-5, rtol=1e-4)


def test_an_input_site_moves_the_input(sd, sae):
    seen = []
    module = sd.pipe.unet.get_submodule(SITE.removeprefix("unet."))
    handle = module.norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sd.pipe.load_sae(sae, Site(SITE, kind="input"))
    sd.run()
    sd.pipe.steer({3: 8.0})
    sd.run()
    handle.remove()
    bare, steered = seen[0], seen[len(seen) // 2]
    moved = (steered - bare)[1].flatten(1).T  # row 1 is cond
    torch.testing.assert_close(moved, (8.0 * sae.W_dec[3]).expand_as(moved), atol=1e-5, rtol=1e-5)
    assert torch.equal(steered[0], bare[0])


def test_half_precision_no_op_is_exact_and_modules_keep_their_dtype(sae):
    harness = Harness()
    harness.bare.to(torch.bfloat16)
    pipe = SAESteeringPipeline.from_pipe(harness.bare)
    assert pipe.unet.dtype == harness.bare.vae.dtype == torch.bfloat16
    pipe.load_sae(sae)
    bare = harness.run(harness.bare)
    assert torch.equal(bare, harness.run(pipe))
    pipe.steer({3: 8.0})
    assert not torch.equal(bare, harness.run(pipe))
    assert sae.W_dec.dtype == torch.float32


def test_saved_pipeline_loads_in_stock_diffusers(sd, sae, tmp_path):
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: 8.0})
    sd.pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*sae*"))
    for loaded in (DiffusionPipeline.from_pretrained(tmp_path), StableDiffusionPipeline.from_pretrained(tmp_path)):
        assert type(loaded) is StableDiffusionPipeline
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(sd.run(sd.bare), sd.run(loaded))


def test_from_pretrained_is_both_classes_and_equals_stock(sd, sae, tmp_path):
    sd.bare.save_pretrained(tmp_path)
    pipe = SAESteeringPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, SAESteeringPipeline) and isinstance(pipe, StableDiffusionPipeline)
    assert torch.equal(sd.run(sd.bare), sd.run(pipe))
    assert inspect.signature(pipe.__call__) == inspect.signature(sd.bare.__call__)
    assert list(pipe.components) == list(sd.bare.components)
    again = type(pipe).from_pretrained(tmp_path)
    assert isinstance(again, SAESteeringPipeline)


def test_stock_from_pipe_still_works(sd, sae):
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: 8.0})
    other = AutoPipelineForImage2Image.from_pipe(sd.pipe)
    assert other.unet is sd.pipe.unet and not isinstance(other, SAESteeringPipeline)
    plain = StableDiffusionPipeline.from_pipe(sd.pipe)
    plain.set_progress_bar_config(disable=True)
    assert torch.equal(sd.run(sd.bare), sd.run(plain))


def test_an_error_in_the_middle_of_a_run_disarms(sd, sae):
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: 8.0})
    steered = sd.run()

    def stop(pipe, step, timestep, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sd.run(callback_on_step_end=stop)
    assert torch.equal(sd.run(sd.bare), Harness().run())
    assert torch.equal(steered, sd.run())


def test_copies_of_a_steered_pipeline_have_plans_of_their_own(sd, sae):
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: 8.0})
    twin = SAESteeringPipeline.from_pipe(sd.pipe)
    assert torch.equal(sd.run(sd.bare), sd.run(twin))
    unet = copy.copy(sd.pipe.unet)
    assert unet is not sd.pipe.unet


def test_ledits_edits_a_real_image_and_its_inversion_is_left_alone():
    """One uncond branch and one cond branch for each edit prompt; `invert` runs outside of the call."""
    torch.manual_seed(0)
    scheduler = partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++", solver_order=2)
    bare = tiny_sd(LEditsPPPipelineStableDiffusion, scheduler=scheduler)
    bare.set_progress_bar_config(disable=True)
    pipe = SAESteeringPipeline.from_pipe(bare)

    def run(pipe):
        torch.manual_seed(1)
        seed = torch.Generator().manual_seed(0)
        pipe.invert(image=picture(32), num_inversion_steps=5, skip=0.2, generator=seed, height=32, width=32)
        scales = {"edit_guidance_scale": [3.0, 4.0], "edit_threshold": [0.5, 0.5], "use_intersect_mask": False}
        return pipe(editing_prompt=["ab", "cd"], **scales, output_type="pt", generator=seed).images

    before = run(bare)
    with pipe.capture([SITE]) as activations:
        assert torch.equal(run(pipe), before)
    assert activations[SITE].branch[:4] == ["uncond", "cond", "cond", "uncond"]
    pipe.load_sae(random_sae())
    pipe.steer({3: 9.0})
    assert not torch.equal(run(pipe), before)
    pipe.reset_steering()
    assert torch.equal(run(pipe), before)
