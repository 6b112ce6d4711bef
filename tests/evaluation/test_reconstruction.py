"""Reconstruction figures against their definitions on all rows at once."""

import pytest
import torch
from conftest import random_sae

from diffusers_sae.evaluation.reconstruction import ReconstructionMeter


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
