"""What is TopK's own; see `test_kinds.py` for the rest."""

import numpy as np
import pytest
import torch
from conftest import random_sae
from reference import codes

from diffusers_sae import InputError, TopKSAE
from diffusers_sae.saes import ARCHITECTURES, register_architecture


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
