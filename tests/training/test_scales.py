"""Sizes by the length of a run."""

import pytest
import torch
from conftest import SITE, Harness

from diffusers_sae import InputError, TopKSAE
from diffusers_sae.capture import StoreConfig, store_activations
from diffusers_sae.training import SCALES, SAETrainer, TrainingConfig, sizes_for

CALL = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return store_activations(Harness().pipe, [SITE], list("abcdef"), folder, StoreConfig(6, 2), **CALL)[SITE]


def sized(stored, scale, **kwargs):
    return sizes_for(scale, stored, lambda d, n: TopKSAE(d, n, 4), TrainingConfig(1, lr=0.123), **kwargs)


def test_steps_are_as_many_as_the_seconds_hold(stored, monkeypatch):
    clock, step = [0.0], SAETrainer.step

    def slow(self, rows):
        clock[0] += 0.25 if self.step_count else 9.0  # the first step takes longer
        return step(self, rows)

    monkeypatch.setattr(SAETrainer, "step", slow)
    monkeypatch.setattr("diffusers_sae.training.scales.time.perf_counter", lambda: clock[0])
    state = torch.random.get_rng_state()
    latents, config = sized(stored, "1m")
    assert (latents, config.steps, config.batch_size, config.lr) == (4 * 8, 240, len(stored) // 4, 0.123)
    assert config.dead_after == 240 * config.batch_size // 10
    assert sized(stored, "1s")[1].steps == 50 and sized(stored, "1m", latents=100)[0] == 100
    assert torch.equal(torch.random.get_rng_state(), state)


def test_longer_scales_are_larger():
    for smaller, larger in zip(list(SCALES.values())[:-1], list(SCALES.values())[1:], strict=True):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True)) and smaller != larger
        assert larger.seconds in (6 * smaller.seconds, 10 * smaller.seconds)


def test_mistakes(stored):
    with pytest.raises(InputError, match="'2m' is not a scale; choose from 1s, 10s, 1m, 10m, 1h, 10h"):
        sized(stored, "2m")
