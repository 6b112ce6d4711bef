"""Tiny real pipelines of every family, with random weights; nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    KandinskyV22CombinedPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    LCMScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PriorTransformer,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    StableUnCLIPImg2ImgPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
)

SITE = "unet.up_blocks.1.attentions.1"
WIDTH = 8
TOKENS = 12


def tiny_tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", *letters, *(c + "</w>" for c in letters), "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=TOKENS)


def tiny_clip(tokenizer: CLIPTokenizer, cls: type = CLIPTextModel):
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def tiny_t5(tokenizer: CLIPTokenizer) -> T5EncoderModel:
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return T5EncoderModel(config).eval()


def tiny_vae(latent_channels: int = 4, shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        sample_size=16,
        latent_channels=latent_channels,
        shift_factor=shift,
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


def ddim(**config) -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, steps_offset=1, **config)


def sd(cls: type = StableDiffusionPipeline, in_channels: int = 4, scheduler: Callable[[], Any] = ddim, **extra):
    tokenizer = tiny_tokenizer()
    return cls(
        vae=tiny_vae(),
        text_encoder=tiny_clip(tokenizer),
        tokenizer=tokenizer,
        unet=tiny_unet(in_channels=in_channels),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **extra,
    )


def sd_controlnet():
    base = sd()
    controlnet = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 16))
    torch.nn.init.normal_(controlnet.controlnet_mid_block.weight)
    return StableDiffusionControlNetPipeline(
        **{**base.components, "controlnet": controlnet.eval()}, requires_safety_checker=False
    )


def sdxl(cls: type = StableDiffusionXLPipeline, **extra):
    tokenizer = tiny_tokenizer()
    return cls(
        vae=tiny_vae(),
        text_encoder=tiny_clip(tokenizer),
        text_encoder_2=tiny_clip(tokenizer, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=tiny_unet(
            32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=4 * (5 if extra.get("requires_aesthetics_score") else 6) + 16,
        ),
        scheduler=ddim(),
        add_watermarker=False,
        **extra,
    )


def kandinsky(cls: type = KandinskyV22Pipeline):
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=32,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    movq = VQModel(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
        vq_embed_dim=4,
    )
    return cls(unet=unet.eval(), scheduler=DDIMScheduler(clip_sample=False), movq=movq.eval())


def tiny_vision() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, projection_dim=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def tiny_reader() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def kandinsky_prior():
    tokenizer = tiny_tokenizer()
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=32, num_embeddings=TOKENS,
        embedding_proj_dim=16, encoder_hid_proj_type=None,
    )  # fmt: skip
    torch.nn.init.normal_(prior.clip_std)
    return KandinskyV22PriorPipeline(
        prior=prior.eval(),
        image_encoder=tiny_vision(),
        text_encoder=tiny_clip(tokenizer, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        scheduler=UnCLIPScheduler(prediction_type="sample", variance_type="fixed_small_log"),
        image_processor=tiny_reader(),
    )


def kandinsky_combined():
    prior = {f"prior_{name}": part for name, part in kandinsky_prior().components.items()}
    return KandinskyV22CombinedPipeline(**kandinsky().components, **prior)


def unclip():
    tokenizer = tiny_tokenizer()
    return StableUnCLIPImg2ImgPipeline(
        feature_extractor=tiny_reader(),
        image_encoder=tiny_vision(),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=32),
        image_noising_scheduler=ddim(),
        tokenizer=tokenizer,
        text_encoder=tiny_clip(tokenizer),
        unet=tiny_unet(class_embed_type="projection", projection_class_embeddings_input_dim=64),
        scheduler=ddim(),
        vae=tiny_vae(),
    )


def sd3(cls: type = StableDiffusion3Pipeline, **extra):
    tokenizer = tiny_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return cls(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(shift=0.06),
        text_encoder=tiny_clip(tokenizer, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        text_encoder_2=tiny_clip(tokenizer, CLIPTextModelWithProjection),
        tokenizer_2=tokenizer,
        text_encoder_3=tiny_t5(tokenizer),
        tokenizer_3=tokenizer,
        **extra,
    )


DOUBLE_STREAM = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
"""What Flux and the models made of it share."""


def flux(cls: type = FluxPipeline):
    tokenizer = tiny_tokenizer()
    transformer = FluxTransformer2DModel(**DOUBLE_STREAM, pooled_projection_dim=16)
    return cls(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(shift=0.06),
        text_encoder=tiny_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=tiny_t5(tokenizer),
        tokenizer_2=tokenizer,
    )


def chroma():
    tokenizer = tiny_tokenizer()
    transformer = ChromaTransformer2DModel(
        **DOUBLE_STREAM, approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16
    )
    return ChromaPipeline(
        transformer=transformer.eval(),
        vae=tiny_vae(shift=0.06),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=tiny_t5(tokenizer),
        tokenizer=tokenizer,
    )


def pixart():
    tokenizer = tiny_tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
    )
    return PixArtSigmaPipeline(
        transformer=transformer.eval(),
        scheduler=ddim(),
        vae=tiny_vae(),
        text_encoder=tiny_t5(tokenizer),
        tokenizer=tokenizer,
    )


def sana():
    tokenizer = tiny_tokenizer()
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    text = Gemma2Config(
        head_dim=16,
        hidden_size=8,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        attn_implementation="eager",
    )
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    )
    return SanaPipeline(
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=Gemma2Model(text).eval(),
        tokenizer=tokenizer,
    )


def qwen():
    vae = AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    return QwenImagePipeline(
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )


def zimage():
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return ZImagePipeline(
        transformer=transformer.eval(),
        vae=tiny_vae(16, shift=0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )


def picture(size: int = 16) -> Image.Image:
    return Image.linear_gradient("L").resize((size, size)).convert("RGB")


def embeddings(count: int, *shape: int, seed: int) -> torch.Tensor:
    """What an encoder might have said of `count` prompts."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)])


