"""Statistics per timestep against their definition."""

from dataclasses import replace

import pytest
import torch
from conftest import random_sae

from diffusers_sae import Directions, InputError, LatentStatistics, TopKSAE, load_sae
from diffusers_sae.saes import SparseCode, StatisticsAccumulator


def signed_saes():
    """SAEs of which every latent may be below 0, and of which some are so on all rows of `rows_below_zero`."""
    torch.manual_seed(3)
    topk = TopKSAE(8, 32, 4, relu=False).eval()
    with torch.no_grad():
        topk.b_enc.sub_(3.0)
    every = TopKSAE(8, 4, 4, relu=False).eval()  # all latents, on every row
    with torch.no_grad():
        every.b_enc.sub_(9.0)
    return {"directions": Directions.of(torch.randn(6, 8)), "topk": topk, "every": every}


@pytest.mark.parametrize("kind", ["directions", "topk", "every"])
def test_codes_below_zero_are_counted_as_they_are(kind):
    sae = signed_saes()[kind].requires_grad_(False)
    accumulator, seen = StatisticsAccumulator(sae.n_latents), []
    for size in (3, 40):  # a latent that is below 0 on all rows of a batch, and maybe not of the next
        x = torch.randn(size, 8) - 5 * sae.W_dec[0]
        seen.append(sae.encode(x).double())
        accumulator.add(1.0, sae.encode_sparse(x))
    z, statistics = torch.cat(seen), accumulator.finish()
    assert (z < 0).any() and (kind == "topk" or (z.amax(0) < 0).any())
    torch.testing.assert_close(statistics.max[0].double(), z.amax(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(statistics.mean[0].double(), z.mean(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(statistics.rate[0].double(), (z != 0).double().mean(0), atol=1e-6, rtol=1e-6)


def test_a_sparse_code_of_a_dense_one_loses_nothing():
    z = torch.tensor([[0.0, -3.0, 1.0, 0.0], [2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    code = SparseCode.of(z)
    assert code.values.shape == (3, 2)
    assert torch.equal(torch.zeros(3, 4).scatter_(-1, code.indices, code.values), z)
    assert SparseCode.of(torch.zeros(2, 5)).values.shape == (2, 1)


def test_statistics_that_share_memory_are_saved(tmp_path):
    mean = torch.rand(2, 4)
    LatentStatistics(torch.tensor([9.0, 1.0]), mean, mean, torch.rand(4, 2).T).save(tmp_path)
    again = LatentStatistics.load(tmp_path)
    assert torch.equal(again.mean, mean) and torch.equal(again.max, mean)


def test_no_codes_have_no_statistics():
    accumulator = StatisticsAccumulator(4)
    accumulator.add(1.0, SparseCode(torch.empty(0, 2), torch.empty(0, 2, dtype=torch.long)))
    with pytest.raises(InputError, match="There are no codes to take statistics of"):
        accumulator.finish()


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


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        ("mean", [torch.nan, 1.0], "a mean that is not finite"),
        ("max", [torch.nan, 1.0], "a max that is not finite"),
        ("max", [torch.inf, 1.0], "a max that is not finite"),
        ("rate", [torch.nan, 1.0], "a rate that is not finite"),
        ("rate", [-0.1, 1.0], "a rate outside 0 to 1"),
        ("rate", [5.0, 1.0], "a rate outside 0 to 1"),
        ("timesteps", [9.0, 9.0], "the same timestep twice"),
        ("timesteps", [torch.nan, 9.0], "a timesteps that is not finite"),
    ],
)
def test_statistics_that_make_no_sense_are_refused(name, values, sentence, tmp_path):
    sae = random_sae()
    sae.statistics = LatentStatistics(torch.tensor([9.0, 1.0]), *(torch.full((2, 32), 0.5) for _ in range(3)))
    sae.save_pretrained(tmp_path)
    assert load_sae(tmp_path).statistics is not None
    column = torch.tensor(values)
    wrong = replace(sae.statistics, **{name: column if name == "timesteps" else column[:, None].repeat(1, 32)})
    wrong.save(tmp_path)
    (tmp_path / "checksums.json").unlink()
    with pytest.raises(InputError, match=f"The statistics in .* have {sentence}; measure them on this SAE again."):
        load_sae(tmp_path)
    sae.statistics = wrong
    with pytest.raises(InputError, match=f"The SAE's statistics have {sentence}"):
        sae.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_largest_activation_that_is_not_known_is_kept(tmp_path):
    sae = random_sae()
    unknown = torch.full((2, 32), torch.nan)
    sae.statistics = LatentStatistics(torch.tensor([9.0, 1.0]), torch.ones(2, 32), unknown, torch.ones(2, 32))
    sae.save_pretrained(tmp_path)
    assert load_sae(tmp_path).statistics.max.isnan().all()
