"""Local text as documents: which files, and what is in them.

Everything yields `Document(key, text)` in a fixed order. The key is the path relative to what was asked for (plus a
line or section number), so that hashes of it do not depend on where the text lies on this machine.
"""

import fnmatch
import glob
import importlib.metadata
import importlib.util
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from apollo_optim.core.errors import InputError
from apollo_optim.core.reading import kind_of, opened
from apollo_optim.data.readers import READERS, RECORDS, ROWS, Document, Reading, reader

CODE_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages", "__pycache__"}
PACKAGES = ("torch", "transformers")
HIDDEN, LINKED = "hidden files and caches", "linked folders, which are not followed"
IRREGULAR, AGAIN = "not regular files", "other names of a file that is read already"


def is_local(source: str) -> bool:
    """Whether a source means files: it exists, is a glob, or looks like a path."""
    if source.startswith("hf:"):
        return False
    return (
        source in ("python", "packages")
        or glob.has_magic(source)
        or os.path.exists(os.path.expanduser(source))
        or source.startswith(("/", "./", "../", "~"))
        or source.count("/") > 1
        or reader(Path(source), rows=True) is not None
    )


def local_documents(source: str, reading: Reading, *, alone: bool = False) -> Iterator[Document]:
    """The documents of one local source: `python`, `packages`, a file, a directory or a glob.

    `alone`: there is no other source, so that the name of a single file tells nothing apart: it may be another one.
    """
    if reading.records_only and source in ("python", "packages"):
        raise InputError(
            f"data.source={source}: that is text, and questions and answers are asked for (data.format): name a jsonl "
            "or parquet file"
        )
    try:
        if source == "python":
            yield from _code(Path(sysconfig.get_path("stdlib")), "", reading)
        elif source == "packages":
            for name in PACKAGES:
                yield from _code(_package(name), name + "/", reading)
        else:
            yield from _files(source, reading, alone)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or source}: {error.strerror or error}") from error


def versions(source: str) -> dict[str, str]:
    """The versions that a built-in corpus depends on; local builds (`+cpu`) hold the same Python source."""
    if source == "python":
        return {"python": sysconfig.get_config_var("py_version")}
    if source == "packages":
        return {name: importlib.metadata.version(name).split("+")[0] for name in PACKAGES}
    return {}


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the corpus `packages` is the source of {' and '.join(PACKAGES)}; {name} is not installed")
    return Path(spec.submodule_search_locations[0])


def _walk(root: Path, skip: Callable[[str], bool]) -> list[Path]:
    found = []
    for directory, folders, names in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if not skip(name)]
        found += [Path(directory, name) for name in names]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _text_files(root: Path, reading: Reading) -> list[Path]:
    """The files of a directory that can be read; what else lies there is counted and named."""
    found = []
    for directory, folders, names in os.walk(root, onerror=_raise):
        inner = set(folders)
        folders[:] = [name for name in folders if not _hidden(name)]
        for name in sorted([*inner, *names]):
            path = Path(directory, name)
            if _hidden(name):
                why = HIDDEN
            elif name in inner and path.is_symlink():
                why = LINKED
            elif name in inner:
                continue
            elif not reader(path, rows=reading.records_only):
                why = f"other types than {_types(reading)}"
            elif path.exists() and not path.is_file():  # a link to nothing is an error when it is read
                why = IRREGULAR
            else:
                found.append(path)
                continue
            reading.leave_out(why, path.relative_to(root).as_posix())
    records = any(reader(path, rows=reading.records_only) in RECORDS for path in found)
    kept = []
    for path in sorted(found, key=lambda path: path.relative_to(root).as_posix()):
        if records and path.name.lower() == "readme.md":  # a data set's card is about it, not of it
            reading.leave_out("data cards", path.relative_to(root).as_posix())
        else:
            kept.append(path)
    return kept


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _raise(error: OSError) -> None:
    raise error


