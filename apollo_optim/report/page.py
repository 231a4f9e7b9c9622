"""A report on disk: the picture, the table, and one page that holds both."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from apollo_optim.core import disk
from apollo_optim.core.errors import InputError
from apollo_optim.core.printing import plain_markdown, printable
from apollo_optim.report.picture import draw, headline
from apollo_optim.report.read import Run, check_comparable, labels
from apollo_optim.report.table import NOTE, markdown_table, table_rows

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
.wide {{ overflow-x: auto }}
img {{ width: 100%; min-width: 44rem; height: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem }}
th, td {{ padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }}
@media (max-width: 40rem) {{ body {{ padding: 0 .5rem }} th, td {{ padding: .3rem }} }}
.note {{ color: #555; font-size: .85rem }}
pre {{ background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8rem }}
</style></head><body>
<h1>{title}</h1>
<div class="wide"><img alt="Loss against tokens and time; memory by part and at its peak. The figures are in the table below." src="data:image/png;base64,{image}"></div>
{words}
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div>
<p class="note">{note}</p>
<h2>Where the figures come from</h2>
{provenance}
</body></html>
"""  # noqa: E501


def html_page(runs: Sequence[Run], image: bytes, words: Sequence[str] = ()) -> str:
    """One page that needs nothing beside it: the picture is inside. `words`: what it shows, a paragraph each."""
    titles, rows = table_rows(runs)
    provenance = []
    for name, run in zip(labels(runs), runs, strict=True):
        facts = {key: run.start.get(key) for key in ("config", "corpus", "versions", "hardware")}
        text = html.escape(json.dumps(facts, indent=2, default=str))
        resumed = f", resumed {run.resumes} times" if run.resumes else ""
        summary = html.escape(printable(f"{name}: {run.path.resolve().name}{resumed}"))
        provenance.append(f"<details><summary>{summary}</summary><pre>{text}</pre></details>")
    return PAGE.format(
        title=html.escape(headline(runs)),
        image=base64.b64encode(image).decode(),
        words="\n".join(f"<p>{html.escape(printable(text))}</p>" for text in words),
        # Upright: a run is a column, so that no figure is cut off where there is room for a few runs.
        head=cells("th", ["", *(row[0] for row in rows)]),
        body="\n".join(
            f"<tr>{cells('td', [title, *(row[i] for row in rows)])}</tr>" for i, title in enumerate(titles[1:], start=1)
        ),
        note=html.escape(NOTE),
        provenance="\n".join(provenance),
    )


def cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


@dataclass(frozen=True)
class Report:
    """Where a report was written."""

    picture: Path
    page: Path
    table: Path


def write_report(runs: Sequence[Run], out: str | Path, words: Sequence[str] = ()) -> Report:
    """Write `report.png`, `report.html` and `report.md` of comparable runs into the directory `out`.

    `words`: what is to be said of them (`in_words`).
    """
    if not runs:
        raise InputError("no runs to report: name one run directory or several")
    check_comparable(runs)
    if not any(run.steps or run.evals for run in runs):
        raise InputError(f"{', '.join(str(run.path) for run in runs)}: no step is logged yet, there is nothing to draw")
    buffer = io.BytesIO()
    draw(runs).savefig(buffer, format="png")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out / "report.png", out / "report.html", out / "report.md")
    told = "".join(f"{plain_markdown(text)}\n\n" for text in words)
    disk.write(report.picture, buffer.getvalue())
    disk.write(report.page, html_page(runs, buffer.getvalue(), words))
    disk.write(report.table, f"# {plain_markdown(headline(runs))}\n\n{told}{markdown_table(runs)}")
    return report
