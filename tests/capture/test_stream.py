"""Streams and the shuffle buffer: nothing lost, nothing twice, resumable."""

import copy

import numpy as np
import pytest
import torch
from conftest import SITE, Harness
from PIL import Image

from diffusers_sae import InputError, SAESteeringPipeline, TopKSAE
from diffusers_sae.capture import ShuffleBuffer, StoreConfig, store_activations, stream_activations
from diffusers_sae.hooks import current_run
from diffusers_sae.training import StreamingConfig, train_on_stream

CALL = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 16, "width": 16}
PROMPTS = ["ab", "cd", "ef", "gh", "ij"]


def test_stream_holds_what_the_pipeline_held(sd):
    sites = [SITE, "unet.mid_block"]
    batches = list(stream_activations(sd.pipe, sites, PROMPTS, batch_size=2, seed=7, **CALL))
    assert [b.prompts for b in batches] == [["ab", "cd"], ["ef", "gh"], ["ij"]]
    rows, timesteps = batches[1].rows(SITE)
    assert rows.shape == (3, 2, 64, 8) and timesteps.tolist() == sd.pipe.scheduler.timesteps.tolist()
    with sd.pipe.capture(sites) as direct:
        sd.run(prompt="gh", generator=torch.Generator().manual_seed(7 + 3), num_inference_steps=3)
    torch.testing.assert_close(rows[:, 1], direct[SITE].rows("cond"), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="held no rows of the branch 'perturbed'; it held cond, uncond"):
        batches[0].rows(SITE, "perturbed")


def test_the_first_step_alone_is_the_first_of_all(sd):
    whole = next(stream_activations(sd.pipe, [SITE], PROMPTS, **CALL))
    first = next(stream_activations(sd.pipe, [SITE], PROMPTS, first_step_only=True, **CALL))
    rows, timesteps = first.rows(SITE)
    assert timesteps.tolist() == whole.rows(SITE)[1][:1].tolist()
    assert torch.equal(rows[0], whole.rows(SITE)[0][0])


def test_the_plan_rests_while_a_stream_runs_and_acts_between_its_batches(sd, sae):
    bare = next(stream_activations(sd.pipe, ["unet.mid_block", SITE], PROMPTS[:2], **CALL))
    unsteered = sd.run()
    sd.pipe.load_sae(sae)
    sd.pipe.load_sae(sae, adapter_name="off")
    sd.pipe.steer({3: 9.0}, "default_0")
    sd.pipe.steer({4: 9.0}, "off")
    sd.pipe.disable_sae("off")
    steered = sd.run()
    assert not torch.equal(steered, unsteered)
    stream = stream_activations(sd.pipe, ["unet.mid_block", SITE], PROMPTS[:2] * 2, batch_size=2, **CALL)
    first = next(stream)
    assert torch.equal(sd.run(), steered)  # between two batches, too
    for path in first.sites:
        assert torch.equal(first.rows(path)[0], bare.rows(path)[0])
    assert [told["enabled"] for told in sd.pipe.get_list_saes().values()] == [True, False]


def test_the_plan_is_in_force_again_after_an_error(sd, sae):
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: 9.0})
    steered = sd.run()
    with pytest.raises(ValueError, match="divisible by 8"):
        next(stream_activations(sd.pipe, [SITE], PROMPTS, **{**CALL, "height": 15}))
    assert torch.equal(sd.run(), steered)


@pytest.mark.parametrize("make", [store_activations, train_on_stream])
def test_stores_and_training_do_not_depend_on_the_plan(sd, sae, tmp_path, make):
    def result(folder):
        if make is store_activations:
            found = store_activations(sd.pipe, [SITE], PROMPTS, folder, StoreConfig(images=5, batch_size=2), **CALL)
            return found[SITE].shard(0)["rows"]
        config = StreamingConfig(images=4, batch_size=2, rows=64, buffer=4096)
        torch.manual_seed(0)
        makers = {SITE: lambda width: TopKSAE(width, 16, 2)}
        return train_on_stream(sd.pipe, makers, PROMPTS, config, folder, **CALL)[SITE].W_dec

    bare = result(tmp_path / "bare")
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: 9.0})
    assert torch.equal(result(tmp_path / "steered"), bare)


@pytest.fixture
def modules_run(sd):
    """The U-Net's blocks in the order in which they begin."""
    unet, names = sd.pipe.unet, []
    blocks = {"down": list(unet.down_blocks), "mid": [unet.mid_block], "up": list(unet.up_blocks)}
    hooks = [
        block.register_forward_pre_hook(lambda *a, name=name: names.append(name))
        for name, each in blocks.items()
        for block in each
    ]
    yield names
    for hook in hooks:
        hook.remove()


