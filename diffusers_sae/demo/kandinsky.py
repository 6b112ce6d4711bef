"""emoji-kandinsky: emoji-sd's U-Net and autoencoder as a Kandinsky 2.2 decoder of image embeddings, and a small prior
that makes such embeddings from prompts.

An embedding is a linear code of the states that emoji-sd's U-Net reads of a caption, which the decoder's projection
turns back into those states; the rest of the U-Net is emoji-sd's, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ..pipelines import SAESteeringPipeline
from .shipped import MODELS, load_pipeline

KANDINSKY_CALL: dict[str, Any] = {
    "num_inference_steps": 20, "guidance_scale": 3.0, "prior_num_inference_steps": 10, "prior_guidance_scale": 1.0,
}  # fmt: skip
"""How emoji-kandinsky draws best; `height=64, width=64` besides."""

READS_THE_EMBEDDING = ("encoder_hid_proj.", "add_embedding.")
"""Beginnings of the names of the decoder's tensors that emoji-sd's U-Net has not."""


def new_decoder(unet: UNet2DConditionModel, width: int) -> UNet2DConditionModel:
    """`unet` as a decoder of image embeddings `(B, width)`.

    Kandinsky's decoders predict a variance too: those channels are there, and 0. What reads the embedding is new.
    """
    config = {
        **unet.config,
        "out_channels": 2 * unet.config.out_channels,
        "encoder_hid_dim": width,
        "encoder_hid_dim_type": "image_proj",
        "addition_embed_type": "image",
    }
    decoder = UNet2DConditionModel.from_config(config)
    state = unet.state_dict()
    for name in ("conv_out.weight", "conv_out.bias"):
        state[name] = torch.cat([state[name], torch.zeros_like(state[name])])
    added = decoder.load_state_dict(state, strict=False).missing_keys
    assert all(reads_the_embedding(name) for name in added), added
    torch.nn.init.zeros_(decoder.add_embedding.image_norm.weight)
    return decoder


def reads_the_embedding(name: str) -> bool:
    """Whether a tensor is of what the decoder has beyond emoji-sd's U-Net."""
    return name.startswith(READS_THE_EMBEDDING)


def movq_of(vae: AutoencoderKL) -> VQModel:
    """The autoencoder as Kandinsky's: the same function, with the scaling factor in it and a codebook that is not used.

    Kandinsky's pipelines decode with `force_not_quantize=True`.
    """
    config = vae.config
    same = ("down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "latent_channels",
            "norm_num_groups", "sample_size", "mid_block_add_attention", "act_fn")  # fmt: skip
    movq = VQModel(**{name: config[name] for name in same}, num_vq_embeddings=2)
    c, factor = config.latent_channels, config.scaling_factor
    state = vae.state_dict()
    # the rows of quant_conv that give the mean take what conv_out gives, so that one convolution can do both
    mean = state["quant_conv.weight"][:c, :, 0, 0]
    for name in ("encoder.conv_out.weight", "encoder.conv_out.bias"):
        state[name] = torch.tensordot(mean, state[name], 1)
    state["quant_conv.weight"] = factor * torch.eye(c)[:, :, None, None]
    state["quant_conv.bias"] = factor * state["quant_conv.bias"][:c]
    state["post_quant_conv.weight"] = state["post_quant_conv.weight"] / factor
    state["quantize.embedding.weight"] = movq.quantize.embedding.weight
    movq.load_state_dict(state)
    return movq


def new_prior(text: CLIPTextModelWithProjection, embeds: torch.Tensor) -> PriorTransformer:
    """A small prior for what this text tower reads, which scales to the embeddings `(N, d)` that it will predict."""
    heads = 4
    prior = PriorTransformer(
        num_attention_heads=heads,
        attention_head_dim=text.config.hidden_size // heads,  # the text's states are taken as they are
        num_layers=2,
        embedding_dim=embeds.shape[1],
        num_embeddings=text.config.max_position_embeddings,
        encoder_hid_proj_type=None,
    )
    for parameter, value in ((prior.clip_mean, embeds.mean(0)), (prior.clip_std, embeds.std(0))):
        parameter.data.copy_(value[None])
        parameter.requires_grad_(False)
    return prior


def decoder_pipeline(unet: UNet2DConditionModel, scheduler: DDIMScheduler, movq: VQModel) -> KandinskyV22Pipeline:
    """The decoder, stock."""
    pipe = KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=movq)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_kandinsky(models: Path = MODELS) -> Any:
    """emoji-kandinsky, prior and decoder, steerable, in fp32 on the CPU: a `KandinskyV22CombinedPipeline`."""
    parts = {
        "text_encoder": ("emoji-clip", CLIPTextModelWithProjection),
        "tokenizer": ("emoji-clip", CLIPTokenizer),
        "image_encoder": ("emoji-kandinsky", CLIPVisionModelWithProjection),
        "image_processor": ("emoji-clip", CLIPImageProcessor),
    }
    clip = {name: cls.from_pretrained(models / folder / name) for name, (folder, cls) in parts.items()}
    sd, own = load_pipeline(models / "emoji-sd"), models / "emoji-kandinsky"
    decoder = new_decoder(sd.unet, clip["image_encoder"].config.projection_dim)
    decoder.load_state_dict({**decoder.state_dict(), **load_file(own / "decoder.safetensors")})
    pipe = KandinskyV22CombinedPipeline(
        unet=decoder.eval(),
        scheduler=sd.scheduler,
        movq=movq_of(sd.vae).eval(),
        prior_prior=PriorTransformer.from_pretrained(own / "prior"),
        prior_scheduler=UnCLIPScheduler.from_pretrained(own / "prior_scheduler"),
        **{f"prior_{name}": part for name, part in clip.items()},
    ).to(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return SAESteeringPipeline.from_pipe(pipe)
