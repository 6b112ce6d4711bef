"""Several processes that train together: all that were started take part, or none."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ..errors import InputError

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where torchrun, and the kinds of MPI, say how many processes they started."""
TORCHRUN = "start them with python -m torch.distributed.run --standalone --nproc_per_node"


def started_processes() -> int:
    """How many processes the launcher of this one started.

    Raises:
        InputError: if it was to start several and started one, as `accelerate launch` does on CPUs without an MPI.
    """
    sizes = [int(value) for name in SIZES if (value := os.environ.get(name, "")).isdecimal()]
    if not sizes and "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        raise InputError(
            "accelerate launch was asked for several processes and started one, as it does on CPUs without "
            f"--mpirun_hostfile; {TORCHRUN} 2, or ask for one."
        )
    return max(sizes, default=1)


def make_accelerator(**kwargs: Any) -> Accelerator:
    """An accelerator of all processes that were started: on GPUs, or on CPUs where there are none.

    Raises:
        InputError: if it would hold fewer processes than were started.
    """
    started = started_processes()
    device = torch.accelerator.current_accelerator(check_available=True)
    on_cpus = started > 1 and (device is None or device.type == "mps")  # else each process would train alone
    accelerator = Accelerator(cpu=on_cpus, **kwargs)
    _check_world(accelerator, started)
    return accelerator


def run_in_main(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Let the main process do something first; if it fails there, all processes raise."""
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            work()
        except Exception as error:
            failure = error
    sentences = [None if failure is None else str(failure)]
    if accelerator.num_processes > 1:
        broadcast_object_list(sentences)
    if failure is not None:
        raise failure
    if sentences[0] is not None:
        raise InputError(sentences[0])


def check_processes(batch_size: int, accelerator: Accelerator | None) -> None:
    """Raise `InputError` unless all processes that were started take part, and can share a batch."""
    if accelerator is None:
        return
    _check_world(accelerator, started_processes())
    if batch_size % accelerator.num_processes:
        raise InputError(
            f"batch_size={batch_size} cannot be shared by {accelerator.num_processes} processes; make it (--rows) a "
            "multiple."
        )


def _check_world(accelerator: Accelerator, started: int) -> None:
    if accelerator.num_processes != started:
        raise InputError(
            f"{started} processes were started and the accelerator has {accelerator.num_processes}, so that each would "
            "train alone; on CPUs, make it by Accelerator(cpu=True), or start one process."
        )


def check_same_step(step: int, accelerator: Accelerator | None) -> None:
    """Raise `InputError` unless all processes go on from the same step."""
    steps = [step] if accelerator is None else gather_object([step])
    if len(set(steps)) > 1:
        raise InputError(
            f"The processes go on from the steps {', '.join(map(str, steps))}, so they see other checkpoints; train in "
            "a folder that all of them share."
        )
