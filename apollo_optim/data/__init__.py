"""Text to batches: corpora, files and streams behind one resumable iterator.

>>> data = open_data(DataConfig(source="python", seq_len=256))
>>> batch = data.train.next(16)
>>> rows = data.validation(tokens=100_000)
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apollo_optim.core.errors import InputError
from apollo_optim.data.batches import IGNORED, Batch, Batches, check_vocabulary
from apollo_optim.data.config import DataConfig
from apollo_optim.data.corpus import CorpusDocuments, open_corpus, shuffled
from apollo_optim.data.files import Reading, is_local
from apollo_optim.data.tokenizer import fingerprint, load_tokenizer, token_bytes, trained_bpe

__all__ = ["IGNORED", "Batch", "Batches", "Data", "DataConfig", "check_vocabulary", "open_data"]


@dataclass
class Data:
    """An open data source: where batches, evaluation rows and the facts for the log come from."""

    tokenizer: Any
    """A `transformers` tokenizer with an end-of-text token."""
    train: Batches
    """Training batches without end, and their position."""
    identity: dict[str, Any]
    """What this text is, as plain JSON: name, SHA-256, bytes, documents, versions, tokenizer."""
    open_validation: Callable[[], Batches]
    """Opens the evaluation text from its beginning."""

    def validation(self, tokens: int | None = None) -> list[Batch]:
        """The first rows of the evaluation text, `tokens` positions of them or all: the same ones every time.

        >>> rows = data.validation(10_000)
        >>> input_ids = torch.stack([row.input_ids for row in rows[:8]])
        """
        rows = self.open_validation().rows(tokens)
        if not rows:
            raise InputError(
                f"the validation text of {self.identity['name']} is shorter than one row of {self.train.seq_len} tokens; "
                "lower data.seq_len or raise data.validation_percent"
            )
        return rows

    def bytes_per_token(self, validation: list[Batch]) -> float:
        """Bytes of text behind each predicted token of these rows: bits per byte = loss / ln 2 / bytes per token.

        Unlike perplexity, bits per byte can be compared between tokenizers. End-of-text tokens are predicted but hold no text.
        """
        sizes = torch.tensor(token_bytes(self.tokenizer))
        targets = torch.cat([row.labels[1:] for row in validation])
        targets = targets[targets != IGNORED]
        return float(sizes[targets].sum()) / max(1, len(targets))


def cache_dir(cfg: DataConfig) -> Path:
    """Where trained tokenizers are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(cfg.cache_dir or Path(base, "apollo-optim")).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the cache directory {path} ({error.strerror}); set data.cache_dir") from error
    return path


def open_data(cfg: DataConfig) -> Data:
    """Open the text that `cfg` names, train or load its tokenizer, and stand at the beginning.

    >>> data = open_data(DataConfig(source="python"))
    >>> data.train.next(4).input_ids.shape
    torch.Size([4, 256])
    """
    if cfg.seq_len < 2:
        raise InputError(f"data.seq_len is {cfg.seq_len}; a row needs at least 2 tokens")
    sources = [cfg.source] if isinstance(cfg.source, str) else list(cfg.source)
    if not sources or not all(sources):
        raise InputError("data.source is empty; name a corpus, a file or a dataset")
    if not all(map(is_local, sources)):
        raise InputError("streams: to come")
    cache = cache_dir(cfg)
    corpus = open_corpus(sources, Reading(cfg.text_key, cfg.on_bad_line), cfg.validation_percent, cache)
    identity = corpus.identity
    if cfg.tokenizer == "bpe":
        key = f"{identity['sha256']}/{cfg.validation_percent}"
        tokenizer = trained_bpe(lambda: map(corpus.text, shuffled(corpus.train, "tokenizer")), cfg.vocab_size, key, cache)
    else:
        tokenizer = load_tokenizer(cfg.tokenizer, cfg.trust_remote_code)
    identity["tokenizer"] = {"name": cfg.tokenizer, "entries": len(tokenizer), "sha256": fingerprint(tokenizer)}
    about = {
        "name": identity["name"],
        "sha256": identity["sha256"],
        "tokenizer": identity["tokenizer"]["sha256"],
        "validation_percent": cfg.validation_percent,
        "seed": cfg.seed,
        "mode": cfg.mode,
        "seq_len": cfg.seq_len,
    }

    def batches(documents: CorpusDocuments) -> Batches:
        return Batches(documents, tokenizer, cfg.seq_len, cfg.mode, about)

    # The evaluation order is the same for every seed, so that runs are compared on the same rows.
    return Data(
        tokenizer,
        batches(CorpusDocuments(corpus, corpus.train, str(cfg.seed))),
        identity,
        lambda: batches(CorpusDocuments(corpus, corpus.validation, "validation", epochs=1)),
    )
