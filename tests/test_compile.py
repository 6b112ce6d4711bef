"""`torch.compile`: whole graphs, and as few as the pipeline alone needs, whatever numbers change."""

import pytest
import torch
from conftest import Harness

from diffusers_sae import StrengthMap

KINDS = ["Stable Diffusion", "SDXL", "Flux"]


class Counter:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def compiled(harness, counter):
    torch._dynamo.reset()
    name = harness.tiny.site.partition(".")[0]
    setattr(harness.pipe, name, torch.compile(getattr(harness.pipe, name), backend=counter, fullgraph=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attached", ["before", "after"])
def test_compiled_images_equal_eager_ones_and_numbers_compile_nothing_anew(kind, attached):
    eager, harness, counter = Harness(kind), Harness(kind), Counter()
    bare = eager.run()
    eager.pipe.load_sae(eager.sae())
    if attached == "after":
        compiled(harness, counter)
        torch.testing.assert_close(harness.run(), bare, atol=1e-4, rtol=1e-3)
        harness.pipe.load_sae(harness.sae())
        harness.pipe.steer({3: 1.0, 5: 2.0}, stop=0.7)
    else:
        harness.pipe.load_sae(harness.sae())
        harness.pipe.steer({3: 1.0, 5: 2.0}, stop=0.7)
        compiled(harness, counter)
    harness.run()
    before = counter.graphs
    for strength in (0.0, 1.0, -2.0, 9.0, 50.0):
        for prompt in ("ab", "cd", "a much longer one"):
            for pipe in (eager.pipe, harness.pipe):
                pipe.reset_steering()
                pipe.steer({3: strength, 5: lambda p, s=strength: s * p}, stop=0.7)
            torch.testing.assert_close(harness.run(prompt=prompt), eager.run(prompt=prompt), atol=1e-3, rtol=1e-2)
    assert counter.graphs - before <= 1 and counter.graphs <= 2 + (attached == "after")


@pytest.mark.parametrize("mode", ["set", "scale", "cap"])
def test_modes_that_read_the_code_compile(mode):
    eager, harness, counter = Harness(), Harness(), Counter()
    for one in (eager, harness):
        one.pipe.load_sae(one.sae())
        one.pipe.steer({3: 0.5, 5: 0.25}, mode=mode)
    compiled(harness, counter)
    torch.testing.assert_close(harness.run(), eager.run(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("mode", ["add", "set"])
def test_maps_and_masks_of_other_sizes_than_the_grid_compile(mode):
    eager, harness, counter = Harness(), Harness(), Counter()
    maps = {3 + i: StrengthMap((500.0,), torch.rand(1, size, size)) for i, size in enumerate((2, 12, 16))}
    for one in (eager, harness):
        one.pipe.load_sae(one.sae())
        one.pipe.steer(maps, mode=mode, mask=torch.eye(12))
    compiled(harness, counter)
    torch.testing.assert_close(harness.run(), eager.run(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("arguments", [{}, {"branch": "both"}, {"mode": "scale"}])
def test_runs_of_one_step_compile_twice_at_most_whatever_the_strength(arguments):
    eager, harness, counter = Harness(), Harness(), Counter()
    for one in (eager, harness):
        one.pipe.load_sae(one.sae())
    compiled(harness, counter)
    for strength in (1.0, 0.0, -2.0, 9.0):
        for one in (eager, harness):
            one.pipe.reset_steering()
            one.pipe.steer({3: strength, 5: strength}, **arguments)
        found, expected = (one.run(num_inference_steps=1) for one in (harness, eager))
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)
    assert counter.graphs <= 2


def test_repeated_blocks_compile(sd):
    sd.pipe.load_sae(sd.sae())
    sd.pipe.steer({3: 9.0})
    expected = sd.run()
    torch._dynamo.reset()
    sd.pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(sd.run(), expected, atol=1e-4, rtol=1e-3)
