"""The Triton back end against dense products in float64, in Triton's interpreter where there is no GPU:

pip install triton && TRITON_INTERPRET=1 python -m pytest tests/saes/test_ops_triton.py
"""

import os

import pytest
import torch

from diffusers_sae.saes.ops import products, ragged_decode, sampled_linear, sparse_decode, topk_encode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
kernels = pytest.importorskip("diffusers_sae.saes.ops.triton_products", exc_type=ImportError)

LATENTS = 17
COUNTS = torch.tensor([3, 0, 5, 1, 2, 0, 4, 1, 1, 5, 0])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Every test's products are made by the kernels: how many were."""
    calls = {}

    def count(name, kernel):
        def counting(*args):
            calls[name] += 1
            return kernel(*args)

        calls[name] = 0
        monkeypatch.setattr(kernels, name, counting)

    count("sampled", kernels.sampled)
    count("gathered", kernels.gathered)
    return calls


@pytest.fixture
def code():
    """Rows of 0 to 5 entries, the same latent twice at times: values, indices, offsets."""
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(LATENTS, (int(COUNTS.sum()),), generator=generator)
    values = torch.randn(len(indices), generator=generator)
    return values, indices, torch.cat([torch.zeros(1, dtype=torch.long), COUNTS.cumsum(0)])


def dense(values, indices, offsets):
    z = torch.zeros(len(offsets) - 1, LATENTS, dtype=torch.float64)
    return z.index_put_((products.rows_of(offsets, len(indices)), indices), values.double(), accumulate=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("d", [1, 5, 64, 300, 600])
def test_products_equal_dense_ones(code, counted, d, dtype):
    values, indices, offsets = code
    x, W = torch.randn(len(COUNTS), d).to(dtype), torch.randn(LATENTS, d).to(dtype)
    values = values.to(dtype)
    on = [each.to(DEVICE) for each in (values, indices, offsets, x, W)]
    found = products.gathered(on[0], on[1], on[2], on[4]).cpu()
    assert found.dtype == dtype
    near = {"atol": TOLERANCE[dtype] * d**0.5, "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(found.double(), dense(values, indices, offsets) @ W.double(), **near)
    picked = products.sampled(on[3], on[4], on[1], on[2]).cpu()
    wanted = (x.double() @ W.double().T)[products.rows_of(offsets, len(indices)), indices]
    torch.testing.assert_close(picked.double(), wanted, **near)
    assert counted == {"sampled": 1, "gathered": 1}


def test_a_code_without_entries():
    offsets, W = torch.zeros(4, dtype=torch.long), torch.randn(LATENTS, 5)
    nothing = torch.zeros(0, dtype=torch.long)
    on = [each.to(DEVICE) for each in (nothing, offsets, W)]
    assert not products.gathered(on[2].new_zeros(0), on[0], on[1], on[2]).any()
    assert len(products.sampled(on[2][:3], on[2], on[0], on[1])) == 0


@pytest.mark.parametrize("k", [1, 4])
def test_a_training_step_has_the_gradients_of_float64(counted, k):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (9, 70), "W_enc": (LATENTS, 70), "b_enc": (LATENTS,), "b_dec": (70,), "W_dec": (LATENTS, 70)}
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def gradients(dtype, device):
        p = {name: x.to(device, dtype).requires_grad_() for name, x in given.items()}
        values, indices = topk_encode(p["x"], p["W_enc"], p["b_enc"], p["b_dec"], k)
        loss = sparse_decode(values, indices, p["W_dec"], p["b_dec"]).mul(0.1).sin().sum()
        return [each.cpu().double() for each in (loss, *torch.autograd.grad(loss, list(p.values())))]

    found = gradients(torch.float32, DEVICE)
    assert counted["sampled"] == 1 and counted["gathered"] == 4
    for a, b in zip(found, gradients(torch.float64, "cpu"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert counted["gathered"] == 4  # float64 is torch's


def test_ragged_codes_have_the_gradients_of_float64(code):
    values, indices, offsets = code
    x, W, b = torch.randn(len(COUNTS), 33), torch.randn(LATENTS, 33), torch.randn(LATENTS)

    def gradients(dtype, device):
        leaves = [each.to(device, dtype).requires_grad_() for each in (values, x, W, b)]
        at = indices.to(device), offsets.to(device)
        picked = sampled_linear(leaves[1], leaves[2], leaves[3], *at)
        loss = ragged_decode(leaves[0] * picked, *at, leaves[2]).mul(0.1).sin().sum()
        return [each.cpu().double() for each in (loss, *torch.autograd.grad(loss, leaves))]

    for a, b in zip(gradients(torch.float32, DEVICE), gradients(torch.float64, "cpu"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
