"""SAEs in half precision give, bit for bit, what the same weights give in fp32."""

import copy

import pytest
import torch
from conftest import SITE, Harness
from kinds import KINDS, READ_ONLY, of_kind

from diffusers_sae import Directions, Rule, TopKSAE
from diffusers_sae.saes import ARCHITECTURES, SparseCode
from diffusers_sae.training.losses import aux_k_loss, fraction_of_variance_unexplained
from diffusers_sae.training.objectives import objective, trainable

DTYPES = (torch.float16, torch.bfloat16)
CHANNELS = ("ChannelAwareSAE", {"channels": 4})
EVERY = [*KINDS, *READ_ONLY, CHANNELS, ("ChannelAwareSAE", {"channels": 4, "k": 3}), ("Directions", {})]


@pytest.fixture(params=EVERY, ids=str)
def full(request):
    torch.manual_seed(0)
    return of_kind(*request.param)


def test_every_architecture_is_here():
    assert {name for name, _ in EVERY} == ARCHITECTURES.keys()


@pytest.fixture(params=DTYPES, ids=str)
def pair(request, full):
    """An SAE in half precision, and its copy in fp32."""
    half = full.to(request.param)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {request.param}
    return half, copy.deepcopy(half).float()


@pytest.mark.parametrize("rows", [torch.float32, *DTYPES], ids=str)
@torch.no_grad()
def test_codes_and_reconstructions_are_those_of_the_fp32_copy(pair, rows):
    half, full = pair
    x = (3 * torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))).to(rows)
    z, code, some = full.encode(x), full.encode_sparse(x), torch.tensor([31, 0, 7, 7])
    values = {
        "forward": (half(x), full(x.float())),
        "encode": (half.encode(x), z),
        "values": (half.encode_sparse(x).values, code.values),
        "encode_only": (half.encode_only(x, some), full.encode_only(x, some)),
        "decode": (half.decode(z), full.decode(z)),
        "decode_sparse": (half.decode_sparse(code), full.decode_sparse(code)),
        "decode of a half-precision code": (half.decode(z.to(rows)), full.decode(z.to(rows).float())),
        "decode_sparse of one": (
            half.decode_sparse(SparseCode(code.values.to(rows), code.indices)),
            full.decode_sparse(SparseCode(code.values.to(rows).float(), code.indices)),
        ),
        "decoder_rows": (half.decoder_rows([3, 5]), full.decoder_rows([3, 5])),
    }
    if not isinstance(half, Directions):
        values["pre_activations"] = half.pre_activations(x), full.pre_activations(x)
        at = code.indices.flatten(0, 1)
        flat = x.flatten(0, 1)
        values["pre_activations_at"] = half.pre_activations_at(flat, at), full.pre_activations_at(flat, at)
    for name, (a, b) in values.items():
        assert a.dtype == torch.float32 and torch.equal(a, b), name
    assert torch.equal(half.encode_sparse(x).indices, code.indices)


@pytest.mark.parametrize("rows", [torch.float32, *DTYPES], ids=str)
def test_objectives_and_losses_are_those_of_the_fp32_copy(pair, rows):
    half, full = pair
    if not trainable(type(half)) or half.input_norm is not None:
        pytest.skip("is read, not trained")
    x = (300 * torch.randn(64, 8, generator=torch.Generator().manual_seed(1))).to(rows)
    weights = torch.linspace(0.5, 2, 64, dtype=rows)
    dead = torch.arange(32) % 2 == 0

    def losses(sae, x, weights):
        result = objective(sae, x, weights, 0.3, 0.5)
        aux = aux_k_loss(sae, x, result.x_hat, dead, 3)
        sae.zero_grad()
        (result.loss + aux).backward()
        gradients = {name: parameter.grad for name, parameter in sae.named_parameters()}
        threshold = torch.zeros(()) if result.threshold is None else result.threshold
        return (result.loss, result.fvu, result.x_hat, result.fired, aux, threshold), gradients

    values, gradients = losses(half, x, weights)
    expected, expected_gradients = losses(full, x.float(), weights.float())
    for a, b in zip(values, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    for name, gradient in gradients.items():
        if gradient is not None:
            expected = expected_gradients[name]  # a gradient in half precision is a sum of rounded ones
            torch.testing.assert_close(gradient.float(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fvu_of_half_precision_is_that_of_the_numbers(dtype):
    """As a function of tensors; squares of these overflow float16, and bfloat16 has 8 bits for a sum of 2,000 rows."""
    x = (torch.randn(2000, 64) * 400 + 100).to(dtype)
    x_hat = (x.float() * 0.5).to(dtype)
    exact = (x.double() - x_hat.double()).square().sum() / (x.double() - x.double().mean(0)).square().sum()
    for a, b in ((x, x_hat), (x, x_hat.float()), (x.float(), x_hat)):
        fvu = fraction_of_variance_unexplained(a, b)
        assert fvu.dtype == torch.float32 and fvu.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["add", "set", "scale", "cap", "ablate", "replace"])
@pytest.mark.parametrize("kind", [*KINDS, ("Directions", {})], ids=str)
def test_every_mode_edits_as_with_the_fp32_copy(sd, kind, mode, dtype):
    torch.manual_seed(0)
    half = of_kind(*kind).to(dtype)
    images = []
    for sae in (half, copy.deepcopy(half).float()):
        sd.pipe.load_sae(sae, site=SITE)
        sd.pipe.steer({0: 0.5, 5: 0.7}, mode=mode, when=Rule({1: 1.0}, above=-9.0))
        images.append(sd.run())
        sd.pipe.unload_sae()
    assert torch.equal(*images) and not torch.equal(images[0], sd.run(sd.bare))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_and_loaded_in_half_precision(sd, tmp_path, dtype):
    full = of_kind("TopKSAE", {"k": 4})
    full.save_pretrained(tmp_path / "full")
    half = TopKSAE.from_pretrained(tmp_path / "full", dtype=dtype)
    assert half.W_enc.dtype == dtype
    half.save_pretrained(tmp_path / "half")
    images = []
    for source in (half, tmp_path / "half"):
        sd.pipe.load_sae(source, site=SITE)
        sd.pipe.steer({0: 2.0, 5: 0.0}, mode="scale")
        images.append(sd.run())
        sd.pipe.unload_sae()
    assert torch.equal(*images)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, ("Directions", {})], ids=str)
def test_a_check_measures_what_the_fp32_copy_has(kind, dtype):
    torch.manual_seed(0)
    harness = Harness()
    half = of_kind(*kind).to(dtype)
    checks = []
    for sae in (half, copy.deepcopy(half).float()):
        harness.pipe.load_sae(sae, site=SITE)
        generator = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": 2, "generator": generator, **harness.tiny.arguments}
        checks.append(harness.pipe.check_sae("ab", **call))
        harness.pipe.unload_sae()
    assert checks[0].candidates == checks[1].candidates and half.W_dec.dtype == dtype
