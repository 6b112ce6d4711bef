"""What a user reads when a command fails: one sentence, and an exit code that scripts can tell apart."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from ..disk import FULL
from ..errors import InputError
from .extras import advise_install

MISTAKE = 2
"""Exit code of a mistake that the user can mend."""
UNEXPECTED = 70
"""Exit code of a failure that nobody foresaw (`EX_SOFTWARE` of sysexits.h)."""
RESUMABLE = ("capture", "train", "evaluate")
"""Commands that go on where they were stopped when they are run again."""
OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")
NO_MEMORY = ("can't allocate memory", "out of memory")
"""What torch's `RuntimeError` says of a processor's memory, or of a GPU's."""


LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
"""Where torchrun, and the kinds of MPI, number the processes that they start on a machine."""


class Stopped(BaseException):
    """The command was told to stop, by Ctrl-C or by a signal; like `KeyboardInterrupt`, no `Exception`."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


def explain(error: Exception) -> tuple[str, int]:
    """One sentence about an error, and the exit code of the command."""
    if isinstance(error, InputError):
        return str(error), MISTAKE
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"This command needs {error.name}, which is not installed; {advise_install(error.name)}.", MISTAKE
    if isinstance(error, OSError) and error.strerror:
        return _explain_files(error), MISTAKE
    if type(error).__name__ in OUT_OF_MEMORY or any(words in str(error) for words in NO_MEMORY):
        return (
            f"There is too little memory ({_first_line(error)}); lower --batch-size, --rows or --latents, or choose a "
            "smaller model."
        ), MISTAKE
    return f"{type(error).__name__}: {_first_line(error)}; run with --debug for the traceback.", UNEXPECTED


def _explain_files(error: OSError) -> str:
    where = f"{error.filename}" if error.filename is not None else "A file"
    if error.errno in FULL:
        return f"{where} cannot be written: the disk is full; make room and run the same command again."
    return f"{where} cannot be read or written ({error.strerror}); check the path and its permissions."


def _first_line(error: Exception) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), "no message")


def advise_after_stop(arguments: Sequence[str], program: str, processes: int) -> str:
    """What a stopped command's user can do: the very command to repeat, or that nothing of it was kept."""
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    again = shlex.join([*program.split(), *arguments])
    if command not in RESUMABLE:
        return f"Stopped; nothing was kept, and the command begins anew when it is repeated: {again}"
    if processes > 1:
        return "Stopped; to go on from the last checkpoint, start the same processes again."
    return f"Stopped; to go on with what was finished, repeat: {again}"


def is_first_process() -> bool:
    """Whether this is the first of the processes that a launcher started on this machine; it speaks for the others."""
    ranks = (os.environ.get(name) for name in LOCAL_RANKS)
    return next((rank for rank in ranks if rank), "0") == "0"


def program_name() -> str:
    """How this program was started."""
    return "python -m diffusers_sae.cli" if sys.argv[0].endswith("__main__.py") else "diffusers-sae"
