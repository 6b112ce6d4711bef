"""Parts of a scheduler's run, in its own direction and against it, as schedulers that a stock pipeline can run with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from .errors import InputError


def _unfit_ddim(config: Any) -> str | None:
    if config.clip_sample or config.thresholding:
        return "clips the image that it predicts, which cannot be undone; set clip_sample=False and thresholding=False"
    if config.prediction_type == "sample":
        return "takes predictions of the sample, whose last step cannot be undone; use a model of epsilon or velocity"
    return None


def _unfit_flow(config: Any) -> str | None:
    if config.stochastic_sampling or config.invert_sigmas:
        return "draws noise or runs backwards; set stochastic_sampling=False and invert_sigmas=False"
    return None


INVERTIBLE: dict[type, Callable[[Any], str | None]] = {
    DDIMScheduler: _unfit_ddim,
    FlowMatchEulerDiscreteScheduler: _unfit_flow,
}
"""Schedulers whose steps can be undone, and what says why a configuration of theirs cannot be."""


def check_invertible(scheduler: Any) -> None:
    """Raise `InputError` for a scheduler whose steps cannot be undone."""
    name = type(scheduler).__name__
    if type(scheduler) not in INVERTIBLE:
        raise InputError(
            f"{name} cannot be inverted; set pipe.scheduler to "
            "DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False), or for a model of flow matching to "
            "FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)."
        )
    unfit = INVERTIBLE[type(scheduler)](scheduler.config)
    if unfit:
        raise InputError(f"This {name} {unfit}.")


def affine_steps(scheduler: Any) -> list[tuple[float, ...]]:
    """(A, B) of every step `x' = A x + B m` of a scheduler that is set to its timesteps; m is the model's output.

    DDIM at eta 0 (2010.02502, equation 12) and Euler's steps along a flow (2209.03003) are of this form. A and B are
    read off the scheduler's own `step`, so that they hold for every spacing, offset and kind of prediction.
    """
    x, m = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    return [tuple(scheduler.step(m, t, x, return_dict=False)[0].tolist()) for t in scheduler.timesteps]


LEAST_SHARE = 0.01
"""Least A of a step that is undone: the less of x is in x', the more of its rounding is in what is found."""
LARGEST_SHARE = 100.0
"""Largest A: so little of the image is in x that a prediction of the noise in x says nothing about it."""


class NoSteps:
    """A scheduler without a step: what is run with it goes from its latents straight to what follows denoising."""

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, scheduler: Any) -> None:
        self.config = scheduler.config
        self.timesteps = torch.empty(0)

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **kwargs: Any) -> None:
        """There are none."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Pipelines look at the arguments of this, and never call it."""
        raise NotImplementedError


class LastSteps:
    """The steps of `scheduler` from timestep `begin` on, towards the image."""

    init_noise_sigma = 1.0

    def __init__(self, scheduler: Any, begin: float, expected: Sequence[float] | None = None) -> None:
        self._inner = copy.deepcopy(scheduler)
        self._begin, self._expected = begin, expected

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":
            raise AttributeError(name)  # not there yet, while this is being copied
        return getattr(self._inner, name)

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **kwargs: Any) -> None:
        """As the scheduler's own, with the steps before `begin` left out."""
        inner = self._inner
        inner.set_timesteps(num_inference_steps, device=device, **kwargs)
        count = _steps_from(inner.timesteps.tolist(), self._begin)
        inner.timesteps = inner.timesteps[-count:]
        if hasattr(inner, "sigmas"):
            inner.sigmas = inner.sigmas[-count - 1 :]
        if self._expected is not None and inner.timesteps.tolist() != list(self._expected):
            raise InputError(
                "The pipeline's scheduler has other timesteps than the inversion was made with; "
                "give it the same scheduler, or invert the image anew."
            )


class InverseSteps:
    """The last steps of `scheduler` undone, from the image up to timestep `begin`.

    A step `x' = A x + B m(x, t)` is undone by the fixed point of `x <- (x' - B m(x, t)) / A`, begun at `x = x'`. One
    iteration is plain DDIM inversion; more are fixed-point inversion (AIDI, 2309.04907), with as many calls of the
    model at each timestep.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, scheduler: Any, begin: float, iterations: int = 1) -> None:
        self._inner = copy.deepcopy(scheduler)
        self._begin, self._iterations = begin, iterations
        self.config = scheduler.config
        self.undone: tuple[float, ...] = ()
        self.on_training_scale = True  # as those of the schedulers that can be undone
        self.step_numbers: list[int] = []
        self._steps: list[tuple[float, ...]] = []
        self._calls = 0
        self._start = self.first_sample = torch.empty(0)

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **kwargs: Any) -> None:
        """Every timestep from the image on, as often as the model is called at it."""
        inner = self._inner
        inner.set_timesteps(num_inference_steps, device="cpu", **kwargs)
        count = _steps_from(inner.timesteps.tolist(), self._begin)
        self.undone = tuple(inner.timesteps[-count:].tolist())
        self.timesteps = inner.timesteps[-count:].flip(0).repeat_interleave(self._iterations).to(device)
        # backwards, so that a window holds the steps that it holds in the run that is undone
        self.step_numbers = [step for step in reversed(range(count)) for _ in range(self._iterations)]
        self._steps = affine_steps(inner)[-count:][::-1]
        self._calls = 0
        self._check_steps()

    def _check_steps(self) -> None:
        """Raise `InputError` if a step cannot be undone."""
        for t, (a, _) in zip(reversed(self.undone), self._steps, strict=True):
            if not abs(a) <= LARGEST_SHARE:
                raise InputError(
                    f"At timestep {t:g} the schedule leaves so little of the image (zero terminal SNR) that a "
                    "prediction of epsilon cannot bring it back; pass a smaller to, or use a model of velocity."
                )
            if abs(a) < LEAST_SHARE:
                raise InputError(f"The step at timestep {t:g} is so long that it cannot be undone; pass more steps.")

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample as it is."""
        return sample

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        """One iteration at the current timestep."""
        step, iteration = divmod(self._calls, self._iterations)
        if self._calls == 0:
            self.first_sample = sample
        self._calls += 1
        if iteration == 0:
            self._start = sample.float()
        a, b = self._steps[step]
        return (((self._start - b * model_output.float()) / a).to(sample.dtype),)


def _steps_from(timesteps: Sequence[float], begin: float) -> int:
    """How many timesteps are at `begin` or nearer to the image; raises `InputError` if none is."""
    count = sum(t <= begin * (1 + 1e-9) for t in timesteps)
    if count == 0:
        raise InputError(
            f"The last of {len(timesteps)} steps is at timestep {timesteps[-1]:g}, and `to` ends at {begin:g}; "
            "pass a larger to, or more steps."
        )
    return count
