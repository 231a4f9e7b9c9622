"""A case in a process of its own.

A *case* is a function that is given a `Running`: its config, its clock, and the way to the log. It runs in a fresh
Python (nothing is forked, so the parent need not be careful with a GPU, and never touches one), writes a line as soon
as it has a figure, and may be killed at any moment: what it has written stays. How it ended is a line, too.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kit import ROOT, Line, append, commit, hardware, one_line, read, versions

GRACE = 4.0
"""Seconds between asking a process to stop (SIGTERM) and killing it."""


class DoesNotFit(Exception):
    """There is less memory than a case wants: it says so instead of trying."""


@dataclass(frozen=True)
class Case:
    """What is run in a process of its own."""

    part: str
    name: str
    run: str
    """`package.module:function`, of a `Running`."""
    config: Line = field(default_factory=dict)
    """Plain data; its key `device` names the device."""
    share: float = 1.0
    """Of the time that its part has left, beside the shares of the cases still to come."""


class Running:
    """A case while it runs: what its function is given."""

    def __init__(self, case: Case, log: Path, deadline: float) -> None:
        self.case, self.config, self.log = case, case.config, log
        self.scratch = log.parent / "scratch"
        """A folder for what is not to stay; the parent removes it."""
        self._deadline = deadline

    def left(self) -> float:
        """Seconds that it may still take. The last case of a process is stopped when they are over."""
        return self._deadline - time.time()

    def write(self, **figures: Any) -> None:
        """A line of the log: what case this is, on what machine, and these figures."""
        about = {"part": self.case.part, "case": self.case.name, "kind": "figures", "status": "ok"}
        machine = hardware(str(self.config.get("device", "cpu")))
        common = {"versions": versions(*self.config.get("packages", ())), "hardware": machine, "commit": commit()}
        append(self.log, {**about, **figures, "time": time.time(), "config": self.config, **common})

    @contextlib.contextmanager
    def attempt(self, **about: Any) -> Iterator[Line]:
        """One measurement of several: what is put into the dictionary becomes a line, and so does an error.

        Whatever goes wrong, the case goes on with what comes next, and memory is given back first.
        """
        line: Line = dict(about)
        try:
            yield line
        except Exception as error:
            line |= {"status": status_of(error), "reason": f"{type(error).__name__}: {one_line(error)}"}
            error.__traceback__ = None  # its frames hold tensors
        give_back()
        self.write(**line)

    def skipped(self, reason: str, **about: Any) -> None:
        """A measurement that was not even begun."""
        self.write(status="skipped", reason=reason, **about)


def status_of(error: BaseException) -> str:
    """How a measurement that raised this has ended."""
    if isinstance(error, DoesNotFit):
        return "does not fit"
    text = str(error).lower()
    full = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
    memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return "out of memory" if memory or any(words in text for words in full) else "failed"


def give_back() -> None:
    """Free what nobody holds any more, cached memory of a GPU included."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # a broken context: the next operation says so
            torch.cuda.empty_cache()


class Child:
    """A process that was started with one case, or several one after the other: `wait` for it."""

    def __init__(
        self, cases: Sequence[Case], log: Path, seconds: float, *, env: Mapping[str, str], background: bool = False
    ) -> None:
        self.cases, self._log, self._started = cases, log, time.time()
        self._deadline = self._started + seconds
        question = {"cases": [vars(case) for case in cases], "log": str(log), "deadline": self._deadline}
        self.output = log.parent / "output" / f"{cases[0].part}-{cases[0].name}.txt"
        self.output.parent.mkdir(exist_ok=True)
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self.output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", CHILD],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # so that a kill takes its own children, compilers, with it
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(json.dumps({**question, "background": background}).encode())

    def wait(self) -> None:
        """Until it ends; at its deadline it is asked to stop, then killed. Cases that could not say how they ended get
        their last line here.
        """
        late = False
        try:
            code = self._process.wait(max(0.0, self._deadline - time.time()))
        except subprocess.TimeoutExpired:
            late, code = True, self.stop()
        except BaseException:
            self.stop()
            raise
        said = [text for text in self.output.read_text(errors="replace").splitlines() if text.strip()]
        if not said:
            self.output.unlink()
        status, reason = "failed", one_line(said[-1]) if said else f"exit code {code}"
        if late:
            status, reason = "timed out", f"stopped after {time.time() - self._started:.0f} s"
        elif code < 0:
            status, reason = "killed", f"by signal {-code}" + " (out of memory?)" * (code == -signal.SIGKILL)
        ended = {(line["part"], line["case"]) for line in read(self._log) if line["kind"] == "end"}
        for case in self.cases:
            if (case.part, case.name) not in ended:
                seconds = round(time.time() - self._started, 2)
                about = Running(case, self._log, self._deadline)
                about.write(kind="end", status=status, reason=reason, seconds=seconds)
                status, reason = "skipped", f"its process had ended: {status}"  # those that were still to come

    def stop(self) -> int:
        """Ask it to stop, then kill it, and all that it started. Its exit code."""
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
            if self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(patience)
        return int(self._process.returncode)


CHILD = "from benchmarks.cases import child; child()"


def child() -> None:
    """The process: the question comes on stdin, the answer goes into the log."""
    question = json.load(sys.stdin)
    if question["background"]:
        os.nice(19)
    cases = [Case(**about) for about in question["cases"]]
    for i, case in enumerate(cases):
        started = time.time()
        share = case.share / sum(later.share for later in cases[i:])
        running = Running(case, Path(question["log"]), started + share * (question["deadline"] - started))
        module, _, function = case.run.partition(":")
        try:
            getattr(importlib.import_module(module), function)(running)
            end: Line = {"status": "ok"}
        except Exception as error:
            traceback.print_exc()
            end = {"status": status_of(error), "reason": f"{type(error).__name__}: {one_line(error)}"}
        running.write(kind="end", seconds=round(time.time() - started, 2), **end)
        give_back()
