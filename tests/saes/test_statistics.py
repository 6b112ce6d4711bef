"""Statistics per timestep against their definition."""

import torch
from conftest import random_sae

from diffusers_sae import LatentStatistics
from diffusers_sae.saes import StatisticsAccumulator


def test_accumulated_in_parts_equals_dense_definition(tmp_path):
    sae = random_sae()
    accumulator = StatisticsAccumulator(sae.n_latents)
    seen = {900.0: [], 100.0: []}
    for t in (900.0, 100.0, 900.0, 100.0):
        x = torch.randn(3, 10, 8)
        seen[t].append(sae.encode(x).detach().flatten(0, 1).double())
        accumulator.add(t, sae.encode_sparse(x))
    statistics = accumulator.finish()
    assert statistics.timesteps.tolist() == [900.0, 100.0]
    for i, t in enumerate((900.0, 100.0)):
        z = torch.cat(seen[t])
        torch.testing.assert_close(statistics.mean[i].double(), z.mean(0), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(statistics.max[i].double(), z.amax(0), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(statistics.rate[i].double(), (z > 0).double().mean(0), atol=1e-6, rtol=1e-6)
    assert torch.equal(statistics.dead, torch.cat([*seen[900.0], *seen[100.0]]).sum(0) == 0)
    statistics.save(tmp_path)
    again = LatentStatistics.load(tmp_path)
    assert torch.equal(again.mean, statistics.mean) and torch.equal(again.timesteps, statistics.timesteps)
    assert LatentStatistics.load(tmp_path / "nothing") is None
    assert torch.equal(statistics.at(480.0).mean, statistics.mean[1])
