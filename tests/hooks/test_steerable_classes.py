"""Pipelines as objects and classes: copies, pickles, and the subclasses that users write."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from conftest import SITE, Harness, random_sae
from diffusers import FluxPipeline, PixArtSigmaPipeline, StableDiffusionPipeline
from tiny import make

from diffusers_sae import InputError, Rule, SAESteeringPipeline
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


class MineOfTwoPasses(SAESteeringPipeline, StableDiffusionPipeline):
    """The same in a class of its own; what the first pass is given differs in all that a run reads."""

    def __call__(self, *args, **kwargs):
        first = {"num_inference_steps": 2, "guidance_scale": 1.0, "num_images_per_prompt": 1}
        super().__call__(*args, **{**kwargs, **first})
        return super().__call__(*args, **kwargs)


class Loud:
    """A mixin of a user's that knows nothing of steering."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class MineWithLoudMixin(Loud, SAESteeringMixin, StableDiffusionPipeline):
    pass


CLASSES = [Mine, MineWithMixin, MineOfMine, MineByItself, MineOfTwoPasses, MineWithLoudMixin]


@pytest.mark.parametrize("cls", CLASSES)
def test_subclasses_that_users_write_steer_and_capture(sd, sae, cls):
    sd.pipe.load_sae(sae)
    with sd.pipe.capture([SITE]) as expected:
        bare = sd.run()
    sd.pipe.steer(STEERED, stop=0.5)
    steered = sd.run()
    mine = cls(**make("Stable Diffusion").components, requires_safety_checker=False)
    mine.set_progress_bar_config(disable=True)
    seeds = {"generator": torch.Generator().manual_seed(0)} if cls not in (MineOfMine, MineOfTwoPasses) else {}
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


def test_a_method_that_makes_the_call_by_super_is_steered(sd, sae):
    class Painter(SAESteeringPipeline, StableDiffusionPipeline):
        def paint(self, prompt, **kwargs):
            return super().__call__(prompt, **kwargs)

    sd.pipe.load_sae(sae)
    sd.pipe.steer(STEERED)
    painter = Painter(**make("Stable Diffusion").components, requires_safety_checker=False)
    painter.set_progress_bar_config(disable=True)
    painter.load_sae(sae)
    painter.steer(STEERED)
    assert torch.equal(sd.run(lambda **kwargs: painter.paint(**kwargs)), sd.run())


def test_a_subclass_that_sets_the_guidance_itself_gets_the_right_branches():
    class Guided(SAESteeringPipeline, PixArtSigmaPipeline):
        def __call__(self, prompt, guidance_scale=None, **kwargs):
            return super().__call__(prompt, guidance_scale=5.0, **kwargs)

    harness = Harness("PixArt-Sigma")
    pipes = [harness.pipe, Guided(**harness.bare.components)]
    images = []
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        pipe.load_sae(harness.sae())
        pipe.steer(STEERED)
        images.append(harness.run(pipe, **({} if pipe is harness.pipe else {"guidance_scale": 1.0})))
    assert torch.equal(*images)


class MineThatEncodes(Mine):
    def __call__(self, prompt, **kwargs):
        embeds, negative = self.encode_prompt(prompt, "cpu", 1, True, "")
        return super().__call__(prompt_embeds=embeds, negative_prompt_embeds=negative, **kwargs)


@pytest.mark.parametrize("cls", [Mine, MineOfMine, MineOfTwoPasses, MineThatEncodes])
def test_decisions_and_warnings_of_a_call_inside_a_subclass_call(sd, sae, cls):
    mine = cls(**make("Stable Diffusion").components, requires_safety_checker=False)
    mine.set_progress_bar_config(disable=True)
    mine.load_sae(sae, adapter_name="image")
    bare = sd.run(mine)
    torch.manual_seed(3)
    text = random_sae(16, site={"path": "text_encoder.encoder.layers.0"})
    mine.load_sae(text, adapter_name="text")
    mine.steer({3: 0.0}, "text", branch="both")
    mine.steer(STEERED, "image", when=Rule(dict.fromkeys(range(32), 1.0), above=-1e9, adapter_name="text"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steered = sd.run(mine)
    assert mine.rule_decisions() == {("image", 0): torch.tensor([True])} and not torch.equal(steered, bare)
    mine.steer({5: 1.0}, "image", start=0.9, stop=0.95)
    with pytest.warns(UserWarning, match="holds none of the run's 4 steps"):
        sd.run(mine)


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
