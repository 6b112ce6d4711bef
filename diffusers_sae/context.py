"""The context of a run: which step it is at, and which row of a batch belongs to which image and guidance branch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import InputError
from .families import DENOISERS, Family, family_of, images_of

BRANCHES = ("cond", "uncond")
"""The branches an edit can name."""


@dataclass
class Context:
    """Where a running module of a pipeline is. Filled by a hook on the module before each of its calls.

    Args:
        timesteps: the scheduler's, in order; one, 0, for what runs before the denoising.
        step: position of the current one, as a tensor on the module's device.
        known_step: the same as a number, where it can be had without waiting for a device.
        rows: batch that the module sees.
        branches: its parts, in order and of equal size.
        size: height and width of the latents or of the image; their ratio is what counts.
        turn: which call of the module is next, where it is called once a branch.
    """

    timesteps: tuple[float, ...] = (0.0,)
    training_timesteps: int = 1
    step: torch.Tensor = field(default_factory=lambda: torch.tensor(0))
    known_step: int | None = 0
    rows: int = 1
    branches: tuple[str, ...] = ("cond",)
    size: tuple[int, int] = (1, 1)
    turn: int = 0

    @property
    def host_step(self) -> int | None:
        """The step as a number that Python may branch on; `None` under `torch.compile`, which would compile each."""
        return None if torch.compiler.is_compiling() else self.known_step

    def at_step(self, table: torch.Tensor) -> torch.Tensor:
        """The row of `table (T, ...)` for the current step, without waiting for the device."""
        step = 0 if len(self.timesteps) == 1 else self.host_step
        return table.index_select(0, self.step.reshape(1))[0] if step is None else table[step]

    @property
    def images(self) -> int:
        """Images in the batch (prompts times images a prompt)."""
        return self.rows // len(self.branches)

    @property
    def timestep(self) -> float:
        """The scheduler's timestep now; waits for the device."""
        return self.timesteps[int(self.step)]

    def progress(self, timestep: float) -> float:
        """0 at pure noise, 1 at the finished image."""
        return 1 - timestep / self.training_timesteps

    def parts(self) -> Iterator[tuple[str, slice]]:
        """Every branch with its rows, which lie side by side."""
        for i, branch in enumerate(self.branches):
            yield branch, slice(i * self.images, (i + 1) * self.images)

    def begin(self) -> None:
        """Forget the run before."""
        self.turn = 0


class TextContext(Context):
    """Context of a text encoder, which pipelines run for the prompts first and then for the negative ones.

    `ids (rows, P)` are the tokens that it reads.
    """

    ids: torch.Tensor

    def update(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Read the encoder's arguments for the call that is about to run."""
        tokens = args[0] if args else kwargs["input_ids"]
        self.ids, self.rows = tokens, tokens.shape[0]
        self.branches = (BRANCHES[min(self.turn, 1)],)
        self.turn += 1


class OnePassContext(Context):
    """Context of what runs once for all images: a generator, or a handover."""

    def update(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Read the module's arguments for the call that is about to run."""
        self.rows = len(next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)))


