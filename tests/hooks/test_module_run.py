"""What a call of a hooked module computes, to the bit where nothing changes, and how many kernels that takes."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SITE, random_sae
from reference import edited

from diffusers_sae import StrengthTable, prepared
from diffusers_sae.context import Context
from diffusers_sae.edits import make_edit
from diffusers_sae.hooks import LoadedSAE, ModuleRun
from diffusers_sae.prepared import prepare
from diffusers_sae.sites import Place, Site

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from steering_kernels import PLANS, cost_of

KERNELS = {
    "add": 2,
    "add, window of half the steps": 2,
    "add, table over timesteps": 2,
    "add, two images, a strength for each": 2,
    "add, timesteps as Flux gives them": 5,
    "add, mask": 6,
    "add, preserve_norm": 14,
    "scale": 17,
    "scale, both branches": 19,
    "scale, mask": 18,
    "replace": 31,
}
"""Kernels of a step at most, by plan: one of them writes the step down, and every other belongs to the site's call."""


@pytest.mark.parametrize("name", KERNELS)
def test_a_steered_step_launches_few_kernels_and_never_waits(name):
    cost = cost_of(PLANS[name], 2)
    assert cost["waits_per_step"] == 0
    assert 0 < cost["kernels_per_step"] <= KERNELS[name], cost["operations_per_step"]


def module_run(sae, *edits, branches=("uncond", "cond"), images=1, step=1, kind="output"):
    """What a run with these edits does at a module, at one of its steps."""
    context = Context((900.0, 500.0, 100.0), branches=branches, rows=images * len(branches))
    context.step, context.known_step = torch.tensor(step), step
    module = torch.nn.Identity()
    loaded = LoadedSAE("test", sae, Site(SITE, kind=kind), Place("unet", module, module))
    ready = [prepare(make_edit(sae=sae, **edit), sae, None, context, None, torch.device("cpu")) for edit in edits]
    run = ModuleRun(context)
    run.arrange([loaded.in_run(context, ready, [])], [])
    return run


def edit_by(run, x):
    with torch.no_grad():
        return run.after(torch.nn.Identity(), x)


def bits(x):
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


def with_zeros(*shape, dtype=torch.float32):
    """Normal numbers, a third of them 0 and a third -0."""
    x = torch.randn(*shape)
    which = torch.arange(x.numel()).reshape(shape) % 3
    return torch.where(which == 0, 0.0, torch.where(which == 1, -0.0, x)).to(dtype)


HALVE_THE_SECOND = {j: [1.0, 0.5] for j in range(32)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "edits",
    [
        [{"features": {3: [0.0, 2.0]}}],
        [{"features": {3: [1.5, 2.0]}}, {"features": {3: [-1.5, 1.0]}}],
        [{"features": HALVE_THE_SECOND, "mode": "scale"}, {"features": {5: [0.0, 2.0]}}],
        [{"features": HALVE_THE_SECOND, "mode": "scale", "branch": "both"}],
        [{"features": {5: [0.0, 2.0]}, "mask": torch.ones(4, 4)}],
    ],
)
def test_rows_that_an_edit_does_not_change_keep_their_bits(dtype, edits):
    x = with_zeros(4, 8, 4, 4, dtype=dtype)  # [uncond, cond] of two images
    y = edit_by(module_run(random_sae(), *edits, images=2), x)
    untouched = [0, 2] if edits[0].get("branch") == "both" else [0, 1, 2]
    assert y.dtype == dtype and torch.equal(bits(y[untouched]), bits(x[untouched]))
    assert not torch.equal(y[3], x[3])


