"""Documents to rows of tokens, with a position that is exact to the token.

documents -> (a block of texts) -> tokenised together -> rows. The position is where the current block began in the
documents, the document within the block, and the tokens of it that are used up. Coming back means reading that block
again, so no tokens are stored, and any source of documents with a position of its own will do: a shuffled corpus and a
stream look the same here.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch

from apollo_optim.core.errors import InputError
from apollo_optim.data.tokenizer import encode

IGNORED = -100  # a label that counts for nothing


class Documents(Protocol):
    """A source of documents with a position."""

    @property
    def skipped(self) -> int:
        """Broken lines, and rows without text, left out so far."""

    def read(self) -> list[str]:
        """The next few documents; none at the end."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Batch(NamedTuple):
    """Rows of tokens; a single row is a Batch of 1-D tensors. The model shifts by itself; -100 labels are padding."""

    input_ids: torch.Tensor
    labels: torch.Tensor


class EndOfText(Exception):
    """The documents are used up."""


class Batches:
    """Batches of rows without end, resumable at any row.

    >>> batch = data.train.next(8)           # batch.input_ids, batch.labels: [8, seq_len]
    >>> state = data.train.state_dict()      # small, and plain JSON
    >>> data.train.load_state_dict(state)    # the next batch follows exactly
    """

    def __init__(
        self, documents: Documents, tokenizer: Any, seq_len: int, mode: Literal["pack", "pad"], about: dict[str, Any]
    ) -> None:
        self.documents, self.tokenizer, self.seq_len, self.mode = documents, tokenizer, seq_len, mode
        self.about = about  # what a position depends on: it means nothing on another corpus or with another tokenizer
        self.tokens = 0  # handed out so far, padding not counted
        self._began = documents.state_dict()
        self._block: list[list[int]] = []
        self._document = self._offset = 0
        self._saved = self._position()

    @property
    def skipped(self) -> int:
        """Broken lines and rows without text that were left out so far."""
        return self.documents.skipped

    def next(self, count: int) -> Batch:
        """The next `count` rows."""
        try:
            rows = [self._row() for _ in range(count)]
        except EndOfText:
            raise InputError(
                f"the text ended after {self.tokens} tokens; train for fewer steps or give more text"
            ) from None
        self._saved = self._position()  # only here: an interrupt in the middle of a batch loses nothing
        return _batch(rows, self.seq_len)

    def rows(self, tokens: int | None) -> list[Batch]:
        """The rows up to `tokens` positions, or to the end of the documents; at least one."""
        return list(self._rows(None if tokens is None else max(1, tokens // self.seq_len)))

    def _rows(self, count: int | None) -> Iterator[Batch]:
        while count is None or count > 0:
            try:
                batch = _batch([self._row()], self.seq_len)
            except EndOfText:
                return
            yield Batch(batch.input_ids[0], batch.labels[0])
            count = None if count is None else count - 1

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch, as plain JSON."""
        return self._saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; one that belongs to other text, another tokenizer or other rows is refused."""
        about = state.get("about")
        if about != self.about:
            was = about if isinstance(about, dict) else {}
            other = [f"{key} was {was.get(key)}, is {now}" for key, now in self.about.items() if was.get(key) != now]
            raise InputError(f"this position was saved on other data: {'; '.join(other) or 'not a position at all'}")
        self._began = state["documents"]
        self.documents.load_state_dict(self._began)
        self.tokens = state["tokens"]
        self._block, self._document, self._offset = [], 0, 0
        if state["document"] or state["offset"]:
            self._read()
            self._document, self._offset = state["document"], state["offset"]
        self._saved = state

    def _position(self) -> dict[str, Any]:
        return {
            "about": self.about,
            "documents": self._began,
            "document": self._document,
            "offset": self._offset,
            "tokens": self.tokens,
        }

    def _read(self) -> None:
        self._began = self.documents.state_dict()
        texts = self.documents.read()
        if not texts:
            raise EndOfText
        self._block, self._document, self._offset = encode(self.tokenizer, texts), 0, 0
        for ids in self._block:
            ids.append(self.tokenizer.eos_token_id)

    def _current(self) -> list[int]:
        """The document at the position, its end-of-text token included."""
        if self._document == len(self._block):
            self._read()
        return self._block[self._document]

    def _row(self) -> list[int]:
        if self.mode == "pad":
            ids = self._current()
            self._document += 1
            # The papers' tokenizer ends a document that it cuts with the end-of-text token too.
            row = ids if len(ids) <= self.seq_len else [*ids[: self.seq_len - 1], ids[-1]]
        else:
            row = []
            while len(row) < self.seq_len:
                ids = self._current()
                piece = ids[self._offset : self._offset + self.seq_len - len(row)]
                row += piece
                self._offset += len(piece)
                if self._offset == len(ids):
                    self._document, self._offset = self._document + 1, 0
        self.tokens += len(row)
        return row


def _batch(rows: list[list[int]], seq_len: int) -> Batch:
    """Padding repeats the end-of-text token; being behind everything, it is seen by no position that counts."""
    input_ids = torch.tensor([row + [row[-1]] * (seq_len - len(row)) for row in rows])
    labels = torch.tensor([row + [IGNORED] * (seq_len - len(row)) for row in rows])
    return Batch(input_ids, labels)


def check_vocabulary(batch: Batch, vocab_size: int, tokenizer: Any = None) -> None:
    """Refuse a token id that occurs and that the model has no embedding for.

    A tokenizer may be larger than the model as long as the surplus never occurs: T5's has 32,100 entries for the
    papers' models of 32,000, and the last 100 are sentinels.
    """
    largest = int(batch.input_ids.max())
    if largest >= vocab_size:
        word = f" ({tokenizer.convert_ids_to_tokens(largest)!r})" if tokenizer is not None else ""
        raise InputError(
            f"token {largest}{word} occurs in the text but the model's vocabulary has {vocab_size} entries; "
            f"use the model's own tokenizer, or a model with a vocabulary of at least {largest + 1}"
        )
