"""The part of the matrix that wants a GPU: fp16, offload, xformers, Inductor, training on the card. See `make gpu`.

`GPU_TESTS_DEVICE=cpu` runs what a processor can of it, to see that the tests themselves work.
"""

import os

import pytest
import torch
from conftest import Harness, random_sae

from diffusers_sae.training import SAETrainer, TrainingConfig

DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
KINDS = ["Stable Diffusion", "SDXL", "Flux", "Stable Diffusion 3"]
EDITS = [{"mode": "add"}, {"mode": "scale"}, {"mode": "set"}]
STRENGTHS = {3: 9.0, 7: 4.0}
needs_a_card = pytest.mark.skipif(DEVICE != "cuda", reason="offload and xformers need a card")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU"),
]


def on_card(kind):
    """A tiny pipeline in half precision on the card."""
    harness = Harness(kind)
    harness.pipe.to(DEVICE, DTYPE)
    return harness


@pytest.fixture(params=KINDS)
def harness(request):
    return on_card(request.param)


def loaded(harness):
    harness.pipe.load_sae(harness.sae(), adapter_name="tiny")
    return harness


@pytest.mark.parametrize("edit", [{"mode": "add", "strength": 0.0}, {"mode": "scale", "strength": 1.0}])
def test_a_plan_that_changes_nothing_changes_no_bit(harness, edit):
    bare = harness.run(harness.bare)
    loaded(harness)
    assert torch.equal(harness.run(), bare)
    harness.pipe.steer(dict.fromkeys(STRENGTHS, edit["strength"]), mode=edit["mode"])
    assert torch.equal(harness.run(), bare)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit["mode"])
def test_steered_images_repeat_and_change(harness, edit):
    bare = harness.run(harness.bare)
    loaded(harness).pipe.steer(STRENGTHS, **edit)
    images = harness.run()
    assert images.isfinite().all() and not torch.equal(images, bare) and torch.equal(harness.run(), images)
    harness.pipe.reset_steering()
    assert torch.equal(harness.run(), bare)


@needs_a_card
@pytest.mark.parametrize("offload", ["model", "sequential", "group"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_offload_gives_the_same_images(offload, order):
    expected = loaded(on_card("Stable Diffusion"))
    expected.pipe.steer(STRENGTHS)
    harness = Harness("Stable Diffusion")
    harness.pipe.to(dtype=DTYPE)
    put = {
        "model": harness.pipe.enable_model_cpu_offload,
        "sequential": harness.pipe.enable_sequential_cpu_offload,
        "group": lambda: harness.pipe.enable_group_offload(
            onload_device=torch.device(DEVICE), offload_type="leaf_level"
        ),
    }[offload]
    if order == "before":
        put()
    loaded(harness).pipe.steer(STRENGTHS)
    if order == "after":
        put()
    for _ in range(2):  # hooks of the second call are others under model offload
        assert torch.equal(harness.run().cpu(), expected.run().cpu())


@needs_a_card
@pytest.mark.parametrize("order", ["before", "after"])
def test_xformers(order):
    pytest.importorskip("xformers")
    harness = on_card("Stable Diffusion")
    harness.pipe.enable_xformers_memory_efficient_attention()
    bare = harness.run()
    if order == "after":
        harness.pipe.disable_xformers_memory_efficient_attention()
    loaded(harness)
    if order == "after":
        harness.pipe.enable_xformers_memory_efficient_attention()
    assert torch.equal(harness.run(), bare)
    harness.pipe.steer(STRENGTHS)
    assert not torch.equal(harness.run(), bare)


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit["mode"])
def test_compiled_images_are_near_eager_ones(kind, edit):
    """By Inductor on a card; on a processor the graph is only traced."""
    torch._dynamo.reset()
    eager, compiled = loaded(on_card(kind)), loaded(on_card(kind))
    name = compiled.tiny.site.partition(".")[0]
    backend = "inductor" if DEVICE == "cuda" else "eager"
    module = torch.compile(getattr(compiled.pipe, name), fullgraph=True, backend=backend)
    setattr(compiled.pipe, name, module)
    for one in (eager, compiled):
        one.pipe.steer(STRENGTHS, stop=0.7, **edit)
    torch.testing.assert_close(compiled.run(), eager.run(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_on_the_card_lowers_the_error(precision):
    torch.manual_seed(0)
    rows = (torch.randn(512, 8) @ torch.randn(8, 24)).to(DEVICE)
    trainer = SAETrainer(random_sae(24, 96, 8).to(DEVICE).train(), TrainingConfig(60, 512, precision=precision), rows)
    first = trainer.step(rows)["fvu"]
    for _ in range(59):
        last = trainer.step(rows)["fvu"]
    assert last < first / 2
