"""β-VAE of activations (Higgins et al., 2017), a baseline of SAEs in table 2 of Ijishakin et al. (2024)."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import InputError


class BetaVAE(nn.Module):
    """`q(z|x) = N(μ(x), diag σ²(x))` and `p(x|z) = N(x̂(z), 1)`, each of one hidden layer, on rows of unit variance.

    Rows `(..., d)` are centred and divided by one number, the root of their mean variance; `forward` reconstructs them
    from the mean of z, in their own units.

    Args:
        d_in: width of the rows.
        n_latents: numbers of the code.
        width: hidden units of encoder and decoder.
        beta: weight of the Kullback-Leibler divergence from N(0, 1); 1 is a VAE.

    Raises:
        InputError: β is negative.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, d_in: int, n_latents: int, width: int = 256, beta: float = 4.0) -> None:
        super().__init__()
        if not beta >= 0:
            raise InputError(f"beta is {beta}; pass 0 or more, 4 as in the paper, or 1 for a plain VAE.")
        self.beta = beta
        self.encoder = nn.Sequential(nn.Linear(d_in, width), nn.ReLU(), nn.Linear(width, 2 * n_latents))
        self.decoder = nn.Sequential(nn.Linear(n_latents, width), nn.ReLU(), nn.Linear(width, d_in))
        self.register_buffer("mean", torch.zeros(d_in))
        self.register_buffer("scale", torch.ones(()))

    def posterior(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """μ and log σ² of the code, `(..., n)` each."""
        mu, log_variance = self.encoder((x - self.mean) / self.scale).chunk(2, dim=-1)
        return mu, log_variance

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of the code, `(..., n)`."""
        return self.posterior(x)[0]

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.mean + self.scale * self.decoder(z)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))

    def loss(self, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Negative bound of Higgins et al. (2017, equation 4) without constants, a row on average.

        `½ ‖x - x̂(μ + σ ε)‖² + β KL(q(z|x) ‖ N(0, 1))`, x in units of `scale`; `noise (..., n)` is ε.
        """
        mu, log_variance = self.posterior(x)
        x_hat = self.decode(mu + (log_variance / 2).exp() * noise)
        error = ((x - x_hat) / self.scale).square().sum(-1) / 2
        divergence = (mu.square() + log_variance.exp() - 1 - log_variance).sum(-1) / 2
        return (error + self.beta * divergence).mean()


def train_beta_vae(
    rows: torch.Tensor,
    n_latents: int,
    *,
    width: int = 256,
    beta: float = 4.0,
    steps: int = 1000,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
) -> BetaVAE:
    """A β-VAE trained on rows `(N, d)` with Adam, the learning rate falling to 0; no global random state is used.

    Raises:
        InputError: rows of another shape, or that do not vary.
    """
    spread = float(rows.var(0).mean().sqrt()) if rows.ndim == 2 and len(rows) > 1 else 0.0
    if not spread > 0:
        raise InputError(f"The rows have shape {tuple(rows.shape)} and spread {spread}; pass (N, d) rows that differ.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = BetaVAE(rows.shape[1], n_latents, width, beta).to(rows)
    vae.mean, vae.scale = rows.mean(0), rows.new_tensor(spread)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(vae.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        chosen = torch.randint(len(rows), (batch_size,), generator=generator)
        noise = torch.randn(batch_size, n_latents, generator=generator).to(rows)
        optimizer.zero_grad()
        vae.loss(rows[chosen], noise).backward()
        optimizer.step()
        schedule.step()
    return vae.eval().requires_grad_(False)
