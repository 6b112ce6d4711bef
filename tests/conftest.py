"""Tiny real pipelines with random weights; nothing is fetched."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers_sae import SAESteeringPipeline, TopKSAE

SITE = "unet.up_blocks.1.attentions.1"
WIDTH = 8


def tiny_tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", *letters, *(c + "</w>" for c in letters), "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=12)


def tiny_text_encoder(tokenizer: CLIPTokenizer, cls: type = CLIPTextModel):
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        sample_size=16,
    ).eval()


def tiny_unet(cross_attention_dim: int = 16, in_channels: int = 4, **extra) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(WIDTH, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=2,
        **extra,
    ).eval()


def tiny_sd(cls: type = StableDiffusionPipeline, in_channels: int = 4, **extra):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    pipe = cls(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=tiny_unet(in_channels=in_channels),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **extra,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sdxl():
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    unet = tiny_unet(
        32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=4 * 6 + 16,
    )
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(tokenizer),
        text_encoder_2=tiny_text_encoder(tokenizer, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _picture() -> Image.Image:
    return Image.linear_gradient("L").resize((16, 16)).convert("RGB")


PIPELINES = {
    "sd": (tiny_sd, {"height": 16, "width": 16}),
    "sdxl": (tiny_sdxl, {"height": 16, "width": 16}),
    "img2img": (lambda: tiny_sd(StableDiffusionImg2ImgPipeline), {"image": _picture(), "strength": 0.7}),
    "pag": (
        lambda: tiny_sd(StableDiffusionPAGPipeline, pag_applied_layers=["mid"]),
        {"height": 16, "width": 16, "pag_scale": 2.0},
    ),
    "pix2pix": (
        lambda: tiny_sd(StableDiffusionInstructPix2PixPipeline, in_channels=8),
        {"image": _picture(), "image_guidance_scale": 1.5},
    ),
}
"""Constructor and call arguments of every tiny pipeline."""


class Harness:
    """A tiny pipeline, bare and steerable over the same modules, and how to run it."""

    def __init__(self, kind: str) -> None:
        make, self.arguments = PIPELINES[kind]
        self.bare = make()
        self.pipe = SAESteeringPipeline.from_pipe(self.bare)

    def run(self, pipe=None, prompt="ab", **kwargs):
        """Images `(N, 3, H, W)` of four steps from seed 0."""
        generator = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": 4, "guidance_scale": 5.0, **self.arguments, **kwargs}
        generator = arguments.pop("generator", generator)
        return (pipe or self.pipe)(prompt, generator=generator, output_type="pt", **arguments).images


@pytest.fixture(params=list(PIPELINES))
def every(request) -> Harness:
    return Harness(request.param)


@pytest.fixture
def sd() -> Harness:
    return Harness("sd")


@pytest.fixture
def sae() -> TopKSAE:
    torch.manual_seed(1)
    return random_sae()


def random_sae(d_in: int = WIDTH, n_latents: int = 32, k: int = 4, **provenance) -> TopKSAE:
    """Random weights with untied encoder and biases, so that no term of the formulas is zero."""
    sae = TopKSAE(d_in, n_latents, k, provenance={"site": {"path": SITE}, **provenance})
    with torch.no_grad():
        sae.W_enc += 0.3 * torch.randn_like(sae.W_enc)
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_(std=0.1)
    return sae.eval()
