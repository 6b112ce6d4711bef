"""Reconstruction figures against their definitions on all rows at once."""

import math

import pytest
import torch
from conftest import random_sae

from diffusers_sae import InputError, TopKSAE
from diffusers_sae.evaluation.reconstruction import ReconstructionMeter, baselines


def test_figures_gathered_in_parts_equal_the_definition():
    sae = random_sae()
    meter = ReconstructionMeter(sae)
    rows = {900.0: torch.randn(40, 8) + 1, 100.0: 2 * torch.randn(60, 8)}
    for t, x in rows.items():
        for part in x.split(7):
            meter.add(t, part)
    figures = meter.figures()

    def fvu(x):
        x, x_hat = x.double(), sae(x).detach().double()
        return ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()

    everything = torch.cat(list(rows.values()))
    assert figures["fvu"] == pytest.approx(fvu(everything), rel=1e-5)
    assert figures["fvu_by_timestep"] == pytest.approx({t: fvu(x) for t, x in rows.items()}, rel=1e-5)
    z = sae.encode(everything)
    assert figures["l0"] == pytest.approx((z > 0).float().sum(1).mean().item())
    assert figures["dead"] == pytest.approx((z == 0).all(0).float().mean().item())
    assert figures["rows"] == 100
    x_hat = sae(everything).detach()
    assert figures["mse"] == pytest.approx((everything - x_hat).square().mean().item(), rel=1e-5)
    assert figures["mae"] == pytest.approx((everything - x_hat).abs().mean().item(), rel=1e-5)
    cosine = (everything * x_hat).sum(-1) / everything.norm(dim=-1) / x_hat.norm(dim=-1)
    assert figures["cosine"] == pytest.approx(cosine.mean().item(), rel=1e-5)
    rate = (z > 0).float().mean(0)
    bins = {"1e-2": ((rate >= 0.0099) & (rate < 0.0999)).sum(), "1e-1": (rate >= 0.0999).sum()}
    assert {name: count for name, count in figures["density"].items() if count} == {n: int(c) for n, c in bins.items()}


def test_baselines_equal_their_definitions():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(8, 8, generator=generator) * torch.linspace(3, 0.1, 8)[:, None]
    seen, held_out = (torch.randn(n, 8, generator=generator) @ mix + 5 for n in (500, 300))
    state = torch.random.get_rng_state()
    found = baselines(seen, held_out, 3, 64)
    assert torch.equal(torch.random.get_rng_state(), state)
    mean = seen.mean(0)
    _, _, v = torch.linalg.svd(seen - mean, full_matrices=False)
    x = held_out - mean
    spread = (held_out - held_out.mean(0)).square().sum()
    assert found["pca"] == pytest.approx(((x - x @ v[:3].T @ v[:3]).square().sum() / spread).item(), rel=1e-4)
    assert 1 <= found["mean"] < 1.05
    assert found["pca"] < 0.5 and found["random"] > found["pca"]
    assert baselines(seen, held_out, 8, 64)["pca"] == pytest.approx(0, abs=1e-9)  # all components: the identity
    torch.manual_seed(0)
    sae = TopKSAE(8, 64, 3)
    assert found["random"] == pytest.approx(((x - sae(x).detach()).square().sum() / spread).item(), rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_rows_without_spread_have_no_fvu(value):
    """NaN, never a division by zero nor a quotient of roundings; whatever is defined is there."""
    sae = random_sae()
    meter = ReconstructionMeter(sae)
    equal, single = torch.full((300, 8), value), torch.full((1, 8), value + 1)
    meter.add(3.0, equal)
    assert math.isnan(meter.figures()["fvu"]) and meter.figures()["rows"] == 300
    meter.add(2.0, single)
    figures = meter.figures()
    assert all(math.isnan(fvu) for fvu in figures["fvu_by_timestep"].values())
    x = torch.cat([equal, single])
    x_hat = sae(x).detach()
    spread = (x.double() - x.double().mean(0)).square().sum()
    assert figures["fvu"] == pytest.approx(((x - x_hat).double().square().sum() / spread).item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_figures_of_half_precision_are_those_of_the_numbers(dtype):
    rows = (300 * torch.randn(200, 8)).to(dtype)
    sae = random_sae()
    meters = [ReconstructionMeter(sae), ReconstructionMeter(sae)]
    codes = [meter.add(1.0, x) for meter, x in zip(meters, (rows, rows.float()), strict=True)]
    assert meters[0].figures() == meters[1].figures() and torch.equal(codes[0].values, codes[1].values)
    torch.manual_seed(0)
    split = rows[:100], rows[100:]
    assert baselines(*split, 3, 16) == baselines(*(x.float() for x in split), 3, 16)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused_and_leave_no_trace(bad):
    sae = random_sae()
    meter, x = ReconstructionMeter(sae), torch.randn(40, 8)
    meter.add(1.0, x)
    before = meter.figures()
    with pytest.raises(InputError, match=r"The rows of 2.0 hold numbers that are not finite"):
        meter.add(2.0, x.index_fill(0, torch.tensor([3]), bad))
    sae.W_dec.data[:] = bad
    with pytest.raises(InputError, match=r"The SAE's reconstruction of the rows of 2.0 is not finite"):
        meter.add(2.0, x)
    assert meter.figures() == before
