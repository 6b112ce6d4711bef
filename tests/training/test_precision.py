"""Precision is a setting, resolved from the hardware and recorded; codes never depend on it."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import random_sae
from test_from_store import CONFIG, stored, trained  # noqa: F401

from diffusers_sae import InputError, TopKSAE
from diffusers_sae.training import SAETrainer, TrainingConfig, train_on_store
from diffusers_sae.training.precision import DTYPES, VARIABLE, has_bfloat16_units, resolve_precision

PRECISIONS = list(DTYPES)


def other(precision):
    return PRECISIONS[1 - PRECISIONS.index(precision)]


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def test_auto_is_what_the_hardware_has_units_for(monkeypatch):
    assert resolve_precision() == ("bfloat16" if has_bfloat16_units("cpu") else "float32")
    assert resolve_precision("auto", "mps") == "float32"
    for precision in PRECISIONS:
        assert resolve_precision(precision) == precision
        monkeypatch.setenv(VARIABLE, precision)
        assert resolve_precision() == precision and resolve_precision(other(precision)) == other(precision)


def test_auto_means_the_same_in_every_process():
    command = [sys.executable, "-c", "from diffusers_sae.training.precision import resolve_precision as f; print(f())"]
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    assert {process.communicate()[0].strip() for process in processes} == {resolve_precision()}


def test_what_is_no_precision_is_refused(monkeypatch):
    with pytest.raises(InputError, match="precision='float16' is not a precision; choose from auto, float32, bfloat16"):
        TrainingConfig(1, precision="float16")
    monkeypatch.setenv(VARIABLE, "fp32")
    with pytest.raises(InputError, match=f"{VARIABLE}='fp32' is not a precision"):
        SAETrainer(TopKSAE(4, 8, 2), TrainingConfig(1), torch.randn(16, 4))


def test_codes_are_exact_whether_an_sae_is_fresh_loaded_or_training(tmp_path, monkeypatch):
    x = torch.randn(64, 8)
    sae = random_sae().train()
    sae.save_pretrained(tmp_path)
    loaded = TopKSAE.from_pretrained(tmp_path)
    expected = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    expected = expected.relu() * (expected >= expected.topk(4).values[:, -1:])
    for precision in PRECISIONS:
        monkeypatch.setenv(VARIABLE, precision)
        for one in (sae, sae.eval(), sae.train(), loaded):
            torch.testing.assert_close(one.encode(x), expected)
            assert torch.equal(one.encode(x), loaded.encode(x))


def test_a_precision_is_recorded_and_changes_only_which_latents_are_chosen():
    rows = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    trainers = {}
    for precision in PRECISIONS:
        torch.manual_seed(0)
        trainers[precision] = SAETrainer(TopKSAE(16, 256, 8), TrainingConfig(4, 512, precision=precision), rows)
    fvu = {precision: trainer.step(rows)["fvu"] for precision, trainer in trainers.items()}
    assert {p: trainer.state_dict()["config"]["precision"] for p, trainer in trainers.items()} == dict(
        zip(PRECISIONS, PRECISIONS, strict=True)
    )
    assert fvu["bfloat16"] == pytest.approx(fvu["float32"], rel=1e-2)
    for trainer in trainers.values():
        assert {p.dtype for p in trainer.sae.parameters()} == {torch.float32}
        moments = [v for state in trainer.optimizer.state.values() for v in state.values() if v.ndim]
        assert {v.dtype for v in moments} == {torch.float32}


@pytest.mark.parametrize("begun", PRECISIONS)
def test_a_resumed_run_keeps_its_precision_on_any_machine(stored, tmp_path, steps_left, monkeypatch, begun):  # noqa: F811
    from conftest import Stop

    config = replace(CONFIG, steps=12)
    monkeypatch.setenv(VARIABLE, begun)
    expected = trained(stored, tmp_path / "whole", config=config).state_dict()
    steps_left[:] = [7]
    with pytest.raises(Stop):
        trained(stored, tmp_path / "stopped", config=config)
    steps_left[:] = [0]
    monkeypatch.setenv(VARIABLE, other(begun))
    with pytest.raises(InputError, match="training.precision is"):
        trained(stored, tmp_path / "stopped", config=replace(config, precision=other(begun)))
    found = trained(stored, tmp_path / "stopped", config=config).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_bfloat16_and_float32_searches_differ_in_what_they_train(stored, tmp_path):  # noqa: F811
    """Otherwise the tests above could not fail."""
    saes = [
        train_on_store(stored, lambda d: TopKSAE(d, 256, 4), tmp_path / precision, replace(CONFIG, precision=precision))
        for precision in PRECISIONS
    ]
    assert not torch.equal(saes[0].W_dec, saes[1].W_dec)
