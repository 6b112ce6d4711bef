"""Arguments of a pipeline's call, checked before any work begins."""

from __future__ import annotations

import difflib
import inspect
import math
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import InputError

CAPTURE_SETS = ("prompt", "generator", "output_type", "num_images_per_prompt", "return_dict")
"""Arguments that a capture sets itself: it makes one image of latents for each prompt, from a seed of its own."""
COUNTS = ("num_inference_steps", "height", "width", "max_sequence_length")
PLAIN = (int, float, str, bool)
"""Types of values that are checked; of others, the pipeline judges."""


def check_call(pipe: Any, call: Mapping[str, Any], taken: Collection[str] = CAPTURE_SETS) -> None:
    """Raise `InputError` unless the pipeline takes all arguments of `call`, with values of these types.

    Args:
        taken: arguments that the caller sets itself.
    """
    function = inspect.unwrap(type(pipe).__call__)
    parameters = {name: p for name, p in inspect.signature(function).parameters.items() if name != "self"}
    named = [name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    known = [name for name in named if name not in taken]
    # diffusers' own pipelines take **kwargs for deprecated callbacks alone, and pass over all others in silence
    free = len(named) < len(parameters) and not function.__module__.startswith("diffusers.")
    for name in call:
        if name in taken:
            raise InputError(f"{name!r} is set by the capture itself; leave it out of the call.")
        if name not in known and not free:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise InputError(f"{type(pipe).__name__} takes no argument {name!r}; the nearest is {near[0]!r}.")
    hints = _hints_of(function)
    for name, value in call.items():
        _check_type(name, value, hints.get(name, Any))
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name}={value} must be finite.")
    for name in COUNTS:  # of which pipelines pass over some that are 0
        if isinstance(call.get(name), int) and call[name] < 1:
            raise InputError(f"{name}={call[name]} must be at least 1.")


@contextmanager
def arguments_refused_by(pipe: Any) -> Iterator[None]:
    """What a pipeline says of its arguments, as an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{type(pipe).__name__} cannot be called like this: {error}") from error


def _hints_of(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # of names that are imported for type checkers alone
        return {}


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Refuse a number, text or truth value for an argument that takes another of these."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if type(value) not in PLAIN or not set(kinds) <= {*PLAIN, type(None)}:
        return
    if not any(type(value) is kind or (kind is float and type(value) is int) for kind in kinds):
        words = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise InputError(f"{name}={value!r} is {type(value).__name__}; pass {words}.")
