"""Documents to rows of tokens, with a position that is exact to the row.

documents -> (a block of texts) -> tokenised -> rows -> the rows of the block in shuffled order. Without that last step
a long document would fill many batches in a row: a 300 KB file is twenty steps of 4,096 tokens, on which a model
trains itself away from everything else. For the same reason a local corpus hands out pieces of some rows each, not
whole documents, so that a block comes from everywhere.

The position is where the current block began in the documents, and the rows of it that are used up. Coming back means
reading that block again, so no tokens are stored, and any source of documents with a position of its own will do: a
shuffled corpus and a stream look the same here.

To make a block takes as long as many steps, so a run has the next one made in a thread (`Batches.ahead`). What a
position says belongs to the block that rows are taken from, never to the one that is being made.
"""

import contextlib
from collections.abc import Iterator, Sized
from typing import Any, NamedTuple, Protocol

from apollo_optim.core.errors import InputError
from apollo_optim.data.ahead import Ahead
from apollo_optim.data.corpus import Text, shuffled, whole_number
from apollo_optim.data.layout import Batch, Layout


class Documents(Protocol):
    """A source of documents with a position."""

    @property
    def skipped(self) -> int:
        """Broken lines, and rows without text, left out so far."""

    def read(self) -> list[Text]:
        """The next few documents, or pieces of documents; none at the end."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Block(NamedTuple):
    """What is read, tokenised and shuffled in one go."""

    began: dict[str, Any]
    """Where it begins in the documents."""
    number: int
    """Blocks up to this one."""
    rows: list[Sized]
    skipped: int
    """Broken lines and rows without text up to its end."""


class EndOfText(Exception):
    """The documents are used up."""


class TextEnded(InputError):
    """There is no batch left to train on."""


class Batches:
    """Batches of rows without end, resumable at any row.

    >>> batch = data.train.next(8)           # batch.input_ids, batch.labels: [8, seq_len]
    >>> state = data.train.state_dict()      # small, and plain JSON
    >>> data.train.load_state_dict(state)    # the next batch follows exactly
    """

    def __init__(
        self,
        documents: Documents,
        layout: Layout,
        about: dict[str, Any],
        seed: str = "",
    ) -> None:
        self.documents, self.layout = documents, layout
        self.seed = seed  # of the order of rows within a block
        self.about = about  # what a position depends on: it means nothing on another corpus or with another tokenizer
        self.tokens = 0  # handed out so far, padding not counted
        self._go_to(documents.state_dict(), 0)
        self._saved = self._position()

    def _go_to(self, began: dict[str, Any], number: int) -> None:
        self._block, self._used = Block(began, number, [], self.documents.skipped), 0
        self._ahead: Ahead[Block] | None = None
        self._wanted = 0  # rows that are going to be asked for, as far as a thread is to make them

    @contextlib.contextmanager
    def ahead(self, rows: int) -> Iterator[None]:
        """While the next `rows` rows are asked for: make the next block in a thread, unless this one suffices.

        The batches are the same bit-for-bit. What goes wrong in the thread is raised by the `next` that needs the
        block. The thread is over when this is left; `state_dict` says the position of the last batch all along.
        """
        self._wanted = rows
        self._look_ahead()
        try:
            yield
        finally:
            self._wanted = 0
            if self._ahead is not None:
                self._ahead.join()  # what came of it stays: the documents are beyond it

    @property
    def skipped(self) -> int:
        """Broken lines and rows without text that were left out so far."""
        return self._block.skipped

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""
        return self.layout.seq_len

    def next(self, count: int) -> Batch:
        """The next `count` rows."""
        try:
            rows = [self._row() for _ in range(count)]
        except EndOfText:
            raise TextEnded(
                f"the text ended after {self.tokens} tokens; train for fewer steps or give more text"
            ) from None
        self._saved = self._position()  # only here: an interrupt in the middle of a batch loses nothing
        return self.layout.batch(rows)

    def rows(self, tokens: int | None) -> list[Batch]:
        """The rows up to `tokens` positions, or to the end of the documents; at least one."""
        return list(self._rows(None if tokens is None else max(1, tokens // self.seq_len)))

    def blocks(self) -> Iterator[list[Any]]:
        """From here to the end of the documents: the rows of every block that makes any, as the layout made them."""
        while True:
            try:
                self._read()
            except EndOfText:
                return
            yield list(self._block.rows)

    def _rows(self, count: int | None) -> Iterator[Batch]:
        while count is None or count > 0:
            try:
                batch = self.layout.batch([self._row()])
            except EndOfText:
                return
            yield batch.row(0)
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
        if self._ahead is not None:
            self._ahead.join()  # it reads the same documents
        block, row, tokens = (whole_number(state, key) for key in ("block", "row", "tokens"))
        if row and not block:
            raise InputError(f"not a position in a text: row {row} of no block")
        self.documents.load_state_dict(state["documents"])
        self.tokens = tokens
        # Before the block that it stands in, of which then as much is used up.
        self._go_to(state["documents"], block - bool(row))
        if row:
            self._read()
            if row > len(self._block.rows):
                raise InputError(f"not a position in this text: its row is {row}, of {len(self._block.rows)}")
            self._used = row
        self._saved = state

    def _position(self) -> dict[str, Any]:
        return {
            "about": self.about,
            "documents": self._block.began,
            "block": self._block.number,
            "row": self._used,
            "tokens": self.tokens,
        }

    def _read(self) -> None:
        """Go to the next block."""
        block = self._make(self._block.number) if self._ahead is None else self._ahead.get()
        self._block, self._used, self._ahead = block, 0, None
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Have the next block made, if it is going to be needed."""
        left = len(self._block.rows) - self._used
        if self._ahead is None and left and self._wanted > left:
            number = self._block.number
            self._ahead = Ahead(lambda: self._make(number))

    def _make(self, number: int) -> Block:
        """The block after number `number` that makes a row: at the end of an epoch there may be too little for one."""
        for _ in range(2):
            began = self.documents.state_dict()
            texts = self.documents.read()
            if not texts:
                raise EndOfText
            number += 1
            rows = shuffled(self.layout.rows(texts), f"{self.seed}/{number}")
            if rows:
                return Block(began, number, rows, self.documents.skipped)
        raise InputError(f"the text is too short to fill one row of {self.seq_len} tokens; lower data.seq_len")

    def _row(self) -> Sized:
        if self._used == len(self._block.rows):
            self._read()
        row = self._block.rows[self._used]
        self._used += 1
        self._wanted -= 1
        self.tokens += len(row)
        return row


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
