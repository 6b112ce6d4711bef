"""The context: progress, branches and rows, read from the denoiser's own arguments."""

from types import SimpleNamespace

import pytest
import torch

from diffusers_sae import InputError
from diffusers_sae.context import DenoisingContext, branch_order


def pipeline(name="StableDiffusionPipeline", guidance=True, **attributes):
    return type(
        name,
        (),
        {
            "do_classifier_free_guidance": guidance,
            "scheduler": SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000)),
            **attributes,
        },
    )()


@pytest.mark.parametrize(
    ("pipe", "branches"),
    [
        (pipeline(), ("uncond", "cond")),
        (pipeline(guidance=False), ("cond",)),
        (pipeline("StableDiffusionPAGPipeline", do_perturbed_attention_guidance=True), ("uncond", "cond", "perturbed")),
        (pipeline("StableDiffusionPAGPipeline", False, do_perturbed_attention_guidance=True), ("cond", "perturbed")),
        (pipeline("StableDiffusionXLPAGPipeline", do_perturbed_attention_guidance=False), ("uncond", "cond")),
        (pipeline("StableDiffusionInstructPix2PixPipeline"), ("cond", "image", "uncond")),
        (pipeline("StableDiffusionXLInstructPix2PixPipeline", guidance=False), ("cond",)),
    ],
)
def test_branch_order(pipe, branches):
    assert branch_order(pipe) == branches


@pytest.mark.parametrize("timestep", [750, 750.0, torch.tensor(750), torch.tensor([750, 750])])
@pytest.mark.parametrize("by_name", [False, True])
def test_update_reads_positional_and_keyword_arguments(timestep, by_name):
    context = DenoisingContext()
    sample = torch.zeros(6, 4, 8, 12)
    if by_name:
        context.update(pipeline(), (), {"sample": sample, "timestep": timestep})
    else:
        context.update(pipeline(), (sample, timestep), {})
    assert context.timestep == 750 and context.progress == 0.25
    assert (context.rows, context.images, context.size) == (6, 3, (8, 12))
    assert context.rows_of("uncond") == slice(0, 3) and context.rows_of("cond") == slice(3, 6)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="A batch of 3 rows cannot hold the branches uncond, cond"):
        DenoisingContext().update(pipeline(), (torch.zeros(3, 4, 8, 8), 10), {})
