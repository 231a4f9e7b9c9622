"""A report on disk: the picture, the table, and one page with curves, bars and the table."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from apollo_optim.core import disk
from apollo_optim.core.errors import InputError
from apollo_optim.core.printing import plain_markdown, printable
from apollo_optim.report import curves
from apollo_optim.report.picture import draw, headline
from apollo_optim.report.read import Run, check_comparable, labels
from apollo_optim.report.table import NOTE, Column, filled, markdown_table, titles_of


def html_page(runs: Sequence[Run], words: Sequence[str] = (), *, refresh: float | None = None) -> str:
    """One page that needs nothing beside it. `words`: what it shows, a paragraph each.

    refresh: Runs go on: a browser reads the page again after so many seconds, axes reach to where the runs will end.
    """
    provenance = []
    for name, run in zip(labels(runs), runs, strict=True):
        facts = {key: run.start.get(key) for key in ("config", "corpus", "versions", "hardware")}
        text = html.escape(json.dumps(facts, indent=2, default=str))
        resumed = f", resumed {run.resumes} times" if run.resumes else ""
        summary = html.escape(printable(f"{name}: {run.path.resolve().name}{resumed}"))
        provenance.append(f"<details><summary>{summary}</summary><pre>{text}</pre></details>")
    return Template(files(__package__).joinpath("page.html").read_text("utf-8")).substitute(
        title=html.escape(headline(runs)),
        refresh=f'<meta http-equiv="refresh" content="{refresh:g}">' if refresh else "",
        words="\n".join(f"<p>{html.escape(printable(text))}</p>" for text in words),
        key=curves.key(runs),
        losses=curves.losses(runs, to_the_end=refresh is not None),
        bars=curves.bars(runs),
        # Upright: a run is a column, so that no figure is cut off where there is room for a few runs.
        head=cells("th", ["", *titles_of(runs)]),
        body="\n".join(figures(column, runs) for column in filled(runs)),
        note=html.escape(NOTE),
        provenance="\n".join(provenance),
    )


def figures(column: Column, runs: Sequence[Run]) -> str:
    """A figure of all runs: a row of the page's table, with the numbers by which it is put in order."""
    told = []
    for run in runs:
        value, text = column.value(run), html.escape(printable(column.cell(run)))
        number = f' data-value="{value!r}"' if isinstance(value, (int, float)) else ""
        told.append(f"<td{number}>{text}</td>")
    sort = f'title="sort the runs by it"{" disabled" if len(runs) == 1 else ""}'
    return f'<tr><th scope="row"><button {sort}>{column.title}</button></th>{"".join(told)}</tr>'


def cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


@dataclass(frozen=True)
class Report:
    """Where a report was written."""

    picture: Path
    page: Path
    table: Path


def report_in(out: str | Path) -> Report:
    """The files of a report in the directory `out`."""
    return Report(*(Path(out) / f"report.{kind}" for kind in ("png", "html", "md")))


def drawable(runs: Sequence[Run]) -> bool:
    """Whether any of them has a step. Raises InputError for none, and for runs that can't be compared."""
    if not runs:
        raise InputError("no runs to report: name one run directory or several")
    check_comparable(runs)
    return any(run.steps or run.evals for run in runs)


def write_page(runs: Sequence[Run], out: str | Path, *, refresh: float) -> Path:
    """Write `report.html` alone, of runs that go on, into the directory `out`; see `html_page`."""
    page = report_in(out).page
    page.parent.mkdir(parents=True, exist_ok=True)
    disk.write(page, html_page(runs, refresh=refresh))
    return page


def write_report(runs: Sequence[Run], out: str | Path, words: Sequence[str] = ()) -> Report:
    """Write `report.png`, `report.html` and `report.md` of comparable runs into the directory `out`.

    `words`: what is to be said of them (`in_words`).
    """
    if not drawable(runs):
        raise InputError(f"{', '.join(str(run.path) for run in runs)}: no step is logged yet, there is nothing to draw")
    buffer = io.BytesIO()
    draw(runs).savefig(buffer, format="png")
    report = report_in(out)
    report.page.parent.mkdir(parents=True, exist_ok=True)
    told = "".join(f"{plain_markdown(text)}\n\n" for text in words)
    disk.write(report.picture, buffer.getvalue())
    disk.write(report.page, html_page(runs, words))
    disk.write(report.table, f"# {plain_markdown(headline(runs))}\n\n{told}{markdown_table(runs)}")
    return report
