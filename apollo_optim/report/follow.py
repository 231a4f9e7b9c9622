"""The page of runs that go on, drawn again whenever their logs have grown, until the runs end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from apollo_optim.report.page import drawable, write_page
from apollo_optim.report.read import Run, log_of, read_run


def follow(
    paths: Sequence[Path],
    out: Path,
    every: float,
    *,
    drawn: Callable[[Path], None] = lambda page: None,
    wait: Callable[[float], None] = time.sleep,
) -> list[Run]:
    """Keep `report.html` in `out` up to date, looked at every so many seconds; returns the runs when all have ended.

    Args:
        drawn: Called with the page when it is there for the first time.
        wait: How time passes.

    A browser that shows the page reads it again by itself. Nothing is drawn before the first step is logged.
    Raises InputError for a path that is no run, and for runs that can't be compared.
    """
    logger, once = logging.getLogger("apollo_optim.report.read"), _Once()
    logger.addFilter(once)
    first, seen = True, None
    try:
        while True:
            now = [(stat.st_size, stat.st_mtime_ns) for stat in (log_of(path).stat() for path in paths)]
            if now != seen:
                seen, runs = now, [read_run(path) for path in paths]
                if drawable(runs):
                    page = write_page(runs, out, refresh=every)
                    if first:
                        drawn(page)
                    first = False
                if all(run.end for run in runs):
                    return runs
            wait(every)
    finally:
        logger.removeFilter(once)


class _Once(logging.Filter):
    """A bad line of a log is told once, not at every look."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._told
        self._told.add(message)
        return new
