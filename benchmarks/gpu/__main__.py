"""What a person with a GPU runs: within eight minutes, a log, a table and a picture of all that matters there.

    python -m benchmarks.gpu --out results/gpu/NAME          everything, in order of worth
    python -m benchmarks.gpu --parts step,7b --out OUT       some of it
    python -m benchmarks.gpu --device cpu                    every part on a tiny model, as a test does
    python -m benchmarks.gpu --tiny                          the same on the GPU: half a minute, before the real thing
    python -m benchmarks.gpu --table results/gpu/NAME        table and picture again, from the log

Nothing is downloaded. Needs torch and transformers; pytest, rich and matplotlib are used where they are. Every part
has its time and processes of its own, and whatever was measured is in OUT/log.jsonl at once: a run that is cut off
leaves it there. Exit code: 0; 1 if something failed or differs; 2 if it could not begin.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import kit, table
from benchmarks.cases import Child, Running
from benchmarks.gpu import report
from benchmarks.gpu.parts import PARTS, Part, Setup

COLD = 45
"""Seconds more for the first process of all, which reads torch from a cold disk."""
TOTAL = 475
"""Seconds that the default parts may take together: for a cold disk, the others have less then."""
CORES = 8
"""From so many on, what needs no device runs beside what does."""


class CannotBegin(Exception):
    """One line: what is wrong, and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    args = parser().parse_args(argv)
    try:
        if args.table:
            return redraw(args.table)
        out = args.out or Path("out/gpu", time.strftime("%Y%m%d-%H%M%S"))
        chosen = choose(args.parts)
        return run(Setup(args.device, args.tiny or args.device == "cpu"), chosen, out)
    except CannotBegin as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(f"{part.name} ({part.seconds} s: {part.says})" for part in PARTS)
    words.add_argument("--device", default="cuda", help="cuda (default), cuda:1, cpu, mps, xpu")
    words.add_argument("--parts", metavar="A,B", help=f"of: {names}")
    words.add_argument("--out", type=Path, help="a folder for log, table and picture; default: out/gpu/TIME")
    words.add_argument("--tiny", action="store_true", help="a tiny model in every part (always so on a cpu)")
    words.add_argument("--table", type=Path, metavar="LOG", help="measure nothing: a log, or the folder that it is in")
    return words


def choose(names: str | None) -> list[Part]:
    """The parts of these names, in their order; the environment always comes first."""
    known = {part.name: part for part in PARTS}
    wanted = [name.strip() for name in names.split(",") if name.strip()] if names else []
    for name in wanted:
        if name not in known:
            raise CannotBegin(f"--parts {name}: there are {', '.join(known)}")
    if not wanted:
        return [part for part in PARTS if part.by_default]
    return [part for part in PARTS if part.name in ("env", *wanted)]


def run(setup: Setup, chosen: Sequence[Part], out: Path) -> int:
    """Part after part, then what the log says."""
    log = out / "log.jsonl"
    if log.exists():
        raise CannotBegin(f"{log} is there already: choose another --out, or look at it with --table {log}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotBegin(f"--out {out}: {error.strerror}") from None
    scratch = out / "scratch"
    scratch.mkdir(exist_ok=True)
    env = {"TORCHINDUCTOR_CACHE_DIR": str((scratch / "inductor").resolve())}  # nothing was compiled yesterday
    env["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
    if setup.device == "cpu":
        env["OMP_NUM_THREADS"] = "1"  # threads of tiny operations only wait for each other
    patience = 3 if setup.device == "cpu" else 1  # a test's machine has other things to do
    end = time.time() + patience * seconds_of(chosen)
    aside = [part for part in chosen if part.background and (os.cpu_count() or 1) >= CORES]
    beside: list[Child] = []
    # whoever stops this, stops what it has started
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for part in chosen:
            if part not in aside:
                seconds = patience * part.seconds + (COLD if part.name == "env" else 0)
                one_part(part, setup, log, min(seconds, end - time.time()), env)
            if part.name == "env":
                check_usable(log, setup, chosen, out)
                none = env | {"CUDA_VISIBLE_DEVICES": ""}
                beside += [Child(p.cases(setup), log, end - time.time(), env=none, background=True) for p in aside]
        for child in beside:
            child.wait()
    except KeyboardInterrupt:
        print("stopped; what was measured so far:", file=sys.stderr)
    finally:
        for child in beside:
            child.stop()
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(scratch, ignore_errors=True)
    return say(log)


def seconds_of(chosen: Sequence[Part]) -> int:
    """That all of them may take, a cold disk included."""
    seconds = sum(part.seconds for part in chosen if not part.background)
    return max(seconds, min(seconds + COLD, TOTAL))


def one_part(part: Part, setup: Setup, log: Path, seconds: float, env: dict[str, str]) -> None:
    """Its cases, each in a process with its share of the time that is left; tiny ones are always together."""
    end, cases = time.time() + seconds, part.cases(setup)
    groups = [cases] if setup.tiny or part.together else [[case] for case in cases]
    for i, group in enumerate(groups):
        shares = [sum(case.share for case in later) for later in groups[i:]]
        mine = (end - time.time()) * shares[0] / sum(shares)
        names = " ".join([part.name, *(case.name for case in group)])
        if mine < 2.0:
            print(f"{names}: no time left", flush=True)
            for case in group:
                Running(case, log, end).skipped("no time left")
            continue
        print(f"{names}: up to {mine:.0f} s ... ", end="", flush=True)
        started = time.time()
        Child(group, log, mine, env=env).wait()
        names_there = {case.name for case in group}
        lines = [line for line in kit.read(log) if line["part"] == part.name and line["case"] in names_there]
        print(f"{time.time() - started:.0f} s, {report.in_short(lines)}", flush=True)


def check_usable(log: Path, setup: Setup, chosen: Sequence[Part], out: Path) -> None:
    """Go no further without a device."""
    lines = kit.read(log)
    device = next((line for line in lines if line.get("what") == "device"), None)
    if device is not None and device["usable"]:
        return
    reason = device["reason"] if device else next((line["reason"] for line in lines if "reason" in line), "no answer")
    log.unlink(missing_ok=True)
    for folder in (out / "scratch", out / "output"):
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # there is something else in it
        out.rmdir()
    what = ", ".join(part.name for part in chosen)
    raise CannotBegin(
        f"no device {setup.device!r} here ({reason}), or this would measure {what} in up to {seconds_of(chosen)} s and "
        "write log.jsonl, table.txt and picture.png; --device cpu does all of it on a tiny model"
    )


def redraw(path: Path) -> int:
    """Table and picture of a log."""
    log = path / "log.jsonl" if path.is_dir() else path
    if not log.is_file():
        raise CannotBegin(f"--table {path}: there is no log")
    return say(log)


def say(log: Path) -> int:
    """Print the table, write it and the picture beside the log; 1 if something failed or differs."""
    if not log.is_file():
        return 1
    lines = kit.read(log)
    tables = report.tables(lines)
    table.show(tables)
    (log.parent / "table.txt").write_text(table.plain(tables), encoding="utf-8")
    print(f"\n{log}, table.txt" + (", picture.png" if report.draw(lines, log.parent / "picture.png") else ""))
    faults = report.faults(lines)
    for line in faults:
        print(f"error: {line}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
