"""The table of runs: a title, how a run fills it, and what a reader should know about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from apollo_optim.core.printing import plain_markdown, printable
from apollo_optim.report.read import Run, labels, token_word
from apollo_optim.report.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.table import Table


def number(format_: str, get: Callable[[Run], Any]) -> Callable[[Run], str]:
    def cell(run: Run) -> str:
        value = get(run)
        return "-" if value is None else format_.format(value)

    return cell


def memory_cell(part: str) -> Callable[[Run], str]:
    return lambda run: human_bytes(run.memory[part]) if part in run.memory else "-"


COLUMNS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("model", lambda run: str(run.setting("model", "name"))),
    ("params", number("{:,}", lambda run: run.start.get("params"))),
    ("lr", number("{:.3g}", lambda run: run.peak("lr"))),
    ("lr of the rest", number("{:.3g}", lambda run: run.peak("lr_rest"))),
    ("steps", number("{:,}", lambda run: (run.steps or [{}])[-1].get("step"))),
    ("tokens", number("{:,}", lambda run: (run.steps or [{}])[-1].get("tokens"))),
    ("loss", number("{:.4f}", lambda run: run.final.get("loss"))),
    ("perplexity", number("{:.2f}", lambda run: run.final.get("perplexity"))),
    ("bits/byte", number("{:.3f}", lambda run: run.final.get("bits_per_byte"))),
    ("ppl n/(n+1)*", number("{:.2f}", lambda run: run.final.get("perplexity_reference"))),
    ("tokens/s", number("{:,.0f}", lambda run: run.tokens_per_second)),
    ("time", number("{}", lambda run: None if run.seconds is None else human_seconds(run.seconds))),
    ("weights", memory_cell("weights")),
    ("gradients", memory_cell("gradients")),
    ("optimizer", memory_cell("optimizer")),
    ("peak", memory_cell("peak")),
)
NOTE = (
    "Loss and perplexity: token-weighted over the validation text. * the figure that the evaluation loop shared by "
    "GaLore, Fira and APOLLO prints (summed loss over n + 1 batches), for comparison with their tables only. Weights, "
    "gradients and optimizer state: bytes as they really are; peak: resident memory of the whole process. "
    "GB = 1e9 bytes."
)


def table_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows. A column that no run fills is left out; a run that has not ended says so in its name."""
    words = {"tokens": token_word(runs)}
    columns = [(words.get(title, title), [cell(run) for run in runs]) for title, cell in COLUMNS]
    columns = [(title, cells) for title, cells in columns if set(cells) != {"-"}]
    names = [name + ("" if run.end else " (not ended)") for name, run in zip(labels(runs), runs, strict=True)]
    rows = [[printable(cell) for cell in (name, *(cells[i] for _, cells in columns))] for i, name in enumerate(names)]
    return ["run", *(title for title, _ in columns)], rows


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
