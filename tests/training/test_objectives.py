"""Training objectives against their papers' formulas in float64, and that every kind learns what made the data."""

import numpy as np
import pytest
import torch
from kinds import KINDS, of_kind
from reference import codes

from diffusers_sae.saes import ARCHITECTURES, BatchTopKSAE, Directions, SparseAutoencoder
from diffusers_sae.training import SAETrainer, TrainingConfig
from diffusers_sae.training.objectives import JumpReLU, Step, objective, trainable

SPARSITY, BANDWIDTH = 0.7, 0.5


def expected_loss(sae, x, z):
    """The loss for dense codes `z (N, n)`, in float64."""
    p = {name: tensor.detach().double().numpy() for name, tensor in sae.state_dict().items()}
    rows, w_enc = x.double().numpy(), p.get("W_enc", p["W_dec"])
    spread = ((rows - rows.mean(0)) ** 2).sum()

    def fvu(codes):
        return ((rows - codes @ p["W_dec"] - p["b_dec"]) ** 2).sum() / spread

    pre = (rows - p["b_dec"]) @ w_enc.T + p["b_enc"]
    match type(sae).__name__:
        case "ReLUSAE":
            return fvu(z) + SPARSITY * z.sum() / spread
        case "JumpReLUSAE":
            return fvu(z) + SPARSITY * (z > 0).sum() / spread
        case "GatedSAE":
            gates = np.maximum(pre, 0)
            return fvu(z) + SPARSITY * gates.sum() / spread + fvu(gates)
        case "MatryoshkaSAE":
            return np.mean([fvu(np.where(np.arange(z.shape[1]) < m, z, 0)) for m in sae.prefixes])
    return fvu(z)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_the_formula(kind):
    sae = of_kind(*kind)
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    z = codes(sae, x)
    if isinstance(sae, BatchTopKSAE):  # in training the k N largest of the batch
        everything = np.maximum((x.numpy() - sae.b_dec.detach().numpy()) @ sae.W_enc.detach().numpy().T
                                + sae.b_enc.detach().numpy(), 0)  # fmt: skip
        least = np.sort(everything.ravel())[-sae.k * len(x)]
        z = np.where(everything >= least, everything, 0)
        before = float(sae.threshold)
    found = objective(sae, x, None, SPARSITY, BANDWIDTH)
    np.testing.assert_allclose(found.loss.item(), expected_loss(sae, x, z), rtol=1e-4)
    assert found.fired.tolist() == (z > 0).any(0).tolist()
    np.testing.assert_allclose(
        found.x_hat.detach().numpy(), z @ sae.W_dec.detach().numpy() + sae.b_dec.detach().numpy(), atol=1e-4
    )
    if isinstance(sae, BatchTopKSAE):
        assert float(sae.threshold) == before
        assert float(found.threshold) == pytest.approx(0.99 * before + 0.01 * least, rel=1e-5)


def test_pseudo_derivatives_of_the_threshold():
    """Equations 11 and 12 of 2407.14435, entry by entry."""
    pre = torch.linspace(0.1, 2, 12).view(6, 2).double().requires_grad_()
    threshold = torch.tensor([0.7, 1.2]).double().requires_grad_()
    grad = torch.randn(6, 2).double()
    near = ((pre - threshold).abs() <= BANDWIDTH / 2).double() / BANDWIDTH
    assert 0 < near.count_nonzero() < 12
    JumpReLU.apply(pre, threshold, BANDWIDTH).backward(grad)
    torch.testing.assert_close(pre.grad, grad * (pre > threshold))
    torch.testing.assert_close(threshold.grad, -(threshold * near * grad).sum(0))
    threshold.grad = pre.grad = None
    Step.apply(pre, threshold, BANDWIDTH).backward(grad)
    assert pre.grad is None
    torch.testing.assert_close(threshold.grad, -(near * grad).sum(0))


def test_a_kind_without_an_objective_is_refused():
    class Strange(SparseAutoencoder):
        pass

    with pytest.raises(TypeError, match="Strange has no training objective"):
        objective(Strange(), torch.zeros(2, 2), None, 0.0, 0.0)
    assert not trainable(Strange) and not trainable(Directions)
    assert all(trainable(ARCHITECTURES[name]) for name, _ in KINDS)


def sparse_data(rows, directions, generator):
    """Sums of three of the directions, each times 0.5 to 1.5, with a little noise."""
    n, d = directions.shape
    chosen = torch.rand(rows, n, generator=generator).topk(3).indices
    amounts = torch.zeros(rows, n).scatter(1, chosen, torch.rand(rows, 3, generator=generator) + 0.5)
    return amounts @ directions + 0.01 * torch.randn(rows, d, generator=generator)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[0] + "".join(f", {k}" for k in kind[1] if k == "tied"))
def test_every_kind_finds_the_features_that_made_the_data(kind):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    name, arguments = kind
    directions = torch.nn.functional.normalize(torch.randn(48, 32, generator=generator), dim=-1)
    sae = ARCHITECTURES[name](32, 48, **{**arguments, **({"k": 3} if "k" in arguments else {})})
    config = TrainingConfig(steps=800, batch_size=256, lr=5e-3, dead_after=5000)
    trainer = SAETrainer(sae.train(), config, sparse_data(2000, directions, generator))
    for _ in range(config.steps):
        trainer.step(sparse_data(config.batch_size, directions, generator))
    trained = trainer.finish()
    cosine = torch.nn.functional.normalize(trained.W_dec.detach(), dim=-1) @ directions.T
    # a Matryoshka SAE spends its first latents on what many features have in common
    assert (cosine.max(0).values > 0.9).float().mean() >= (0.75 if name == "MatryoshkaSAE" else 0.95)
    x = sparse_data(1000, directions, generator)
    with torch.no_grad():
        z = trained.encode(x)
        fvu = (x - trained.decode(z)).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu < 0.15 and (z > 0).sum(-1).float().mean() < 8 and (z > 0).any(0).all()
