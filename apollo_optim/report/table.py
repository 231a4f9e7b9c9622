"""The table of runs: a title, how a run fills it, and what a reader should know about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from apollo_optim.core.printing import plain_markdown, printable
from apollo_optim.report.read import Run, labels, token_word
from apollo_optim.report.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.table import Table


class Column(NamedTuple):
    """A figure of runs: what it is called, how a run's log tells it, and how it is written."""

    title: str
    value: Callable[[Run], Any]
    """A number or a text; None where the log does not tell it."""
    text: Callable[[Any], str] = str

    def cell(self, run: Run) -> str:
        """As it is written: "-" for what is not known."""
        value = self.value(run)
        return "-" if value is None else self.text(value)


def size_of(part: str) -> Callable[[Run], int | None]:
    return lambda run: run.memory.get(part)


COLUMNS = (
    Column("model", lambda run: str(run.setting("model", "name"))),
    Column("params", lambda run: run.start.get("params"), "{:,}".format),
    Column("lr", lambda run: run.peak("lr"), "{:.3g}".format),
    Column("lr of the rest", lambda run: run.peak("lr_rest"), "{:.3g}".format),
    Column("steps", lambda run: (run.steps or [{}])[-1].get("step"), "{:,}".format),
    Column("tokens", lambda run: (run.steps or [{}])[-1].get("tokens"), "{:,}".format),
    Column("loss", lambda run: run.final.get("loss"), "{:.4f}".format),
    Column("perplexity", lambda run: run.final.get("perplexity"), "{:.2f}".format),
    Column("bits/byte", lambda run: run.final.get("bits_per_byte"), "{:.3f}".format),
    Column("ppl n/(n+1)*", lambda run: run.final.get("perplexity_reference"), "{:.2f}".format),
    Column("tokens/s", lambda run: run.tokens_per_second, "{:,.0f}".format),
    Column("time", lambda run: run.seconds, human_seconds),
    Column("weights", size_of("weights"), human_bytes),
    Column("gradients", size_of("gradients"), human_bytes),
    Column("optimizer", size_of("optimizer"), human_bytes),
    Column("peak", size_of("peak"), human_bytes),
)
NOTE = (
    "Loss and perplexity: token-weighted over the validation text. * the figure that the evaluation loop shared by "
    "GaLore, Fira and APOLLO prints (summed loss over n + 1 batches), for comparison with their tables only. Weights, "
    "gradients and optimizer state: bytes as they really are; peak: resident memory of the whole process. "
    "GB = 1e9 bytes."
)


def filled(runs: Sequence[Run]) -> list[Column]:
    """The columns that any of the runs fills."""
    words = {"tokens": token_word(runs)}
    found = [column for column in COLUMNS if any(column.value(run) is not None for run in runs)]
    return [column._replace(title=words.get(column.title, column.title)) for column in found]


def titles_of(runs: Sequence[Run]) -> list[str]:
    """What a table calls the runs: one that has not ended says so."""
    ended = zip(labels(runs), runs, strict=True)
    return [printable(name + ("" if run.end else " (not ended)")) for name, run in ended]


def table_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows. A column that no run fills is left out."""
    columns = filled(runs)
    rows = [
        [name, *(printable(column.cell(run)) for column in columns)]
        for name, run in zip(titles_of(runs), runs, strict=True)
    ]
    return ["run", *(column.title for column in columns)], rows


def rich_table(runs: Sequence[Run]) -> Table:
    """The table for a terminal, turned on its side: fifteen figures a run fit no terminal next to each other."""
    from rich.table import Table
    from rich.text import Text

    titles, rows = table_rows(runs)
    table = Table(header_style="bold")
    table.add_column("")
    for row in rows:
        table.add_column(Text(row[0]), justify="right")
    for i, title in enumerate(titles[1:], start=1):
        table.add_row(title, *(Text(row[i]) for row in rows))
    return table


def markdown_table(runs: Sequence[Run]) -> str:
    titles, rows = table_rows(runs)
    head, *body = [[plain_markdown(cell) for cell in line] for line in (titles, *rows)]
    told = [head, ["---"] + ["---:"] * (len(titles) - 1), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in told) + f"\n{NOTE}\n"
