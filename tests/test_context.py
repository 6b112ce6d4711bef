"""The context: step, branches and rows, read from the denoiser's own arguments."""

from types import SimpleNamespace

import pytest
import torch

from diffusers_sae import InputError
from diffusers_sae.context import DenoisingContext, TextContext, _place_in
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
    if by_name:
        context.update((), {"sample": sample, "timestep": timestep})
    else:
        context.update((sample, timestep), {})
    assert context.timestep == 750 and context.known_step == 1 and context.progress(750) == 0.25
    assert (context.rows, context.images, context.size) == (6, 3, (8, 12))
    assert dict(context.parts()) == {"uncond": slice(0, 3), "cond": slice(3, 6)}


@pytest.mark.parametrize(("name", "given"), [("FluxPipeline", 0.25), ("ZImagePipeline", 0.75), ("SanaPipeline", 250.0)])
def test_timesteps_in_other_units(name, given):
    transformer = SimpleNamespace(config=SimpleNamespace(timestep_scale=1.0))
    context = context_of(pipeline(name, guidance=False, transformer=transformer), prompt="a")
    context.update((), {"hidden_states": torch.zeros(1, 4, 8, 8), "timestep": torch.tensor([given])})
    assert context.timestep == 250


@pytest.mark.parametrize(
    ("take", "step"),
    [
        (lambda t: t[2], 2),
        (lambda t: t[1].expand(6), 1),
        (lambda t: t[2:], 2),
        (lambda t: t[[1]], None),
        (lambda t: t[1] + 0, None),
        (lambda t: t[1:], None),
        (lambda t: t[0].view(torch.int32), None),
    ],
)
def test_a_view_of_the_schedulers_tensor_tells_its_step(take, step):
    timesteps = torch.tensor([999.0, 750.0, 250.0])
    assert _place_in(timesteps, take(timesteps)) == step


def test_of_equal_timesteps_the_first_one_is_the_step():
    pipe = pipeline()
    pipe.scheduler.timesteps = torch.tensor([999.0, 750.0, 750.0, 250.0])
    context = context_of(pipe)
    for timestep in (pipe.scheduler.timesteps[2], torch.tensor(750.0), 750):
        context.update((torch.zeros(2, 4, 8, 8), timestep), {})
        assert (context.known_step, int(context.step)) == (1, 1)


def test_branches_in_turn_alternate():
    context = context_of(pipeline("FluxPipeline"), prompt="a", true_cfg_scale=2.0, negative_prompt="b")
    seen = []
    for _ in range(4):
        context.update((), {"hidden_states": torch.zeros(1, 16, 8), "timestep": torch.tensor([0.75])})
        seen.append(context.branches)
    assert seen == [("cond",), ("uncond",)] * 2


def test_guidance_that_is_cut_off_and_skip_layer_guidance():
    cut = context_of(pipeline("ZImagePipeline"), prompt=["a", "b"])
    cut.update(([torch.zeros(4, 1, 8, 8)] * 2, torch.tensor([0.25])), {})
    assert cut.branches == ("cond",) and cut.images == 2
    skipping = context_of(pipeline("StableDiffusion3Pipeline"), prompt=["a", "b"])
    sample = {"hidden_states": torch.zeros(2, 4, 8, 8), "timestep": torch.tensor([750.0])}
    skipping.update((), {**sample, "skip_layers": [1]})
    assert skipping.branches == ("cond",) and skipping.images == 2


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_that_does_not_fit_the_branches_is_refused(rows):
    context = context_of(pipeline(), prompt="a")
    with pytest.raises(InputError, match=f"A batch of {rows} rows cannot hold the branches uncond, cond"):
        context.update((torch.zeros(rows, 4, 8, 8), 10), {})


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
