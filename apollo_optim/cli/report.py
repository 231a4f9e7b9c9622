"""`apollo-optim report`: the table on the terminal; the picture, the page and the table in a directory."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import InputError
from ..core.printing import say
from .words import Parser, home, show

if TYPE_CHECKING:
    from ..report import Run


def run(argv: Sequence[str]) -> int:
    parser = Parser(
        "apollo-optim report",
        "Draw loss against tokens and time and the memory of runs, from their metrics.jsonl; print the table.\n"
        "Runs on different text, or with different tokenizers, are not put side by side.",
        "examples:\n  apollo-optim report out/demo\n  apollo-optim report out/adamw out/apollo --out out/comparison\n"
        "  apollo-optim report out/adamw out/apollo --at llama-7b   also in words\n"
        "  apollo-optim report out/demo --follow    the page of a run that goes on, drawn again as it does",
    )
    parser.add_argument(
        "run", nargs="+", metavar="DIR", help="a run directory (or a log that was kept alone, a .jsonl)"
    )
    parser.add_argument("--out", help="where to write report.png, .html and .md (DIR/report; several runs: ./report)")
    parser.add_argument("--at", metavar="MODEL", help="say, too, what the optimizers' state would be with this model")
    parser.add_argument("--follow", action="store_true", help="draw the page again while runs go on, until they end")
    parser.add_argument("--every", type=float, default=10.0, metavar="SECONDS", help="how often, with --follow (10)")
    args = parser.parse(argv)
    if not 1 <= args.every < 1e6:
        raise InputError(f"--every {args.every:g}: at least a second")
    from .. import report

    runs = [report.read_run(home(path)) for path in args.run]
    alone = len(runs) == 1 and runs[0].path.is_dir()
    out = (args.out and home(args.out)) or (runs[0].path / "report" if alone else Path("report"))
    if args.follow:
        try:
            report.follow([run.path for run in runs], out, args.every, drawn=say_where)
        except KeyboardInterrupt:
            say("\nstopped; the report of what is there:", error=True)
        runs = [report.read_run(run.path) for run in runs]
    words = report.in_words(runs, args.at or "", [planned_state(run, args.at) for run in runs] if args.at else ())
    written = report.write_report(runs, out, words)
    show(report.rich_table(runs))
    show(report.NOTE, style="dim")
    for text in words:
        say(f"\n{text}")
    # Not by rich: a path that is wrapped can't be copied.
    say(f"\npicture: {written.picture}\npage:    {written.page}\ntable:   {written.table}")
    return 0


def say_where(page: Path) -> None:
    """Once, when there is something to look at."""
    say(f"page: {page} (open it: it is redrawn as the runs go on; Ctrl-C ends this, not the runs)", error=True)


def planned_state(run: "Run", model: str) -> int:
    """Bytes of state that the run's optimizer would keep with a model of this name, as `plan` counts them."""
    from ..train.config import ModelConfig, from_dict
    from ..train.plan import state_of

    cfg = from_dict({"optim": run.start["config"]["optim"]})
    cfg.model = ModelConfig(model, dtype=run.setting("model", "dtype") or "float32")
    return state_of(cfg)
