"""A local corpus: a fixed set of documents that is read, hashed and split once and then served from disk.

Opening a corpus reads every document and writes it to one nameless temporary file. What was hashed is therefore
exactly what is trained on, even if the files change during the run; any document is one read away in any order, even a
line of a gzip file; nothing but a few integers a document stays in memory; and nothing is left behind, not even by
kill -9.
"""

import hashlib
import logging
import os
import random
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from apollo_optim.core.errors import InputError
from apollo_optim.core.reading import is_count
from apollo_optim.data.files import AGAIN, local_documents, versions
from apollo_optim.data.readers import Document, Reading

BLOCK = 1 << 22  # characters of text whose rows are shuffled together
CODE = ("python", "packages")
PROGRESS = 10  # seconds after which it is told how much was read

T = TypeVar("T")
log = logging.getLogger(__name__)


class Text(NamedTuple):
    """A document, or a piece of one."""

    text: str
    ends: bool = True
    """The end of its document."""


@dataclass
class Corpus:
    """Documents on disk, in pieces, and which of these belong to which split."""

    file: IO[bytes]
    longest: int | None = None
    """Bytes of a piece, cut at line ends; None: whole documents."""
    documents: int = 0
    validation_documents: int = 0
    ends: bytearray = field(default_factory=bytearray)
    starts: "array[int]" = field(default_factory=lambda: array("Q", [0]))
    train: "array[int]" = field(default_factory=lambda: array("Q"))
    validation: "array[int]" = field(default_factory=lambda: array("Q"))
    skipped: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of text."""
        return self.starts[-1]

    def __getitem__(self, index: int) -> Text:
        start, end = self.starts[index], self.starts[index + 1]
        return Text(os.pread(self.file.fileno(), end - start, start).decode(), bool(self.ends[index]))

    def whole(self, indices: Iterable[int], seed: str) -> Iterator[str]:
        """The documents that these pieces make, in shuffled order, however they are cut."""
        for first in shuffled((i for i in indices if i == 0 or self.ends[i - 1]), seed):
            last = self.ends.index(1, first)
            yield "".join(self[i].text for i in range(first, last + 1))

    def add(self, text: bytes, validation: bool) -> None:
        self.documents += 1
        self.validation_documents += validation
        self.file.write(text)
        for size in pieces(text, self.longest or len(text)):
            (self.validation if validation else self.train).append(len(self.ends))
            self.starts.append(self.starts[-1] + size)
            self.ends.append(0)
        self.ends[-1] = 1

    def divide(self, percent: float) -> bool:
        """Make two documents of the single one that is there, the end for validation. False where it is too short."""
        text = os.pread(self.file.fileno(), self.starts[-1], 0)
        first = next(pieces(text, max(1, int(len(text) * (1 - percent / 100)))))
        if not text[first:].strip():
            return False
        self.documents = self.validation_documents = 0
        self.ends, self.starts, self.train, self.validation = bytearray(), array("Q", [0]), array("Q"), array("Q")
        self.file.seek(0)
        self.add(text[:first], validation=False)
        self.add(text[first:], validation=True)
        self.file.flush()
        return True


def pieces(text: bytes, longest: int) -> Iterator[int]:
    """The sizes of pieces of at most `longest` bytes, cut at line ends where there are any, never in a character."""
    start = 0
    while len(text) - start > longest:
        cut = text.rfind(b"\n", start, start + longest) + 1
        if not cut:
            cut = start + longest
            while cut > start + 1 and text[cut] & 0xC0 == 0x80:
                cut -= 1
        yield cut - start
        start = cut
    yield len(text) - start


def share(key: str) -> float:
    """A number in [0, 100) that depends on the key alone: below validation_percent means validation."""
    return int.from_bytes(hashlib.sha256(_bytes(key)).digest()[:6], "big") / (1 << 48) * 100


def _bytes(key: str) -> bytes:
    return key.encode(errors="surrogateescape")  # a file name need not be UTF-8


def open_corpus(
    sources: list[str],
    reading: Reading,
    validation_percent: float,
    cache_dir: Path,
    longest: int | None = None,
    held: Sequence[str] = (),
) -> Corpus:
    """Read, hash and split the documents of `sources`; `held`: those to evaluate on, if they lie elsewhere."""
    if not 0 < validation_percent < 100:
        raise InputError(f"data.validation_percent is {validation_percent}; it must lie between 0 and 100")
    name = " ".join(sources)
    total = hashlib.sha256()
    lowest, highest = 100.0, 0.0
    said = time.monotonic()
    try:
        corpus = Corpus(tempfile.TemporaryFile(dir=cache_dir, prefix="corpus-"), longest)  # noqa: SIM115 (for the whole run)
        for source, part in [*((source, sources) for source in sources), *((source, held) for source in held)]:
            for key, text in _worth_reading(source, reading, alone=len(part) == 1):
                position = share(key) if not held else 0.0 if part is held else 100.0
                lowest, highest = min(lowest, position), max(highest, position)
                total.update(_bytes(f"{key}\0{len(text)}\0"))
                total.update(text)
                corpus.add(text, validation=position < validation_percent)
                if time.monotonic() - said > PROGRESS:
                    said = time.monotonic()
                    log.info("%s: read %s documents, %.1f GB so far", name, f"{corpus.documents:,}", corpus.size / 1e9)
        corpus.file.flush()
    except OSError as error:  # of writing: what cannot be read has its own message
        raise InputError(f"cannot copy the text to {cache_dir} ({error.strerror}); set data.cache_dir") from error
    if reading.skipped:
        log.warning("%s: skipped %d broken lines, the first: %s", name, reading.skipped, reading.first_skipped)
    if reading.left_out:
        log.warning("%s: left out: %s", name, reading.said())
    if corpus.documents == 1 and not held:
        if reading.records_only:
            raise InputError(f"{name}: one row is too little for training and validation: set data.validation_source")
        if not corpus.divide(validation_percent):
            raise InputError(f"{name}: this document is too short for training and validation text; give more")
    _check_splits(corpus, name, validation_percent, lowest, highest)
    corpus.skipped, corpus.left_out = reading.skipped, reading.left_out
    corpus.identity = {
        "name": name,
        "sha256": total.hexdigest(),
        "bytes": corpus.starts[-1],
        "documents": corpus.documents,
        "validation_documents": corpus.validation_documents,
        "validation_percent": validation_percent,
        "skipped_lines": reading.skipped,
    }
    for source in sources:
        corpus.identity.update(versions(source))
    return corpus


def _check_splits(corpus: Corpus, name: str, validation_percent: float, lowest: float, highest: float) -> None:
    """Refuse an empty one. `lowest`, `highest`: of the shares that decide where a document goes."""
    for part, documents, bound in (
        ("validation", corpus.validation, f"at least {lowest + 0.001:.3f}"),
        ("training", corpus.train, f"at most {highest:.3f}"),
    ):
        if not documents:
            raise InputError(
                f"{name}: the {part} split is empty, with {corpus.documents} documents and {validation_percent:g} % of "
                f"them for validation; set data.validation_percent to {bound}, give more documents, or a file of their "
                "own (data.validation_source)"
            )


def _worth_reading(source: str, reading: Reading, *, alone: bool) -> Iterator[Document]:
    """The documents that are not blank, and of a library each content once; none at all is an error."""
    seen: set[bytes] = set()
    empty, elsewhere = True, reading.left_out.get(AGAIN, 0)
    for document in local_documents(source, reading, alone=alone):
        if not document.text.strip():
            if source not in CODE:  # (what they are of is said in the documentation)
                reading.leave_out("blank documents", document.key)
            continue
        if source in CODE:  # libraries hold copies of the same file; a user's own repetitions are theirs to judge
            digest = hashlib.sha256(document.text).digest()
            if digest in seen:
                continue
            seen.add(digest)
        empty = False
        yield document
    if empty and reading.left_out.get(AGAIN, 0) == elsewhere:  # else all of it is read as part of another source
        first = f"; skipped {reading.skipped} broken lines, the first: {reading.first_skipped}"
        raise InputError(f"{source}: holds no text{first if reading.skipped else ''}")


def whole_number(state: dict[str, Any], key: str) -> int:
    """A count of a saved position. Raises InputError if it is none."""
    value = state.get(key) if isinstance(state, dict) else None
    if not is_count(value):
        raise InputError(f"not a position in a text: its {key} is {value!r}")
    return value


def shuffled(items: Iterable[T], seed: str) -> list[T]:
    """The same order on every machine and Python: `Random.random()` is the one stream that Python promises to keep."""
    number = random.Random(seed)
    return sorted(items, key=lambda _: number.random())


class CorpusDocuments:
    """The pieces of one split in shuffled order, epoch after epoch, with a position that is two integers."""

    def __init__(self, corpus: Corpus, indices: "array[int]", seed: str, epochs: int | None = None) -> None:
        self.corpus, self.indices, self.seed, self.epochs = corpus, indices, seed, epochs
        self.skipped = corpus.skipped
        self.load_state_dict({"epoch": 0, "position": 0})

    def read(self) -> list[Text]:
        """The next pieces, about BLOCK characters of them; none when the last epoch is over."""
        if self.position == len(self.order):
            if self.epochs is not None and self.epoch + 1 >= self.epochs:
                return []
            self.load_state_dict({"epoch": self.epoch + 1, "position": 0})
        texts: list[Text] = []
        size = 0
        while size < BLOCK and self.position < len(self.order):
            texts.append(self.corpus[self.order[self.position]])
            size += len(texts[-1].text)
            self.position += 1
        return texts

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        epoch, position = (whole_number(state, key) for key in ("epoch", "position"))
        self.order = shuffled(self.indices, f"{self.seed}/{epoch}")
        if position > len(self.order):
            raise InputError(f"not a position in this text: its position is {position}, of {len(self.order)} pieces")
        self.epoch, self.position = epoch, position
