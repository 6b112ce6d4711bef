"""Streams and the shuffle buffer: nothing lost, nothing twice, resumable."""

import pytest
import torch
from conftest import SITE

from diffusers_sae import InputError
from diffusers_sae.capture import ShuffleBuffer, stream_activations

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
