"""Tables: on a terminal by rich where it is installed, plain in a pipe, and as Markdown in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Table:
    """Cells of text."""

    title: str
    head: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    note: str = ""
    words: int = 1
    """So many columns are words, to the left; the others are figures, to the right."""

    def plain(self) -> str:
        """For files and pipes."""
        everything = [self.head, *self.rows]
        widths = [max(len(row[i]) for row in everything) for i in range(len(self.head))]
        lines = ["  ".join(self._cell(i, row[i], widths[i]) for i in range(len(widths))).rstrip() for row in everything]
        rule = "-" * min(120, max(map(len, lines)))
        return "\n".join([self.title, rule, lines[0], rule, *lines[1:], *filter(None, [self.note])])

    def _cell(self, column: int, text: str, width: int) -> str:
        return text.ljust(width) if column < self.words else text.rjust(width)


def plain(tables: Sequence[Table]) -> str:
    """All of them, one below the other."""
    return "\n\n".join(table.plain() for table in tables if table.rows) + "\n"


def show(tables: Sequence[Table]) -> None:
    """Print them."""
    console = _console() if sys.stdout.isatty() else None
    if console is None:
        print(plain(tables), end="")
        return
    from rich.table import Table as Rich
    from rich.text import Text

    for table in tables:
        if table.rows:
            rich = Rich(title=table.title, caption=table.note or None, title_justify="left", caption_justify="left")
            for i, name in enumerate(table.head):
                rich.add_column(name, justify="left" if i < table.words else "right", overflow="fold")
            for row in table.rows:
                rich.add_row(*map(Text, row))
            console.print(rich)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], align: str = "l") -> str:
    """A table of a Markdown file.

    Args:
        align: A letter a column, `l` or `r`; the last one is repeated.
    """
    rule = "".join("|---:" if side == "r" else "|---" for side in align.ljust(len(head), align[-1]))
    lines = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], rule + "|", *lines[1:]])


def _console() -> Any:
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console()