def _code(root: Path, prefix: str, reading: Reading) -> Iterator[Document]:
    """The Python files of a library, without its tests and tables. Each content once is up to the corpus."""
    for path in _walk(root, CODE_SKIPPED.__contains__):
        key = prefix + path.relative_to(root).as_posix()
        # torch/version.py names the build, not the release: without it the corpus is equal wherever the pin is
        if path.suffix == ".py" and key != "torch/version.py":
            with opened(path) as file:
                text = file.read()
            try:
                text.decode()
            except UnicodeDecodeError as error:
                reading.bad(str(path), error)
                continue
            yield Document(key, text)


def _files(source: str, reading: Reading, alone: bool) -> Iterator[Document]:
    root, nameless = Path(source).expanduser(), False
    if glob.has_magic(source) and not root.exists():
        found = _globbed(root, reading)
        if not found:
            raise InputError(f"{source}: no file matches")
        root = Path(os.path.commonpath([path.parent for path in found]))
    elif root.is_dir():
        found = _text_files(root, reading)
        if not found:
            raise InputError(f"{source}: no text in this directory; files of type {_types(reading)} are read")
    elif root.is_file():
        found, root, nameless = [root], root.parent, alone
    elif root.exists():
        raise InputError(f"{source}: {kind_of(root)}, not a regular file")
    else:
        raise InputError(f"{source}: no such file or directory (a Hugging Face dataset is written hf:NAME)")
    readers = {path: reader(path, rows=reading.records_only) for path in found}
    unknown = [path for path in found if not readers[path]]
    if unknown:
        raise InputError(f"{unknown[0]}: unknown file type; {_types(reading)} are read")
    if reading.records_only and (texts := [path for path in found if readers[path] not in RECORDS]):
        raise InputError(f"{texts[0]}: a text, and questions and answers are read from {_types(reading)} (data.format)")
    for path in found:
        read: Any = readers[path]
        key = "" if nameless else path.relative_to(root).as_posix()
        if reading.is_new(path, key):
            yield from read(path, key, reading)
        else:
            reading.leave_out(AGAIN, str(path))


def _globbed(pattern: Path, reading: Reading) -> list[Path]:
    """The files that a glob matches, in order. Linked folders are not followed: one to a folder above has no end."""
    start = next(number for number, part in enumerate(pattern.parts) if glob.has_magic(part))
    base = Path(*pattern.parts[:start])  # links up to here were asked for by name
    found = []
    for path in sorted(set(_below(base, pattern.parts[start:], reading))) if base.is_dir() else ():
        if path.is_file():
            found.append(path)
        elif not (path.is_dir() and "**" in pattern.parts):  # which matches folders on its way to the files in them
            reading.leave_out(IRREGULAR, str(path))
    return found


def _below(folder: Path, parts: Sequence[str], reading: Reading) -> Iterator[Path]:
    part, rest = parts[0], parts[1:]
    everywhere = part == "**"
    if everywhere:
        rest = rest[next((i for i, other in enumerate(rest) if other != "**"), len(rest)) :] or ("*",)
        yield from _below(folder, rest, reading)
    elif not glob.has_magic(part):
        path = folder / part
        if not rest and os.path.lexists(path):
            yield path
        elif rest and path.is_dir() and not _is_link(path, reading):
            yield from _below(path, rest, reading)
        return
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name.startswith(".") and not part.startswith("."):
            continue
        if everywhere:
            if path.is_dir() and not _is_link(path, reading):
                yield from _below(path, parts, reading)
        elif fnmatch.fnmatchcase(name, part):
            if not rest:
                yield path
            elif path.is_dir() and not _is_link(path, reading):
                yield from _below(path, rest, reading)


def _is_link(path: Path, reading: Reading) -> bool:
    if path.is_symlink():
        reading.leave_out(LINKED, str(path))
        return True
    return False


def _types(reading: Reading) -> str:
    known = READERS | ROWS if reading.records_only else READERS
    return ", ".join(s[1:] for s, read in known.items() if read in RECORDS or not reading.records_only)
