"""The trainer: centring and scaling, dead-latent care, unit-norm decoder, checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from ..capture.descriptions import describe_sae, refuse_differences
from ..errors import InputError
from ..saes import JumpReLUSAE, SparseAutoencoder
from ..saes.ops import row_dots
from .checkpoints import DELETE, check_contents, check_tensors
from .losses import aux_k_loss
from .objectives import objective
from .optimizers import OPTIMIZERS
from .precision import DTYPES, PRECISIONS, resolve_precision
from .resampling import resample


@dataclass(frozen=True)
class TrainingConfig:
    """How an SAE is trained.

    Args:
        steps: optimiser steps of the whole run, which the schedule of the rate follows.
        batch_size: rows a step.
        lr: peak rate, for rows whose mean square distance from the centre is scaled to `d`.
        warmup, decay: shares of the run for the linear rise and the linear fall of the rate.
        k_aux, aux_weight, dead_after: AuxK: latents that model the residual, weight of that loss, and the rows without
            firing after which a latent counts as dead.
        centre: `geometric_median` or `mean`: where the decoder bias starts.
        sparsity: weight of the L1 penalty of ReLU and gated SAEs, or of the L0 penalty of JumpReLU ones.
        sparsity_warmup: share of the run in which that weight rises from 0.
        bandwidth: width of JumpReLU's pseudo-derivative, for the same scale of rows.
        clip: largest norm of the gradient.
        resample_every: steps after which dead latents begin anew, in the first half of the run; never by default.
        ema: how much of the average of the weights a step keeps; if given, the trained SAE has that average.
        optimizer: `adam`, or `adafactor`, which keeps next to nothing beside weights and gradients.
        precision: `float32`, `bfloat16` or `auto`, which the trainer resolves by `resolve_precision` and records. It is
            the dtype in which TopK searches for the largest latents; codes, losses and weights stay float32.

    Raises:
        InputError: if there is no such optimizer or precision.
    """

    steps: int
    batch_size: int = 2048
    lr: float = 8e-3
    warmup: float = 0.02
    decay: float = 0.5
    k_aux: int = 64
    aux_weight: float = 1 / 32
    dead_after: int = 100_000
    centre: str = "geometric_median"
    sparsity: float = 1.0
    sparsity_warmup: float = 0.1
    bandwidth: float = 0.1
    clip: float = 1.0
    resample_every: int | None = None
    ema: float | None = None
    optimizer: str = "adam"
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"precision={self.precision!r} is not a precision; choose from {', '.join(PRECISIONS)}.")
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"{self.optimizer!r} is not an optimizer; choose from {', '.join(OPTIMIZERS)}.")


def geometric_median(x: torch.Tensor, iterations: int = 100, tolerance: float = 1e-6) -> torch.Tensor:
    """Point with the least sum of distances to the rows of `x (N, d)` (Weiszfeld's iteration)."""
    median = x.mean(0)
    for _ in range(iterations):
        weights = 1 / (x - median).norm(dim=-1).clamp(min=1e-8)
        update = (weights[:, None] * x).sum(0) / weights.sum()
        if (update - median).norm() <= tolerance * median.norm():
            return update
        median = update
    return median


class SAETrainer:
    """Trains one SAE on batches of rows.

    Rows are scaled so that their mean square distance from the centre is `d`; `finish` folds the scale back into the
    biases, which suffices since every architecture here is positively homogeneous.

    Under `accelerate launch` or torchrun each process takes its part of every batch, and all make the step of the whole
    batch. What BatchTopK keeps is then chosen among the rows of each process.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        config: TrainingConfig,
        sample: torch.Tensor | None,
        *,
        trained: bool = False,
        accelerator: Accelerator | None = None,
    ) -> None:
        """A trainer of a new SAE, or of one that is `trained` and keeps its weights.

        `sample (N, d)`: rows that centre and scale are taken from; none are needed if `load_state_dict` follows.
        """
        self.processes = accelerator.num_processes if accelerator else 1
        self.device = accelerator.device if accelerator else sae.b_dec.device
        if sae.input_norm is not None:
            raise InputError(f"SAEs with input_norm={sae.input_norm!r} are read, not trained; leave it out.")
        if config.resample_every and self.processes > 1:
            raise InputError("resample_every works in one process; leave it out, as AuxK revives dead latents too.")
        self.sae, self._asked = sae, config
        self.config = replace(config, precision=resolve_precision(config.precision, self.device))
        self.scale = 1.0 if sample is None else self._centre_and_scale(sample, trained)
        sae.to(self.device)
        self.optimizer = OPTIMIZERS[config.optimizer](sae.parameters(), config.lr)
        self.step_count = 0
        self.rows_since_fired = torch.zeros(sae.n_latents, dtype=torch.long, device=self.device)
        self.average = EMAModel(sae.parameters(), decay=config.ema, use_ema_warmup=True) if config.ema else None

    def _centre_and_scale(self, sample: torch.Tensor, trained: bool) -> float:
        sae, config = self.sae, self.config
        centre = sae.b_dec.detach()
        if not trained:
            centre = geometric_median(sample) if config.centre == "geometric_median" else sample.mean(0)
        scale = float((sae.d_in / (sample - centre).square().sum(-1).mean()).sqrt())
        if trained:
            sae.scale_input_(scale)
        else:  # the rest of a new SAE is made for scaled rows
            with torch.no_grad():
                sae.b_dec.copy_(scale * centre)
        return scale

    def rate(self) -> float:
        """Share of the peak rate at this step."""
        done = self.step_count / self.config.steps
        rise = min(1.0, (self.step_count + 1) / max(1.0, self.config.warmup * self.config.steps))
        return rise * min(1.0, max(0.0, (1 - done) / self.config.decay))

    def step(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> dict[str, float]:
        """One step on raw rows `(N, d)`; returns the FVU, the AuxK loss and the share of dead latents.

        `weights (N,)` say how much each row counts in the FVU.
        """
        sae, config = self.sae, self.config
        x = rows.to(self.device, non_blocking=True) * self.scale
        sparsity = config.sparsity * min(1.0, (self.step_count + 1) / max(1.0, config.sparsity_warmup * config.steps))
        found = objective(sae, x, weights, sparsity, config.bandwidth, DTYPES[config.precision])
        dead = self.rows_since_fired >= config.dead_after
        aux = aux_k_loss(sae, x, found.x_hat, dead, config.k_aux)
        fvu, loss = found.fvu.detach(), found.loss
        if self.processes > 1:  # each loss is a sum over rows, divided by one: of a process's rows, or of all
            share, aux = self._share_of_spread(x), aux * self._share_of((x - found.x_hat.detach()).square().sum())
            fvu, loss = self._summed(fvu * share), loss * share
        loss = loss + config.aux_weight * aux
        if not torch.isfinite(self._summed(loss.detach().clone())):
            raise FloatingPointError(f"The loss is {loss.item()} at step {self.step_count}; lower the rate.")
        loss.backward()
        for parameter in sae.parameters():
            if parameter.grad is not None:
                self._summed(parameter.grad)
        self._update()
        with torch.no_grad():
            if isinstance(sae, JumpReLUSAE):
                sae.threshold.clamp_(min=0)
            if found.threshold is not None:
                sae.threshold.copy_(self._reduced(found.threshold, "MIN"))
        self.rows_since_fired += len(x) * self.processes
        self.rows_since_fired[self._reduced(found.fired.int(), "MAX") > 0] = 0
        self.step_count += 1
        self._resample(x, found.x_hat)
        if self.average:
            self.average.step(sae.parameters())
        return {"fvu": fvu.item(), "aux": self._summed(aux.detach()).item(), "dead": dead.float().mean().item()}

    @torch.no_grad()
    def _update(self) -> None:
        """One step of the optimiser. Decoder rows turn and keep unit norm; the gradient's norm is bounded by `clip`.

        The part of the gradient along a decoder row is removed, and the row normalised, while it is in the cache.
        """
        decoder, grads = self.sae.W_dec, [p.grad for p in self.sae.parameters() if p.grad is not None]
        assert decoder.grad is not None
        dots = row_dots(decoder, decoder.grad)
        along = dots if self.step_count else dots / torch.linalg.vector_norm(decoder, dim=-1).square()  # 1 after a step
        squares = torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).square().sum() - along @ dots
        shrink = min(1.0, self.config.clip / (float(squares.clamp(min=0).sqrt()) + 1e-6))

        def before(parameter: nn.Parameter, rows: slice) -> None:
            assert parameter.grad is not None
            grad = parameter.grad[rows]
            if parameter is decoder:
                grad.addcmul_(parameter[rows], along[rows, None], value=-1)
            if shrink < 1:
                grad.mul_(shrink)

        def after(parameter: nn.Parameter, rows: slice) -> None:
            if parameter is decoder:
                parameter[rows].div_(torch.linalg.vector_norm(parameter[rows], dim=-1, keepdim=True))

        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self.rate()
        self.optimizer.update(before, after)
        self.optimizer.zero_grad()

    def _resample(self, x: torch.Tensor, x_hat: torch.Tensor) -> None:
        every = self.config.resample_every
        if every and self.step_count % every == 0 and self.step_count <= self.config.steps // 2:
            dead = self.rows_since_fired >= self.config.dead_after
            generator = torch.Generator().manual_seed(self.step_count)
            resample(self.sae, self.optimizer, dead, x, x_hat.detach(), generator)
            self.rows_since_fired[dead] = 0

    def _reduced(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        """`tensor`, in place, after all processes have put theirs together."""
        if self.processes > 1:
            torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, how))
        return tensor

    def _summed(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._reduced(tensor, "SUM")

    def _share_of(self, amount: torch.Tensor) -> torch.Tensor:
        """This process's share of the sum of `amount` over all."""
        return amount / self._summed(amount.clone()).clamp(min=1e-12)

    def _share_of_spread(self, x: torch.Tensor) -> torch.Tensor:
        """Spread of this process's rows around their mean, over that of all rows around theirs."""
        mean = self._summed(x.sum(0)) / (len(x) * self.processes)
        whole = self._summed((x - mean).square().sum())
        return (x - x.mean(0)).square().sum() / whole

    def finish(self) -> SparseAutoencoder:
        """The trained SAE for raw activations, on the CPU."""
        if self.average:
            self.average.copy_to(self.sae.parameters())
            with torch.no_grad():
                self.sae.W_dec.div_(self.sae.W_dec.norm(dim=-1, keepdim=True))
        self.sae.cpu().scale_input_(1 / self.scale)
        return self.sae.eval()

    def state_dict(self) -> dict[str, Any]:
        """All that the following steps depend on."""
        return {
            "sae": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scale": self.scale,
            "step_count": self.step_count,
            "rows_since_fired": self.rows_since_fired,
            "average": self.average.state_dict() if self.average else None,
            "config": asdict(self.config),
            "description": describe_sae(self.sae),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, whose precision stands if this trainer's was `auto`.

        Raises:
            InputError: if it is of another SAE or configuration, or damaged; the trainer is then as it was.
        """
        own = self.state_dict()
        check_contents(state, [name for name in own if name != "description"], "The checkpoint")
        check_contents(state["config"], ("steps",), "The checkpoint's config")
        config = self.config
        if self._asked.precision == "auto" and state["config"].get("precision") in DTYPES:
            config = replace(config, precision=state["config"]["precision"])
        here = {"sae": own["description"], "training": asdict(config)}
        if "description" not in state:
            raise InputError(f"The checkpoint is of an older version and does not say of which SAE; {DELETE}.")
        there = {"sae": state["description"], "training": state["config"]}
        refuse_differences(there, here, "The checkpoint", "the checkpoint", DELETE)
        self._check_tensors(state)
        self.config = config
        self.sae.load_state_dict(state["sae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scale, self.step_count = state["scale"], state["step_count"]
        self.rows_since_fired = state["rows_since_fired"].to(self.device)
        if self.average:
            self.average.load_state_dict(state["average"])
            self.average.to(self.device)

    def _check_tensors(self, state: dict[str, Any]) -> None:
        """Raise `InputError` unless a state has the tensors that it must have."""
        check_tensors("weights", state["sae"], self.sae.state_dict())
        check_tensors("count", state, {"rows_since_fired": self.rows_since_fired})
        parameters = list(self.sae.parameters())
        check_contents(state["optimizer"], ("state", "param_groups"), "The checkpoint's optimizer")
        for i, moments in state["optimizer"]["state"].items():
            for name in {"exp_avg", "exp_avg_sq"} & set(moments):
                check_tensors(f"moment {i}", moments, {name: parameters[i]})
        if self.average:
            check_contents(state["average"], ("shadow_params",), "The checkpoint's average")
            shadows = dict(enumerate(state["average"]["shadow_params"]))
            check_tensors("average", shadows, dict(enumerate(parameters)))