def test_the_denoiser_runs_no_further_than_to_the_last_site(sd, modules_run):
    """For h-space, that is the down path and the bottleneck; and what was seen there is the same."""
    whole = next(stream_activations(sd.pipe, ["unet.mid_block"], PROMPTS, **CALL))
    modules_run.clear()
    sites = ["unet.mid_block", "unet.down_blocks.0"]
    first = next(stream_activations(sd.pipe, sites, PROMPTS, first_step_only=True, **CALL))
    assert modules_run == ["down"] * len(sd.pipe.unet.down_blocks) + ["mid"]
    assert torch.equal(first.rows("unet.mid_block")[0], whole.rows("unet.mid_block")[0][:1])
    assert current_run() is None
    modules_run.clear()
    next(stream_activations(sd.pipe, sites, PROMPTS, **CALL))
    assert modules_run.count("up") == 3 * len(sd.pipe.unet.up_blocks)


def test_a_compiled_denoiser_is_run_to_its_end(sd):
    """Leaving it by an exception would be up to the compiler."""
    bare = next(stream_activations(sd.pipe, ["unet.mid_block"], PROMPTS, first_step_only=True, **CALL))
    pipe = SAESteeringPipeline.from_pipe(sd.pipe, unet=copy.deepcopy(sd.pipe.unet))
    pipe.set_progress_bar_config(disable=True)
    ended: list[str] = []
    pipe.unet.conv_out.register_forward_hook(lambda *_: ended.append("out"))
    pipe.unet.compile(backend="eager")
    compiled = next(stream_activations(pipe, ["unet.mid_block"], PROMPTS, first_step_only=True, **CALL))
    assert ended == ["out"]
    torch.testing.assert_close(compiled.rows("unet.mid_block")[0], bare.rows("unet.mid_block")[0])


def test_a_denoiser_that_is_called_branch_by_branch_is_not_left_after_the_first():
    flux = Harness("Flux, true guidance")
    call = {**flux.tiny.arguments, "num_inference_steps": 2}
    batch = next(stream_activations(flux.pipe, [flux.tiny.site], ["ab"], first_step_only=True, **call))
    assert set(batch.sites[flux.tiny.site].branch) == {"cond", "uncond"}


def test_skipping_resumes_with_the_same_images(sd):
    whole = list(stream_activations(sd.pipe, [SITE], PROMPTS, batch_size=1, **CALL))
    rest = list(stream_activations(sd.pipe, [SITE], PROMPTS, batch_size=1, skip=3, **CALL))
    assert [b.first_image for b in rest] == [3, 4]
    for a, b in zip(whole[3:], rest, strict=True):
        assert torch.equal(a.rows(SITE)[0], b.rows(SITE)[0])


def test_buffer_mixes_what_it_was_given():
    buffer = ShuffleBuffer(100, 1, torch.Generator().manual_seed(0))
    buffer.add(torch.arange(60.0).view(3, 20, 1))
    assert buffer.rows.flatten().tolist() == list(range(60))
    sample = buffer.sample(5000).flatten()
    assert set(sample.tolist()) == set(range(60))
    assert sample[:60].tolist() != sorted(sample[:60].tolist())


def test_a_full_buffer_replaces_random_rows_and_keeps_the_newest():
    buffer = ShuffleBuffer(100, 1, torch.Generator().manual_seed(0))
    buffer.add(torch.zeros(100, 1))
    buffer.add(torch.ones(30, 1))
    assert buffer.rows.sum() == 30
    assert 0 < buffer.rows[:30].sum() < 30
    buffer.add(torch.full((500, 1), 2.0))
    assert (buffer.rows == 2).all()


def test_of_more_rows_than_it_holds_the_buffer_keeps_a_random_choice():
    buffer = ShuffleBuffer(100, 1, torch.Generator().manual_seed(0))
    buffer.add(torch.arange(1000.0).view(10, 100, 1))
    held = buffer.rows.flatten()
    assert len(set(held.tolist())) == 100
    by_timestep = torch.bincount((held / 100).long(), minlength=10)
    assert by_timestep.min() >= 3  # 10 of each on average; the first alone would be 100 of one


def test_labels_of_captured_activations(sd):
    with sd.pipe.capture([SITE]) as activations:
        sd.run(prompt=["ab", "cd"])
        sd.run(prompt="ef")
    site = activations[SITE]
    assert len(site.tensor) == len(site.branch) == len(site.timestep) == len(site.image) == 4 * 2 * 3
    assert site.image.unique().tolist() == [0, 1, 2]
    assert site.select("cond", image=2).shape == (4, 8, 8, 8)
    with sd.pipe.capture([SITE]) as alone:
        sd.run(prompt="ef")
    assert torch.equal(alone[SITE].tensor, site.tensor[-8:])


