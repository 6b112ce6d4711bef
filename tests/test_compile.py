"""`torch.compile`: whole graphs, and as few as the pipeline alone needs, whatever numbers change."""

import threading

import pytest
import torch
from conftest import Harness

from diffusers_sae import SAESteeringPipeline, StrengthMap

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


STEPS = {
    "load": lambda one: one.pipe.load_sae(one.sae(), adapter_name="a"),
    "steer": lambda one: one.pipe.steer({3: 4.0}, "a"),
    "scale": lambda one: one.pipe.steer({5: 0.5}, "a", mode="scale"),
    "reset": lambda one: one.pipe.reset_steering(),
    "disable": lambda one: one.pipe.disable_sae(),
    "enable": lambda one: one.pipe.enable_sae(),
    "load elsewhere": lambda one: one.pipe.load_sae(one.sae(), "unet.down_blocks.0.attentions.0", adapter_name="b"),
    "steer elsewhere": lambda one: one.pipe.steer({3: 4.0}, "b"),
    "unload": lambda one: one.pipe.unload_sae(),
}


@pytest.mark.filterwarnings("ignore:The SAE was trained at")
@pytest.mark.parametrize(
    "order",
    [
        ("load", "steer", "disable", "enable", "unload"),
        ("load", "load elsewhere", "steer elsewhere", "scale", "reset"),
    ],
)
def test_every_change_of_the_plan_reaches_a_compiled_model(order):
    eager, harness = Harness(), Harness()
    compiled(harness, Counter())
    for name in order:
        for one in (eager, harness):
            STEPS[name](one)
        torch.testing.assert_close(harness.run(), eager.run(), atol=1e-4, rtol=1e-3)


def test_a_pipeline_joins_another_one_at_a_module_of_a_compiled_model():
    eager, harness = Harness(), Harness()
    compiled(harness, Counter())
    other = SAESteeringPipeline.from_pipe(harness.pipe)
    other.load_sae(harness.sae())
    other.steer({5: 4.0})
    for pipe in (other, harness.pipe):
        harness.run(pipe)
    for one in (eager, harness):
        one.pipe.load_sae(one.sae())
        one.pipe.steer({3: 4.0})
    torch.testing.assert_close(harness.run(), eager.run(), atol=1e-4, rtol=1e-3)
    other.unload_sae()
    torch.testing.assert_close(harness.run(other), Harness().run(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(harness.run(), eager.run(), atol=1e-4, rtol=1e-3)


def test_captures_and_plans_of_a_compiled_model_that_change_within_a_run():
    eager, harness, seen = Harness(), Harness(), []
    compiled(harness, Counter())
    for one in (eager, harness):
        one.pipe.load_sae(one.sae())
        one.run()
        captures = [one.pipe.capture([one.tiny.site])]

        def callback(pipe, i, timestep, tensors, one=one, captures=captures):
            if i == 0:
                captures.append(captures[0].__enter__())
                pipe.steer({3: 4.0}, stop=0.75)
            if i == 2:
                captures[0].__exit__(None, None, None)
            return tensors

        seen.append((one.run(callback_on_step_end=callback), captures[1][one.tiny.site]))
    torch.testing.assert_close(seen[1][0], seen[0][0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(seen[1][1].tensor, seen[0][1].tensor, atol=1e-4, rtol=1e-3)
    assert seen[1][1].timestep.tolist() == seen[0][1].timestep.tolist() and len(seen[0][1].timestep) == 4


def test_a_compiled_model_in_two_threads_is_exact_for_each():
    harness = Harness()
    compiled(harness, Counter())
    embeds, negative = harness.bare.encode_prompt("ab", "cpu", 1, True, "")
    call = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    scheduler = type(harness.bare.scheduler).from_config(harness.bare.scheduler.config)
    parts = {**harness.pipe.components, "scheduler": scheduler}
    stock = type(harness.bare)(**parts, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    harness.pipe.load_sae(harness.sae())
    harness.pipe.steer({3: 4.0})
    pipes = (harness.pipe, stock)
    expected = [harness.run(pipe, **call) for pipe in pipes]
    found = [[], []]

    def work(i):
        with torch.no_grad():
            for _ in range(4):
                found[i].append(harness.run(pipes[i], **call))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.equal(*expected)
    for images, runs in zip(expected, found, strict=True):
        assert len(runs) == 4 and all(torch.equal(run, images) for run in runs)


def test_repeated_blocks_compile(sd):
    sd.pipe.load_sae(sd.sae())
    sd.pipe.steer({3: 9.0})
    expected = sd.run()
    torch._dynamo.reset()
    sd.pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(sd.run(), expected, atol=1e-4, rtol=1e-3)
