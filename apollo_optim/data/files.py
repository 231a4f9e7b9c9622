"""Local text as documents: which files, and what is in them.

Everything yields `Document(key, text)` in a fixed order. The key is the path relative to what was asked for (plus a
line or section number), so that hashes of it do not depend on where the text lies on this machine.
"""

import glob
import gzip
import importlib.metadata
import importlib.util
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from apollo_optim.core.errors import InputError

SECTION = 1 << 16  # bytes; a longer txt or md file becomes several documents of about this size, cut at line ends
CODE_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages", "__pycache__"}
PACKAGES = ("torch", "transformers")


class Document(NamedTuple):
    key: str
    text: bytes  # valid UTF-8, never blank


class BadRecord(Exception):
    """One line or row that holds no usable text; the message says why."""


@dataclass
class Reading:
    """How records are read, and what had to be skipped so far."""

    text_key: str = "text"
    on_bad_line: Literal["skip", "error"] = "skip"
    skipped: int = 0
    first_skipped: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    """Why, and how many files or documents."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few of each."""

    def leave_out(self, why: str, name: str) -> None:
        """Count what is not read, though it lies in a source that was named."""
        self.left_out[why] = self.left_out.get(why, 0) + 1
        if self.left_out[why] <= 3:
            self.examples.setdefault(why, []).append(name)

    def said(self) -> str:
        """What was left out, counted and named, in one line."""
        return "; ".join(
            f"{why}: {count} ({', '.join(self.examples[why])}{', ...' if count > 3 else ''})"
            for why, count in self.left_out.items()
        )

    def bad(self, where: str, why: object) -> None:
        if self.on_bad_line == "error":
            raise InputError(f"{where}: {why}; repair it, or set data.on_bad_line to skip")
        self.skipped += 1
        self.first_skipped = self.first_skipped or f"{where}: {why}"


def missing_key(where: str, key: str, keys: Iterable[str]) -> InputError:
    return InputError(f"{where}: no key {key!r}; the keys are {', '.join(sorted(keys)) or '(none)'}; set data.text_key")


def text_of(record: object, key: str) -> str:
    """The text of one record, or BadRecord."""
    if not isinstance(record, dict):
        raise BadRecord(f"a JSON object is expected, not {type(record).__name__}")
    if key not in record:
        raise BadRecord(f"no key {key!r}")
    text = record[key]
    if not isinstance(text, str):
        raise BadRecord(f"{key!r} is {'null' if text is None else type(text).__name__}, not a string")
    return text


# ---- whole files


def _decodable(path: Path, text: bytes, offset: int = 0) -> bytes:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise InputError(
            f"{path}: byte {at} (0x{text[error.start]:02x}) is not valid UTF-8; convert the file or leave it out"
        ) from error
    return text


def _whole(path: Path, key: str, reading: Reading) -> Iterator[Document]:
    yield Document(key, _decodable(path, path.read_bytes()))


def _sections(path: Path, key: str, reading: Reading) -> Iterator[Document]:
    """A text file as one document, or as sections if it is long: a big file too can be shuffled, split, and held."""
    number, offset, rest = 0, 0, b""
    with path.open("rb") as file:
        while block := file.read(SECTION):
            rest += block
            while len(rest) > SECTION:
                cut = rest.rfind(b"\n", 0, SECTION) + 1 or SECTION
                while cut > 1 and rest[cut] & 0xC0 == 0x80:  # never inside a character
                    cut -= 1
                yield Document(f"{key}#{number}", _decodable(path, rest[:cut], offset))
                number, offset, rest = number + 1, offset + cut, rest[cut:]
    yield Document(f"{key}#{number}" if number else key, _decodable(path, rest, offset))


# ---- records


def _json_lines(file: IO[bytes], path: Path, key: str, reading: Reading) -> Iterator[Document]:
    keys: set[str] = set()
    found = False
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if isinstance(record, dict):
                keys.update(list(record)[:20])
                found = found or reading.text_key in record
            text = text_of(record, reading.text_key).encode()  # a lone surrogate fails here
        except (BadRecord, ValueError, RecursionError) as error:
            if keys and not found and reading.on_bad_line == "error":
                raise missing_key(f"{path}:{number}", reading.text_key, keys) from error
            reading.bad(f"{path}:{number}", error if isinstance(error, BadRecord) else f"not JSON ({error})")
            continue
        yield Document(f"{key}:{number}", text)
    if keys and not found:  # not some bad lines but a wrong key
        raise missing_key(str(path), reading.text_key, keys)


def _jsonl(path: Path, key: str, reading: Reading) -> Iterator[Document]:
    with path.open("rb") as file:
        yield from _json_lines(file, path, key, reading)


def _jsonl_gz(path: Path, key: str, reading: Reading) -> Iterator[Document]:
    try:
        with gzip.open(path, "rb") as file:
            yield from _json_lines(file, path, key, reading)  # type: ignore[arg-type]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: a damaged gzip file ({error}); fetch it again or leave it out") from error


def _parquet(path: Path, key: str, reading: Reading) -> Iterator[Document]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if reading.text_key not in file.schema_arrow.names:
                raise missing_key(str(path), reading.text_key, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[reading.text_key]):
                for record in batch.to_pylist():
                    number += 1
                    try:
                        text = text_of(record, reading.text_key).encode()
                    except BadRecord as error:
                        reading.bad(f"{path}: row {number}", error)
                        continue
                    yield Document(f"{key}:{number}", text)
    except (pyarrow.lib.ArrowException, UnicodeError) as error:
        raise InputError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error


Reader = Callable[[Path, str, Reading], Iterator[Document]]
READERS: dict[str, Reader] = {
    ".txt": _sections,
    ".md": _sections,
    ".py": _whole,
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl_gz,
    ".json.gz": _jsonl_gz,  # C4's shards are json lines under this name
    ".parquet": _parquet,
}


RECORDS = (_jsonl, _jsonl_gz, _parquet)


def reader(path: Path) -> Reader | None:
    name = path.name.lower()
    return next((read for suffix, read in READERS.items() if name.endswith(suffix)), None)


# ---- sources


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
