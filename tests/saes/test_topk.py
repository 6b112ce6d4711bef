"""What is TopK's own; see `test_kinds.py` for the rest."""

import numpy as np
import pytest
import torch
from conftest import random_sae
from reference import codes

from diffusers_sae import InputError, TopKSAE
from diffusers_sae.saes import ARCHITECTURES, register_architecture, topk


@pytest.mark.parametrize("k", [0, 33])
def test_k_must_fit(k):
    with pytest.raises(InputError, match="must lie between 1 and n_latents"):
        TopKSAE(8, 32, k)


def test_architectures_are_registered_once():
    assert ARCHITECTURES["TopKSAE"] is TopKSAE
    with pytest.raises(ValueError, match="registered already"):
        register_architecture(TopKSAE)


@pytest.mark.parametrize("k", [1, 4, 32])
def test_every_row_has_at_most_k_latents(k):
    sae, x = random_sae(k=k), torch.randn(50, 8)
    assert torch.equal((sae.encode(x) > 0).sum(-1).clamp(min=k), torch.full((50,), k))
    np.testing.assert_allclose(sae.encode(x).detach(), codes(sae, x), atol=1e-5)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(("n", "k"), [(32, 4), (30, 4), (30, 11), (16, 16)])
def test_codes_of_some_latents_are_those_of_all_in_one_block_and_in_several(monkeypatch, relu, n, k):
    sae, x = random_sae(n_latents=n, k=k), torch.randn(2, 3, 5, 8)
    sae.relu = relu
    some = torch.tensor([n - 1, 0, 9, 8, 9])
    whole = sae.encode(x)[..., some]
    assert whole.count_nonzero() and (k == n or whole.count_nonzero() < whole.numel())
    for block, together in ((4096, 2**24), (8, 0), (4, 30 * 8), (4, 30 * 16)):
        monkeypatch.setattr(topk, "BLOCK", block)
        monkeypatch.setattr(topk, "TOGETHER", together)
        np.testing.assert_allclose(sae.encode_only(x, some).detach(), whole.detach(), atol=1e-6)


def test_pre_activations_that_are_held_together_are_bounded():
    sae = TopKSAE(1, 163_840, 32)
    for rows in (1, 64, 256, 4096, 100_000):
        block = sae._block_for(rows)
        assert block >= topk.BLOCK and (block == topk.BLOCK or block * rows <= topk.TOGETHER)
    assert sae._block_for(64) >= 163_840