def test_capture_changes_no_bit_and_leaves_no_hook(every):
    bare = every.run(every.bare)
    site = every.tiny.site
    with every.pipe.capture([site]):
        assert torch.equal(bare, every.run())
    name, _, path = site.partition(".")
    denoiser = getattr(every.pipe, name)
    assert not denoiser._forward_pre_hooks
    assert not denoiser.get_submodule(path)._diffusers_hook.hooks
    with pytest.raises(InputError, match="capture takes a list of sites"), every.pipe.capture(site):
        pass


@pytest.fixture(scope="module")
def img2img():
    """An img2img pipeline and images of its size."""
    harness = Harness("Stable Diffusion img2img")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    return harness, [Image.fromarray(each) for each in pixels]


STRENGTHS = {"strengths": (0.25, 0.75, 1.0), "num_inference_steps": 4, "guidance_scale": 5.0}


def test_images_with_noise_are_seen_once_a_strength(img2img, monkeypatch):
    harness, images = img2img
    calls = []
    forward = type(harness.pipe.unet).forward
    monkeypatch.setattr(type(harness.pipe.unet), "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    batches = list(
        stream_activations(harness.pipe, [SITE], PROMPTS[:3], batch_size=2, seed=5, images=images, **STRENGTHS)
    )
    assert len(calls) == 6 and [b.prompts for b in batches] == [["ab", "cd"], ["ef"]]
    schedule = harness.pipe.scheduler
    schedule.set_timesteps(4)
    rows, timesteps = batches[0].rows(SITE)
    assert timesteps.tolist() == [schedule.timesteps[i].item() for i in (3, 1, 0)] and rows.shape[:2] == (3, 2)
    assert batches[0].sites[SITE].image.unique().tolist() == [0, 1]
    # against the formula: the latents of the second image with noise, once through the denoiser
    pipe, seen = harness.pipe, {}
    pixels = pipe.image_processor.preprocess(images[1:2])
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.sample(generator) * pipe.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        text = pipe.encode_prompt("cd", "cpu", 1, False)[0]
        block = pipe.unet.get_submodule(SITE.removeprefix("unet."))
        hook = block.register_forward_hook(lambda module, args, out: seen.update(x=out[0]))
        for i, t in enumerate(timesteps):
            noisy = schedule.add_noise(latents, noise, t.reshape(1).long())
            pipe.unet(noisy, t, encoder_hidden_states=text)
            torch.testing.assert_close(rows[i, 1], seen["x"].flatten(2).transpose(1, 2)[0], atol=1e-4, rtol=1e-3)
        hook.remove()


def test_images_in_a_store(img2img, tmp_path):
    harness, images = img2img
    config = StoreConfig(3, 2, dtype="float32")
    stored = store_activations(harness.pipe, [SITE], PROMPTS[:3], tmp_path, config, images=images, **STRENGTHS)[SITE]
    assert len(stored) == 3 * 3 * 64 and stored.shard(0)["image"].unique().tolist() == [0, 1]
    again = store_activations(harness.pipe, [SITE], PROMPTS[:3], tmp_path, config, images=images, **STRENGTHS)[SITE]
    assert again.manifest == stored.manifest
    with pytest.raises(InputError, match="is of another run: call"):
        store_activations(harness.pipe, [SITE], PROMPTS[:3], tmp_path, config, images=images[::-1], **STRENGTHS)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"strengths": (0.1,)}, "Strength 0.1 must lie between one step of 4"),
        ({"images": [1, 2]}, "There are 2 pictures for 3 images; give one for each"),
    ],
)
def test_mistakes_with_images_leave_no_store(img2img, tmp_path, change, sentence):
    harness, images = img2img
    with pytest.raises(InputError, match=sentence):
        store_activations(
            harness.pipe, [SITE], PROMPTS[:3], tmp_path, StoreConfig(3, 2), **{"images": images, **STRENGTHS, **change}
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"strengths": (0.1,)}, "Strength 0.1 must lie between one step of 4"),
        ({"strengths": (1.5,)}, "Strength 1.5 must lie between"),
        ({"images": []}, "There are 0 images for more prompts"),
    ],
)
def test_mistakes_with_images(img2img, change, sentence):
    harness, images = img2img
    with pytest.raises(InputError, match=sentence):
        next(stream_activations(harness.pipe, [SITE], PROMPTS[:3], **{"images": images, **STRENGTHS, **change}))


def test_a_pipeline_without_images_is_refused(sd):
    with pytest.raises(InputError, match="takes no images to add noise to; make its img2img sibling"):
        next(stream_activations(sd.pipe, [SITE], PROMPTS, images=[1], **CALL))
