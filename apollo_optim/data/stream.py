"""Hugging Face datasets, streamed: nothing is downloaded ahead, and the position is the dataset's own.

A stream keeps the order it comes in, but for the rows of one block. A shuffle buffer would forget its content at every
resume; C4 comes shuffled.
"""

from pathlib import Path
from typing import Any

from apollo_optim.core.errors import InputError
from apollo_optim.data.corpus import BLOCK, Text
from apollo_optim.data.foreign import unreachable
from apollo_optim.data.readers import BadRecord, Reading


def open_builder(name: str, subset: str | None) -> Any:
    """The dataset's description, or one line that says why it cannot be had."""
    from datasets import load_dataset_builder

    own = "" if "/" in name else "; `python` and `packages` need no download"
    if not Path(name).exists() and (why := unreachable()) is not None:
        raise InputError(f"cannot open the dataset {name!r}: {why}{own}")
    try:
        return load_dataset_builder(name, subset)
    except Exception as error:  # no network, no such name, a gated or a scripted dataset: the hub's own words
        raise InputError(f"cannot open the dataset {name!r}: {_line(error)}{own}") from error


class StreamDocuments:
    """One pass over a split of a dataset."""

    def __init__(self, builder: Any, name: str, split: str, reading: Reading) -> None:
        self.name, self.reading = f"{name} ({split})", reading
        self.rows = 0
        try:
            self.dataset = builder.as_streaming_dataset(split=split)
        except Exception as error:  # no such split, mostly; the message lists those that exist
            raise InputError(f"cannot open the split {split!r} of {name!r}: {_line(error)}") from error
        self._state = self.dataset.state_dict()
        self._iterator = iter(self.dataset)

    @property
    def skipped(self) -> int:
        return self.reading.skipped

    def read(self) -> list[Text]:
        texts: list[Text] = []
        size = 0
        while size < BLOCK and (row := self._next()) is not None:
            self.rows += 1
            if self.rows == 1 and not self.reading.wanted(row):
                raise self.reading.missing(self.name, row)
            try:
                text = self.reading.text_of(row, f"{self.name}: row {self.rows}")
            except BadRecord as error:
                self.reading.bad(f"{self.name}: row {self.rows}", error)
                continue
            if not text.strip():
                self.reading.skipped += 1
                continue
            texts.append(Text(text))
            size += len(text)
        self._state = self.dataset.state_dict()
        return texts

    def _next(self) -> dict[str, Any] | None:
        try:
            return next(self._iterator, None)
        except Exception as error:
            raise InputError(f"{self.name}: the stream broke after {self.rows} rows: {_line(error)}") from error

    def state_dict(self) -> dict[str, Any]:
        return {"dataset": self._state, "rows": self.rows, "skipped": self.reading.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state, self.rows, self.reading.skipped = state["dataset"], state["rows"], state["skipped"]
        self.dataset.load_state_dict(self._state)
        self._iterator = iter(self.dataset)


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
