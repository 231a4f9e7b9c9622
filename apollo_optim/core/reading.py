"""Reading files that may come from anywhere: regular files only, of a bounded size, and every failure in one line."""

from __future__ import annotations

import json
import os
import stat
import zlib
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from apollo_optim.core.errors import Damaged, InputError

LARGEST_JSON = 16 << 20  # bytes; what we and others write into a JSON file is a thousandth of it
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def kind_of(path: Path) -> str | None:
    """What it is, if it is no regular file ("a FIFO"); None for one, and for a link to one. Raises OSError."""
    mode = os.stat(path).st_mode
    return None if stat.S_ISREG(mode) else next((kind for test, kind in _KINDS if test(mode)), "something else")


def opened(path: Path) -> BinaryIO:
    """A regular file, open for reading in bytes: a FIFO would wait for ever, a device never end.

    Raises InputError if it is something else, OSError if it cannot be opened.
    """
    if (kind := kind_of(path)) is not None:  # before it is opened: that alone waits, or sets a device going
        raise InputError(f"{path} is {kind}, not a regular file")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_text(path: Path, most: int = LARGEST_JSON) -> str:
    """A text of UTF-8, of at most so many bytes.

    Raises Damaged if it is none or longer, InputError if it is no regular file, OSError if it cannot be read.
    """
    with opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise Damaged(path, f"it has more than {most:,} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Damaged(path, f"byte {error.start} is not UTF-8") from None


def read_json(path: Path, most: int = LARGEST_JSON) -> Any:
    """What a JSON file holds. Raises as `read_text` does, and Damaged if it is no JSON."""
    return parsed(read_text(path, most), path)


def parsed(text: str | bytes, path: Path) -> Any:
    """JSON that was read from `path`. Raises Damaged."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Damaged(path, f"not JSON: {error}") from None
    except RecursionError:
        raise Damaged(path, "it is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise Damaged(path, str(error).split(";", maxsplit=1)[0]) from None


def is_count(value: Any) -> TypeGuard[int]:
    """A whole number that is not negative, as JSON has it."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with opened(path) as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc
