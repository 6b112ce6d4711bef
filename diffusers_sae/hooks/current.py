"""The run that a thread is in."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Protocol


class Run(Protocol):
    """What hooks ask of a run; see `SteeringRun`."""

    def at(self, key: str) -> Any:
        """What the run does at the module whose hook has this key; `None` for nothing."""

    def enter(self, key: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """A component is about to run with these arguments."""


class _Current(threading.local):
    """`torch.compile` guards on the value that the calling thread sees, so that threads can share a graph."""

    run: Run | None = None


_current = _Current()


def current_run() -> Run | None:
    """The innermost run of this thread; `None` outside of a call of a steerable pipeline, and during its callbacks."""
    return _current.run


def set_current_run(run: Run | None) -> None:
    """Make `run` the one that hooks act for in this thread."""
    _current.run = run
