"""Descriptions of runs: the same in every process, other for whatever changes the result."""

import copy
import functools
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from conftest import SITE, Harness, random_sae
from PIL import Image

from diffusers_sae import InputError, ReLUSAE, TopKSAE
from diffusers_sae.capture.descriptions import (
    checked_prompts,
    describe,
    describe_call,
    describe_pipeline,
    describe_prompts,
    describe_sae,
    digest_weights,
    refuse_differences,
)
from diffusers_sae.training import TrainingConfig


def adder(amount):
    seen = []

    def add(pipe, step, t, kept):
        seen.append(step)
        return kept, amount

    return add


def picture(value):
    return Image.new("RGB", (4, 4), (value, 0, 0))


def moved_scheduler():
    pipe = Harness().pipe
    return type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")


VALUES = {
    "number": (3, 4),
    "float": (0.5, 0.25),
    "nan": (float("nan"), float("inf")),
    "text": ("a", "b"),
    "none": (None, 0),
    "list": ([1, 2], [2, 1]),
    "dict": ({"a": 1}, {"a": 2}),
    "tensor": (torch.arange(9.0), torch.arange(9.0).flip(0)),
    "long tensor": (torch.zeros(5000), torch.cat([torch.zeros(2500), torch.ones(1), torch.zeros(2499)])),
    "dtype of a tensor": (torch.zeros(3), torch.zeros(3, dtype=torch.float16)),
    "shape of a tensor": (torch.zeros(3, 2), torch.zeros(2, 3)),
    "array": (np.arange(4), np.arange(4) + 1),
    "numpy number": (np.float32(1), np.float32(2)),
    "picture": (picture(1), picture(2)),
    "pictures": ([picture(1), picture(2)], [picture(2), picture(1)]),
    "function": (adder(1), adder(2)),
    "code": (lambda x: x + 1, lambda x: x - 1),
    "name in the code": (lambda x: x.a, lambda x: x.b),
    "default": (lambda x, a=1: x, lambda x, a=2: x),
    "partial": (functools.partial(print, sep="a"), functools.partial(print, sep="b")),
    "class": (ReLUSAE, TopKSAE),
    "module": (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
    "scheduler": (Harness().pipe.scheduler, moved_scheduler()),
    "record": (TrainingConfig(5), TrainingConfig(6)),
    "dtype": (torch.float16, torch.float32),
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_value_is_described_alike_and_another_one_otherwise(kind):
    value, other = VALUES[kind]
    described = describe(value)
    assert json.loads(json.dumps(described)) == described  # a manifest keeps it
    assert described == describe(copy.deepcopy(value))
    assert described != describe(other)


def test_what_a_function_counts_is_not_compared():
    add = adder(1)
    before = describe(add)
    add(None, 1, 2, {})
    assert describe(add) == before


def test_what_has_no_description_is_named_without_its_address():
    class Thing:
        pass

    assert describe(Thing()) == describe(Thing()) and "0x" not in json.dumps(describe(Thing()))


SCRIPT = """
import json
from test_descriptions import VALUES
from diffusers_sae.capture.descriptions import describe
print(json.dumps({name: describe(value[0]) for name, value in VALUES.items() if name != "module"}))
"""


def test_descriptions_are_the_same_in_another_process(tmp_path):
    here = {name: describe(value[0]) for name, value in VALUES.items() if name != "module"}
    environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "5"}
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(found.stdout) == here


def test_prompts_are_counted_and_told_apart():
    assert describe_prompts(["a", "b"]) != describe_prompts(["a\0b"]) != describe_prompts(["ab"])
    assert describe_prompts(["a"]) == describe_prompts(["a"])
    assert checked_prompts((word for word in "abc"), 2) == ["a", "b"]
    for prompts, sentence in (
        (["a"], "There are 1 prompts for 2 images; give one for each"),
        ("ab", r"prompts takes a list of prompts; pass \['ab'\]"),
        (["a", None], "Prompt 1 is None, no string"),
    ):
        with pytest.raises(InputError, match=sentence):
            checked_prompts(prompts, 2)


class Lazy:
    """Pictures that are made when they are asked for."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, part):
        return [picture(value) for value in self.values[part]]


def test_pictures_are_compared_as_far_as_they_are_used():
    def described(pictures):
        return describe_call({"images": pictures}, 2)

    assert described(Lazy([1, 2, 3])) == described(Lazy([1, 2])) == described([picture(1), picture(2)])
    assert described(Lazy([1, 2])) != described(Lazy([1, 3]))


def test_a_pipeline_is_the_same_wherever_it_lies_and_however_it_is_run():
    first, second = Harness().pipe, Harness().pipe
    second.register_to_config(_name_or_path="elsewhere")
    second.safety_checker = None
    assert describe_pipeline(first) == describe_pipeline(second)
    with torch.no_grad():
        second.vae.decoder.conv_out.bias[-1] += 1
    assert describe_pipeline(first)["weights"]["unet"] == describe_pipeline(second)["weights"]["unet"]
    assert describe_pipeline(first)["weights"]["vae"] != describe_pipeline(second)["weights"]["vae"]


def test_edits_do_not_count_since_they_rest():
    harness = Harness()
    bare = describe_pipeline(harness.pipe)
    harness.pipe.load_sae(harness.sae(), adapter_name="a")
    with harness.pipe.steering({3: 2.0}):
        assert describe_pipeline(harness.pipe) == bare


def test_weights_are_told_apart_wherever_they_differ_and_offloaded_ones_are_read():
    module = Harness().pipe.unet
    whole = digest_weights(module)
    for name, parameter in list(module.named_parameters())[::5]:
        with torch.no_grad():
            before = parameter.flatten()[-1].item()
            parameter.view(-1)[-1] += 0.5
            assert digest_weights(module) != whole, name
            parameter.view(-1)[-1] = before
    assert digest_weights(module) == whole
    module.up_blocks[0].b1 = 1.2  # as enable_freeu sets it
    assert digest_weights(module) != whole
    module.up_blocks[0].b1 = None
    assert digest_weights(module.half()) != whole
    module = Harness().pipe.unet
    cpu_offload(module)
    assert next(module.parameters()).is_meta and digest_weights(module) == whole


def test_an_sae_is_described_by_what_it_is_not_by_where_it_is_from():
    assert describe_sae(random_sae(base_model="a")) == describe_sae(random_sae(base_model="b"))
    assert describe_sae(random_sae())["class"] == "TopKSAE" and describe_sae(random_sae())["k"] == 4
    assert describe_sae(random_sae(k=5)) != describe_sae(random_sae())


def test_a_refusal_names_what_differs():
    there = {"sae": {"k": 4, "d_in": 8}, "training": vars(TrainingConfig(5)), "prompts": describe_prompts(["a"])}
    refuse_differences(there, copy.deepcopy(there), "a.pt", "the checkpoint", "delete it")
    here = {**there, "sae": {"k": 9, "d_in": 8}, "prompts": describe_prompts(["b"])}
    with pytest.raises(InputError) as error:
        refuse_differences(there, here, "a.pt", "the checkpoint", "delete it")
    assert str(error.value) == (
        "a.pt is of another run: sae.k is 4 in the checkpoint and 9 here; prompts has other contents; delete it."
    )
    many = {**there, "training": vars(replace(TrainingConfig(6), batch_size=2, lr=1, warmup=1, decay=1, k_aux=1))}
    with pytest.raises(InputError, match="; and 2 more; delete it"):
        refuse_differences(there, many, "a.pt", "the checkpoint", "delete it")
    with pytest.raises(InputError, match=f"plan.{SITE} is nothing in the store and .{{57}}[.]{{3}} here"):
        refuse_differences({"plan": {}}, {"plan": {SITE: "a" * 90}}, "a", "the store", "delete it")
