"""What people use beside SAEs, loaded before them and after them: the images are the same, bit for bit."""

import copy
import gc
import threading
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conftest import Harness
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.embeddings import ImageProjection
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny import make
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from diffusers_sae import TopKSAE

STRENGTHS = {3: 9.0, 7: -4.0}


class Neighbour(NamedTuple):
    """How something is put on a pipeline and taken off again, and the pipelines it goes with."""

    on: Callable
    off: Callable | None
    kinds: tuple[str, ...]
    exact: bool = True
    arguments: dict | None = None


def lora_weights(pipe):
    """A LoRA on all attention layers of the U-Net, as a state dict."""
    twin = copy.deepcopy(pipe.unet)
    twin.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(twin))
    return {f"unet.{name}": 5 * value for name, value in sorted(state.items())}


def load_lora(pipe):
    torch.manual_seed(2)
    pipe.load_lora_weights(lora_weights(pipe), adapter_name="style")
    pipe.set_adapters(["style"], [0.8])


def fuse_lora(pipe):
    load_lora(pipe)
    pipe.fuse_lora()


def unfuse_lora(pipe):
    pipe.unfuse_lora()
    pipe.unload_lora_weights()


def ip_adapter(pipe):
    """Random weights of an IP-Adapter in the layout that people load."""
    torch.manual_seed(3)
    width = pipe.unet.config.cross_attention_dim
    state: dict = {"image_proj": {}, "ip_adapter": {}}
    projection = ImageProjection(image_embed_dim=width, cross_attention_dim=width, num_image_text_embeds=4)
    for old, new in (("image_embeds", "proj"), ("norm", "norm")):
        for kind, tensor in getattr(projection, old).state_dict().items():
            state["image_proj"][f"{new}.{kind}"] = tensor
    names = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    for i, name in enumerate(names):
        hidden = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for part in ("k", "v"):
            state["ip_adapter"][f"{2 * i + 1}.to_{part}_ip.weight"] = torch.randn(hidden, width)
    pipe.unet._load_ip_adapter_weights([state])


def no_ip_adapter(pipe):
    pipe.unet.encoder_hid_proj = None
    pipe.unet.config.encoder_hid_dim_type = None
    pipe.unet.set_attn_processor(AttnProcessor2_0())


def group_offload(pipe):
    root = getattr(pipe, "unet", None) or pipe.transformer
    root.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )


def layerwise_casting(pipe):
    root = getattr(pipe, "unet", None) or pipe.transformer
    root.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def int8_weights(pipe):
    root = getattr(pipe, "unet", None) or pipe.transformer
    quantize_(root, Int8WeightOnlyConfig(version=2))


SD = ("Stable Diffusion", "SDXL")
NEIGHBOURS = {
    "LoRA": Neighbour(load_lora, lambda pipe: pipe.unload_lora_weights(), SD),
    "LoRA, fused": Neighbour(fuse_lora, unfuse_lora, SD, exact=False),
    "IP-Adapter": Neighbour(
        ip_adapter,
        no_ip_adapter,
        ("Stable Diffusion",),
        arguments={"ip_adapter_image_embeds": [torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(6))]},
    ),
    "attention slicing": Neighbour(
        lambda pipe: pipe.enable_attention_slicing(1), lambda pipe: pipe.disable_attention_slicing(), SD, exact=False
    ),
    "FreeU": Neighbour(lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.5, 1.6), lambda pipe: pipe.disable_freeu(), SD),
    "group offload": Neighbour(group_offload, None, (*SD, "Flux", "Stable Diffusion 3")),
    "layerwise casting": Neighbour(layerwise_casting, None, (*SD, "Flux", "PixArt-Sigma")),
    "int8 weights (torchao)": Neighbour(int8_weights, None, (*SD, "Flux", "Stable Diffusion 3", "PixArt-Sigma")),
}
CACHES = {
    "First-Block-Cache": FirstBlockCacheConfig(threshold=10.0),
    "MagCache": MagCacheConfig(1.0, 1, retention_ratio=0.25, num_inference_steps=4, mag_ratios=[1.0] * 4),
    "TaylorSeer": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "Pyramid Attention Broadcast": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
}
"""All of them bold enough to skip work in four steps."""
NEIGHBOURS |= {
    name: Neighbour(
        lambda pipe, config=config: pipe.transformer.enable_cache(config),
        lambda pipe: pipe.transformer.disable_cache(),
        ("Flux", "Qwen-Image"),
    )
    for name, config in CACHES.items()
}
SAME = ("LoRA, fused", "attention slicing", "group offload")
"""Neighbours that need not change the images."""
PAIRS = [(name, kind) for name, neighbour in NEIGHBOURS.items() for kind in neighbour.kinds]


