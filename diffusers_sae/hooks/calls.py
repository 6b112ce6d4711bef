"""Calls of a steerable pipeline: each is a run, which is suspended while a callback is called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from .current import current_run
from .run import SteeringRun

CALLBACKS = ("callback_on_step_end", "callback")
"""Arguments of pipelines that are functions of the user's."""


def as_run(method: Callable, nested: Callable | None = None) -> Callable:
    """A pipeline's `__call__`, or a method like it, of which every call is a `SteeringRun`.

    Args:
        nested: takes the place of `method` where the pipeline calls it inside of another such method.
    """
    signature = inspect.signature(method)

    @functools.wraps(method)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if nested is not None and run_of(self) is not None:
            return nested(self, *args, **kwargs)
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError:
            return method(self, *args, **kwargs)  # which says what is wrong
        call = inspect.BoundArguments(signature, bound.arguments.copy())
        call.apply_defaults()
        named = {**call.arguments, **call.arguments.get(_keywords_of(signature), {})}
        with SteeringRun(self._steering, self, named) as run:
            _suspend_in_callbacks(bound, run)
            return method(*bound.args, **bound.kwargs)

    __call__.is_run = True  # type: ignore[attr-defined]
    return __call__


def is_run(method: Callable) -> bool:
    """Whether `as_run` made a method."""
    return getattr(method, "is_run", False)


def run_of(pipe: Any) -> SteeringRun | None:
    """The run of the pipeline that this thread is in."""
    run = current_run()
    return run if isinstance(run, SteeringRun) and run.state is pipe._steering else None


def _keywords_of(signature: inspect.Signature) -> str:
    """The name of `**kwargs`; empty if there is none."""
    names = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    return names[0] if names else ""


def _suspend_in_callbacks(bound: inspect.BoundArguments, run: SteeringRun) -> None:
    """Replace callbacks by ones in which the run is suspended."""
    for arguments in (bound.arguments, bound.arguments.get(_keywords_of(bound.signature), {})):
        for name in CALLBACKS:
            if callable(arguments.get(name)):
                arguments[name] = suspending(arguments[name], run)


def suspending(callback: Callable, run: SteeringRun) -> Callable:
    """`callback`, during which `run` is suspended. It stays an instance of its class, which pipelines ask for."""

    @functools.wraps(callback)
    def suspended(*args: Any, **kwargs: Any) -> Any:
        with run.suspended():
            return callback(*args, **kwargs)

    cls = type(callback)
    if not isinstance(getattr(cls, "tensor_inputs", None), property):
        return suspended
    twin: Any = object.__new__(type(cls.__name__, (cls,), {"__call__": lambda _, *args, **kw: suspended(*args, **kw)}))
    twin.__dict__ = callback.__dict__  # shared, since callbacks keep state
    return twin
