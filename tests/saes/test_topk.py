"""TopK SAE against an independent float64 implementation; saving and loading."""

import numpy as np
import pytest
import torch
from conftest import random_sae

from diffusers_sae import InputError, TopKSAE
from diffusers_sae.saes import ARCHITECTURES, register_architecture


def dense_reference(sae, x):
    """Codes and reconstruction in float64, by sorting."""
    p = {n: t.detach().double().numpy() for n, t in sae.named_parameters()}
    pre = np.maximum((x.double().numpy() - p["b_dec"]) @ p["W_enc"].T + p["b_enc"], 0)
    order = np.argsort(-pre, axis=-1)
    z = np.where(np.argsort(order, axis=-1) < sae.k, pre, 0)
    return z, z @ p["W_dec"] + p["b_dec"]


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("k", [1, 4, 32])
def test_codes_and_reconstruction_equal_the_reference(shape, k):
    sae = random_sae(k=k)
    x = torch.randn(shape)
    z, x_hat = dense_reference(sae, x)
    np.testing.assert_allclose(sae.encode(x).detach().numpy(), z, atol=1e-5)
    np.testing.assert_allclose(sae.decode(sae.encode(x)).detach().numpy(), x_hat, atol=1e-5)
    np.testing.assert_allclose(sae(x).detach().numpy(), x_hat, atol=1e-5)
    np.testing.assert_allclose(sae.decode_sparse(sae.encode_sparse(x)).detach().numpy(), x_hat, atol=1e-5)
    some = torch.tensor([31, 0, 7])
    np.testing.assert_allclose(sae.encode_only(x, some).detach().numpy(), z[..., some], atol=1e-5)


def test_rows_do_not_mix(sae):
    x = torch.randn(6, 8)
    torch.testing.assert_close(sae.encode(x)[2], sae.encode(x[2]))


def test_half_precision_input_is_encoded_in_fp32(sae):
    x = torch.randn(5, 8).half()
    assert sae.encode(x).dtype == torch.float32
    torch.testing.assert_close(sae.encode(x), sae.encode(x.float()))


def test_new_saes_have_unit_rows_and_a_tied_encoder():
    sae = TopKSAE(8, 32, 4)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(32))
    assert torch.equal(sae.W_enc, sae.W_dec)


@pytest.mark.parametrize("k", [0, 33])
def test_k_must_fit(k):
    with pytest.raises(InputError, match="must lie between 1 and n_latents"):
        TopKSAE(8, 32, k)


def test_architectures_are_registered_once():
    assert ARCHITECTURES["TopKSAE"] is TopKSAE
    with pytest.raises(ValueError, match="registered already"):
        register_architecture(TopKSAE)


def test_save_and_load_keep_every_bit_and_the_provenance(tmp_path):
    sae = random_sae(base_model="some/model", steps=20)
    sae.save_pretrained(tmp_path)
    again = TopKSAE.from_pretrained(tmp_path)
    assert again.k == sae.k and again.provenance == sae.provenance
    for (name, a), (_, b) in zip(sae.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (tmp_path / "checksums.json").exists()
