"""Pipelines as objects and classes: copies, pickles, and the subclasses that users write."""

import copy
import gc
import pickle

import pytest
import torch
from conftest import SITE, Harness
from diffusers import FluxPipeline, StableDiffusionPipeline
from tiny import make

from diffusers_sae import InputError, SAESteeringPipeline
from diffusers_sae.pipelines import SAESteeringMixin

STEERED = {3: 6.0}
COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda pipe: pickle.loads(pickle.dumps(pipe)),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_carry_the_plan_and_are_independent(sd, sae, name):
    bare = sd.run()
    sd.pipe.load_sae(sae)
    sd.pipe.steer(STEERED)
    sd.pipe.load_sae(sae, adapter_name="resting")
    sd.pipe.steer({5: 9.0}, "resting")
    sd.pipe.disable_sae("resting")
    steered = sd.run()
    twin = COPIES[name](sd.pipe)
    assert type(twin) is type(sd.pipe) and list(twin.get_list_saes()) == ["default_0", "resting"]
    assert torch.equal(sd.run(twin), steered)
    twin.reset_steering("default_0")
    assert torch.equal(sd.run(twin), bare) and torch.equal(sd.run(), steered)
    twin.steer({7: -3.0}, "default_0")
    other = sd.run(twin)
    sd.pipe.unload_sae()
    assert torch.equal(sd.run(), bare) and torch.equal(sd.run(twin), other) and not torch.equal(other, bare)
    assert (twin.unet is sd.pipe.unet) == (name == "copy")


@pytest.mark.parametrize("name", COPIES)
def test_copies_outlive_the_original(sae, name):
    harness = Harness()
    harness.pipe.load_sae(sae)
    harness.pipe.steer(STEERED)
    steered = harness.run()
    twin = COPIES[name](harness.pipe)
    del harness.pipe
    gc.collect()
    assert torch.equal(harness.run(twin), steered)


def test_from_pipe_begins_with_an_empty_plan(sd, sae):
    bare = sd.run()
    sd.pipe.load_sae(sae)
    sd.pipe.steer(STEERED)
    twin = SAESteeringPipeline.from_pipe(sd.pipe)
    assert twin.get_list_saes() == {} and torch.equal(sd.run(twin), bare)


class Mine(SAESteeringPipeline, StableDiffusionPipeline):
    pass


class MineWithMixin(SAESteeringMixin, StableDiffusionPipeline):
    pass


class MineOfMine(Mine):
    """Two passes in one call, the second with other steps."""

    def __call__(self, *args, **kwargs):
        super().__call__(*args, **{**kwargs, "num_inference_steps": 2})
        return super().__call__(*args, **kwargs)


class MineByItself(SAESteeringPipeline, StableDiffusionPipeline):
    def __call__(self, prompt, **kwargs):
        return StableDiffusionPipeline.__call__(self, prompt, **kwargs)


@pytest.mark.parametrize("cls", [Mine, MineWithMixin, MineOfMine, MineByItself])
def test_subclasses_that_users_write_steer_and_capture(sd, sae, cls):
    sd.pipe.load_sae(sae)
    with sd.pipe.capture([SITE]) as expected:
        bare = sd.run()
    sd.pipe.steer(STEERED, stop=0.5)
    steered = sd.run()
    mine = cls(**make("Stable Diffusion").components, requires_safety_checker=False)
    mine.set_progress_bar_config(disable=True)
    seeds = {"generator": torch.Generator().manual_seed(0)} if cls is not MineOfMine else {}
    arguments = {"latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), **seeds}
    assert torch.equal(sd.run(mine, **arguments), bare)
    with mine.capture([SITE]) as activations:
        sd.run(mine, **arguments)
    calls = activations[SITE].calls
    assert torch.equal(activations[SITE].tensor[-8:], expected[SITE].tensor) and calls in (4, 6)
    mine.load_sae(sae)
    mine.steer(STEERED, stop=0.5)
    assert torch.equal(sd.run(mine, **arguments), steered)
    assert isinstance(mine, StableDiffusionPipeline)
    twin = pickle.loads(pickle.dumps(mine))
    assert type(twin) is cls and torch.equal(sd.run(twin, **arguments), steered)


def test_a_subclass_of_a_family_with_branches_in_turn():
    class MyFlux(SAESteeringPipeline, FluxPipeline):
        pass

    harness = Harness("Flux")
    harness.pipe.load_sae(harness.sae())
    harness.pipe.steer(STEERED)
    mine = MyFlux(**harness.bare.components)
    mine.set_progress_bar_config(disable=True)
    mine.load_sae(harness.sae())
    mine.steer(STEERED)
    assert torch.equal(harness.run(mine), harness.run())


def test_a_subclass_with_steering_after_the_pipeline_is_refused():
    with pytest.raises(InputError, match=r"write class Wrong\(SAESteeringPipeline"):

        class Wrong(StableDiffusionPipeline, SAESteeringPipeline):
            pass