class DenoisingContext(Context):
    """Context of a denoiser."""

    _family: Family
    _pipe: Any
    _call: Mapping[str, Any]
    _table: torch.Tensor
    _given: torch.Tensor
    _planned: tuple[str, ...] = ("cond",)
    _unit = (1.0, 0.0)
    _asked_size: tuple[int, int] | None = None

    def start(self, pipe: Any, call: Mapping[str, Any]) -> None:
        """A call of the pipeline begins, with these arguments."""
        self.begin()
        self._pipe, self._call, self._family = pipe, call, family_of(pipe)
        self._expected = images_of(call)

    def prepare(self, device: torch.device) -> None:
        """Read the scheduler's timesteps, which are set by now, and what a compiled denoiser cannot ask for."""
        timesteps = self._pipe.scheduler.timesteps
        self._given = timesteps
        self.timesteps = tuple(float(t) for t in timesteps.tolist())
        self.training_timesteps = self._pipe.scheduler.config.num_train_timesteps
        factor, offset = self._unit = self._family.unit(self._pipe)
        self._table = (timesteps.to(device, torch.float32) - offset) / factor  # as the denoiser is given them
        self._planned = self._family.branches(self._pipe, self._call)
        height, width = self._call.get("height"), self._call.get("width")
        self._asked_size = (height, width) if height and width else None

    def update(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Read the denoiser's arguments for the call that is about to run."""
        named = dict(zip(("sample", "timestep"), args, strict=False))
        given = {**kwargs, **named}
        sample = next(given[n] for n in ("sample", "hidden_states", "x") if n in given)
        self.rows = len(sample)
        self.size = _size(sample, given) or self._asked_size or (1, 1)
        self._find_step(given["timestep"])
        self.branches = self._branches_now(given)
        one_by_one = len(self.branches) > 1 and self.rows == self._expected
        if self.rows % len(self.branches) or one_by_one:
            raise InputError(
                f"A batch of {self.rows} rows cannot hold the branches {', '.join(self.branches)} of "
                f"{type(self._pipe).__name__}, so none was edited; report the pipeline, or call reset_steering()."
            )

    def _find_step(self, timestep: Any) -> None:
        self.known_step = self._number_of(timestep)
        if self.known_step is None:
            self.step = (self._table - timestep[(0,) * timestep.ndim]).abs().argmin()
        else:
            # filled, since a copy from the host would wait; and no view, whose offset torch.compile may guard on
            self.step = torch.full((), self.known_step, device=self._table.device)

    def _number_of(self, timestep: Any) -> int | None:
        """The step of a timestep as a number, where that can be had without waiting for a device."""
        if isinstance(timestep, torch.Tensor):
            if torch.compiler.is_compiling():
                return None
            entry = _place_in(self._given, timestep) if self._unit == (1.0, 0.0) else None
            if entry is not None:
                return self.timesteps.index(self.timesteps[entry])
            if timestep.device.type != "cpu":
                return None
            timestep = float(timestep[(0,) * timestep.ndim])
        factor, offset = self._unit
        now = timestep * factor + offset
        return min(range(len(self.timesteps)), key=lambda i: abs(self.timesteps[i] - now))

    def _branches_now(self, given: Mapping[str, Any]) -> tuple[str, ...]:
        if given.get("skip_layers") is not None:  # the extra call of skip-layer guidance
            return ("cond",)
        if torch.compiler.is_compiling():
            branches = self._planned
            cut_off = len(branches) > 1 and self.rows == self._expected and not self._family.in_turn
        else:
            branches = self._family.branches(self._pipe, self._call)
            cut_off = self._family.cut_off and self.rows == self._expected
        if cut_off:
            return ("cond",)
        if self._family.in_turn:
            self.turn = (self.turn + 1) % len(branches)
            return (branches[self.turn - 1],)
        return branches


def _place_in(whole: torch.Tensor, entry: torch.Tensor) -> int | None:
    """The index of `entry` if it is a view of one entry of `whole (T,)`.

    Pipelines take their timesteps from the scheduler's tensor one by one, and the host knows where a view begins.
    """
    repeated = all(size == 1 or stride == 0 for size, stride in zip(entry.shape, entry.stride(), strict=True))
    if not repeated or whole.ndim != 1 or entry.dtype != whole.dtype:
        return None
    if entry.untyped_storage()._cdata != whole.untyped_storage()._cdata:
        return None
    index, left = divmod(int(entry.storage_offset()) - int(whole.storage_offset()), max(whole.stride(0), 1))
    return index if left == 0 and 0 <= index < len(whole) else None


def _size(sample: Any, given: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of the image, up to a factor, if the denoiser is told."""
    one = sample[0]
    if one.ndim >= 3:
        return one.shape[-2], one.shape[-1]
    if given.get("img_shapes") is not None:
        shape = given["img_shapes"][0]
        height, width = (shape[0] if isinstance(shape, list) else shape)[-2:]
        return height, width
    return None


def arguments_of(function: Any, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults filled in; empty if they do not fit, which the call itself will say."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return bound.arguments


def context_of(component: str) -> Context:
    """A context for a component of a pipeline, by its name."""
    if component in DENOISERS:
        return DenoisingContext()
    return TextContext() if component.startswith("text_encoder") else OnePassContext()