def steered(harness):
    harness.pipe.load_sae(harness.sae())
    harness.pipe.steer(STRENGTHS)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_orders_of_loading_agree(name, kind):
    neighbour = NEIGHBOURS[name]
    alone = Harness(kind)
    neighbour.on(alone.pipe)
    extra = neighbour.arguments or {}
    bare = alone.run(**extra)
    assert name in SAME or not torch.equal(bare, alone.run(make(kind)))
    first, last = Harness(kind), Harness(kind)
    neighbour.on(first.pipe)
    steered(first)
    steered(last)
    neighbour.on(last.pipe)
    images = first.run(**extra)
    assert torch.equal(images, last.run(**extra)) and not torch.equal(images, bare)
    for harness in (first, last):
        harness.pipe.reset_steering()
        assert torch.equal(bare, harness.run(**extra))
        harness.pipe.unload_sae()
        assert torch.equal(bare, harness.run(**extra))


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if NEIGHBOURS[pair[0]].off])
def test_neighbours_that_go_leave_the_steering(name, kind):
    neighbour = NEIGHBOURS[name]
    plain = Harness(kind)
    steered(plain)
    expected = plain.run()
    for sae_first in (True, False):
        harness = Harness(kind)
        if sae_first:
            steered(harness)
        neighbour.on(harness.pipe)
        if not sae_first:
            steered(harness)
        together = harness.run(**(neighbour.arguments or {}))
        assert name in SAME or not torch.equal(together, expected)
        neighbour.off(harness.pipe)
        if neighbour.exact:
            assert torch.equal(harness.run(), expected)
        else:
            torch.testing.assert_close(harness.run(), expected, atol=1e-4, rtol=1e-3)


def test_a_lora_that_comes_and_goes_many_times(sd):
    steered(sd)
    expected = sd.run()
    for _ in range(3):
        load_lora(sd.pipe)
        sd.run()
        sd.pipe.unload_lora_weights()
        assert torch.equal(sd.run(), expected)


def test_model_cpu_offload_over_three_calls(sd):
    steered(sd)
    expected = sd.run()
    sd.pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(3):
        assert torch.equal(sd.run(), expected)
    sd.pipe.reset_steering()
    assert torch.equal(sd.run(), sd.run(make(sd.kind)))


@pytest.mark.parametrize("kind", ["Stable Diffusion", "Flux"])
def test_deep_copies_are_bare_and_their_own(kind):
    harness = Harness(kind)
    steered(harness)
    expected, bare = harness.run(), harness.run(harness.bare)
    name = harness.tiny.site.partition(".")[0]
    gc.collect()
    saes = sum(type(thing) is TopKSAE for thing in gc.get_objects())
    twin = copy.deepcopy(getattr(harness.pipe, name))
    assert sum(type(thing) is TopKSAE for thing in gc.get_objects()) == saes  # it took no SAE along
    other = type(harness.bare)(**{**harness.bare.components, name: twin})
    other.set_progress_bar_config(disable=True)
    assert torch.equal(harness.run(other), bare)
    steered_block = twin.get_submodule(harness.tiny.site.partition(".")[2])
    with torch.no_grad():
        for parameter in steered_block.parameters():
            parameter.zero_()
    assert torch.equal(harness.run(), expected)
    assert not torch.equal(harness.run(other), bare)


def test_two_threads_each_with_its_own_pipeline():
    harnesses = [Harness(), Harness("SDXL")]
    for harness in harnesses:
        steered(harness)
    expected = [harness.run() for harness in harnesses]
    found = [[], []]

    def work(i):
        for _ in range(3):
            found[i].append(harnesses[i].run())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for runs, images in zip(found, expected, strict=True):
        assert len(runs) == 3 and all(torch.equal(run, images) for run in runs)
