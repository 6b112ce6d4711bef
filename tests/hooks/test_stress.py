"""Eight pipelines in eight threads over four sets of modules, and all that a user does: each run as it is alone.

`DIFFUSERS_SAE_STRESS_RUNS=500 pytest tests/hooks/test_stress.py` makes as many runs; by default they are fewer.
"""

import copy
import os
import random
import threading

import pytest
import torch
from conftest import Harness, random_sae

from diffusers_sae import Rule, SAESteeringPipeline
from diffusers_sae.demo.shipped import SITES, load_pipeline
from diffusers_sae.hooks import current_run

RUNS = int(os.environ.get("DIFFUSERS_SAE_STRESS_RUNS", 48))
KINDS = ("Stable Diffusion", "SDXL", "Flux", "emoji-sd")
STEPS = 3


class Modules:
    """One set of modules, with an SAE that its pipelines share."""

    def __init__(self, kind):
        self.harness = None if kind == "emoji-sd" else Harness(kind)
        self.bare = load_pipeline() if self.harness is None else self.harness.bare
        self.site = SITES[1] if self.harness is None else self.harness.tiny.site
        torch.manual_seed(3)
        self.sae = random_sae(128, site={"path": self.site}) if self.harness is None else self.harness.sae()
        self.call = {} if self.harness is None else self.harness.tiny.arguments

    def stock(self):
        """A stock pipeline over the modules, with a scheduler and tokenizers of its own."""
        pipe = copy.copy(self.bare)
        tokenizers = [n for n in pipe.components if n.startswith("tokenizer") and getattr(pipe, n) is not None]
        pipe.register_modules(
            scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config),
            **{name: copy.deepcopy(getattr(pipe, name)) for name in tokenizers},
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def pipeline(self):
        """A new steerable pipeline like this."""
        pipe = SAESteeringPipeline.from_pipe(self.stock())
        pipe.load_sae(self.sae, adapter_name="a")
        return pipe


class Stop(Exception):
    pass


def change_plan(pipe, choice, rng):
    """One thing that a user does to a plan."""
    feature, strength = rng.randrange(32), rng.choice([-6.0, 3.0, 8.0])
    match choice:
        case "steer":
            window = rng.choice([{}, {"stop": 0.67}, {"start": 0.34}])
            pipe.steer({feature: strength}, "a", **window, branch=rng.choice(["cond", "both"]))
        case "scale":
            pipe.steer({feature: 0.5}, "a", mode="scale", preserve_norm=rng.random() < 0.5)
        case "rule":
            pipe.steer({feature: strength}, "a", when=Rule({feature: 1.0}, above=0.01))
        case "reset":
            pipe.reset_steering()
        case "disable":
            pipe.disable_sae()
        case "enable":
            pipe.enable_sae()
        case "reload":
            sae = pipe._steering.loaded["a"].sae
            pipe.unload_sae()
            pipe.load_sae(sae, adapter_name="a")


PLAN = ("steer", "steer", "scale", "rule", "reset", "disable", "enable", "reload")
DURING = ("nothing", "plan", "plan", "stock", "another", "capture", "raise")


def run_once(modules, pipe, seed):
    """One run with what a random user does before and within it: the images, or that it was stopped; and captures."""
    rng, seen = random.Random(seed), []
    change_plan(pipe, rng.choice(PLAN), rng)
    during, at, captured = rng.choice(DURING), rng.randrange(STEPS), rng.random() < 0.3
    opened = pipe.capture([modules.site])

    def callback(_, step, timestep, tensors):
        assert current_run() is None
        if step == at:
            if during == "plan":
                change_plan(pipe, rng.choice(PLAN), rng)
            if during == "stock":
                seen.append(call(modules.stock(), rng.randrange(100)))
            if during == "another":
                other = modules.pipeline()
                other.steer({rng.randrange(32): 5.0})
                seen.append(call(other, rng.randrange(100)))
            if during == "capture":
                seen.append(opened.__enter__())
            if during == "raise":
                raise Stop
        return tensors

    def call(pipe, seed, **arguments):
        generator = torch.Generator().manual_seed(seed)
        prompt = random.Random(seed).choice(["ab", "cd", "a cat"])
        arguments = {**modules.call, "num_inference_steps": STEPS, "generator": generator, **arguments}
        return pipe(prompt, output_type="latent", **arguments).images

    def whole():
        try:
            return call(pipe, seed, callback_on_step_end=callback)
        except Stop:
            return None

    if captured:
        with pipe.capture([modules.site]) as activations:
            images = whole()
        seen.append(activations)
    else:
        images = whole()
    if during == "capture":
        opened.__exit__(None, None, None)
    tensors = [each if isinstance(each, torch.Tensor) else held(each[modules.site]) for each in seen]
    return [images, *tensors]


def held(activations):
    return activations.tensor if activations.calls else None


def equal(a, b):
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


@pytest.mark.filterwarnings("ignore")
def test_every_run_is_as_it_is_alone():
    sets = [Modules(kind) for kind in KINDS]
    users = [(modules, i) for modules in sets for i in (0, 1)]
    per_user = -(-RUNS // len(users))

    def all_runs(modules, number):
        pipe = modules.pipeline()
        return [run_once(modules, pipe, 1000 * number + i) for i in range(per_user)]

    alone = [all_runs(modules, 2 * sets.index(modules) + i) for modules, i in users]
    together, errors = [None] * len(users), []

    def work(n):
        modules, i = users[n]
        try:
            with torch.no_grad():
                together[n] = all_runs(modules, 2 * sets.index(modules) + i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(users))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    for expected, found in zip(alone, together, strict=True):
        for one, other in zip(expected, found, strict=True):
            assert len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    assert any(run[0] is None for runs in alone for run in runs) or per_user < 6
