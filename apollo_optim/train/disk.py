"""Writing to any file system: needed are files and their rename. What else one may lack is done without, and said once.

Mounted cloud drives, SMB, FUSE and Lustre have no links, no locks, or no flush of a folder; overlays do not rename
folders. Nothing that a run saves rests on those: a folder that could not be renamed into place is marked until it is
complete. A disk that is full, broken or read-only is another matter: those errors are raised.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from apollo_optim.core.errors import InputError

UNFINISHED = ".unfinished"  # in a folder that is being filled or emptied in place
_NOT_THERE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EISDIR}
_NO_RENAME = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM}

log = logging.getLogger(__name__)
_said: set[str] = set()


def go_without(what: str, error: OSError) -> None:
    """One line, once in a process."""
    if what not in _said:
        _said.add(what)
        log.warning("%s (%s)", what, error.strerror or error)


def flush(path: Path) -> None:
    """Put a file or a folder onto the disk itself, as far as the file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        go_without(f"{path.parent}: this file system cannot be told to write at once: a power cut may cost more", error)


def replace(source: Path, target: Path) -> None:
    """Put a file in the place of another, at once where it can be."""
    try:
        source.replace(target)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        go_without(f"{target.parent}: this file system renames no files: they are copied", error)
        shutil.copyfile(source, target)
        source.unlink()


def put_in_place(temporary: Path, final: Path) -> None:
    """A finished folder of files gets its name, which must not be taken; it is complete once `is_finished` says so."""
    try:
        temporary.rename(final)
        return
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        go_without(f"{final.parent}: this file system renames no folders: their files are moved one by one", error)
    final.mkdir()
    (final / UNFINISHED).touch()
    for path in sorted(temporary.iterdir()):
        replace(path, final / path.name)
        flush(final / path.name)
    flush(final)
    (final / UNFINISHED).unlink()


def is_finished(folder: Path) -> bool:
    """Whether all of it is there: it is neither being filled nor being removed."""
    return not (folder / UNFINISHED).exists()


def remove(folder: Path) -> None:
    """Remove a folder that others may look at: whoever finds it by its name finds all of it."""
    going = folder.with_name(f".tmp-old-{folder.name}")
    try:
        folder.rename(going)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        (folder / UNFINISHED).touch()
        going = folder
    shutil.rmtree(going)


def link(path: Path, target: str) -> None:
    """Have `path` point to its neighbour `target`: for people and tools, so it may fail."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        if path.is_dir() and not path.is_symlink():  # a copy that followed the link
            remove(path)
        temporary.symlink_to(target)
        temporary.replace(path)
    except OSError as error:
        go_without(f"{path} could not be made: the newest is {target}", error)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Keep other processes out of a folder; whether that could be done. Makes the folder.

    Raises InputError if it cannot be written to, or another process is in there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise InputError(f"cannot write to the run directory {folder}: {error.strerror}") from None
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
            done = True
        except ImportError:
            done = False  # not Unix
        except BlockingIOError:
            raise InputError(f"another process is training in {folder}") from None
        except OSError as error:
            done = False
            go_without(f"{folder}: this file system has no locks: see to it that one process trains there", error)
        yield done
