import torch

from diffusers_sae.evaluation.known_features import KnownFeatures


def test_rows_are_sums_of_few_features_with_noise():
    made = KnownFeatures(64, 16, active=3, noise=0.0)
    rows = made.rows(4000)
    assert rows.shape == (4000, 64)
    amounts = torch.linalg.lstsq(made.directions.T, rows.T).solution.T  # 16 features in 64 dimensions: unique
    torch.testing.assert_close(amounts @ made.directions, rows, atol=1e-4, rtol=0)
    active = amounts > 0.1
    assert int(active.sum(-1).max()) == 3
    single = amounts[active & (active.sum(-1, keepdim=True) == 3)]
    assert single.min() > 0.5 - 1e-4 and single.max() < 1.5 + 1e-4
    rate = active.float().mean(0)
    assert 2.5 < rate[0] / rate[-1] < 5.5  # 16^0.5 = 4
    noisy = KnownFeatures(64, 16, active=3, noise=0.1).rows(4000)
    assert abs(float((noisy - rows).std()) - 0.1) < 0.005


def test_the_same_seed_gives_the_same_rows_and_a_run_never_repeats_them():
    a, b = KnownFeatures(8, 4, seed=3), KnownFeatures(8, 4, seed=3)
    first = a.rows(10)
    assert torch.equal(first, b.rows(10)) and not torch.equal(first, a.rows(10))


def test_recovered_counts_features_with_a_direction_near_them():
    made = KnownFeatures(32, 8)
    near = made.directions[:3] * 5 + 0.05 * torch.randn(3, 32)
    assert made.recovered(near) == 3 / 8
    assert made.recovered(-made.directions) == 0
    assert made.recovered(torch.zeros(3, 32)) == 0 and made.recovered(torch.empty(0, 32)) == 0
    assert made.recovered(made.directions, cosine=0.999) == 1