@pytest.mark.parametrize("limit", [0, 2**24], ids=["by the step", "by the table"])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("mode", ["add", "scale"])
@pytest.mark.parametrize("branch", ["cond", "uncond", "both", "contrast"])
def test_branches_images_and_steps_get_what_is_theirs(monkeypatch, limit, known, mode, branch):
    monkeypatch.setattr(prepared, "TABLE_LIMIT", limit)
    monkeypatch.setattr("diffusers_sae.shifts.TABLE_LIMIT", limit)
    sae, x = random_sae(), torch.randn(6, 8, 4, 4)  # [uncond, cond, perturbed] of two images
    table = StrengthTable((900.0, 500.0, 100.0), (3.0, -0.5, 7.0))
    features = {3: [0.5, 2.0], 7: table, 9: 1.25}
    edits = [{"features": features, "mode": mode, "branch": branch}, {"features": {4: 9.0}, "stop": 0.4}]
    run = module_run(sae, *edits, branches=("uncond", "cond", "perturbed"), images=2)
    run.context.known_step = 1 if known else None
    y = edit_by(run, x)
    strengths = np.array([[0.5, -0.5, 1.25], [2.0, -0.5, 1.25]])
    weights = {"uncond": (1, 0), "cond": (0, 1), "both": (1, 1), "contrast": (-1, 1)}[branch]
    for i, weight in enumerate((*weights, 0)):
        rows = x[2 * i : 2 * i + 2].flatten(2).transpose(1, 2)
        expected = edited(sae, rows, [3, 7, 9], strengths, mode, weight)
        found = y[2 * i : 2 * i + 2].flatten(2).transpose(1, 2)
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
        assert weight or torch.equal(found, rows)


def test_a_batch_that_is_not_the_contexts_is_sliced_as_the_contexts():
    sae, x = random_sae(), torch.randn(5, 8, 4, 4)
    y = edit_by(module_run(sae, {"features": {3: 2.0}}), x)
    expected = x.clone()
    expected[1] += 2 * sae.W_dec.detach()[3, :, None, None]
    torch.testing.assert_close(y, expected)


def test_gradients_pass_through_an_edit():
    sae = random_sae().requires_grad_(False)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    for edit in ({"features": {3: 2.0}}, {"features": {3: 2.0}, "mode": "scale"}):
        y = module_run(sae, edit).after(torch.nn.Identity(), x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_the_site_of_an_update_reads_its_input_only_for_edits_that_look_at_it():
    sae, x = random_sae(), torch.randn(2, 8, 4, 4)
    for edit in ({"features": {3: 2.0}}, {"features": {3: 2.0}, "mode": "scale"}):
        run = module_run(sae, edit, kind="update")
        with torch.no_grad():
            run.before((x / 2,), {})
            y = run.after(torch.nn.Identity(), x)
        mode = edit.get("mode", "add")
        seen = (x / 2)[1:].flatten(2).transpose(1, 2)
        change = edited(sae, seen, [3], [[2.0]], mode) - seen.double().numpy()
        found = (y - x)[1:].flatten(2).transpose(1, 2)
        np.testing.assert_allclose(found.numpy(), change, atol=2e-5)


@pytest.mark.parametrize("zero", [0.0, [0.0, 4.0], lambda progress: 0.0, lambda progress: 9.0 * (progress > 0.5)])
def test_rows_keep_their_norm_whatever_the_strength_of_the_edit_that_asks_for_it(sae, zero):
    """Compiled graphs do not know strengths, so that these must not matter."""
    keeps = {"features": {3: zero}, "preserve_norm": True, "start": 0.34}
    for step, kept in ((0, False), (1, True)):
        run = module_run(sae, keeps, {"features": {5: 6.0}, "branch": "both"}, images=2, step=step)
        x = torch.randn(4, 16, sae.d_in, generator=torch.Generator().manual_seed(2))
        after = edit_by(run, x)
        uncond, cond = ((after.norm(dim=-1) / x.norm(dim=-1)) - 1).abs().chunk(2)
        assert bool((cond < 1e-5).all()) == kept and uncond.max() > 0.01


def test_rows_that_nothing_changes_keep_tiny_and_huge_numbers_beside_preserve_norm():
    x = torch.randn(2, 8, 4, 4)
    x[:, :, 0, 0], x[:, :, 0, 1], x[:, :, 0, 2] = 0.0, 1e-14, 1e30
    edit = {"features": {3: 1e-30}, "mode": "scale", "preserve_norm": True, "branch": "both"}
    sae = random_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-1e9)  # no latent fires, so that scaling one changes nothing
        sae.b_enc[5] = 1e9
    y = edit_by(module_run(sae, edit), x)
    assert torch.equal(bits(y[:, :, 0, :2]), bits(x[:, :, 0, :2])) and torch.equal(y[:, :, 0, 2], x[:, :, 0, 2])
    assert torch.equal(y, x)
