"""`python -m benchmarks.race`: run the race, see where it stands, make its table and pictures."""

import argparse
import difflib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from apollo_optim.core.errors import InputError
from apollo_optim.train.config import RunConfig
from benchmarks.race import former
from benchmarks.race.agenda import Row
from benchmarks.race.methods import METHODS
from benchmarks.race.protocol import SETTINGS, STAGES, Trial, config_of

T = TypeVar("T", Trial, former.Trial)
ACTIONS = ("run", "status", "table", "picture", "config")
HELP = f"""The race: every optimizer trains the same small LLaMA on the same text, and each has as many search runs
for its learning rates (matrices, embedding, head) and one knob of its own.

  run      work on the queue until it is empty; Ctrl-C, SIGTERM and kill -9 lose at most some steps of one run, and
           the same command goes on. Start it as often as there are cores: workers share the results, and no trial is
           computed twice.
  status   what is done, what is running, what comes next, and what the whole race costs
  table    the table of a setting, from the lines there are
  picture  everything that a reader wants: RESULTS/report.md with its table, pareto.png (loss against bytes of state),
           curves.png, and all of it in one file, report.html
  config   the run file of the line called TRIAL, for `apollo-optim pretrain --config`: how to reproduce one row

settings: {", ".join(f"{s.name} ({s.model}, {s.tokens:,} tokens a step, {s.steps} steps)" for s in SETTINGS.values())}
methods:  {", ".join(METHODS)}

The queue: {"; ".join(f"{s.setting} {s.who} seeds {','.join(map(str, s.seeds))}" for s in STAGES)}.
A method comes in with its search and one full run, so that the picture is there early and only sharpens.

The lines of results/race are of a former protocol (benchmarks/race/former.py), by which nothing is run any more; of
them there are `status` (their names), `config` and `table`, with --only the methods, the first being the one that the
others are compared to.

  python -m benchmarks.race run --results results/race2
  python -m benchmarks.race run --results results/race2 --only adamw apollo --limit-minutes 60
  python -m benchmarks.race run --results results/race2 --only adamw muon-8bit --setting 9m
  python -m benchmarks.race picture --results results/race2
  python -m benchmarks.race table --results results/race/llama-4m --only apollo-bf16 apollo-int8 apollo-int4
  python -m benchmarks.race config 4k-adamw-lr0.002-emb0.08-head0.02-knob1.152e+06-seed0-steps140 > run.yaml

docs/race.md says what is compared, what would falsify a claim, and how to reproduce one row.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m benchmarks.race", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("action", choices=list(ACTIONS), metavar="ACTION", help=", ".join(ACTIONS))
    made.add_argument("trial", nargs="?", metavar="TRIAL", help="of config: the name of a line, as `run` prints it")
    made.add_argument("--results", type=Path, default=Path("results/race2"), help="where the lines are (%(default)s)")
    made.add_argument("--work", type=Path, help="where unfinished runs live (out/race/ and the name of the results)")
    made.add_argument("--only", nargs="+", metavar="METHOD", help="run these methods alone; former lines: of the table")
    made.add_argument("--limit-minutes", type=float, help="stop then; what is unfinished is saved and goes on later")
    made.add_argument("--max-trials", type=int, help="stop after so many")
    made.add_argument("--setting", choices=[*SETTINGS], help="run this one alone; of the table (4k)")
    return made


def work_on(args: argparse.Namespace) -> int:
    """One worker."""
    from benchmarks.race.store import Store
    from benchmarks.race.trial import Interrupted
    from benchmarks.race.worker import work

    try:
        return work(
            Store(args.results, args.work), args.only, args.limit_minutes, args.max_trials, setting=args.setting
        )
    except Interrupted as error:
        print(f"{str(error).partition(';')[0]}; the same command goes on", flush=True)
        return 130


def run_file(trials: Iterable[T], name: str | None, config: Callable[[T, str], RunConfig]) -> str:
    """The run file of a line, as YAML. Raises InputError where there is no such line."""
    import yaml

    from apollo_optim.train.config import to_dict

    found = {trial.name: trial for trial in trials}
    if name is None or name not in found:
        near = difflib.get_close_matches(name or "", found, n=1)
        raise InputError(f"no line is called {name}" + (f" (did you mean {near[0]}?)" if near else ""))
    return str(yaml.safe_dump(to_dict(config(found[name], f"out/{name}")), sort_keys=False))


def of_former(args: argparse.Namespace, rows: dict[former.Trial, Row]) -> str:
    """What is asked of the lines of the former protocol. Raises InputError for what they have not."""
    if args.action == "table":
        return former.table(rows, args.only or former.IN_THE_TABLE)
    if args.action == "config":
        return run_file(rows, args.trial, former.config_of).rstrip()
    if args.action == "status":
        return "\n".join(f"{trial.name}: perplexity {row['perplexity']:.2f}" for trial, row in rows.items())
    raise InputError(
        f"the lines of {args.results} are of the former protocol, which has no `{args.action}`: "
        "status, table and config are there, and new lines need other --results"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 2 for wrong input; 130 when a run was interrupted and saved."""
    args = parser().parse_args(argv)
    args.work = args.work or Path("out/race") / args.results.name
    try:
        if rows := former.read(args.results):
            print(of_former(args, rows))
            return 0
        for name in args.only or ():
            if name not in METHODS:
                raise InputError(f"--only {name}: no such method; there are {', '.join(METHODS)}")
        if args.action == "run":
            return work_on(args)
        from benchmarks.race import page, report
        from benchmarks.race.store import Store

        store = Store(args.results, args.work)
        started = time.time()
        if not store.path.exists() and args.action != "status":  # a race that has not begun has a status
            raise InputError(f"there are no lines in {store.path}: start in a checkout, or name the folder: --results")
        if args.action == "status":
            print(report.status(store.board(), store.running()))
        elif args.action == "table":
            print(report.table(store.board(), SETTINGS[args.setting or "4k"]))
        elif args.action == "config":
            print(run_file(store.board().rows, args.trial, config_of), end="")
        else:
            for path in page.write(store.board(), args.results):
                print(f"{path} ({time.time() - started:.1f} s)")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
