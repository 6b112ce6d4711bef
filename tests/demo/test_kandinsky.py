"""emoji-kandinsky: the same autoencoder as emoji-sd, the shipped decoder and prior, and its SAE."""

import pytest
import torch
from diffusers import KandinskyV22CombinedPipeline
from safetensors.torch import load_file

from diffusers_sae import load_sae
from diffusers_sae.demo.kandinsky import KANDINSKY_CALL, load_kandinsky, movq_of, reads_the_embedding
from diffusers_sae.demo.shipped import MODELS, load_judge, load_pipeline, look
from diffusers_sae.demo.world import Scene

SCENES = [Scene("frog", "3d", "blue"), Scene("cat", "flat", "black"), Scene("hamburger", "cartoon", "yellow"),
          Scene("gift", "3d", "green")]  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return load_kandinsky()


def test_the_autoencoder_is_emoji_sds():
    vae = load_pipeline().vae
    vae.register_to_config(scaling_factor=0.7)
    movq, x = movq_of(vae).eval(), torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mean * 0.7
        torch.testing.assert_close(movq.encode(x).latents, z, atol=2e-5, rtol=0)
        torch.testing.assert_close(
            movq.decode(z, force_not_quantize=True).sample, vae.decode(z / 0.7).sample, atol=2e-5, rtol=0
        )


def test_only_what_reads_the_embedding_differs_from_emoji_sds_unet(pipe):
    unet = load_pipeline().unet.state_dict()
    for name, x in pipe.unet.state_dict().items():
        if not reads_the_embedding(name):
            assert torch.equal(x[: len(unet[name])], unet[name]) and not x[len(unet[name]) :].any(), name
    shipped = load_file(MODELS / "emoji-kandinsky" / "decoder.safetensors")
    assert all(torch.equal(pipe.unet.state_dict()[name], x.float()) for name, x in shipped.items())
    assert {name for name in pipe.unet.state_dict() if reads_the_embedding(name)} == set(shipped)


def test_it_draws_what_prompts_ask_for_and_the_sae_turns_it(pipe, tmp_path):
    prompts = [scene.caption() for scene in SCENES]
    short = {**KANDINSKY_CALL, "num_inference_steps": 3, "prior_num_inference_steps": 2}

    def images(pipe, call):
        generator = torch.Generator().manual_seed(0)
        return pipe(prompts, generator=generator, height=64, width=64, output_type="pt", **call).images

    found = look(load_judge(), list(images(pipe, KANDINSKY_CALL)))
    assert sum(f["background"][0] == s.background for f, s in zip(found, SCENES, strict=True)) == len(SCENES)
    assert sum(f["object"][0] == s.object for f, s in zip(found, SCENES, strict=True)) >= 3
    bare, sae = images(pipe, short), load_sae(MODELS / "emoji-kandinsky" / "sae")
    pipe.load_sae(sae)
    assert torch.equal(images(pipe, short), bare)
    pipe.steer({int(sae.statistics.mean.mean(0).argmax()): 20.0})
    assert not torch.equal(images(pipe, short), bare)
    pipe.unload_sae()
    assert torch.equal(images(pipe, short), bare)
    pipe.save_pretrained(tmp_path)
    stock = KandinskyV22CombinedPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    torch.testing.assert_close(images(stock, short), bare, atol=1e-3, rtol=0)
