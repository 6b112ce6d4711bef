"""The context: step, branches and rows, read from the denoiser's own arguments."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_sae import InputError
from diffusers_sae.context import DenoisingContext, TextContext
from diffusers_sae.families import family_of, images_of


def pipeline(name="StableDiffusionPipeline", guidance=True, **attributes):
    scheduler = SimpleNamespace(
        config=SimpleNamespace(num_train_timesteps=1000), timesteps=torch.tensor([999.0, 750.0, 250.0])
    )
    return type(name, (), {"do_classifier_free_guidance": guidance, "scheduler": scheduler, **attributes})()


def context_of(pipe, **call):
    context = DenoisingContext()
    context.start(pipe, call)
    context.prepare(torch.device("cpu"))
    return context


@pytest.mark.parametrize(
    ("pipe", "call", "branches"),
    [
        (pipeline(), {}, ("uncond", "cond")),
        (pipeline(guidance=False), {}, ("cond",)),
        (
            pipeline("StableDiffusionPAGPipeline", do_perturbed_attention_guidance=True),
            {},
            ("uncond", "cond", "perturbed"),
        ),
        (
            pipeline("StableDiffusionPAGPipeline", False, do_perturbed_attention_guidance=True),
            {},
            ("cond", "perturbed"),
        ),
        (pipeline("StableDiffusionXLPAGPipeline", do_perturbed_attention_guidance=False), {}, ("uncond", "cond")),
        (pipeline("StableDiffusionInstructPix2PixPipeline"), {}, ("cond", "image", "uncond")),
        (
            pipeline("StableDiffusionXLInstructPix2PixPipeline"),
            {"guidance_scale": 7.0, "image_guidance_scale": 0.5},
            ("cond",),
        ),
        (pipeline("PixArtSigmaPipeline"), {"guidance_scale": 4.5}, ("uncond", "cond")),
        (pipeline("PixArtSigmaPipeline"), {"guidance_scale": 1.0}, ("cond",)),
        (pipeline("FluxPipeline"), {"true_cfg_scale": 4.0}, ("cond",)),
        (pipeline("FluxPipeline"), {"true_cfg_scale": 4.0, "negative_prompt": ""}, ("cond", "uncond")),
        (pipeline("ZImagePipeline"), {}, ("cond", "uncond")),
        (pipeline("LEditsPPPipelineStableDiffusion", enabled_editing_prompts=2), {}, ("uncond", "cond", "cond")),
    ],
)
def test_branch_order(pipe, call, branches):
    assert family_of(pipe).branches(pipe, call) == branches


@pytest.mark.parametrize("timestep", [750, 750.0, torch.tensor(750), torch.tensor([750, 750])])
@pytest.mark.parametrize("by_name", [False, True])
def test_update_reads_positional_and_keyword_arguments(timestep, by_name):
    context = context_of(pipeline(), prompt=["a", "b", "c"])
    sample = torch.zeros(6, 4, 8, 12)
    for t in (torch.tensor(999.0), timestep):
        if by_name:
            context.update((), {"sample": sample, "timestep": t})
        else:
            context.update((sample, t), {})
    assert context.timestep == 750 and context.known_step == int(context.step) == 1
    assert (context.steps, context.step_count) == ((0, 1, 2), 3)
    assert (context.rows, context.images, context.size) == (6, 3, (8, 12))
    assert dict(context.parts()) == {"uncond": slice(0, 3), "cond": slice(3, 6)}


def test_a_run_that_begins_later_than_expected_says_so_once():
    context = context_of(pipeline(), prompt="a")
    sample, moved = torch.zeros(2, 4, 8, 8), []
    for t in (750.0, 250.0):
        context.update((sample, torch.tensor(t)), {})
        moved.append(context.moved)
    assert moved == [True, False]
    assert (context.timesteps, context.steps, context.known_step) == ((750.0, 250.0), (0, 1), 1)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("FluxPipeline", lambda t: t.expand(2) / 1000),
        ("FluxPipeline", lambda t: t.expand(2).bfloat16() / 1000),
        ("Flux2KleinPipeline", lambda t: t.expand(2).half() / 1000),
        ("ZImagePipeline", lambda t: (1000 - t.expand(2)) / 1000),
        ("SanaPipeline", lambda t: t.expand(2) * 0.3),
        ("SanaPAGPipeline", lambda t: t.expand(2).bfloat16()),
        ("SanaControlNetPipeline", lambda t: t.expand(2)),
        ("SanaSprintPipeline", lambda t: torch.sin(t.expand(2)) / (torch.cos(t.expand(2)) + torch.sin(t.expand(2)))),
        ("AuraFlowPipeline", lambda t: torch.tensor([t / 1000]).expand(2).bfloat16()),
        ("HunyuanDiTPipeline", lambda t: torch.tensor([t] * 2).half()),
        ("StableDiffusion3Pipeline", lambda t: t.expand(2)),
    ],
)
def test_timesteps_as_pipelines_give_them(name, given):
    """Every position of a schedule, with the pipeline's expression: some round to the same number."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=12.0)
    scheduler.set_timesteps(50)
    pipe = pipeline(name, guidance=False, transformer=SimpleNamespace(config=SimpleNamespace(timestep_scale=0.3)))
    pipe.scheduler, pipe.do_perturbed_attention_guidance = scheduler, False
    context, found = context_of(pipe, prompt=["a", "b"], guidance_scale=0.0), []
    for t in scheduler.timesteps:
        context.update((), {"hidden_states": torch.zeros(2, 4, 8, 8), "timestep": given(t)})
        found.append(context.known_step)
    assert found == list(range(50))


