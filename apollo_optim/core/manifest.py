"""`manifest.json` of a folder: which files are in it, and what they were when they were written.

    {"format": ..., "version": 3, ..., "files": {"config.json": {"bytes": 12, "crc32": 34}}, "crc32": 56}

`files` are those that are read, no more and no less. The last number is the checksum of all the rest. Checksums find
damage, not deceit: whoever hands a folder on can write a manifest that fits.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apollo_optim.core import disk
from apollo_optim.core.errors import Damaged, InputError
from apollo_optim.core.reading import checksum, is_count, read_json

NAME = "manifest.json"
SELF_CHECKED = 3  # from this version on a manifest has a checksum of its own


@dataclass(frozen=True)
class Format:
    """A kind of folder."""

    name: str
    """As it is written into the manifest."""
    version: int
    """The newest that can be read."""
    what: str
    """In words: "a checkpoint of apollo-optim"."""


def write_manifest(folder: Path, form: Format, **more: Any) -> None:
    """Describe all files that lie in a folder."""
    files = {
        path.name: {"bytes": path.stat().st_size, "crc32": checksum(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != NAME
    }
    content = {"format": form.name, "version": form.version, **more, "files": files}
    disk.write(folder / NAME, json.dumps(content | {"crc32": _own(content)}, indent=1))


def _own(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def read_manifest(folder: Path, form: Format) -> dict[str, Any]:
    """The manifest of a folder, judged by itself alone.

    Raises InputError if there is none or it is another's, Damaged if it is not as it was written.
    """
    path = folder / NAME
    try:
        content: Any = read_json(path)
    except FileNotFoundError:
        raise InputError(f"{folder} is not {form.what}: it has no {NAME}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(content, dict) or content.get("format") != form.name:
        raise InputError(f"{folder} is not {form.what}")
    version = content.get("version")
    if not is_count(version):
        raise Damaged(path, f"version {version!r}")
    if version > form.version:
        raise InputError(
            f"{folder} was written by a newer apollo-optim (format {version}, this one reads {form.version})"
        )
    own = content.pop("crc32", None)
    if version >= SELF_CHECKED and own != _own(content):
        raise Damaged(path, "its own checksum is wrong")
    files = content.get("files")
    if not isinstance(files, dict) or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise Damaged(path, "its list of files")
    return content


def _is_entry(name: str, entry: Any) -> bool:
    plain = name not in ("", ".", "..", NAME) and not set(name) & {"/", "\\", "\0"}
    return plain and isinstance(entry, dict) and is_count(entry.get("bytes")) and is_count(entry.get("crc32"))


def check_files(folder: Path, files: dict[str, Any], *, alone: bool = True) -> None:
    """Compare the files of a folder with its manifest's.

    Args:
        folder: Where they are.
        files: The `files` of its manifest.
        alone: Nothing else may lie there: not a sync tool's second copy of a file, say. Hidden files may.

    Raises InputError naming the file that lacks, was changed, or is not listed.
    """
    for name, written in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != written["bytes"]:
                raise Damaged(path, f"it has {size} bytes instead of {written['bytes']}")
            if checksum(path) != written["crc32"]:
                raise Damaged(path, "its checksum is wrong")
        except FileNotFoundError:
            raise Damaged(folder, f"{name} is missing") from None
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
    for name in sorted(os.listdir(folder)) if alone else ():
        if name not in files and name != NAME and not name.startswith("."):
            raise InputError(
                f"{folder / name} is not listed in {NAME}: no checkpoint of ours has it (a second copy of a sync "
                "tool?); move it away"
            )


def strangers(folder: Path, form: Format) -> list[str]:
    """The entries of a folder that we did not write, or that were changed since; all of it, where it is not ours."""
    names = [name for name in os.listdir(folder) if name != disk.UNFINISHED]
    try:
        files = read_manifest(folder, form)["files"]
    except InputError:
        return names

    def changed(name: str) -> bool:
        try:
            check_files(folder, {name: files[name]}, alone=False)
        except InputError:
            return True
        return False

    return [name for name in names if name != NAME and (name not in files or changed(name))]
