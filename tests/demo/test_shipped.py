"""The shipped model: exact where nothing is asked for, and visibly steered where it is."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_sae import SAESteeringPipeline
from diffusers_sae.demo.measure_removal import REMOVAL, edits_away
from diffusers_sae.demo.measure_steering import edits_towards, load_towards
from diffusers_sae.demo.shipped import (
    MODELS,
    SITES,
    generate,
    load_detectors,
    load_judge,
    load_pipeline,
    load_scores,
    look,
)

PROMPTS = ["a 3d render of a panda on a red background", "an ink drawing of a rocket on a yellow background",
           "pixel art of a woman cook with dark skin", "a gift"]  # fmt: skip
SITE = SITES[0]


@pytest.fixture(scope="module")
def bare():
    pipe = StableDiffusionPipeline.from_pretrained(MODELS / "emoji-sd", dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(bare):
    return SAESteeringPipeline.from_pipe(bare)


def run(pipe, prompts=PROMPTS[0], n=1, **call):
    count = n * (len(prompts) if isinstance(prompts, list) else 1)
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    arguments = {"num_inference_steps": 4, "guidance_scale": 4.0, "num_images_per_prompt": n, **call}
    return pipe(prompts, generator=generators, output_type="pt", **arguments).images


def load_all(pipe):
    for site in SITES:
        pipe.load_sae(MODELS / "saes" / site, adapter_name=site)


@pytest.mark.parametrize(
    "call", [{}, {"n": 2}, {"guidance_scale": 1.0}, {"height": 64, "width": 96}, {"prompts": PROMPTS[:2]}]
)
def test_what_changes_nothing_changes_no_bit(bare, pipe, call):
    expected = run(bare, **call)
    assert torch.equal(run(pipe, **call), expected)
    load_all(pipe)
    assert torch.equal(run(pipe, **call), expected)
    pipe.steer({3: 0.0}, adapter_name=SITE)
    pipe.steer({5: 1.0}, adapter_name=SITE, mode="scale")
    assert torch.equal(run(pipe, **call), expected)
    for edit in edits_towards(load_scores(), "ink", load_towards()["ink"]):
        pipe.steer(**edit)
    steered = run(pipe, **call)
    assert not torch.equal(steered, expected)
    assert torch.equal(run(pipe, **call), steered)
    pipe.reset_steering()
    assert torch.equal(run(pipe, **call), expected)
    pipe.unload_sae()
    assert torch.equal(run(pipe, **call), expected)


def test_a_batch_is_its_single_runs(pipe):
    load_all(pipe)
    for edit in edits_away(load_scores(), load_detectors(), "panda", REMOVAL["object"]):
        pipe.steer(**edit)
    batch = run(pipe, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(i)
        single = pipe(prompt, generator=generator, output_type="pt", num_inference_steps=4, guidance_scale=4.0).images
        torch.testing.assert_close(batch[i : i + 1], single, atol=2e-3, rtol=0)


def test_an_edit_of_cond_leaves_uncond_alone(pipe):
    load_all(pipe)
    call = {"num_inference_steps": 1}
    with pipe.capture([SITE]) as before:
        run(pipe, **call)
    pipe.steer({7: 3.0}, adapter_name=SITE)
    with pipe.capture([SITE]) as after:
        run(pipe, **call)
    assert torch.equal(before[SITE].rows("uncond"), after[SITE].rows("uncond"))
    assert not torch.equal(before[SITE].rows("cond"), after[SITE].rows("cond"))


def test_a_steered_pipeline_is_saved_as_the_stock_one(bare, pipe, tmp_path):
    load_all(pipe)
    pipe.steer({7: 3.0}, adapter_name=SITE)
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32, safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert type(again) is StableDiffusionPipeline
    assert torch.equal(run(again), run(bare))


def test_the_judge_sees_what_was_asked_for_and_what_was_steered():
    pipe, judge, scores = load_pipeline(), load_judge(), load_scores()
    prompts = ["a panda", "a rocket", "a house", "a cactus"]
    seen = look(judge, list(generate(pipe, prompts, range(4))))
    assert sum(s["background"][0] == "red" for s in seen) <= 1
    assert sum(s["object"][0] in p for s, p in zip(seen, prompts, strict=True)) >= 3
    load_all(pipe)
    for edit in edits_towards(scores, "red background", load_towards()["red background"]):
        pipe.steer(**edit)
    steered = look(judge, list(generate(pipe, prompts, range(4))))
    assert sum(s["background"][0] == "red" for s in steered) >= 3


def test_a_removal_touches_only_prompts_that_ask_for_the_concept(bare, pipe):
    load_all(pipe)
    expected = run(bare, PROMPTS, num_inference_steps=20)
    for edit in edits_away(load_scores(), load_detectors(), "panda", REMOVAL["object"]):
        pipe.steer(**edit)
    images = run(pipe, PROMPTS, num_inference_steps=20)
    assert [torch.equal(a, b) for a, b in zip(expected, images, strict=True)] == [False, True, True, True]
    seen = look(load_judge(), list(images * 2 - 1))
    assert seen[0]["object"][0] != "panda"
