"""The memory that a long metrics.jsonl takes when `report` and a resumed run read it.

    apollo-optim bench long-log --megabytes 200

A tiny run is trained and its log made long: lines of its steps, again and again. Each command runs twice in a process
of its own, with the log as it was and with the long one; the difference of the two peaks is what the log takes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from apollo_optim.cli.words import Parser
from apollo_optim.core.errors import InputError
from benchmarks import kit
from benchmarks.kit import Line
from benchmarks.table import markdown

RUN = ["--model.name", "llama-1m", "--data.source", "python", "--data.cache_dir"]
STEPS = ["--train.batch_size", "1", "--train.threads", "1", "--optim.compile", "false"]
STEPS += ["--eval.every", "null", "--schedule.kind", "constant"]


def peak_of(words: Sequence[str]) -> Line:
    """The command's peak resident memory (bytes) and seconds. Raises InputError if it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, "-m", "apollo_optim", *words], stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if process.returncode:
            raise InputError(f"{' '.join(words)}: {said.read().decode(errors='replace')[-2000:]}")
    return {"peak": usage.ru_maxrss * 1024, "seconds": time.perf_counter() - start}


def lengthen(log: Path, size: int) -> int:
    """Repeat the log's lines of steps behind its last one until it has `size` bytes. Returns how many lines it has."""
    lines = log.read_bytes().splitlines(keepends=True)
    steps = b"".join(line for line in lines if b'"event": "step"' in line)
    if not steps:
        raise InputError(f"{log} has no line of a step")
    with log.open("ab") as file:
        while file.tell() < size:
            file.write(steps)
    with log.open("rb") as file:
        return sum(1 for _ in file)


def measure(args: argparse.Namespace, log: Path) -> None:
    """A line of the log for each command and length."""
    with tempfile.TemporaryDirectory() as work:
        run = Path(work, "run")
        train = ["pretrain", *RUN, f"{work}/cache", *STEPS, "--log.display", "plain", "--checkpoint.every", "4"]
        peak_of([*train, "--train.steps", "4", "--out", str(run)])
        for length in ("as it was", "long"):
            copy = Path(work, length.replace(" ", "-"))
            shutil.copytree(run, copy, symlinks=True)
            metrics = copy / "metrics.jsonl"
            lines = lengthen(metrics, args.megabytes * 1_000_000 if length == "long" else 0)
            about: Line = {"log": length, "bytes": metrics.stat().st_size, "lines": lines}
            about |= {"hardware": kit.hardware("cpu"), "versions": kit.versions(), "commit": kit.commit()}
            kit.append(log, {"command": "report", **about, **peak_of(["report", str(copy), "--out", f"{work}/page"])})
            resume = ["pretrain", "--out", str(copy), "--resume", "--train.steps", "8"]
            kit.append(log, {"command": "pretrain --resume", **about, **peak_of(resume)})


def table(rows: Sequence[Line]) -> str:
    """The last measurement of each command and length."""
    last = {(row["command"], row["log"]): row for row in rows}
    cells = []
    for command in dict.fromkeys(row["command"] for row in rows):
        short, long = (last[command, length] for length in ("as it was", "long"))
        figures = [kit.mb(long["bytes"], ",.0f"), f"{long['lines']:,}", kit.mb(short["peak"], ",.0f")]
        figures += [kit.mb(long["peak"], ",.0f"), kit.mb(long["peak"] - short["peak"], ",.0f")]
        cells.append([command, *figures, f"{short['seconds']:.0f}", f"{long['seconds']:.0f}"])
    titles = ["command", "log, MB", "lines", "peak, MB: short log", "long log", "the log takes", "seconds: short log"]
    return "\n".join(["# Reading a long log", "", markdown([*titles, "long log"], cells, "lr"), ""])


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser("apollo-optim bench long-log", __doc__)
    parser.add_argument("--megabytes", type=int, default=200, help="of the long log (200)")
    parser.add_argument("--out", type=Path, default=Path("results/trust"), help="long-log.jsonl and .md are kept there")
    parser.add_argument("--table", action="store_true", help="measure nothing, make the table of the log")
    args = parser.parse(argv)
    log = args.out / "long-log.jsonl"
    if not args.table:
        measure(args, log)
    return kit.tabled(log, args.out / "long-log.md", table)


if __name__ == "__main__":
    kit.command(main)
