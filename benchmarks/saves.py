"""How long do the processes of a run stand still for a checkpoint? Ours beside torch's asynchronous one.

    apollo-optim bench saves [--model llama-60m] [--optimizer adamw] [--processes 2] [--rounds 5]

FSDP2 on gloo processes of this machine. `ours`: `train.checkpoint.save`, which the others lend their parts to, flushed
to the disk, until all go on. `async, returns`: `torch.distributed.checkpoint.async_save` of the same tensors, each
process its own parts, until it returns and training could go on; `async, done`: until the files are there. In turn.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from apollo_optim.cli.words import Parser
from apollo_optim.core.storage import nbytes
from apollo_optim.parallel.world import World
from apollo_optim.train import checkpoint
from apollo_optim.train.build import Job, build
from benchmarks import kit
from benchmarks.kit import Line
from benchmarks.processes import config_of, meet, spawned
from benchmarks.table import markdown

LOG = Path("results/processes/saves.jsonl")
WAYS = ("ours", "async, returns", "async, done")


def stepped(args: Any, world: World, out: Path) -> Job:
    """A run after a step, so that there is a state to save."""
    cfg = config_of(args.optimizer, args, "fsdp2", out)
    job = build(cfg, out, world=world)
    for p in job.model.parameters():
        p.grad = torch.zeros_like(p)
    job.optimizer.step()
    job.optimizer.zero_grad()
    return job


def ours(job: Job, out: Path, number: int) -> None:
    """As the event `Save` does it."""
    if job.world.leads:
        checkpoint.save(out, number, job.model, job.state.state_dict(), keep=1)
    else:
        checkpoint.lend(checkpoint.weights(job.model), job.state.state_dict())
    job.world.wait()


def tensors(job: Job) -> dict[str, torch.Tensor]:
    """All that training changes, by name: what both ways save."""
    found = dict(checkpoint.weights(job.model))
    for number, state in job.optimizer.state_dict()["state"].items():
        found |= {f"{number}.{key}": t for key, t in state.items() if isinstance(t, torch.Tensor)}
    return found


def work(rank: int, size: int, port: int, args: Any, folder: Path) -> None:
    """One process of several; the first one writes the log."""
    from torch.distributed.checkpoint.state_dict_saver import async_save

    meet(rank, size, port)
    job, times = stepped(args, World(rank, size, rank), folder / "run"), {way: list[float]() for way in WAYS}
    for number in range(1, args.rounds + 1):
        job.world.wait()
        start = time.perf_counter()
        ours(job, folder / "run", number)
        times["ours"].append(time.perf_counter() - start)
        there = folder / f"async-{number}"
        start = time.perf_counter()
        future: Any = async_save(tensors(job), checkpoint_id=there)
        times["async, returns"].append(time.perf_counter() - start)
        future.result()
        times["async, done"].append(time.perf_counter() - start)
        job.world.wait()
        if job.world.leads:
            shutil.rmtree(there)
    if job.world.leads:
        line: Line = {"model": args.model, "optimizer": args.optimizer, "processes": size, "rounds": args.rounds}
        line["bytes"] = sum(nbytes(t) for t in tensors(job).values())
        line["seconds"] = {way: kit.spread(taken) for way, taken in times.items()}
        kit.append(args.log, line | {"commit": kit.commit(), **kit.hardware("cpu"), "versions": kit.versions()})
    torch.distributed.destroy_process_group()


def table(lines: Sequence[Line]) -> str:
    """The newest line of every case."""
    newest = {(line["model"], line["optimizer"], line["processes"]): line for line in lines}
    rows = [
        [*map(str, case), kit.mb(line["bytes"], ",.0f"), *(kit.told(line["seconds"][way]) for way in WAYS)]
        for case, line in sorted(newest.items())
    ]
    return markdown(["model", "optimizer", "processes", "MB", *(f"{way}, s" for way in WAYS)], rows, "llr")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser("apollo-optim bench saves", __doc__)
    parser.add_argument("--model", default="llama-60m")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--log", type=Path, default=LOG, help="a line a run; the table lies beside it, as .md")
    args = parser.parse(argv)
    args.steps, args.log = 1, args.log.resolve()
    with tempfile.TemporaryDirectory() as folder:
        spawned(args.processes, work, args, Path(folder))
    kit.keep_table(args.log.with_suffix(".md"), "Standing still for a checkpoint", table(kit.measured(args.log)))
    return 0


if __name__ == "__main__":
    kit.command(main)
