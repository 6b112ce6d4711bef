"""The run that a thread is in."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import SteeringRun


class _Current(threading.local):
    """`torch.compile` guards on the value that the calling thread sees, so that threads can share a graph."""

    run: SteeringRun | None = None


_current = _Current()


def current_run() -> SteeringRun | None:
    """The innermost run of this thread; `None` outside of a call of a steerable pipeline, and during its callbacks."""
    return _current.run


def set_current_run(run: SteeringRun | None) -> None:
    """Make `run` the one that hooks act for in this thread."""
    _current.run = run
