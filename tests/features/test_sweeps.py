"""Sweeps are the images that single calls with these edits give, and leave the plan as it was."""

import pytest
import torch
from conftest import Harness

from diffusers_sae.features.sweeps import one_after_another, sweep, sweep_two


@pytest.fixture
def steerable():
    harness = Harness()
    harness.pipe.load_sae(harness.sae(), adapter_name="one")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {**harness.tiny.arguments, "num_inference_steps": 2, "output_type": "pt", "prompt": ["ab", "cd"]}
    return harness.pipe, {**call, "latents": latents}


def image(pipe, call, edits, row=0, **steer):
    with pipe.steering(edits, **steer):
        return pipe(**call).images[row]


def test_sweep(steerable):
    pipe, call = steerable
    rows = sweep(pipe, 3, [-5.0, 0.0, 5.0], {"adapter_name": "one", "stop": 0.7}, **call)
    assert len(rows) == 2 and all(len(row) == 3 for row in rows)
    assert torch.equal(rows[1][2], image(pipe, call, {3: 5.0}, 1, stop=0.7))
    assert torch.equal(rows[0][1], pipe(**call).images[0])
    assert not torch.equal(rows[0][0], rows[0][2])
    assert pipe.get_list_saes()["one"]["edits"] == 0


def test_sweep_two(steerable):
    pipe, call = steerable
    grid = sweep_two(pipe, (3, 4), [0.0, 5.0], **call)
    assert torch.equal(grid[0][0], pipe(**call).images[0])
    assert torch.equal(grid[1][0], image(pipe, call, {3: 5.0}))
    assert torch.equal(grid[0][1], image(pipe, call, {4: 5.0}))
    torch.testing.assert_close(grid[1][1], image(pipe, call, {3: 5.0, 4: 5.0}), atol=1e-4, rtol=0)
    assert pipe.get_list_saes()["one"]["edits"] == 0


def test_one_after_another(steerable):
    pipe, call = steerable
    images = one_after_another(pipe, {3: 5.0, 4: -5.0}, **call)
    assert len(images) == 3
    assert torch.equal(images[1], image(pipe, call, {3: 5.0}))
    assert torch.equal(images[2], image(pipe, call, {3: 5.0, 4: -5.0}))
