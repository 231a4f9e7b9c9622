"""Writing: the only file of the package that makes, replaces and removes files (tests/house/test_written.py).

A file gets its content at once or not at all: it is written under a random name beside its own, where nothing may lie
yet, and renamed. No link is followed in the last part of a path: a link is replaced, what it points to is left alone.
Modes are as the umask says, whoever wrote the file. What is removed was made by us.

Needed are files and their rename. What else a file system may lack is done without, and said once: mounted cloud
drives, SMB, FUSE and Lustre have no links, no locks, or no flush of a folder; overlays do not rename folders. Nothing
that a run saves rests on those: a folder that could not be renamed into place is marked until it is complete. A disk
that is full, broken or read-only is another matter: those errors are raised.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from apollo_optim.core.errors import InputError

UNFINISHED = ".unfinished"  # in a folder that is being filled or emptied in place
OURS = re.compile(r"\.tmp-[0-9a-f]{16}-.*", re.DOTALL)  # the random names that `beside` gives
_NOT_THERE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EISDIR}
_NO_RENAME = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM}
_NEW = os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

log = logging.getLogger(__name__)
_said: set[str] = set()
_locked: dict[Path, tuple[int, int]] = {}  # the folders that this process keeps others out of: device, inode


def go_without(what: str, error: OSError) -> None:
    """One line, once in a process."""
    if what not in _said:
        _said.add(what)
        log.warning("%s (%s)", what, error.strerror or error)


# --- files ---


def beside(path: Path) -> Path:
    """A name in the same folder that nobody can guess, for what is not finished."""
    return path.with_name(f".tmp-{secrets.token_hex(8)}-{path.name[:100]}")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file to be filled, which is `path` when the block ends well, and nothing otherwise."""
    temporary = beside(path)
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_EXCL | _NEW, 0o666), "wb") as file:
            yield file
        flush(temporary)
        replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write(path: Path, content: str | bytes) -> None:
    """Give a file this content (text: UTF-8), all of it or none."""
    data = content.encode() if isinstance(content, str) else content
    with writing(path) as file:
        file.write(data)


def appending(path: Path) -> BinaryIO:
    """A file to write on at its end. Raises InputError if it is a link or no file."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | _NEW, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK) and path.is_symlink():
            raise InputError(f"{path} is a link, which is not written to: put the file itself there") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode) and str(path) != os.devnull:
        os.close(descriptor)
        raise InputError(f"{path} is not a regular file: move it away")
    return os.fdopen(descriptor, "ab")


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
        if target.is_symlink():
            target.unlink()
        shutil.copyfile(source, target)
        source.unlink()


# --- folders ---


@contextlib.contextmanager
def new_folder(final: Path, *, keep: Collection[str] | None = None) -> Iterator[Path]:
    """A folder to be filled with files, which is `final` when the block ends well, and nothing otherwise.

    `keep`: what lies at `final` already may be replaced, but for the entries of these names, which stay. None: it must
    not be there, or be empty.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(final)
    temporary.mkdir()
    try:
        yield temporary
        as_umask_says(temporary)
        for path in [*temporary.iterdir(), temporary]:
            flush(path)
        put_in_place(temporary, final, keep)
        flush(final.parent)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def as_umask_says(folder: Path) -> None:
    """Give the files of a folder of ours the mode of a new one: some writers make theirs for their owner alone."""
    probe = beside(folder / "mode")
    descriptor = os.open(probe, os.O_WRONLY | os.O_EXCL | _NEW, 0o666)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    probe.unlink()
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # a file system without modes
            if path.is_file() and not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != mode:
                path.chmod(mode)


def put_in_place(temporary: Path, final: Path, keep: Collection[str] | None = None) -> None:
    """A finished folder of files gets its name; it is complete once `is_finished` says so.

    Raises FileExistsError if the name is taken and `keep` is None.
    """
    if final.is_symlink() and keep is not None:
        log.warning("%s was a link: what it pointed to (%s) is left as it is", final, os.readlink(final))
        final.unlink()
    there = os.listdir(final) if final.is_dir() else []
    if keep is None and (there or (os.path.lexists(final) and not final.is_dir())):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))
    try:
        if not final.exists():
            temporary.rename(final)
            return
        if there:
            _exchange(temporary, final, keep or ())
            return
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        go_without(f"{final.parent}: this file system renames no folders: their files are moved one by one", error)
    final.mkdir(exist_ok=True)
    (final / UNFINISHED).touch()
    for name in set(there) - set(keep or ()) - {UNFINISHED}:
        remove(final / name)
    for path in sorted(temporary.iterdir()):
        if path.name in (keep or ()):
            continue  # it lies there
        replace(path, final / path.name)
        flush(final / path.name)
    flush(final)
    (final / UNFINISHED).unlink()


def _exchange(temporary: Path, final: Path, keep: Collection[str]) -> None:
    """Put a folder in the place of another, which goes, but for `keep`: copied first, so that no kill costs it."""
    for name in keep:
        if (source := final / name).is_dir() and not source.is_symlink():
            shutil.copytree(source, temporary / name, symlinks=True)
        else:
            shutil.copy2(source, temporary / name, follow_symlinks=False)
    old = beside(final)
    final.rename(old)
    try:
        temporary.rename(final)
    except OSError:
        old.rename(final)
        raise
    shutil.rmtree(old)


def is_finished(folder: Path) -> bool:
    """Whether all of it is there: it is neither being filled nor being removed."""
    return not (folder / UNFINISHED).exists()


def remove(path: Path) -> None:
    """Remove a link (not what it points to), a file or a folder; of a folder, whoever finds it finds all of it."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    going = beside(path)
    try:
        path.rename(going)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        (path / UNFINISHED).touch()
        going = path
    shutil.rmtree(going)


def link(path: Path, target: str) -> None:
    """Have `path` point to its neighbour `target`: for people and tools, so it may fail."""
    temporary = beside(path)
    try:
        if path.is_dir() and not path.is_symlink():  # a copy that followed the link
            remove(path)
        temporary.symlink_to(target)
        temporary.replace(path)
    except OSError as error:
        go_without(f"{path} could not be made: the newest is {target}", error)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


# --- one process at a time ---


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Keep other processes out of a folder; whether that could be done. Makes the folder.

    Raises InputError if it cannot be written to, or another process is in there.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | _NEW, 0o666)
    except OSError as error:
        raise InputError(f"cannot write to the run directory {folder}: {error.strerror}") from None
    with os.fdopen(descriptor, "r+b") as file:
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
        if done:
            _locked[folder] = _identity(os.fstat(descriptor))
        try:
            yield done
        finally:
            _locked.pop(folder, None)


def check_lock(folder: Path) -> None:
    """Raises OSError if a folder that this process has locked is another one now: moved, removed, or made anew."""
    if (mine := _locked.get(folder)) is None:
        return
    try:
        same = _identity(os.stat(folder / ".lock", follow_symlinks=False)) == mine
    except OSError:
        same = False
    if not same:
        raise OSError(errno.ESTALE, "the run directory was moved, removed or replaced while this process trained in it")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
