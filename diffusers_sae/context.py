"""The context of a run: which step it is at, and which row of a batch belongs to which image and guidance branch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .errors import InputError
from .families import DENOISERS, Family, family_of, images_of
from .schedule import Schedule, on_training_scale, step_numbers, timesteps_passed

BRANCHES = ("cond", "uncond")
"""The branches an edit can name."""


@dataclass
class Context:
    """Where a running module of a pipeline is. Filled by a hook on the module before each of its calls.

    Args:
        timesteps: the scheduler's that the run passes, in order; one, 0, for what runs before the denoising.
        steps: the step of the run that each belongs to; by default each has its own.
        step: position of the current one, as a tensor on the module's device.
        known_step: the same as a number, where it can be had without waiting for a device.
        rows: batch that the module sees.
        branches: its parts, in order and of equal size.
        size: height and width of the latents or of the image; their ratio is what counts.
        turn: which call of the module is next, where it is called once a branch.
        moved: whether the last call showed other timesteps than were expected, so that edits must be prepared again.
        first_image: number of the first image of the batch, counted over calls of the pipeline.
    """

    timesteps: tuple[float, ...] = (0.0,)
    steps: tuple[int, ...] = ()
    step: torch.Tensor = field(default_factory=lambda: torch.tensor(0))
    known_step: int | None = 0
    rows: int = 1
    branches: tuple[str, ...] = ("cond",)
    size: tuple[int, int] = (1, 1)
    turn: int = 0
    moved: bool = False
    first_image: int = 0

    def __post_init__(self) -> None:
        self.steps = self.steps or tuple(range(len(self.timesteps)))

    @property
    def step_count(self) -> int:
        """Steps of the run."""
        return max(self.steps) + 1

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

    def parts(self) -> Iterator[tuple[str, slice]]:
        """Every branch with its rows, which lie side by side."""
        for i, branch in enumerate(self.branches):
            yield branch, slice(i * self.images, (i + 1) * self.images)

    def begin(self) -> None:
        """Forget the run before."""
        self.turn = 0

    def check_training_scale(self, what: str) -> None:
        """Raise `InputError` if `what`, which is looked up by timestep, cannot be in this run."""

    def lacks(self, branches: Collection[str]) -> list[str]:
        """Those of the branches that the run does not have."""
        return [branch for branch in branches if branch not in self.branches]

    def end(self) -> None:
        """The run has ended without an error; raises `InputError` if the step of one of its calls is unknown."""


class TextContext(Context):
    """Context of a text encoder, which pipelines run for the prompts first and then for the negative ones.

    `ids (rows, P)` are the tokens that it reads.
    """

    ids: torch.Tensor
    _order: tuple[str, ...] = BRANCHES

    def start(self, call: Mapping[str, Any]) -> None:
        """A call of the pipeline begins, with these arguments; of embedded prompts only the negative ones are read."""
        self.begin()
        self._order = BRANCHES if call.get("prompt_embeds") is None else BRANCHES[1:]

    def update(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Read the encoder's arguments for the call that is about to run."""
        tokens = args[0] if args else kwargs["input_ids"]
        self.ids, self.rows = tokens, tokens.shape[0]
        self.branches = (self._order[min(self.turn, len(self._order) - 1)],)
        self.turn += 1

    def lacks(self, branches: Collection[str]) -> list[str]:
        return [branch for branch in branches if branch not in self._order[: self.turn]]


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
    _schedule: Schedule | None = None
    _planned: tuple[str, ...] = ("cond",)
    _asked_size: tuple[int, int] | None = None

    def start(self, pipe: Any, call: Mapping[str, Any]) -> None:
        """A call of the pipeline begins, with these arguments."""
        self.begin()
        self._pipe, self._call, self._family = pipe, call, family_of(pipe)
        self._expected = images_of(call)
        self._schedule = None

    @property
    def is_prepared(self) -> bool:
        """Whether the run's timesteps have been read; until its first step, the scheduler may get others."""
        schedule = self._schedule
        return schedule is not None and (schedule.begun or schedule.timesteps is self._pipe.scheduler.timesteps)

    def prepare(self, device: torch.device, loop: Any = None, total: int | None = None, underway: bool = False) -> None:
        """Read the scheduler's timesteps, which are set by now, and what a compiled denoiser cannot ask for.

        Args:
            device: the denoiser's.
            loop, total: what the pipeline gives its progress bar.
            underway: the denoiser has been called before in this run.
        """
        pipe = self._pipe
        passed = timesteps_passed(pipe, self._call, loop, total)
        given = partial(self._family.given, pipe)
        self._schedule = Schedule(pipe.scheduler.timesteps, passed, given, device, underway)
        self._read(passed)
        self._planned = self._family.branches(pipe, self._call)
        height, width = self._call.get("height"), self._call.get("width")
        self._asked_size = (height, width) if height and width else None

    def _read(self, passed: range) -> None:
        scheduler = self._pipe.scheduler
        self.timesteps = tuple(float(t) for t in scheduler.timesteps[passed.start : passed.stop].tolist())
        self.steps = step_numbers(scheduler, passed)

    def update(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Read the denoiser's arguments for the call that is about to run."""
        named = dict(zip(("sample", "timestep"), args, strict=False))
        given = {**kwargs, **named}
        sample = next(given[n] for n in ("sample", "hidden_states", "x") if n in given)
        self.rows = len(sample)
        self.size = _size(sample, given) or self._asked_size or (1, 1)
        self._find_step(given)
        self.branches = self._branches_now(given)
        one_by_one = len(self.branches) > 1 and self.rows == self._expected
        if self.rows % len(self.branches) or one_by_one:
            raise InputError(
                f"A batch of {self.rows} rows cannot hold the branches {', '.join(self.branches)} of "
                f"{type(self._pipe).__name__}, so none was edited; report the pipeline, or call reset_steering()."
            )

    def _find_step(self, given: Mapping[str, Any]) -> None:
        """Find the step in the schedule; the first call of the run decides where in it the run begins."""
        schedule, timestep = self._schedule, given["timestep"]
        assert schedule is not None
        if not torch.compiler.is_compiling():
            self.moved = not schedule.begun and schedule.settle(timestep)
            if self.moved:
                self._read(schedule.passed)
        begins_step = self.turn == 0 and given.get("skip_layers") is None
        self.known_step, self.step = schedule.find(timestep, begins_step)

    def check_training_scale(self, what: str) -> None:
        scheduler = self._pipe.scheduler
        if not on_training_scale(scheduler):
            raise InputError(
                f"{what} is looked up by timestep, and those of {type(scheduler).__name__} do not count from 0 to the "
                "training's last, as here; pass unit='raw' and numbers or functions, or use another scheduler."
            )

    def lacks(self, branches: Collection[str]) -> list[str]:
        return [branch for branch in branches if branch not in self._planned]

    def end(self) -> None:
        if self._schedule is not None:
            self._schedule.check()

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


def context_of(component: str) -> Context:
    """A context for a component of a pipeline, by its name."""
    if component in DENOISERS:
        return DenoisingContext()
    return TextContext() if component.startswith("text_encoder") else OnePassContext()
