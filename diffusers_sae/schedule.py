"""The steps of a run: which of its scheduler's timesteps it passes, which step each belongs to, and where it is now.

A scheduler lists the timesteps at which the denoiser is called, and a pipeline goes through them in order: all, or
those that `strength`, `denoising_start` and `denoising_end` leave. Facts read from diffusers 0.42.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import torch
from diffusers import PNDMScheduler

from .errors import InputError

Given = Callable[[torch.Tensor, torch.dtype], torch.Tensor]
"""What a pipeline gives its denoiser at timesteps `(T,)` of the scheduler, in a dtype: `(T,)`."""


def timesteps_passed(pipe: Any, call: Mapping[str, Any], loop: Any = None, total: int | None = None) -> range:
    """Positions in the scheduler's timesteps that a run is about to pass.

    Args:
        pipe: when its timesteps are set.
        call: the arguments of its call.
        loop: what the pipeline iterates over, if that is known.
        total: number of steps that it announces to the progress bar.
    """
    scheduler = pipe.scheduler
    whole = len(scheduler.timesteps)
    length = min(_length(pipe, loop, total), whole)
    begin = getattr(scheduler, "begin_index", None)
    if begin is None:
        begin = _end(scheduler, call) - length
    if not 0 <= begin <= whole - length:
        begin = whole - length
    return range(begin, begin + length)


def _length(pipe: Any, loop: Any, total: int | None) -> int:
    """Timesteps that a run passes."""
    if isinstance(loop, Sized):
        return len(loop)
    length = getattr(pipe, "_num_timesteps", None)
    if length is not None:
        return length
    whole = len(pipe.scheduler.timesteps)
    steps = getattr(pipe.scheduler, "num_inference_steps", None)
    left_out = 0 if total is None or steps is None else (steps - total) * getattr(pipe.scheduler, "order", 1)
    return min(max(whole - left_out, 1), whole)


def _end(scheduler: Any, call: Mapping[str, Any]) -> int:
    """Position after the last that a run passes, which `denoising_end` brings forward."""
    share = call.get("denoising_end")
    if not isinstance(share, float) or not 0 < share < 1:
        return len(scheduler.timesteps)
    total = scheduler.config.num_train_timesteps
    return int((scheduler.timesteps >= round(total - share * total)).sum())


def step_numbers(scheduler: Any, passed: range) -> tuple[int, ...]:
    """The step that each timestep of a run belongs to, counted from the run's first.

    A scheduler with an attribute `step_numbers`, one for each of its timesteps, says so itself.
    """
    own = getattr(scheduler, "step_numbers", None)
    if own is not None:
        return tuple(own[passed.start : passed.stop])
    if isinstance(scheduler, PNDMScheduler):
        return tuple(_pndm_step(scheduler, call) for call in range(len(passed)))
    # schedulers of order 2 call the model twice per step, and count calls from the run's first
    return tuple(call // (getattr(scheduler, "order", None) or 1) for call in range(len(passed)))


def _pndm_step(scheduler: PNDMScheduler, call: int) -> int:
    """Three Runge-Kutta steps of four calls and then linear multistep, or multistep whose first step takes two."""
    if scheduler.config.skip_prk_steps:
        return max(call - 1, 0)
    runge_kutta = len(scheduler.prk_timesteps)
    return call // 4 if call < runge_kutta else runge_kutta // 4 + call - runge_kutta


def on_training_scale(scheduler: Any) -> bool:
    """Whether timesteps count from 0 to `num_train_timesteps`, as they did when the model was trained.

    EDM and continuous Euler give the model log(sigma) / 4, IPNDM and SCM an angle, and others shares of 1. A scheduler
    with an attribute `on_training_scale` says so itself.
    """
    own = getattr(scheduler, "on_training_scale", None)
    if own is not None:
        return bool(own)
    total = getattr(scheduler.config, "num_train_timesteps", None)
    timesteps = scheduler.timesteps.detach().cpu()
    if total is None or not ((timesteps >= 0) & (timesteps <= total)).all():
        return False
    if not timesteps.is_floating_point():
        return True
    sigmas = getattr(scheduler, "sigmas", None)
    sigmas = None if sigmas is None else torch.as_tensor(sigmas).detach().cpu()[: len(timesteps)].to(timesteps.dtype)
    if getattr(scheduler, "alphas_cumprod", None) is not None:  # noise as in DDPM: one level for each timestep
        return sigmas is None or not torch.allclose(timesteps, sigmas.log() / 4, rtol=1e-4)
    return sigmas is not None and torch.allclose(timesteps, sigmas * total, rtol=1e-4)  # a flow


class Schedule:
    """The timesteps of one run as its pipeline gives them to the denoiser, and where in them the run is.

    A timestep is found where it equals what the pipeline makes of the scheduler's, rounding included. Where several
    do, the run's progress decides: each step lies after the one before.

    Args:
        timesteps: the scheduler's, `(T,)`.
        passed: positions in them that the run is expected to pass.
        given: what the pipeline makes of them.
        device: the denoiser's.
        underway: the run has begun already, unseen, so that its next call does not tell where it began.

    Attributes:
        begun: whether the run has begun.
    """

    def __init__(
        self, timesteps: torch.Tensor, passed: range, given: Given, device: torch.device, underway: bool = False
    ) -> None:
        self.timesteps, self._device = timesteps, device
        dtypes = list(dict.fromkeys((timesteps.dtype, torch.float32, torch.float16, torch.bfloat16)))
        # made here and not in a compiled denoiser, which may leave roundings out
        tables = torch.stack([given(timesteps, dtype).to(dtype).to(torch.float32) for dtype in dtypes])  # (dtypes, T)
        self._tables = dict(zip(dtypes, tables.to(device), strict=True))
        self._values = dict(zip(dtypes, tables.tolist(), strict=True))
        self._begin_at(passed)
        self.begun = underway

    def _begin_at(self, passed: range) -> None:
        """Expect a run over some of the timesteps, from its first call on."""
        self.passed = passed
        within = slice(passed.start, passed.stop)
        self._tables_passed = {dtype: table[within].clone() for dtype, table in self._tables.items()}
        self._values_passed = {dtype: values[within] for dtype, values in self._values.items()}
        self._repeats = {dtype: len(set(values)) < len(passed) for dtype, values in self._values_passed.items()}
        self._places = torch.arange(len(passed), device=self._device)
        self._reached = torch.full((), -1, device=self._device)
        self._position = torch.zeros((), dtype=torch.long, device=self._device)
        self._last = -1
        self._steps_begun = 0
        self._distances: list[torch.Tensor] = []

    def settle(self, timestep: Any) -> bool:
        """Let the first call decide where the run begins; returns whether that is elsewhere than expected.

        It waits for the device once, unless the timestep is a view of the scheduler's or lies on the host.

        Raises:
            InputError: the timestep is on no schedule.
        """
        begin = place_in(self.timesteps, timestep)
        if begin is None:
            values, value = self._values[self._dtype(timestep)], _number(timestep)
            expected = values[self.passed.start] == value
            begin = self.passed.start if expected else _index(values, value, 0)
        if begin is None:
            raise _off_schedule(timestep)
        if begin == self.passed.start:
            return False
        self._begin_at(range(begin, min(begin + len(self.passed), len(self.timesteps))))
        return True

    def find(self, timestep: Any, begins_step: bool) -> tuple[int | None, torch.Tensor]:
        """The position in the run at which the denoiser is called: as a number, where that is known, and as a tensor.

        Args:
            timestep: that it is given.
            begins_step: whether this is the first call at the timestep; other guidance branches may have their own.

        Raises:
            InputError: the timestep is on no schedule.
        """
        if isinstance(timestep, torch.Tensor) and torch.compiler.is_compiling():
            return None, self._find_compiled(timestep, begins_step)
        position = self._find_on_host(timestep, begins_step) if self.begun else 0  # see `settle`
        self.begun = True
        self._steps_begun += begins_step
        if position is None:
            self._position = self._find_on_device(timestep) if begins_step else self._position
            return None, self._position
        self._last = position
        # filled, since a copy from the host would wait; and no view, whose offset torch.compile may guard on
        self._position = torch.full((), position, device=self._device)
        return position, self._position

    def check(self) -> None:
        """Raise `InputError` if a timestep that only the device has seen was on no schedule; waits for the device."""
        if self._distances and bool(torch.stack(self._distances).any()):
            raise _off_schedule()

    def _find_on_host(self, timestep: Any, begins_step: bool) -> int | None:
        """The position as a number, or `None` where that would wait for the device."""
        place = place_in(self.timesteps, timestep)
        if place is None:
            if isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu":
                return None
            values, value = self._values_passed[self._dtype(timestep)], _number(timestep)
            position = _index(values, value, max(self._last + begins_step, 0))
            if position is None and values[self._last] == value:  # a further call of the same step
                position = self._last
        else:
            position = place - self.passed.start if place in self.passed else None
        if position is None:
            raise _off_schedule(timestep)
        return position

    def _find_on_device(self, timestep: torch.Tensor) -> torch.Tensor:
        """The position of a step that begins now; `check` tells whether there is any."""
        dtype = self._dtype(timestep)
        # every step lies at least one timestep after the one before
        least = min(self._steps_begun, len(self.passed)) - 1 if self._repeats[dtype] else 0
        distance, position = (self._tables_passed[dtype][least:] - timestep[(0,) * timestep.ndim]).abs().min(0)
        self._distances.append(distance)
        return position + least if least else position

    def _find_compiled(self, timestep: torch.Tensor, begins_step: bool) -> torch.Tensor:
        """The position, by tensors alone. Only repeated timesteps need a memory, which CUDA graphs do without."""
        dtype = self._dtype(timestep)
        distance = (self._tables_passed[dtype] - timestep[(0,) * timestep.ndim]).abs()
        if not self._repeats[dtype]:
            return distance.argmin()
        if begins_step:
            self._reached.copy_(torch.where(self._places > self._reached, distance, torch.inf).argmin())
        return self._reached.clone()

    def _dtype(self, timestep: Any) -> torch.dtype:
        """The dtype in which a timestep is compared."""
        dtype = timestep.dtype if isinstance(timestep, torch.Tensor) else None
        return dtype if dtype in self._tables else self.timesteps.dtype


def place_in(whole: torch.Tensor, entry: Any) -> int | None:
    """The index of `entry` if it is a view of one entry of `whole (T,)`.

    Pipelines take their timesteps from the scheduler's tensor one by one, and the host knows where a view begins.
    """
    if not isinstance(entry, torch.Tensor) or whole.ndim != 1 or entry.dtype != whole.dtype:
        return None
    repeated = all(size == 1 or stride == 0 for size, stride in zip(entry.shape, entry.stride(), strict=True))
    if not repeated or entry.untyped_storage()._cdata != whole.untyped_storage()._cdata:
        return None
    index, left = divmod(int(entry.storage_offset()) - int(whole.storage_offset()), max(whole.stride(0), 1))
    return index if left == 0 and 0 <= index < len(whole) else None


def _index(values: Sequence[float], value: float, first: int) -> int | None:
    return next((i for i in range(first, len(values)) if values[i] == value), None)


def _number(timestep: Any) -> float:
    """A timestep as a number, rounded as the tables are; waits for the device that it is on."""
    first = timestep[(0,) * timestep.ndim] if isinstance(timestep, torch.Tensor) else torch.tensor(timestep)
    return float(first.to(torch.float32))


def _off_schedule(timestep: Any = None) -> InputError:
    which = "a timestep" if timestep is None else f"the timestep {_number(timestep):g}"
    return InputError(
        f"The denoiser was called at {which} that is not ahead on the schedule of this run, so that its step is "
        "unknown; report the pipeline, or run it without SAEs and captures."
    )