class Tiny(NamedTuple):
    """A family's pipeline: constructor, call arguments, a site with its width, and the branches of its first step."""

    make: Callable[[], Any]
    arguments: dict[str, Any]
    site: str = SITE
    width: int = WIDTH
    branches: tuple[str, ...] = ("uncond", "cond")


def _embedded(seed: int, mask: bool) -> Callable[[int], dict[str, Any]]:
    def arguments(count: int) -> dict[str, Any]:
        both = {
            "prompt_embeds": embeddings(count, 7, 16, seed=seed),
            "negative_prompt_embeds": embeddings(count, 7, 16, seed=seed + 50),
        }
        if mask:
            ones = torch.ones(count, 7).long()
            return {**both, "prompt_embeds_mask": ones, "negative_prompt_embeds_mask": ones}
        return {name: list(tensor) for name, tensor in both.items()}

    return arguments


def _images(seed: int) -> Callable[[int], dict[str, Any]]:
    def arguments(count: int) -> dict[str, Any]:
        return {
            "image_embeds": embeddings(count, 32, seed=seed),
            "negative_image_embeds": embeddings(count, 32, seed=seed + 50),
        }

    return arguments


SQUARE = {"height": 16, "width": 16, "guidance_scale": 5.0}
SHORT = {**SQUARE, "max_sequence_length": TOKENS}
MAP = "unet.up_blocks.0.attentions.0"
BLOCK = "transformer.transformer_blocks.0"
PIPELINES: dict[str, Tiny] = {
    "Stable Diffusion": Tiny(sd, SQUARE),
    "Stable Diffusion 2.1": Tiny(partial(sd, scheduler=partial(ddim, prediction_type="v_prediction")), SQUARE),
    "Stable Diffusion, LCM": Tiny(
        partial(sd, scheduler=LCMScheduler), {**SQUARE, "guidance_scale": 1.0}, branches=("cond",)
    ),
    "Stable Diffusion img2img": Tiny(
        partial(sd, StableDiffusionImg2ImgPipeline), {"image": picture(), "strength": 0.7, "guidance_scale": 5.0}
    ),
    "Stable Diffusion inpaint": Tiny(
        partial(sd, StableDiffusionInpaintPipeline),
        {**SQUARE, "image": picture(), "mask_image": picture(), "strength": 1.0},
    ),
    "Stable Diffusion ControlNet": Tiny(sd_controlnet, {**SQUARE, "image": picture()}),
    "Stable Diffusion PAG": Tiny(
        partial(sd, StableDiffusionPAGPipeline, pag_applied_layers=["mid"]),
        {**SQUARE, "pag_scale": 2.0},
        branches=("uncond", "cond", "perturbed"),
    ),
    "InstructPix2Pix": Tiny(
        partial(sd, StableDiffusionInstructPix2PixPipeline, in_channels=8),
        {"image": picture(), "image_guidance_scale": 1.5, "guidance_scale": 5.0},
        branches=("cond", "image", "uncond"),
    ),
    "SDXL": Tiny(sdxl, SQUARE),
    "SDXL Turbo": Tiny(sdxl, {**SQUARE, "guidance_scale": 0.0}, branches=("cond",)),
    "SDXL img2img": Tiny(
        partial(sdxl, StableDiffusionXLImg2ImgPipeline),
        {"image": picture(), "strength": 0.7, "guidance_scale": 5.0},
    ),
    "Kandinsky 2.2": Tiny(kandinsky, {"height": 32, "width": 32, "guidance_scale": 4.0}, MAP, 64),
    "Kandinsky 2.2 combined": Tiny(
        kandinsky_combined,
        {"height": 32, "width": 32, "guidance_scale": 4.0, "prior_num_inference_steps": 2},
        MAP,
        64,
    ),
    "Stable unCLIP img2img": Tiny(unclip, {**SQUARE, "image": picture(), "noise_level": 3}),
    "Kandinsky 2.2 img2img": Tiny(
        partial(kandinsky, KandinskyV22Img2ImgPipeline),
        {"height": 32, "width": 32, "guidance_scale": 4.0, "image": picture(32), "strength": 0.7},
        MAP,
        64,
    ),
    "Stable Diffusion 3": Tiny(sd3, SQUARE, BLOCK, 16),
    "Stable Diffusion 3 img2img": Tiny(
        partial(sd3, StableDiffusion3Img2ImgPipeline), {**SQUARE, "image": picture(), "strength": 0.7}, BLOCK, 16
    ),
    "Stable Diffusion 3 PAG": Tiny(
        partial(sd3, StableDiffusion3PAGPipeline, pag_applied_layers=["blocks.1"]),
        {**SQUARE, "pag_scale": 2.0},
        BLOCK,
        16,
        ("uncond", "cond", "perturbed"),
    ),
    "Flux": Tiny(flux, SHORT, BLOCK, 32, ("cond",)),
    "Flux, true guidance": Tiny(
        flux, {**SHORT, "true_cfg_scale": 3.0, "negative_prompt": "zz"}, BLOCK, 32, ("cond", "uncond")
    ),
    "Flux img2img": Tiny(
        partial(flux, FluxImg2ImgPipeline), {**SHORT, "image": picture(), "strength": 0.7}, BLOCK, 32, ("cond",)
    ),
    "Chroma": Tiny(chroma, {**SHORT, "negative_prompt": "zz"}, BLOCK, 32, ("cond", "uncond")),
    "PixArt-Sigma": Tiny(pixart, {**SHORT, "use_resolution_binning": False, "clean_caption": False}, BLOCK, 16),
    "Sana": Tiny(
        sana,
        {
            **SHORT,
            "height": 32,
            "width": 32,
            "use_resolution_binning": False,
            "clean_caption": False,
            "complex_human_instruction": None,
        },
        BLOCK,
        16,
    ),
    "Qwen-Image": Tiny(qwen, {"height": 16, "width": 16, "true_cfg_scale": 3.0}, BLOCK, 48, ("cond", "uncond")),
    "Z-Image": Tiny(
        zimage, {**SQUARE, "height": 32, "width": 32}, "transformer.noise_refiner.0", 32, ("cond", "uncond")
    ),
}
"""Every family by the name that the README's table has."""

EMBEDDED: dict[str, Callable[[int], dict[str, Any]]] = {
    "Kandinsky 2.2": _images(100),
    "Kandinsky 2.2 img2img": _images(100),
    "Qwen-Image": _embedded(200, mask=True),
    "Z-Image": _embedded(300, mask=False),
}
"""Pipelines that get embeddings instead of prompts: arguments for so many images."""


def make(name: str):
    """A pipeline of `PIPELINES` with weights from seed 0."""
    torch.manual_seed(0)
    pipe = PIPELINES[name].make()
    pipe.set_progress_bar_config(disable=True)
    return pipe
