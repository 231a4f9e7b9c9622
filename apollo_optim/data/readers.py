"""What is in a file: its documents, whatever its type, and what had to be left out."""

import codecs
import csv
import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, NamedTuple

from apollo_optim.core.errors import InputError
from apollo_optim.core.reading import opened, read_json

LONGEST = 64 << 20  # bytes of a line, a row or a file that is read in one piece
ARRAY = 1 << 30  # bytes of a JSON array, which is read in one piece
BATCH = 16 << 20  # bytes of a parquet file's column that are in memory at a time, about
SECTION = 1 << 16  # bytes; a longer txt or md file becomes several documents of about this size, cut at line ends


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

    files: dict[tuple[int, int], str] = field(default_factory=dict)
    """Device and inode of what was read, and its key."""

    records_only: ClassVar[bool] = False
    """Are plain texts refused?"""

    def wanted(self, keys: Iterable[str]) -> list[str]:
        """Those of a record's keys, or of a file's columns, that are read; none: it holds nothing to read."""
        return [self.text_key] if self.text_key in keys else []

    def text_of(self, record: object, at: str) -> str:
        """The text of one record; `at`: file and line, the file left out where it is the only one. Raises BadRecord."""
        return text_of(record, self.text_key)

    def missing(self, where: str, keys: Iterable[str]) -> InputError:
        """The complaint about records of which none holds anything to read."""
        return missing_key(where, self.text_key, keys)

    def is_new(self, path: Path, key: str) -> bool:
        """Whether a file is read under this key for the first time, or under none other: its text lies in one split.

        A source that is named twice is read twice: its keys, which decide on the split, are the same.
        """
        status = path.stat()
        return not status.st_ino or self.files.setdefault((status.st_dev, status.st_ino), key) == key

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
    there = ", ".join(sorted(keys)) or "(none)"
    return InputError(
        f"{where}: no key {key!r}; the keys are {there}; set data.text_key (or, for questions and answers, data.format)"
    )


def kind_in_json(value: object) -> str:
    """What a value is, for a message."""
    return "null" if value is None else type(value).__name__


def text_of(record: object, key: str) -> str:
    """The text of one record, or BadRecord."""
    if not isinstance(record, dict):
        raise BadRecord(f"a JSON object is expected, not {kind_in_json(record)}")
    if key not in record:
        raise BadRecord(f"no key {key!r}")
    text = record[key]
    if not isinstance(text, str):
        raise BadRecord(f"{key!r} is {kind_in_json(text)}, not a string")
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
    with opened(path) as file:
        text = file.read(LONGEST + 1)
    if len(text) > LONGEST:
        raise _too_long(str(path), "a file that is read in one piece")
    yield Document(key, _decodable(path, text))


def _too_long(where: str, what: str) -> InputError:
    return InputError(f"{where}: {what} of more than {LONGEST >> 20} MiB; cut it, or leave it out")


def _sections(path: Path, key: str, reading: Reading) -> Iterator[Document]:
    """A text file as one document, or as sections if it is long: a big file too can be shuffled, split, and held."""
    number, offset, rest = 0, 0, b""
    with opened(path) as file:
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


Record = tuple[int, str, Callable[[], object]]
"""Of a line or row: its number, where it is, and what reads it."""


def _documents(records: Iterable[Record], path: Path, key: str, reading: Reading) -> Iterator[Document]:
    keys: set[str] = set()
    found = False
    for number, where, read in records:
        try:
            record = read()
            if isinstance(record, dict):
                keys.update(list(record)[:20])
                found = found or bool(reading.wanted(record))
            text = reading.text_of(record, f"{key}:{number}").encode()  # a lone surrogate fails here
        except (BadRecord, ValueError, RecursionError) as error:
            if keys and not found and reading.on_bad_line == "error":
                raise reading.missing(where, keys) from error
            reading.bad(where, error if isinstance(error, BadRecord) else f"not JSON ({error})")
            continue
        yield Document(f"{key}:{number}", text)
    if keys and not found:  # not some bad lines but a wrong key
        raise reading.missing(str(path), keys)


