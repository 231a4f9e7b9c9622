"""What a person sees while it runs: a live panel on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
from typing import Any, Protocol

from apollo_optim.core.printing import lines, printable, say
from apollo_optim.train.company import BUSY
from apollo_optim.train.measure import peak_memory

NARROW = 60  # columns of a terminal


class Display(Protocol):
    """Somewhere to show a run."""

    def note(self, text: str) -> None:
        """A line that stays."""

    def memory(self, sizes: dict[str, int]) -> None:
        """Bytes of weights, gradients and optimizer state, as they really are."""

    def step(self, record: dict[str, Any], eta: float) -> None:
        """The figures of one step, and how many seconds are left."""

    def evaluation(self, record: dict[str, Any]) -> None:
        """The figures of one evaluation."""

    def close(self) -> None:
        """Give the terminal back."""


def open_display(kind: str, title: str, steps: int) -> Display:
    """`auto` is rich on a terminal where rich is installed, else plain lines."""
    if kind == "none":
        return Silent()
    if kind == "rich" or (kind == "auto" and sys.stderr.isatty()):
        try:
            return Live(title, steps)
        except ImportError:
            pass  # rich is a convenience: plain lines say the same
    return Plain(title, steps)


class Silent:
    """Nothing at all."""

    def note(self, text: str) -> None: ...
    def memory(self, sizes: dict[str, int]) -> None: ...
    def step(self, record: dict[str, Any], eta: float) -> None: ...
    def evaluation(self, record: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Plain:
    """One line an event, on stderr: for logs and pipes."""

    def __init__(self, title: str, steps: int) -> None:
        self.steps = steps
        self.note(title)

    def note(self, text: str) -> None:
        """A line that stays."""
        say(text, error=True)

    def memory(self, sizes: dict[str, int]) -> None:
        """One line, once they exist."""
        self.note("memory: " + ", ".join(f"{name} {in_bytes(size)}" for name, size in sizes.items()))

    def step(self, record: dict[str, Any], eta: float) -> None:
        """One line."""
        figures = " | ".join(f"{name} {value}" for name, value in step_figures(record, eta))
        self.note(f"step {record['step']:>{len(str(self.steps))}}/{self.steps} | {figures}")

    def evaluation(self, record: dict[str, Any]) -> None:
        """One line."""
        self.note(
            f"evaluation at step {record['step']}: " + ", ".join(f"{k} {v}" for k, v in evaluation_figures(record))
        )

    def close(self) -> None:
        """Nothing to give back."""


class Live:
    """A panel that is redrawn at every logged step; notes scroll above it."""

    def __init__(self, title: str, steps: int) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._title, self._steps = title, steps
        self._rows: dict[str, str] = {}
        self._progress = Progress(TextColumn("step"), BarColumn(None), MofNCompleteColumn(), expand=True)
        self._task = self._progress.add_task("", total=steps)
        # Drawn by hand, not by a timer thread: nothing runs between two logged steps.
        self._console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        self._live = RichLive(self._panel(), console=self._console, auto_refresh=False)
        self._live.start()

    def note(self, text: str) -> None:
        """A line above the panel."""
        self._live.console.print(lines(text))

    def memory(self, sizes: dict[str, int]) -> None:
        """Rows of the panel."""
        self._rows |= {name: in_bytes(size) for name, size in sizes.items()}
        self._draw()

    def step(self, record: dict[str, Any], eta: float) -> None:
        """Rows of the panel."""
        self._rows |= dict(step_figures(record, eta))
        self._progress.update(self._task, completed=record["step"])
        self._draw()

    def evaluation(self, record: dict[str, Any]) -> None:
        """A line above the panel, and a row of it."""
        self.note(
            f"evaluation at step {record['step']}: " + ", ".join(f"{k} {v}" for k, v in evaluation_figures(record))
        )
        self._rows["validation"] = f"{record['loss']:.4f} (perplexity {record['perplexity']:.2f})"
        self._draw()

    def close(self) -> None:
        """Leave the last picture on the screen."""
        self._live.stop()

    def _draw(self) -> None:
        self._live.update(self._panel(), refresh=True)

    def _panel(self) -> Any:
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        names = list(self._rows)
        # Two columns of figures, or one where they would be cut.
        half = (len(names) + 1) // 2 if self._console.width >= NARROW else len(names)
        for i in range(half):
            pair = [names[i], *names[half + i : half + i + 1]]
            table.add_row(*(cell for name in pair for cell in (Text(name, "dim"), self._rows[name])))
        return Panel(Group(self._progress, table), title=Text(printable(self._title)), title_align="left")


def step_figures(record: dict[str, Any], eta: float) -> list[tuple[str, str]]:
    """Names and values as they are shown."""
    rates = (
        f"{record['lr']:.3g}"
        if record["lr"] == record["lr_rest"]
        else f"{record['lr']:.3g} (rest {record['lr_rest']:.3g})"
    )
    skipped = [("skipped", f"{record['skipped']:,}")] if record.get("skipped") else []
    share = record.get("waiting") or 0.0  # of the time since the last line
    waiting = [("waiting for text", f"{share:.0%}")] if share >= 0.05 else []
    others = record.get("others") or 0.0
    busy = [("others' CPU", f"{others:.0%}")] if others >= BUSY else []
    return [
        ("loss", f"{record['loss']:.4f}"),
        ("lr", rates),
        ("grad norm", f"{record['grad_norm']:.3f}"),
        ("tokens/s", f"{record['tokens_per_s']:,.0f}"),
        ("ETA", duration(eta)),
        ("peak", in_bytes(record.get("peak_gpu") or peak_memory())),
        *waiting,
        *busy,
        *skipped,
    ]


def evaluation_figures(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values as they are shown. (The papers' n/(n+1) figure is for tables: see the log and the report.)"""
    return [
        ("loss", f"{record['loss']:.4f}"),
        ("perplexity", f"{record['perplexity']:.2f}"),
        ("bits per byte", f"{record['bits_per_byte']:.4f}"),
    ]


def in_bytes(size: int) -> str:
    """12.3 MB; a megabyte is 10**6 bytes."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 10**power:
            return f"{size / 10**power:.3g} {unit}" if size < 10 ** (power + 3) else f"{size / 10**power:.0f} {unit}"
    return f"{size} B"


def duration(seconds: float) -> str:
    """1:02:03, or 4:05."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
