"""Hooks on modules: shared, gone when nobody uses them, and robust against what else is put on a module."""

import copy
import gc
import pickle

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import SITE, Harness, random_sae
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny import make

from diffusers_sae import SAESteeringPipeline

STEERED = {3: 6.0}
LINEAR = f"{SITE}.transformer_blocks.0.attn1.to_v"


def block(pipe):
    return pipe.unet.get_submodule(SITE.removeprefix("unet."))


def carries_hooks(module):
    return any(
        name in each.__dict__ for each in module.modules() for name in ("_diffusers_sae", "__reduce_ex__")
    ) or any(each._forward_pre_hooks or "forward" in each.__dict__ for each in module.modules())


def test_pipelines_share_one_hook_and_the_last_takes_it_along(sd, sae):
    assert not carries_hooks(sd.bare.unet)
    pipes = [SAESteeringPipeline.from_pipe(sd.bare) for _ in range(3)]
    for pipe in pipes:
        pipe.load_sae(sae)
    assert len(block(sd.bare)._diffusers_hook.hooks) == 1 and len(sd.bare.unet._forward_pre_hooks) == 1
    pipes.pop().unload_sae()
    assert carries_hooks(sd.bare.unet)
    pipes.pop().unload_sae()
    pipes.pop().unload_sae()
    assert not carries_hooks(sd.bare.unet)


def test_a_pipeline_that_is_collected_leaves_no_hook(sd, sae):
    for _ in range(3):
        pipe = SAESteeringPipeline.from_pipe(sd.bare)
        pipe.load_sae(sae)
        pipe.steer(STEERED)
        sd.run(pipe)
        del pipe
        gc.collect()
        assert not carries_hooks(sd.bare.unet)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_copied_and_pickled_modules_carry_no_hooks(sd, sae, copied, component):
    bare = sd.run()
    sd.pipe.load_sae(sae)
    sd.pipe.steer(STEERED)
    sd.pipe.load_sae(random_sae(16), "text_encoder.encoder.layers.0", adapter_name="text")
    sd.pipe.steer({3: 2.0}, "text")
    steered = sd.run()
    twin = copied(getattr(sd.pipe, component))
    assert not carries_hooks(twin)
    other = type(sd.bare)(**{**sd.bare.components, component: twin}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(sd.run(other), bare)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(sd.run(), steered)


def test_a_shallow_copy_of_a_hooked_module_carries_none(sd, sae):
    sd.pipe.load_sae(sae)
    for module in (sd.pipe.unet, block(sd.pipe)):
        twin = copy.copy(module)
        assert "_diffusers_sae" not in twin.__dict__ and not twin._forward_pre_hooks
        assert "_diffusers_sae" in module.__dict__


class Doubling(ModelHook):
    """An accelerate hook that shows in the images: it doubles a block's input."""

    def pre_forward(self, module, *args, **kwargs):
        return (2 * args[0], *args[1:]), kwargs


@pytest.mark.parametrize("under", [False, True])
@pytest.mark.parametrize("first_off", ["accelerate's", "ours"])
def test_hooks_of_accelerate_come_and_go_under_and_over_ours(sd, sae, under, first_off):
    bare = sd.run()
    add_hook_to_module(block(sd.bare), Doubling())
    doubled = sd.run()
    sd.pipe.load_sae(sae)
    sd.pipe.steer(STEERED)
    both = sd.run()
    sd.pipe.unload_sae()
    assert torch.equal(sd.run(), doubled) and not torch.equal(doubled, bare) and not torch.equal(both, doubled)
    remove_hook_from_module(block(sd.bare))
    sd.pipe.load_sae(sae)
    sd.pipe.steer(STEERED)
    steered = sd.run()
    sd.pipe.unload_sae()
    assert torch.equal(sd.run(), bare)

    def put_on(ours):
        if ours:
            sd.pipe.load_sae(sae)
            sd.pipe.steer(STEERED)
        else:
            add_hook_to_module(block(sd.bare), Doubling())

    put_on(not under)
    put_on(under)
    assert torch.equal(sd.run(), both)
    if first_off == "ours":
        sd.pipe.unload_sae()
        assert torch.equal(sd.run(), doubled) and hasattr(block(sd.bare), "_hf_hook")
        remove_hook_from_module(block(sd.bare))
    else:
        remove_hook_from_module(block(sd.bare))
        assert torch.equal(sd.run(), steered)
        sd.pipe.unload_sae()
    assert torch.equal(sd.run(), bare)


def lora_on_linears():
    torch.manual_seed(2)
    twin = make("Stable Diffusion").unet
    twin.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(twin))
    return {f"unet.{name}": 5 * value for name, value in sorted(state.items())}


@pytest.mark.parametrize("mode", ["set", "add"])
def test_a_lora_over_a_linear_site_gives_the_same_bits_in_both_orders(mode):
    sae, lora, images, seen = random_sae(site={"path": LINEAR}), lora_on_linears(), [], []
    for lora_first in (True, False):
        harness = Harness()
        if lora_first:
            harness.pipe.load_lora_weights(dict(lora), adapter_name="style")
        harness.pipe.load_sae(sae)
        if not lora_first:
            harness.pipe.load_lora_weights(dict(lora), adapter_name="style")
        harness.pipe.steer({3: 1.0, 5: 1.0}, mode=mode)
        with harness.pipe.capture([LINEAR]) as activations:
            images.append(harness.run())
        seen.append(activations[LINEAR].tensor)
        harness.pipe.unload_lora_weights()
        images.append(harness.run())
    alone = Harness()
    alone.pipe.load_sae(sae)
    alone.pipe.steer({3: 1.0, 5: 1.0}, mode=mode)
    assert torch.equal(images[0], images[2]) and torch.equal(*seen) and not torch.equal(images[0], images[1])
    assert torch.equal(images[1], alone.run()) and torch.equal(images[3], images[1])
    alone.pipe.unload_sae()
    assert not carries_hooks(alone.pipe.unet)
