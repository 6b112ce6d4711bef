"""The settings of a training run: what they may be, and what follows from them."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from kinds import of_kind

from diffusers_sae import InputError, TopKSAE
from diffusers_sae.training import SAETrainer, TrainingConfig

BAD = {
    "steps": (0, -1, 2.5, "10", True, None),
    "batch_size": (1, 0, -1, 64.0, None),
    "lr": (0, -1e-3, math.nan, math.inf, "1e-3", None),
    "warmup": (-0.1, 1.1, math.nan),
    "decay": (-0.1, 1.1, math.nan),
    "k_aux": (-1, 0.5),
    "aux_weight": (-1.0, math.nan, math.inf),
    "dead_after": (0, -5, 1.5, math.inf),
    "centre": ("median", None, 3, ["mean"]),
    "sparsity": (-1.0, math.nan),
    "sparsity_warmup": (-0.1, 2),
    "bandwidth": (0, -1.0, math.nan, math.inf),
    "clip": (0, -1.0, math.nan),
    "resample_every": (0, -1, 2.5),
    "ema": (0, 1, -0.5, 1.5, math.nan),
    "optimizer": ("sgd",),
    "precision": ("float16",),
}


def test_every_setting_has_bad_values():
    assert BAD.keys() == {field.name for field in fields(TrainingConfig)}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(InputError) as error:
        TrainingConfig(**{"steps": 10, name: value})
    assert name in str(error.value) and repr(value) in str(error.value)


def test_the_ends_of_the_ranges_are_allowed():
    TrainingConfig(
        1, 2, warmup=0, decay=1, k_aux=0, aux_weight=0, dead_after=1, sparsity=0, sparsity_warmup=0, clip=math.inf
    )
    TrainingConfig(np.int64(5), lr=np.float64(1e-3))


@pytest.mark.parametrize("kind", [("TopKSAE", {"k": 3}), ("JumpReLUSAE", {})], ids=str)
def test_runs_at_the_ends_of_the_ranges_are_finite(kind):
    torch.manual_seed(0)
    rows = torch.randn(256, 32) + 3
    config = TrainingConfig(
        5, 64, warmup=0, decay=0, k_aux=0, aux_weight=0, dead_after=1, sparsity=0, sparsity_warmup=0, clip=math.inf,
        centre="mean", bandwidth=1e-6,
    )  # fmt: skip
    trainer = SAETrainer(of_kind(*kind, d_in=32, n_latents=64).train(), config, rows)
    assert all(math.isfinite(value) for _ in range(5) for value in trainer.step(rows[:64]).values())
    assert all(torch.isfinite(p).all() for p in trainer.finish().parameters())


def test_the_rate_rises_and_falls_over_the_shares_of_the_run():
    config = TrainingConfig(100, warmup=0.1, decay=0.5)
    assert [config.rate_at(i) for i in (0, 4, 9, 50)] == pytest.approx([0.1, 0.5, 1, 1])
    assert [config.rate_at(i) for i in (75, 99)] == pytest.approx([0.5, 0.02])
    assert {replace(config, warmup=0, decay=0).rate_at(i) for i in range(100)} == {1.0}  # no decay is no decay
    assert replace(config, warmup=0, decay=1).rate_at(25) == 0.75


def test_a_resolved_config_is_explicit():
    config = TrainingConfig(40, 64).resolve("cpu")
    assert config.dead_after == 256 and config.precision in ("float32", "bfloat16")
    assert config.resolve("cpu") == config
    assert TrainingConfig(40, 64, dead_after=7).resolve("cpu").dead_after == 7
    trainer = SAETrainer(TopKSAE(4, 8, 2), TrainingConfig(40, 64), torch.randn(16, 4))
    assert trainer.state_dict()["config"]["dead_after"] == 256
