"""Features by mean activation, and pairs that undo each other."""

import torch

from diffusers_sae import LatentStatistics, TopKSAE
from diffusers_sae.features.ranking import most_active, opposite_pairs


def test_most_active_is_by_the_mean_over_all_timesteps_without_the_dead():
    mean = torch.tensor([[0.1, 5.0, 0.0, 1.0], [0.3, 0.0, 0.0, 6.0]])
    statistics = LatentStatistics(torch.tensor([9.0, 1.0]), mean, mean, (mean > 0).float())
    assert most_active(statistics, 2) == [3, 1]
    assert most_active(statistics, 9) == [3, 1, 0]


def test_most_active_of_signed_codes_is_by_magnitude():
    mean = torch.tensor([[0.1, -5.0, 0.0, 1.0]])
    statistics = LatentStatistics(torch.tensor([9.0]), mean, mean, (mean != 0).float())
    assert most_active(statistics, 9) == [1, 3, 0]


def test_opposite_pairs_are_found_in_chunks_of_any_size():
    torch.manual_seed(0)
    sae = TopKSAE(64, 40, 4)
    with torch.no_grad():
        sae.W_dec[31] = -2.0 * sae.W_dec[7]
        sae.W_dec[12] = -sae.W_dec[20] + 0.05 * torch.randn(64)
    cosines = torch.cosine_similarity(sae.W_dec[:, None], sae.W_dec[None], dim=-1)
    expected = [(i, j) for i in range(40) for j in range(i + 1, 40) if cosines[i, j] < -0.5]
    for chunk in (1, 7, 1024):
        pairs = opposite_pairs(sae, chunk=chunk)
        assert [pair[:2] for pair in pairs] == [(7, 31), (12, 20)] and {p[:2] for p in pairs} == set(expected)
        assert abs(pairs[0].cosine + 1) < 1e-5 and pairs[1].cosine < -0.9
    assert opposite_pairs(sae, count=1)[0][:2] == (7, 31)
    assert [p[:2] for p in opposite_pairs(sae, [12, 20, 7])] == [(12, 20)]
    assert opposite_pairs(sae, [1]) == []
