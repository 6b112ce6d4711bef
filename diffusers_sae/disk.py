"""Files that are whole or not there, folders that one process writes, and disks that are full."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""A full disk, a full quota, and a file above the limit for files."""
ATTEMPTS = 10
"""How often a lock is tried, since a folder that its holder removes is made and locked anew."""


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill `<file>.part`, which gets its name when it is on the disk; no part of it stays if that fails.

    Raises:
        InputError: if the disk is full.
    """
    partial = file.with_name(f"{file.name}.part")
    with refuse_full_disk(file):
        try:
            write(partial)
            with partial.open("rb") as opened:
                os.fsync(opened.fileno())
            partial.rename(file)
        except Exception:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def refuse_full_disk(path: Path) -> Iterator[None]:
    """Turn what libraries raise where a disk is full into an `InputError` about `path`."""
    try:
        yield
    except Exception as error:
        reason = _reason_of(error)
        if reason not in FULL:
            raise
        raise InputError(
            f"{path} cannot be written ({os.strerror(reason)}); make room and run the same again, which goes on from "
            "what was written whole."
        ) from None


def _reason_of(error: BaseException | None) -> int | None:
    """The system's error number behind an exception: torch hides it in the context, safetensors in the text."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            return int(number[1])
        error = error.__cause__ or error.__context__
    return None


def append_to_log(file: Path, entry: Mapping[str, Any]) -> None:
    """Add one line of JSON; raises `InputError` if the disk is full."""
    with refuse_full_disk(file), file.open("a") as log:
        log.write(json.dumps(entry) + "\n")


def cut_log(file: Path, count: str, last: int) -> None:
    """Drop what a stopped run logged after its last checkpoint: where `count` exceeds `last`, and half lines."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            reached = json.loads(line)[count]
        except (ValueError, TypeError, LookupError, RecursionError):
            continue
        if isinstance(reached, int) and reached <= last:
            kept.append(f"{line}\n")
    write_whole(file, lambda partial: partial.write_text("".join(kept)))


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Make a folder, keep other processes from writing it, and remove it again if it stays empty.

    The lock is the folder's own, so it leaves no file and ends with its process, however that dies. Systems without
    such locks (Windows, some network disks) go without.

    Raises:
        InputError: if another process writes the folder, or it cannot be made.
    """
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = _lock(folder)
    try:
        yield
    finally:
        try:
            for path in absent:
                path.rmdir()
        except OSError:  # it is not empty
            pass
        if descriptor is not None:
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Make and lock a folder; returns the open descriptor that holds the lock."""
    for _ in range(ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be made ({error.strerror}); choose another folder.") from None
        try:
            import fcntl
        except ImportError:
            return None
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            break
        except OSError:  # no locks here
            return descriptor
        if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
        os.close(descriptor)  # it was removed before it was locked
    raise InputError(f"Another process is writing {folder}; wait until it has ended, or choose another folder.")
