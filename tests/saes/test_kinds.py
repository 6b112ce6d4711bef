"""Every kind of SAE against its paper's formula in float64, and what all of them have in common."""

import numpy as np
import pytest
import torch
from conftest import SITE, Harness
from kinds import ARGUMENTS, KINDS, READ_ONLY, of_kind
from reference import codes, edited, normalized

from diffusers_sae import InputError
from diffusers_sae.loaders import load_sae
from diffusers_sae.saes import GatedSAE, JumpReLUSAE, MatryoshkaSAE, ReLUSAE, TopKSAE


def name_of(kind):
    return kind[0] + "".join(f", {k} {v}" for k, v in kind[1].items() if k != "k")


@pytest.fixture(params=[*KINDS, *READ_ONLY], ids=name_of)
def kind(request):
    return of_kind(*request.param)


@pytest.fixture(params=KINDS, ids=name_of)
def trained(request):
    return of_kind(*request.param)


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 3, 4, 8)])
def test_codes_and_reconstructions_equal_the_formula(kind, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    z = codes(kind, x)
    assert 0 < (z != 0).mean() < 1
    decoded = z @ kind.W_dec.detach().double().numpy() + kind.b_dec.detach().double().numpy()
    _, scale, shift = normalized(kind, x)
    with torch.no_grad():
        np.testing.assert_allclose(kind.encode(x), z, atol=1e-5)
        np.testing.assert_allclose(kind.decode(kind.encode(x)), decoded, atol=1e-5)
        np.testing.assert_allclose(kind.decode_sparse(kind.encode_sparse(x)), decoded, atol=1e-5)
        np.testing.assert_allclose(kind(x), shift + scale * decoded, atol=2e-5)
        some = torch.tensor([31, 0, 7, 7])
        np.testing.assert_allclose(kind.encode_only(x, some), z[..., some], atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 3, 8)])
def test_no_rows_have_no_codes(kind, shape):
    x = torch.zeros(shape)
    assert kind(x).shape == shape and kind.encode(x).shape == (*shape[:-1], 32)
    code = kind.encode_sparse(x)
    assert code.values.shape == code.indices.shape and code.indices.shape[:-1] == shape[:-1]
    assert kind.decode_sparse(code).shape == shape
    assert kind.encode_only(x, torch.tensor([3, 1])).shape == (*shape[:-1], 2)


def test_rows_do_not_mix(kind):
    x = torch.randn(6, 8)
    torch.testing.assert_close(kind.encode(x)[2], kind.encode(x[2]))
    alone, together = kind.encode_sparse(x[2]), kind.encode_sparse(x)
    torch.testing.assert_close(kind.decode_sparse(alone), kind.decode_sparse(together)[2])


def test_half_precision_is_encoded_in_fp32(kind):
    x = torch.randn(5, 8).half()
    assert kind.encode(x).dtype == torch.float32
    assert torch.equal(kind.encode(x), kind.encode(x.float()))


@pytest.mark.parametrize("factor", [0.01, 3.0])
def test_an_sae_of_scaled_rows(trained, factor):
    x = torch.randn(20, 8)
    z, x_hat = trained.encode(x), trained(x)
    trained.scale_input_(factor)
    torch.testing.assert_close(trained.encode(factor * x), factor * z)
    torch.testing.assert_close(trained(factor * x), factor * x_hat)


def test_saved_and_loaded_bit_by_bit(kind, tmp_path):
    kind.save_pretrained(tmp_path)
    x = torch.randn(5, 8)
    for again in (type(kind).from_pretrained(tmp_path), load_sae(tmp_path)):
        assert type(again) is type(kind) and again.provenance == kind.provenance
        assert set(again.state_dict()) == set(kind.state_dict())
        assert all(torch.equal(a, kind.state_dict()[name]) for name, a in again.state_dict().items())
        assert torch.equal(again.encode(x), kind.encode(x))


@pytest.mark.parametrize("mode", ["add", "set", "scale", "cap", "ablate"])
def test_edits_follow_the_formula(kind, mode):
    harness = Harness()
    with harness.pipe.capture([SITE]) as activations:
        bare = harness.run()
    x = activations[SITE].rows("cond")[0]
    harness.pipe.load_sae(kind)
    assert torch.equal(harness.run(), bare)
    features = [int(j) for j in codes(kind, x).mean((0, 1)).argsort()[-3:]]
    harness.pipe.steer(dict.fromkeys(features, 0.4), mode=mode)
    with harness.pipe.capture([SITE]) as activations:
        harness.run()
    expected = edited(kind, x, features, np.full((1, 3), 0.4), mode)
    np.testing.assert_allclose(activations[SITE].rows("cond")[0], expected, atol=5e-5)


def test_weights_that_do_not_fit(tmp_path):
    state = of_kind("JumpReLUSAE", {}).state_dict()
    config = {"_class_name": "JumpReLUSAE"}
    with pytest.raises(InputError, match="has no threshold; a JumpReLUSAE has the tensors W_dec"):
        load_sae({k: v for k, v in state.items() if k != "threshold"}, config=config)
    with pytest.raises(InputError, match=r"has a threshold of shape \(3,\); with W_dec \(32, 8\) it must be \(32,\)"):
        load_sae({**state, "threshold": torch.zeros(3)}, config=config)
    with pytest.raises(InputError, match="not finite"):
        load_sae({**state, "threshold": state["threshold"] / 0}, config=config)


@pytest.mark.parametrize("prefixes", [[], [4, 4, 32], [8, 4, 32], [0, 32], [4, 16]])
def test_prefixes_must_rise_to_all_latents(prefixes):
    with pytest.raises(InputError, match=r"which must rise from at least 1 to n_latents \(32\)"):
        MatryoshkaSAE(8, 32, 4, prefixes=prefixes)


def test_new_saes_of_every_kind_start_tied_with_unit_rows():
    for cls in (ReLUSAE, TopKSAE, JumpReLUSAE, GatedSAE):
        sae = cls(8, 32, **ARGUMENTS.get(cls.__name__, {}))
        torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(32))
        assert torch.equal(sae.W_enc, sae.W_dec)
    assert MatryoshkaSAE(8, 32, 4).prefixes == (2, 4, 8, 16, 32)
    tied = ReLUSAE(8, 32, tied=True)
    assert tied.W_enc is tied.W_dec and "W_enc" not in tied.state_dict()


@pytest.mark.parametrize("input_norm", ["layer_norm", "constant_norm"])
@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_rows_without_a_norm_have_finite_codes_and_reconstructions(input_norm, size):
    sae = TopKSAE(8, 32, 4, input_norm=input_norm).eval()
    x = torch.full((3, 8), size)
    assert sae.encode(x).isfinite().all() and sae.encode_only(x, torch.arange(32)).isfinite().all()
    torch.testing.assert_close(sae(x), x, atol=1e-6, rtol=0)
