"""A worker: claim, run, write the line, until the queue is empty."""

import math
import os
import shutil
import time
from collections.abc import Callable

from benchmarks.race.agenda import Row
from benchmarks.race.protocol import Trial
from benchmarks.race.store import Store
from benchmarks.race.trial import Interrupted, run

Runner = Callable[..., Row]
PAUSE = 20.0
"""Seconds between two looks at the queue while others run all that is wanted."""


def work(
    store: Store,
    only: list[str] | None = None,
    limit_minutes: float | None = None,
    max_trials: int | None = None,
    runner: Runner | None = None,
    setting: str | None = None,
) -> int:
    """Run what is wanted until nothing is; returns 0.

    Args:
        only: Methods; None: all.
        limit_minutes: Stop then; a run that is not finished is saved and left to the next worker.
        max_trials: Stop after so many.
        runner: `trial.run`, or a stand-in for it.
        setting: The name of one setting; None: all.

    Raises InputError where the text of this machine is not the one of the lines, and Interrupted when told to stop.
    """
    runner = runner or run
    deadline = math.inf if limit_minutes is None else time.monotonic() + 60 * limit_minutes
    done = 0
    while time.monotonic() < deadline and (max_trials is None or done < max_trials):
        trial, busy = store.claim(only, setting)
        if trial is None:
            if not busy:
                say_why_nothing(store, only, setting)
                return 0
            time.sleep(min(PAUSE, max(0.0, deadline - time.monotonic())))
            continue
        try:
            rows = store.board().rows
            row = runner(trial, store.work, rows=rows, deadline=deadline, methods=store.methods)
            keep_log(store, trial)
            store.append(row)
            shutil.rmtree(store.work / trial.name, ignore_errors=True)
        except Interrupted:
            if time.monotonic() < deadline:
                raise
            print(f"time is up: {trial.name} is saved, and the same command goes on with it", flush=True)
            return 0
        finally:
            store.release(trial)
        done += 1
        print(line_of(trial, row), flush=True)
    return 0


def keep_log(store: Store, trial: Trial) -> None:
    """The whole log of a final run, for the curves; without the folder that it lay in."""
    log = store.work / trial.name / "metrics.jsonl"
    if not trial.search and log.exists():
        kept = store.results / "logs" / f"{trial.name}.jsonl"
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(log.read_text(encoding="utf-8").replace(f"{store.work}{os.sep}", ""), encoding="utf-8")


def say_why_nothing(store: Store, only: list[str] | None, setting: str | None) -> None:
    """The queue is empty: of all, or of what was chosen, which may wait for another's search."""
    waiting = next(store.board().wanted(), None)
    if (only or setting) and waiting is not None:
        chosen = " ".join(only or ["all methods"]) + (f" in {setting}" if setting else "")
        print(f"nothing to do for {chosen}; first in the whole queue: {waiting.name}", flush=True)
    else:
        print("the queue is empty", flush=True)


def line_of(trial: Trial, row: Row) -> str:
    """What a reader of the worker's output wants to know."""
    figure = f"perplexity {row['perplexity']:.2f}" if row["perplexity"] is not None else row["ended"]
    return f"{time.strftime('%H:%M:%S')} {trial.name}: {figure} ({row['wall']:.0f} s)"
