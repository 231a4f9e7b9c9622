"""The report: Markdown for the repository, and one HTML file with its pictures inside for everybody else."""

import base64
import re
from pathlib import Path

from benchmarks.race.agenda import Board
from benchmarks.race.protocol import SETTINGS
from benchmarks.race.report import curves, describe, hours, pareto, table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 110rem; padding: 0 1rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ccc; padding: 0.3rem 0.6rem; text-align: left; white-space: nowrap; }
"""


def write(board: Board, results: Path) -> list[Path]:
    """`report.md`, `report.html` and the two pictures in the results folder. Raises InputError for mixed corpora."""
    settings = [s for s in SETTINGS.values() if any(board.finals(s, name) for name in board.methods)]
    page = ["# The race", "", "Made by `python -m benchmarks.race picture`; docs/race.md says what is compared.", ""]
    pictures = []
    if settings:
        pictures = [pareto(board, settings, results / "pareto.png"), curves(board, settings[0], results)]
        page += ["![Loss against bytes of optimizer state](pareto.png)", "", "![Curves](curves.png)", ""]
    for setting in settings:
        page += [f"## {describe(setting)}", "", table(board, setting), ""]
    spent = sum(row["wall"] for row in board.rows.values())
    page.append(f"{len(board.rows)} runs, {hours(spent)} by the clock, one core each.")
    text = "\n".join(page) + "\n"
    (results / "report.md").write_text(text, encoding="utf-8")
    (results / "report.html").write_text(html(text, results), encoding="utf-8")
    return [results / "report.md", results / "report.html", *pictures]


def html(text: str, folder: Path) -> str:
    """A page that needs no other file: pictures that Markdown names are inside of it."""
    import markdown

    def inside(match: re.Match[str]) -> str:
        return 'src="data:image/png;base64,' + base64.b64encode((folder / match[1]).read_bytes()).decode() + '"'

    body = re.sub(r'src="([^":]+\.png)"', inside, markdown.markdown(text, extensions=["tables"]))
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>The race</title>\n<style>{STYLE}</style>\n'
        f"{body}\n</html>\n"
    )
