"""`apollo-optim report`: the table on the terminal; the picture, the page and the table in a directory."""

from collections.abc import Sequence
from pathlib import Path

from ..core.printing import say
from .words import Parser, home, show


def run(argv: Sequence[str]) -> int:
    parser = Parser(
        "apollo-optim report",
        "Draw loss against tokens and time and the memory of runs, from their metrics.jsonl; print the table.\n"
        "Runs on different text, or with different tokenizers, are not put side by side.",
        "examples:\n  apollo-optim report out/demo\n  apollo-optim report out/adamw out/apollo --out out/comparison",
    )
    parser.add_argument(
        "run", nargs="+", metavar="DIR", help="a run directory (or a log that was kept alone, a .jsonl)"
    )
    parser.add_argument("--out", help="where to write report.png, .html and .md (DIR/report; several runs: ./report)")
    args = parser.parse(argv)
    from .. import report

    runs = [report.read_run(home(path)) for path in args.run]
    alone = len(runs) == 1 and runs[0].path.is_dir()
    written = report.write_report(
        runs, (args.out and home(args.out)) or (runs[0].path / "report" if alone else Path("report"))
    )
    show(report.rich_table(runs))
    show(report.NOTE, style="dim")
    # Not by rich: a path that is wrapped can't be copied.
    say(f"\npicture: {written.picture}\npage:    {written.page}\ntable:   {written.table}")
    return 0
