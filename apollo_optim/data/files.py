"""Local text as documents: which files, and what is in them.

Everything yields `Document(key, text)` in a fixed order. The key is the path relative to what was asked for (plus a
line or section number), so that hashes of it do not depend on where the text lies on this machine.
"""

import glob
import importlib.metadata
import importlib.util
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from apollo_optim.core.errors import InputError
from apollo_optim.data.readers import READERS, RECORDS, Document, Reading, reader

CODE_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages", "__pycache__"}
PACKAGES = ("torch", "transformers")


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
        or reader(Path(source)) is not None
    )


def local_documents(source: str, reading: Reading, *, alone: bool = False) -> Iterator[Document]:
    """The documents of one local source: `python`, `packages`, a file, a directory or a glob.

    `alone`: there is no other source, so that the name of a single file tells nothing apart: it may be another one.
    """
    try:
        if source == "python":
            yield from _code(Path(sysconfig.get_path("stdlib")), "", reading)
        elif source == "packages":
            for name in PACKAGES:
                yield from _code(_package(name), name + "/", reading)
        else:
            yield from _files(source, reading, alone)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or source}: {error.strerror}") from error


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
                why = "hidden files and caches"
            elif name in inner and path.is_symlink():
                why = "linked folders, which are not followed"
            elif name in inner:
                continue
            elif not reader(path):
                why = f"other types than {_types()}"
            elif path.exists() and not path.is_file():  # a link to nothing is an error when it is read
                why = "not regular files"
            else:
                found.append(path)
                continue
            reading.leave_out(why, path.relative_to(root).as_posix())
    records = any(reader(path) in RECORDS for path in found)
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
            text = path.read_bytes()
            try:
                text.decode()
            except UnicodeDecodeError as error:
                reading.bad(str(path), error)
                continue
            yield Document(key, text)


def _files(source: str, reading: Reading, alone: bool) -> Iterator[Document]:
    root, nameless = Path(source).expanduser(), False
    if glob.has_magic(source) and not root.exists():
        matches = sorted(map(Path, glob.glob(str(root), recursive=True)))
        found = [path for path in matches if path.is_file()]
        for path in matches:
            # Of `**`, which matches folders on its way to the files in them, they are no surprise.
            if not path.is_file() and "**" not in source:
                reading.leave_out("not regular files", str(path))
        if not found:
            raise InputError(f"{source}: no file matches")
        root = Path(os.path.commonpath([path.parent for path in found]))
    elif root.is_dir():
        found = _text_files(root, reading)
        if not found:
            raise InputError(f"{source}: no text in this directory; files of type {_types()} are read")
    elif root.is_file():
        found, root, nameless = [root], root.parent, alone
    elif root.exists():
        raise InputError(f"{source}: not a regular file")
    else:
        raise InputError(f"{source}: no such file or directory (a Hugging Face dataset is written hf:NAME)")
    unknown = [path for path in found if not reader(path)]
    if unknown:
        raise InputError(f"{unknown[0]}: unknown file type; {_types()} are read")
    for path in found:
        read: Any = reader(path)
        key = "" if nameless else path.relative_to(root).as_posix()
        yield from read(path, key, reading)


def _types() -> str:
    return ", ".join(suffix[1:] for suffix in READERS)
