"""The command line, `diffusers-sae`: one command a file."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from ..errors import InputError
from .failures import Stopped, advise_after_stop, explain, is_first_process, program_name

DEBUG = "--debug"


def main() -> None:
    """Run the command line.

    A failure ends in one sentence, and `--debug` shows where it arose. Exit codes: 2 for a user's mistake, 70 for a
    failure that nobody foresaw, 130 after Ctrl-C, 143 after SIGTERM.
    """
    debug = DEBUG in sys.argv
    arguments = [a for a in sys.argv[1:] if a != DEBUG]
    try:
        with _stopped_by_signals():
            from .app import app

            sys.exit(app(args=arguments, prog_name="diffusers-sae", standalone_mode=True))
    except (Stopped, KeyboardInterrupt) as stop:  # the latter before the handlers are set
        if debug:
            raise
        code = stop.exit_code if isinstance(stop, Stopped) else Stopped(signal.SIGINT).exit_code
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if not is_first_process():
            sys.exit(code)
        print(f"\n{advise_after_stop(arguments, program_name(), processes)}", file=sys.stderr)
        sys.exit(code)
    except Exception as error:
        if debug:
            raise
        sentence, code = explain(error)
        if not isinstance(error, InputError) or is_first_process():  # which says the same
            print(f"error: {sentence}", file=sys.stderr)
        sys.exit(code)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise `Stopped`. Python's `KeyboardInterrupt` would end in typer, without our advice.

    What is raised after a signal counts as the stop: libraries catch all that is raised while they are imported, and
    raise an error of their own.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield
        return

    stops: list[Stopped] = []

    def stop(number: int, frame: object) -> NoReturn:
        stops.append(Stopped(number))
        raise stops[-1]

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Exception as error:
        if stops:
            raise stops[-1] from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
