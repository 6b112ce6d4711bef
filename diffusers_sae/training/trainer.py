"""The trainer: centring and scaling, dead-latent care, unit-norm decoder, checkpoints."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from ..capture.descriptions import describe_sae, refuse_differences
from ..errors import InputError
from ..saes import JumpReLUSAE, SparseAutoencoder
from ..saes.ops import row_dots
from .checkpoints import DELETE, check_contents, check_number, check_plain, check_tensors
from .config import TrainingConfig
from .losses import aux_k_loss, has_spread
from .objectives import objective, trainable
from .optimizers import OPTIMIZERS
from .precision import DTYPES
from .resampling import resample

log = logging.getLogger(__name__)
SMALLEST = sys.float_info.min
"""The least scale: above 0."""


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

    An SAE in half precision is trained in fp32, as which it stands until `finish` gives it its dtype again.

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

        Raises:
            InputError: if the SAE cannot be trained, or the sample has another width, or numbers that are not finite,
                or no spread.
        """
        if not trainable(type(sae)):
            raise InputError(f"A {type(sae).__name__} cannot be trained; make an SAE of another class.")
        self.processes = accelerator.num_processes if accelerator else 1
        self.device = accelerator.device if accelerator else sae.b_dec.device
        if sae.input_norm is not None:
            raise InputError(f"SAEs with input_norm={sae.input_norm!r} are read, not trained; leave it out.")
        if config.batch_size < 2 * self.processes:
            raise InputError(
                f"batch_size={config.batch_size} is too few for {self.processes} processes; give each 2 rows."
            )
        if config.resample_every and self.processes > 1:
            raise InputError("resample_every works in one process; leave it out, as AuxK revives dead latents too.")
        self.sae, self._asked = sae, config
        self.config = config.resolve(self.device)
        if config.k_aux and config.aux_weight and not config.aux_k_acts:
            log.warning(
                "AuxK will not act: dead_after=%s rows are not seen before the last of %s steps of %s rows.",
                config.dead_after, config.steps, config.batch_size,
            )  # fmt: skip
        if sample is not None:
            sample = self._checked_sample(sample)
        self._dtype = sae.W_dec.dtype
        if self._dtype.itemsize < 4:
            sae.float()
        self.scale = 1.0 if sample is None else self._centre_and_scale(sample, trained)
        sae.to(self.device)
        self.optimizer = OPTIMIZERS[config.optimizer](sae.parameters(), config.lr)
        self.step_count = 0
        self.rows_since_fired = torch.zeros(sae.n_latents, dtype=torch.long, device=self.device)
        self.average = EMAModel(sae.parameters(), decay=config.ema, use_ema_warmup=True) if config.ema else None

    def _checked_sample(self, sample: torch.Tensor) -> torch.Tensor:
        """The sample in fp32; raises `InputError` if it gives no centre and scale."""
        sample, width = sample.float(), self.sae.d_in
        if sample.ndim != 2 or sample.shape[1] != width or len(sample) == 0:
            raise InputError(f"The sample has shape {tuple(sample.shape)}; pass rows (N, {width}), with N above 0.")
        if not torch.isfinite(sample).all():
            raise InputError("The sample holds numbers that are not finite; leave those rows out.")
        if not has_spread(sample):
            raise InputError(f"The {len(sample)} rows of the sample are all the same; an SAE needs rows that vary.")
        return sample

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
        return self.config.rate_at(self.step_count)

    def step(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> dict[str, float]:
        """One step on raw rows `(N, d)`; returns the FVU, the AuxK loss and the share of dead latents.

        `weights (N,)` say how much each row counts in the FVU.

        Raises:
            InputError: if the rows are not finite, or all the same, so that they have no FVU; nothing was changed.
            FloatingPointError: if the loss is not finite although they are; nothing was changed.
        """
        sae, config = self.sae, self.config
        x = rows.to(self.device, non_blocking=True).float() * self.scale
        sparsity = config.sparsity * min(1.0, (self.step_count + 1) / max(1.0, config.sparsity_warmup * config.steps))
        found = objective(sae, x, weights, sparsity, config.bandwidth, DTYPES[config.precision])
        dead = self.rows_since_fired >= config.rows_until_dead
        aux = aux_k_loss(sae, x, found.x_hat, dead, config.k_aux)
        fvu, loss = found.fvu.detach(), found.loss
        if self.processes > 1:  # each loss is a sum over rows, divided by one: of a process's rows, or of all
            share, aux = self._share_of_spread(x), aux * self._share_of((x - found.x_hat.detach()).square().sum())
            fvu, loss = self._summed(fvu * share), loss * share
        loss = loss + config.aux_weight * aux
        if not torch.isfinite(self._summed(loss.detach().clone())):
            raise self._fault(x, weights, loss)
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
        shrink = (self.config.clip / (squares.clamp(min=0).sqrt() + 1e-6)).clamp(max=1)
        shrinks = self.device.type != "cpu" or bool(shrink < 1)  # elsewhere to ask would wait for the device

        def before(parameter: nn.Parameter, rows: slice) -> None:
            assert parameter.grad is not None
            grad = parameter.grad[rows]
            if parameter is decoder:
                grad.addcmul_(parameter[rows], along[rows, None], value=-1)
            if shrinks:
                grad.mul_(shrink)

        def after(parameter: nn.Parameter, rows: slice) -> None:
            if parameter is decoder:
                parameter[rows].div_(torch.linalg.vector_norm(parameter[rows], dim=-1, keepdim=True))

        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self.rate()
        self.optimizer.update(before, after)
        self.optimizer.zero_grad()

    def _fault(self, x: torch.Tensor, weights: torch.Tensor | None, loss: torch.Tensor) -> Exception:
        """Why the loss of rows `x (N, d)` is not finite."""
        if not torch.isfinite(x).all():
            return InputError(f"The rows of step {self.step_count} hold numbers that are not finite; leave those out.")
        if not has_spread(x):
            return InputError(f"The rows of step {self.step_count} are all the same; an SAE needs rows that vary.")
        if weights is not None and not 0 < float(weights.sum()) < torch.inf:
            return InputError(f"The weights of step {self.step_count} add up to {float(weights.sum())}; pass others.")
        return FloatingPointError(f"The loss is {loss.item()} at step {self.step_count}; lower the rate.")

    def _resample(self, x: torch.Tensor, x_hat: torch.Tensor) -> None:
        every = self.config.resample_every
        if every and self.step_count % every == 0 and self.step_count <= self.config.steps // 2:
            dead = self.rows_since_fired >= self.config.rows_until_dead
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
        """The trained SAE for raw activations, on the CPU, in the dtype that it came in."""
        if self.average:
            self.average.copy_to(self.sae.parameters())
            with torch.no_grad():
                self.sae.W_dec.div_(self.sae.W_dec.norm(dim=-1, keepdim=True))
        self.sae.cpu().scale_input_(1 / self.scale)
        if self._dtype != self.sae.W_dec.dtype:
            torch.nn.Module.to(self.sae, self._dtype)  # that of diffusers warns of an empty list
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
        for name in ("config", "description"):
            check_plain(state.get(name), name)
        config = self.config
        if self._asked.precision == "auto" and state["config"].get("precision") in list(DTYPES):
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
        parameters = list(self.sae.parameters())
        check_number("scale", state["scale"], float, SMALLEST, math.inf)
        check_number("step_count", state["step_count"], int, 0, math.inf)
        check_tensors("weights", state["sae"], self.sae.state_dict())
        check_tensors("count", state, {"rows_since_fired": self.rows_since_fired}, least=0)
        self._check_moments(state["optimizer"], state["step_count"], parameters)
        if self.average:
            self._check_average(state["average"], parameters)

    def _check_moments(self, state: Any, steps: int, parameters: list[nn.Parameter]) -> None:
        check_contents(state, ("state", "param_groups"), "The checkpoint's optimizer")
        own = [{**group, "lr": 0} for group in self.optimizer.state_dict()["param_groups"]]
        check_plain(state["param_groups"], "param_groups")
        groups = state["param_groups"]
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise InputError(f"The checkpoint's optimizer has no groups of parameters, so it is damaged; {DELETE}.")
        there = [{**group, "lr": 0} for group in groups]
        refuse_differences(dict(enumerate(there)), dict(enumerate(own)), "The checkpoint", "the checkpoint", DELETE)
        moments = state["state"]
        decoder = next(i for i, parameter in enumerate(parameters) if parameter is self.sae.W_dec)
        if not isinstance(moments, dict):
            raise InputError(f"The checkpoint's optimizer has no moments, so it is damaged; {DELETE}.")
        check_contents(moments, [decoder] if steps else [], "The checkpoint's optimizer")  # which every step updates
        for i, kept in moments.items():
            if type(i) is not int or not 0 <= i < len(parameters):
                raise InputError(f"The checkpoint has moments of no parameter, {i!r}, so it is damaged; {DELETE}.")
            check_tensors(f"moment {i}", kept, {"step": torch.empty(())}, least=1)
            for name, shape in self.optimizer.moments(parameters[i]).items():  # the others are mean squares
                least = -math.inf if name == "exp_avg" else 0
                check_tensors(f"moment {i}", kept, {name: parameters[i].new_empty(shape, device="meta")}, least)
        if steps:
            check_number("step_count", steps, int, *2 * [float(moments[decoder]["step"])])

    def _check_average(self, state: Any, parameters: list[nn.Parameter]) -> None:
        assert self.average is not None
        own = self.average.state_dict()
        check_contents(state, list(own), "The checkpoint's average")
        shadows = state["shadow_params"]
        like = dict(enumerate(parameters))
        check_tensors("average", dict(enumerate(shadows)) if isinstance(shadows, list) else None, like)
        check_number("average.optimization_step", state["optimization_step"], int, 0, math.inf)
        varying = ("shadow_params", "optimization_step")
        here, there = ({name: of[name] for name in own if name not in varying} for of in (own, state))
        check_plain(there, "average")
        refuse_differences({"average": there}, {"average": here}, "The checkpoint", "the checkpoint", DELETE)