def test_branches_in_turn_alternate():
    context = context_of(pipeline("FluxPipeline"), prompt="a", true_cfg_scale=2.0, negative_prompt="b")
    seen = []
    for t in (0.999, 0.999, 0.75, 0.75):
        context.update((), {"hidden_states": torch.zeros(1, 16, 8), "timestep": torch.tensor([t])})
        seen.append((*context.branches, context.known_step))
    assert seen == [("cond", 0), ("uncond", 0), ("cond", 1), ("uncond", 1)]


def test_guidance_that_is_cut_off_and_skip_layer_guidance():
    cut = context_of(pipeline("ZImagePipeline"), prompt=["a", "b"])
    cut.update(([torch.zeros(4, 1, 8, 8)] * 2, torch.tensor([0.25])), {})
    assert cut.branches == ("cond",) and cut.images == 2
    skipping = context_of(pipeline("StableDiffusion3Pipeline"), prompt=["a", "b"])
    sample = {"hidden_states": torch.zeros(2, 4, 8, 8), "timestep": torch.tensor([750.0])}
    skipping.update((), {**sample, "hidden_states": torch.zeros(4, 4, 8, 8)})
    skipping.update((), {**sample, "skip_layers": [1]})
    assert skipping.branches == ("cond",) and skipping.images == 2


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_that_does_not_fit_the_branches_is_refused(rows):
    context = context_of(pipeline(), prompt="a")
    with pytest.raises(InputError, match=f"A batch of {rows} rows cannot hold the branches uncond, cond"):
        context.update((torch.zeros(rows, 4, 8, 8), 750), {})


def test_text_encoders_read_the_prompts_first():
    context = TextContext()
    for branch in ("cond", "uncond"):
        context.update((torch.zeros(2, 77),), {})
        assert context.branches == (branch,) and context.images == 2 and context.timesteps == (0.0,)


def test_images_of_a_call():
    assert images_of({"prompt": "a", "num_images_per_prompt": 3}) == 3
    assert images_of({"prompt": ["a", "b"]}) == 2
    assert images_of({"prompt": None, "prompt_embeds": torch.zeros(4, 7, 8)}) == 4
    assert images_of({"image": 1}) is None
