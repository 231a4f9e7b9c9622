"""How texts become rows, and rows a batch: one file of a layout each, and `Batches` knows none of them.

`Pack` and `Pad` are for plain text; `answers.Answers` lays out questions and answers.
"""

from array import array
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from apollo_optim.data.corpus import Text
from apollo_optim.data.tokenizer import encode

IGNORED = -100  # a label that counts for nothing


class Batch(NamedTuple):
    """Rows of tokens, each tensor [rows, seq_len]; a single row is one of 1-D tensors. The model shifts by itself."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    """-100: not learnt, as padding and questions are."""
    position_ids: torch.Tensor | None = None
    """Beginning at 0 with every text of a row, where texts of a row must not see each other; None: they may."""

    def pinned(self) -> "Batch":
        """The same in page-locked memory, from which `non_blocking` copies do not block. Needs a GPU."""
        return self.map(torch.Tensor.pin_memory)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The same with every tensor changed."""
        positions = None if self.position_ids is None else change(self.position_ids)
        return Batch(change(self.input_ids), change(self.labels), positions)

    @classmethod
    def stacked(cls, rows: "Sequence[Batch]") -> "Batch":
        """A batch of single rows of one layout."""
        positions = [row.position_ids for row in rows if row.position_ids is not None]
        ids, labels = torch.stack([row.input_ids for row in rows]), torch.stack([row.labels for row in rows])
        return cls(ids, labels, torch.stack(positions) if positions else None)

    def part(self, start: int, end: int) -> "Batch":
        """Some of its rows."""
        return self.map(lambda tensor: tensor[start:end])

    def row(self, number: int) -> "Batch":
        """One of its rows."""
        return self.map(lambda tensor: tensor[number])


class Layout(Protocol):
    """Texts to rows to batches. The length of a row is its number of tokens, padding not counted."""

    seq_len: int

    def rows(self, texts: list[Text]) -> Sequence[Sized]:
        """The rows of a block of texts; too little text makes none."""

    def batch(self, rows: Sequence[Any]) -> Batch:
        """Some of these rows as tensors."""


@dataclass
class Pack:
    """Documents one after another, an end-of-text token after each, cut into rows: no position is wasted.

    What is left over at the end of a block, less than one row, is left out.
    """

    tokenizer: Any
    seq_len: int

    def rows(self, texts: list[Text]) -> "list[array[int]]":
        tokens, length = array("i"), self.seq_len  # 4 bytes a token: a block of Python's numbers takes ten times that
        for ids, text in zip(encode(self.tokenizer, [text.text for text in texts]), texts, strict=True):
            tokens.extend(ids)
            if text.ends:
                tokens.append(self.tokenizer.eos_token_id)
        return [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]

    def batch(self, rows: "Sequence[array[int]]") -> Batch:
        return padded(rows, self.seq_len)


@dataclass
class Pad:
    """One document a row, cut or padded. As the papers' tokenizer does, one that is cut ends with end-of-text, too."""

    tokenizer: Any
    seq_len: int

    def rows(self, texts: list[Text]) -> "list[array[int]]":
        end = self.tokenizer.eos_token_id
        return [
            array("i", [*ids[: self.seq_len - 1], end]) for ids in encode(self.tokenizer, [text.text for text in texts])
        ]

    def batch(self, rows: "Sequence[array[int]]") -> Batch:
        return padded(rows, self.seq_len)


def padded(rows: "Sequence[array[int]]", seq_len: int) -> Batch:
    """Padding repeats the last token; being behind everything, it is seen by no position that counts."""
    return Batch(
        torch.stack([filled(row, row[-1], seq_len) for row in rows]),
        torch.stack([filled(row, IGNORED, seq_len) for row in rows]),
    )


def filled(row: "array[int]", token: int, seq_len: int) -> torch.Tensor:
    """A row as a tensor [seq_len], made up with `token`."""
    return torch.frombuffer(row + array("i", [token]) * (seq_len - len(row)), dtype=torch.int32).long()
