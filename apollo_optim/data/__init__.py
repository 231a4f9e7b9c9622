"""Text to batches: corpora, files and streams behind one resumable iterator.

>>> data = open_data(DataConfig(source="python", seq_len=256))
>>> batch = data.train.next(16)
>>> rows = data.validation(tokens=100_000)
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from apollo_optim.core.errors import InputError
from apollo_optim.core.reading import read_text
from apollo_optim.data.answers import Answers, check_template, template_of
from apollo_optim.data.batches import Batches, Documents, check_vocabulary
from apollo_optim.data.chat import ChatReading
from apollo_optim.data.config import DataConfig
from apollo_optim.data.corpus import CorpusDocuments, open_corpus
from apollo_optim.data.files import is_local
from apollo_optim.data.layout import IGNORED, Batch, Layout, Pack, Pad
from apollo_optim.data.readers import Reading
from apollo_optim.data.stream import StreamDocuments, open_builder
from apollo_optim.data.tokenizer import fingerprint, load_tokenizer, token_bytes, trained_bpe

__all__ = ["IGNORED", "Batch", "Batches", "Data", "DataConfig", "check_vocabulary", "open_data"]


@dataclass
class Data:
    """An open data source: where batches, evaluation rows and the facts for the log come from."""

    tokenizer: Any
    """A `transformers` tokenizer with an end-of-text token."""
    train: Batches
    """Training batches, and their position."""
    identity: dict[str, Any]
    """What this text is, as plain JSON: name, sha256, bytes, versions, ...; for a stream its split and revision."""
    open_validation: Callable[[], Batches]
    """Opens the evaluation text from its beginning."""
    left_out: dict[str, int] = field(default_factory=dict)
    """What of the source is not trained on: a reason, and how many files or documents. (Broken lines: `skipped`.)"""
    open_epoch: Callable[[], Batches] | None = None
    """Opens the training text from its beginning for one pass; None: a stream."""
    notes: list[str] = field(default_factory=list)
    """What is to be told of it, a line each."""

    def validation(self, tokens: int | None = None) -> list[Batch]:
        """The first rows of the evaluation text, `tokens` positions of them or all: the same ones every time.

        >>> rows = data.validation(10_000)
        >>> input_ids = torch.stack([row.input_ids for row in rows[:8]])
        """
        rows = self.open_validation().rows(tokens)
        if not rows:
            raise InputError(
                f"the validation text of {self.identity['name']} is shorter than one row of {self.train.seq_len} "
                "tokens; lower data.seq_len or give more of it (data.validation_percent)"
            )
        return rows

    def bytes_per_token(self, validation: list[Batch]) -> float:
        """Bytes of text behind each predicted token of these rows: bits per byte = loss / ln 2 / bytes per token.

        Unlike perplexity, bits per byte can be compared between tokenizers. End-of-text tokens hold no text.
        """
        sizes = torch.tensor(token_bytes(self.tokenizer))
        targets = torch.cat([row.labels[1:] for row in validation])
        targets = targets[targets != IGNORED]
        return float(sizes[targets].sum()) / max(1, len(targets))


@dataclass
class _Text:
    """Documents, wherever they come from."""

    identity: dict[str, Any]
    key: dict[str, Any]
    """What decides which documents come: the part of the identity without which a position means nothing."""
    train: Documents
    open_validation: Callable[[], Documents]
    open_epoch: Callable[[], Documents] | None
    sample: Callable[[], Iterable[str]]
    """Training text in a fixed order, for a tokenizer to be trained on."""
    left_out: dict[str, int] = field(default_factory=dict)


def open_data(cfg: DataConfig, tokenizer: Any = None, *, trust_remote_code: bool = False) -> Data:
    """Open the text that `cfg` names, train or load its tokenizer, and stand at the beginning.

    `tokenizer`: the one that `cfg` names, where it is at hand already.
    `trust_remote_code`: a tokenizer by name may run the Python code of its repository.

    >>> data = open_data(DataConfig(source="python"))
    >>> data.train.next(4).input_ids.shape
    torch.Size([4, 256])
    """
    if cfg.seq_len < 2:
        raise InputError(f"data.seq_len is {cfg.seq_len}; a row needs at least 2 tokens")
    cache = _cache_dir(cfg)
    text = _open_text(cfg, cache)
    at_hand = tokenizer is not None
    if tokenizer is None and cfg.tokenizer == "bpe":
        tokenizer = trained_bpe(text.sample, cfg.vocab_size, json.dumps(text.key, sort_keys=True), cache)
    elif tokenizer is None:
        tokenizer = load_tokenizer(os.path.expanduser(cfg.tokenizer), trust_remote_code=trust_remote_code)
    if cfg.chat_template is not None and not at_hand:  # else it has it already
        tokenizer.chat_template = _template(cfg.chat_template)
    sha256 = fingerprint(tokenizer)
    identity = {**text.identity, "tokenizer": {"name": cfg.tokenizer, "entries": len(tokenizer), "sha256": sha256}}
    about = {**text.key, "tokenizer": sha256, "mode": cfg.mode, "seq_len": cfg.seq_len, "seed": cfg.seed}
    if cfg.format != "text":
        about["template"] = hashlib.sha256(template_of(tokenizer).encode()).hexdigest()
        check_template(tokenizer, cfg.chat_template or "the tokenizer's chat template")

    def batches(documents: Documents, seed: str) -> Batches:
        return Batches(documents, _layout(cfg, tokenizer), about, seed)

    open_epoch = text.open_epoch
    return Data(
        tokenizer,
        batches(text.train, str(cfg.seed)),
        identity,
        lambda: batches(text.open_validation(), "validation"),
        text.left_out,
        None if open_epoch is None else lambda: batches(open_epoch(), str(cfg.seed)),
    )


def _layout(cfg: DataConfig, tokenizer: Any) -> Layout:
    if cfg.format == "text":
        return (Pack if cfg.mode == "pack" else Pad)(tokenizer, cfg.seq_len)
    name = cfg.source if isinstance(cfg.source, str) else ", ".join(cfg.source)
    return Answers(tokenizer, cfg.seq_len, cfg.mode == "pack", name)


def _template(path: str) -> str:
    try:
        return read_text(Path(path).expanduser(), 1 << 20)
    except OSError as error:
        raise InputError(f"data.chat_template: cannot read {path}: {error.strerror}") from None


def _open_text(cfg: DataConfig, cache: Path) -> _Text:
    sources = [cfg.source] if isinstance(cfg.source, str) else list(cfg.source)
    if not sources or not all(sources):
        raise InputError("data.source is empty; name a corpus, a file or a dataset")
    streams = [source for source in sources if not is_local(source)]
    if not streams:
        return _open_local(cfg, sources, cache)
    if len(sources) > 1:
        raise InputError(f"data.source lists {streams[0]!r}, which is no file; a dataset can only be used alone")
    return _open_stream(cfg, streams[0].removeprefix("hf:"))


def _open_local(cfg: DataConfig, sources: list[str], cache: Path) -> _Text:
    # Packed text is shuffled in pieces of about four rows; in pad mode a row is a whole document.
    longest = 16 * cfg.seq_len if cfg.mode == "pack" and cfg.format == "text" else None
    held = [cfg.validation_source] if isinstance(cfg.validation_source, str) else cfg.validation_source or []
    corpus = open_corpus(sources, _reading(cfg), cfg.validation_percent, cache, longest, held)
    return _Text(
        corpus.identity,
        {key: corpus.identity[key] for key in ("sha256", "validation_percent")},
        CorpusDocuments(corpus, corpus.train, str(cfg.seed)),
        # One order for every seed, so that all runs are compared on the same rows.
        lambda: CorpusDocuments(corpus, corpus.validation, "validation", epochs=1),
        lambda: CorpusDocuments(corpus, corpus.train, str(cfg.seed), epochs=1),
        lambda: corpus.whole(corpus.train, "tokenizer"),
        corpus.left_out,
    )


def _open_stream(cfg: DataConfig, name: str) -> _Text:
    if cfg.validation_source is not None:
        raise InputError(f"data.validation_source: {name} is a dataset; name its split with data.validation_split")
    builder = open_builder(name, cfg.subset)

    def documents(split: str | None) -> StreamDocuments:
        if split is None:
            raise InputError(
                f"{name}: data.validation_split is null; name the split to evaluate on, or do not evaluate"
            )
        return StreamDocuments(builder, name, split, _reading(cfg))

    def sample() -> Iterator[str]:
        stream = documents(cfg.split)
        while texts := stream.read():
            yield from (text.text for text in texts)

    identity = {
        "name": name,
        "subset": cfg.subset,
        "split": cfg.split,
        **({"text_key": cfg.text_key} if cfg.format == "text" else {"format": cfg.format, "columns": cfg.columns}),
        "revision": builder.hash,
    }
    return _Text(identity, identity, documents(cfg.split), lambda: documents(cfg.validation_split), None, sample)


def _reading(cfg: DataConfig) -> Reading:
    if cfg.format == "text":
        return Reading(cfg.text_key, cfg.on_bad_line)
    return ChatReading(cfg.text_key, cfg.on_bad_line, format=cfg.format, columns=cfg.columns)


def _cache_dir(cfg: DataConfig) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(cfg.cache_dir or Path(base, "apollo-optim")).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the cache directory {path} ({error.strerror}); set data.cache_dir") from error
    return path
