"""Training on rows in memory."""

import pytest
import torch

from diffusers_sae import InputError, TopKSAE
from diffusers_sae.training import TrainingConfig
from diffusers_sae.training.from_rows import train_on_rows


def rows(count=4096):
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, 16), dim=-1)
    chosen = torch.randint(24, (count, 2))
    return (directions[chosen] * (1 + torch.rand(count, 2, 1))).sum(1) + 5, directions


def test_it_finds_the_directions_that_the_rows_are_made_of():
    x, directions = rows()
    config = TrainingConfig(400, 512, lr=8e-3, dead_after=5000)
    torch.manual_seed(1)
    sae = train_on_rows(x, TopKSAE(16, 32, k=2), config)
    cosine = (directions @ sae.W_dec.T).amax(1)
    assert (cosine > 0.9).float().mean() > 0.7
    fvu = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu < 0.2


def test_the_seed_says_which_rows_are_drawn():
    x, _ = rows(512)
    trained = []
    for seed in (3, 3, 4):
        torch.manual_seed(1)
        trained.append(train_on_rows(x, TopKSAE(16, 32, k=2), TrainingConfig(5, 64), seed=seed).W_dec)
    assert torch.equal(trained[0], trained[1]) and not torch.equal(trained[0], trained[2])


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.zeros(0, 16), r"shape \(0, 16\)"),
        (torch.zeros(5, 8), r"the SAE takes \(N, 16\)"),
        (torch.full((5, 16), torch.nan), "not finite"),
    ],
)
def test_bad_rows_get_a_sentence(x, sentence):
    with pytest.raises(InputError, match=sentence):
        train_on_rows(x, TopKSAE(16, 32, k=2), TrainingConfig(1, 4))
