"""The lines on disk, and which trial is whose.

`RESULTS/trials.jsonl` holds one line a trial, only ever appended to. A trial belongs to the process that holds the lock
on its claim file in the work folder; a lock goes with its process, however that ends, so nothing has to be tidied up.
Workers on one file system (with `flock`) share both folders.
"""

import contextlib
import fcntl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from benchmarks import kit
from benchmarks.race.agenda import Board, Row
from benchmarks.race.methods import METHODS, Method
from benchmarks.race.protocol import Trial


class Store:
    """A results folder and the work folder beside it."""

    def __init__(self, results: Path, work: Path, methods: Mapping[str, Method] = METHODS) -> None:
        self.results, self.work, self.methods = results, work, methods
        self.path = results / "trials.jsonl"
        self.claims: dict[str, IO[str]] = {}

    def lines(self) -> list[Row]:
        """What is done. A line that a crash cut off is not: its trial is run again."""
        return kit.read(self.path)

    def board(self) -> Board:
        """The race as it stands."""
        return Board.of(self.lines(), self.methods)

    def claim(self, only: list[str] | None = None, setting: str | None = None) -> tuple[Trial | None, bool]:
        """The first wanted trial that nobody runs, ours until `release`; and whether others run what is wanted.

        Args:
            only: Methods; None: all.
            setting: The name of one; None: all.
        """
        busy = False
        with self.locked():
            for trial in self.board().wanted():
                if (only is not None and trial.method not in only) or setting not in (None, trial.setting):
                    continue
                if self._take(trial):
                    return trial, busy
                busy = True
        return None, busy

    def _take(self, trial: Trial) -> bool:
        if (file := lock(self.work / "claims" / trial.name)) is None:
            return False
        self.claims[trial.name] = file
        return True

    def running(self) -> list[str]:
        """Names of the trials that a process is at work on now."""
        free = {path.name: lock(path) for path in sorted((self.work / "claims").glob("*"))}
        for file in free.values():
            if file is not None:
                file.close()
        return [name for name, file in free.items() if file is None]

    def release(self, trial: Trial) -> None:
        """Somebody else may have it."""
        self.claims.pop(trial.name).close()

    def append(self, row: Row) -> None:
        """One more line, on the disk when this returns."""
        with self.locked():
            kit.append(self.path, row)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time."""
        for folder in (self.results, self.work):
            folder.mkdir(parents=True, exist_ok=True)
        with (self.work / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def lock(path: Path) -> IO[str] | None:
    """The open file, locked until it is closed; None where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
