"""Kill processes of a run of several with `kill -9`, let torchrun start it again (or resume it), compare to the bit.

    apollo-optim bench kill-processes [--runs 10] [--processes 2] [--mode fsdp2]

Three kinds in turn: `one`: a process, at a random moment; `save`: a process, while a checkpoint is half-written; `all`:
torchrun and all processes, at a random moment. After the first two torchrun (`--max-restarts 1`) starts all of them
again by itself, after the third the same command is given with `--resume`. Step, tokens, loss, gradient norm and
evaluations of every step and the bytes of weights and optimizer state at the end must be those of a run of as many
processes that was never stopped. One JSON line a killed run; what is in the log already (by number, mode and processes)
is not done again. Exit code 0 if all of the log are equal.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apollo_optim.cli.words import Parser
from apollo_optim.train.config import RunConfig, save_config
from benchmarks import kit
from benchmarks.kill import expect, figures, final_files, fingerprint, records, two_runs, wait_for_first_step
from benchmarks.kit import Line

LOG = Path("results/processes/kills.jsonl")
KINDS = ("one", "save", "all")
TRIES = 20


def config_of(mode: str, steps: int) -> RunConfig:
    """The small fp32 run of `bench kill`, in several processes."""
    cfg = two_runs(steps)["float32"]
    cfg.parallel.mode = mode  # type: ignore[assignment]
    return cfg


def start(
    cfg: RunConfig, run: Path, processes: int, *words: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """torchrun, of which a process that is killed costs a restart; `environment`: beside what is there."""
    path = run.with_suffix(".yaml")
    save_config(dataclasses.replace(cfg, out=str(run)), path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    command += ["--nproc-per-node", str(processes), "-m", "apollo_optim", "pretrain", "--config", str(path), *words]
    with run.with_suffix(".log").open("ab") as said:
        env = os.environ | (environment or {})
        return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=env)


def workers(parent: int) -> list[int]:
    """The processes that torchrun has started, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            status = (process / "stat").read_text().rpartition(") ")[2].split()
            words = (process / "environ").read_text().split("\0")
        except OSError:  # gone meanwhile
            continue
        rank = next((word for word in words if word.startswith("RANK=")), None)
        if int(status[1]) == parent and rank is not None:
            found[int(rank.removeprefix("RANK="))] = int(process.name)
    return [found[rank] for rank in sorted(found)]


def killed(kind: str, cfg: RunConfig, run: Path, processes: int, seconds: float, chance: random.Random) -> Line | None:
    """Start, kill, wait for the end; None if there was nothing to kill any more, or no half-written checkpoint."""
    child = start(cfg, run, processes)
    wait_for_first_step(child, run)
    victim = chance.randrange(processes)
    if kind == "save":
        while not list((run / "checkpoints").glob(".tmp-*")) and child.poll() is None:
            time.sleep(0.0005)
    else:
        time.sleep(chance.uniform(0, seconds))
    ranks = workers(child.pid)
    if child.poll() is not None or len(ranks) < processes or (run / "model").exists():
        child.wait()
        return None
    at_step = max((record["step"] for record in records(run) if record["event"] == "step"), default=0)
    for pid in [child.pid, *ranks] if kind == "all" else [ranks[victim]]:
        os.kill(pid, signal.SIGKILL)
    half_written = bool(list((run / "checkpoints").glob(".tmp-*")))
    code = child.wait()
    if kind == "all":
        code = start(cfg, run, processes, "--resume").wait()
    if code != 0:
        said = [line for line in run.with_suffix(".log").read_text().splitlines() if "error" in line.lower()]
        raise SystemExit("\n".join([f"{run.name} did not come back:", *said]))
    starts = [record["resumed_from"] for record in records(run) if record["event"] == "start"]
    if len(starts) < 2 or (kind == "save" and not half_written):
        return None
    return {"at_step": at_step, "victim": None if kind == "all" else victim, "resumed_from": starts[-1]}


def compared(run: Path, whole: Path) -> Line:
    """Figures that are not the same, and whether the bytes of the last checkpoint are."""
    ours, theirs = figures(run), figures(whole)
    different = sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))
    return {"lines": len(theirs), "different": different, "same_bytes": final_files(run) == final_files(whole)}


def campaign(args: Any) -> None:
    """Every run of it that is not in the log yet."""
    kinds = {number: KINDS[number % len(KINDS)] for number in range(args.runs)}
    of = {"mode": args.mode, "processes": args.processes, "steps": args.steps}
    there = {line["number"] for line in kit.read(args.log) if of.items() <= line.items()}
    if kinds.keys() <= there:
        return
    cfg, source = config_of(args.mode, args.steps), fingerprint()
    with tempfile.TemporaryDirectory(prefix="kill-") as directory:
        whole = Path(directory) / "whole"
        child = start(cfg, whole, args.processes)
        wait_for_first_step(child, whole)
        first = time.monotonic()
        expect(child.wait() == 0, "the run that nobody killed failed")
        seconds = time.monotonic() - first
        for number in sorted(kinds.keys() - there):
            chance, run = random.Random(number), Path(directory) / f"run-{number}"
            for _ in range(TRIES):
                if (found := killed(kinds[number], cfg, run, args.processes, seconds, chance)) is not None:
                    break
                print(f"{number}: it came too early or too late, once more", flush=True)
                shutil.rmtree(run)
            if found is None:
                raise SystemExit(f"error: {number}: none of {TRIES} kills of the kind {kinds[number]!r} was in time")
            line: Line = {"number": number, "kind": kinds[number], **of, **found, **compared(run, whole)}
            expect(source == fingerprint(), "the package was edited meanwhile: these runs cannot be compared")
            kit.append(args.log, line | {"commit": kit.commit(), "versions": kit.versions()})
            print(f"{number}: {line}", flush=True)
            shutil.rmtree(run)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser("apollo-optim bench kill-processes", __doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--mode", choices=("ddp", "fsdp2", "hsdp"), default="fsdp2")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--log", type=Path, default=LOG)
    args = parser.parse(argv)
    campaign(args)
    lines = kit.measured(args.log)
    wrong = [line["number"] for line in lines if line["different"] or not line["same_bytes"]]
    print(
        f"{len(lines) - len(wrong)} of {len(lines)} killed runs are equal to the bit to the one that was never stopped"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    kit.command(main)
