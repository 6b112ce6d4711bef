"""Text files as other programs write them, and folders to write to."""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path

from ..errors import InputError

MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's mark, which begins it
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks, and the encoding of the files that begin with them."""


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, or in another Unicode encoding that its byte order mark tells. Line ends stay.

    Raises:
        InputError: the file is not there, is no file, cannot be opened, or is no text.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{file} is not there; check the path, which counts from {Path.cwd()}.") from None
    except OSError as error:
        what = "is a folder" if file.is_dir() else f"cannot be opened ({error.strerror})"
        raise InputError(f"{file} {what}; pass a file that can be read.") from None
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name, byte = encoding.removesuffix("-sig").upper(), data[error.start]
        raise InputError(f"{file} is no {name} text (byte {error.start} is 0x{byte:02x}); save it as UTF-8.") from None
    if "\0" in text:
        raise InputError(f"{file} is no text: it holds zero bytes; save it as UTF-8.")
    return text


def lines_of(text: str) -> list[str]:
    """Lines, which end at line feeds, carriage returns or both; `str.splitlines` would also end them at U+2028, U+0085,
    form feeds and others that may stand in a prompt."""
    return re.split(r"\r\n|\n|\r", text)


def check_output_folder(folder: Path) -> None:
    """Raise `InputError` if a folder can neither be written to nor be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"{folder} cannot be written, since {there} is a file; choose another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written, since {there} is not yours to write to; choose another folder.")


def check_output_file(file: Path) -> None:
    """Raise `InputError` if a file cannot be written."""
    if file.is_dir():
        raise InputError(f"{file} is a folder; pass a file to write.")
    check_output_folder(file.parent)
    if file.exists() and not os.access(file, os.W_OK):
        raise InputError(f"{file} is not yours to write to; pass another file.")