def _json_lines(file: IO[bytes], path: Path, key: str, reading: Reading) -> Iterator[Document]:
    def lines() -> Iterator[Record]:
        number = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST:
                raise _too_long(f"{path}:{number}", "a line")
            if line.strip():
                yield number, f"{path}:{number}", partial(json.loads, line)

    return _documents(lines(), path, key, reading)


def _jsonl(path: Path, key: str, reading: Reading) -> Iterator[Document]:
    with opened(path) as file:
        yield from _json_lines(file, path, key, reading)


def _jsonl_gz(path: Path, key: str, reading: Reading) -> Iterator[Document]:
    try:
        with opened(path) as packed, gzip.GzipFile(fileobj=packed) as file:
            yield from _json_lines(file, path, key, reading)  # type: ignore[arg-type]
    except (EOFError, zlib.error, gzip.BadGzipFile, struct.error) as error:
        raise InputError(f"{path}: a damaged gzip file ({error}); fetch it again or leave it out") from error


def _parquet(path: Path, key: str, reading: Reading) -> Iterator[Document]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        # Regular files only; and read as it is needed, not all columns of a row group ahead.
        with opened(path) as raw, pyarrow.parquet.ParquetFile(raw, pre_buffer=False) as file:
            columns = reading.wanted(file.schema_arrow.names)
            if not columns:
                raise reading.missing(str(path), file.schema_arrow.names)
            number, bytes_ = 0, sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
            rows = max(1, min(256, BATCH * file.metadata.num_rows // max(1, bytes_)))
            for batch in file.iter_batches(batch_size=rows, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    try:
                        text = reading.text_of(record, f"{key}:{number}").encode()
                    except BadRecord as error:
                        reading.bad(f"{path}: row {number}", error)
                        continue
                    if len(text) > LONGEST:
                        raise _too_long(f"{path}: row {number}", "a text")
                    yield Document(f"{key}:{number}", text)
    except (pyarrow.lib.ArrowException, UnicodeError, OSError, OverflowError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a readable parquet file ({why})") from error


def _json(path: Path, key: str, reading: Reading) -> Iterator[Document]:
    """An array of objects; or, as many call it, a file of json lines."""
    with opened(path) as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if start[:1] != b"[":
        return _jsonl(path, key, reading)
    rows = enumerate(read_json(path, ARRAY), 1)
    records = ((number, f"{path}: row {number}", partial(_as_it_is, row)) for number, row in rows)
    return _documents(records, path, key, reading)


def _csv(path: Path, key: str, reading: Reading) -> Iterator[Document]:
    """Rows under a line of names, quoted where they hold commas, quotes or line ends; UTF-8."""
    with opened(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as file:
        csv.field_size_limit(LONGEST)
        rows = enumerate(csv.DictReader(file, strict=True), 1)
        records = ((number, f"{path}: row {number}", partial(_named, row)) for number, row in rows)
        try:
            yield from _documents(records, path, key, reading)
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not a readable csv file ({error}); it has to be UTF-8, with commas") from error


def _as_it_is(row: object) -> object:
    return row


def _named(row: dict[Any, Any]) -> object:
    """A row of a csv file. Raises BadRecord for fields beyond the last name."""
    if None in row:
        raise BadRecord(f"{len(row[None])} fields more than there are names")
    return row


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


RECORDS = (_jsonl, _jsonl_gz, _parquet, _json, _csv)
ROWS: dict[str, Reader] = {
    ".json": _json,
    ".csv": _csv,
}  # of questions and answers: among texts they are something else


def reader(path: Path, *, rows: bool = False) -> Reader | None:
    """What reads a file of this name. `rows`: of questions and answers."""
    name = path.name.lower()
    known = READERS | ROWS if rows else READERS
    return next((read for suffix, read in known.items() if name.endswith(suffix)), None)
