"""A long run of several processes: does memory grow, is a file, a process or a socket left behind?

    apollo-optim bench soak [--steps 2000] [--processes 2] [--mode fsdp2]

The small run of `bench kill-processes` under torchrun, with a save every 8 steps and an evaluation every 10. About
once a second each rank's resident memory, open files and sockets are read from /proc. The slope of the memory is a
least-squares line through the means of 20 equal stretches of the steps after the first tenth (in which buffers,
caches and the compiler's code find their size): resident memory is noisy from one second to the next, and means of
stretches are nearly independent, so that the standard error is an honest one. glibc is told to give blocks of 128 KiB
and more back at once: what it keeps of what was set free goes up and down by megabytes. Growth is a slope of more
than two standard errors *and* of more than 1 kB a step. At the end nothing may be left: no process of the run, no
file in its own temporary directory (but torch's own folders), no half-written checkpoint, no more checkpoints than
were asked for, nothing new in /dev/shm. Exit code 1 if the run failed, memory grows, or something is left. One JSON
line a run, with all stretches.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from apollo_optim.cli.words import Parser
from benchmarks import kit
from benchmarks.kill import records, wait_for_first_step
from benchmarks.kill_processes import config_of, start, workers
from benchmarks.kit import Line

LOG = Path("results/processes/soak.jsonl")
STRETCHES = 20
GROWS = 1_000
"""Bytes a step that matter: a run of a million steps would take 1 GB more at its end."""
SHARED = Path("/dev/shm")
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17), "MALLOC_TRIM_THRESHOLD_": str(1 << 17)}
TORCHS = ("torchinductor_", "torchelastic_")
"""Folders that torch itself keeps in the temporary directory: compiled code for the next run, and torchrun's logs."""


def held(pid: int) -> Line:
    """What a process has: resident bytes, open files (sockets among them), sockets."""
    process = Path(f"/proc/{pid}")
    resident = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    links = []
    for handle in (process / "fd").iterdir():
        try:
            links.append(os.readlink(handle))
        except FileNotFoundError:  # closed meanwhile
            continue
    return {"resident": resident, "files": len(links), "sockets": sum(link.startswith("socket:") for link in links)}


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of the least-squares line through (step, value): the slope and its standard error, both a step."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    line = statistics.linear_regression(steps, values)
    rest = [value - line.slope * step - line.intercept for step, value in points]
    spread = sum((step - statistics.fmean(steps)) ** 2 for step in steps)
    return line.slope, (sum(r * r for r in rest) / (len(points) - 2) / spread) ** 0.5


def stretches(samples: Sequence[Line], steps: int) -> list[Line]:
    """The means of a rank's samples in each stretch of the steps after the first tenth."""
    first, found = steps / 10, []
    width = (steps - first) / STRETCHES
    for number in range(STRETCHES):
        begin = first + number * width
        among = [sample for sample in samples if begin <= sample["step"] < begin + width]
        if among:
            means = {key: statistics.fmean(sample[key] for sample in among) for key in ("step", "resident")}
            least = {
                key: min(sample[key] for sample in among) for key in ("files", "sockets")
            }  # a save opens some more
            found.append(means | least | {"samples": len(among)})
    return found


def remaining(run: Path, keep: int, temporary: Path, shared: set[str]) -> list[str]:
    """What lies where nothing should after the end, in words."""
    checkpoints = [path.name for path in (run / "checkpoints").iterdir() if not path.is_symlink()]
    left = [f"{run.name}/checkpoints/{name}" for name in checkpoints if name.startswith(".tmp-")]
    whole = [name for name in checkpoints if name.startswith("step-")]
    left += [f"{len(whole)} checkpoints, {keep} were asked for"] * (len(whole) > keep)
    left += [f"temporary {path.name}" for path in temporary.iterdir() if not path.name.startswith(TORCHS)]
    left += [f"/dev/shm/{name}" for name in sorted(set(os.listdir(SHARED)) - shared)]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "environ").read_text().split("\0")
        except OSError:  # gone, or another user's
            continue
        if f"TMPDIR={temporary}" in command:
            left.append(f"process {process.name}")
    return left


def soak(steps: int, processes: int, mode: str) -> Line:
    """The run, watched to its end."""
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        run, temporary = Path(directory) / "run", Path(directory) / "tmp"
        temporary.mkdir()
        shared, cfg = set(os.listdir(SHARED)), config_of(mode, steps)
        cfg.out = str(run)
        samples: list[list[Line]] = [[] for _ in range(processes)]
        began, told = time.monotonic(), 0.0
        child = start(cfg, run, processes, environment={"TMPDIR": str(temporary), **GIVEN_BACK})
        wait_for_first_step(child, run)
        while child.poll() is None:
            step = max((record["step"] for record in records(run) if record["event"] == "step"), default=0)
            try:
                now = [held(pid) for pid in workers(child.pid)]
            except OSError:  # it ends just now
                continue
            for mine, found in zip(samples, now, strict=False):
                mine.append({"step": step, **found})
            if time.monotonic() - told > 30 and samples[0]:
                told = time.monotonic()
                print(f"step {step:,}/{steps:,}: " + ", ".join(kit.mb(found["resident"]) for found in now), flush=True)
            time.sleep(1)
        line: Line = {"mode": mode, "processes": processes, "steps": steps, "seconds": time.monotonic() - began}
        line |= {"code": child.wait(), "saves": steps // 8, "evaluations": steps // 10}
        line["left"] = remaining(run, cfg.checkpoint.keep, temporary, shared)
        line["ranks"] = []
        for mine in samples:
            means = stretches(mine, steps)
            rate, error = slope([(mean["step"], mean["resident"]) for mean in means])
            line["ranks"].append({"slope": rate, "error": error, "stretches": means})
        return line


def faults(line: Line) -> list[str]:
    """What is wrong with a run that was watched, in words."""
    found = [f"it ended with {line['code']}"] * (line["code"] != 0) + [f"left behind: {what}" for what in line["left"]]
    for rank, of in enumerate(line["ranks"]):
        if of["slope"] > max(2 * of["error"], GROWS):
            found.append(f"memory of rank {rank} grows by {of['slope']:,.0f} bytes a step")
        for key in ("files", "sockets"):
            first, last = of["stretches"][0][key], of["stretches"][-1][key]
            found += [f"rank {rank} has {last} {key} open, {first} at first"] * (last > first)
    return found


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser("apollo-optim bench soak", __doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--mode", choices=("ddp", "fsdp2", "hsdp"), default="fsdp2")
    parser.add_argument("--log", type=Path, default=LOG)
    args = parser.parse(argv)
    line = soak(args.steps, args.processes, args.mode)
    kit.append(args.log, line | kit.hardware("cpu") | {"commit": kit.commit(), "versions": kit.versions()})
    for rank, of in enumerate(line["ranks"]):
        last = of["stretches"][-1]
        print(
            f"rank {rank}: {kit.mb(last['resident'])} MB at the end, slope {of['slope']:,.0f} +- {of['error']:,.0f} "
            f"bytes a step, {last['files']} files open, {last['sockets']} of them sockets"
        )
    print(f"{line['steps']:,} steps, {line['saves']} saves, {line['evaluations']} evaluations: ", end="")
    print("; ".join(faults(line)) or "memory is flat, nothing is left behind")
    return 1 if faults(line) else 0


if __name__ == "__main__":
    kit.command(main)
