"""Is a run the same in one process and in several? Every optimizer, DDP and FSDP2, on gloo processes of this machine.

    python -m benchmarks.processes [--optimizers NAME ...] [--processes 2 4] [--modes ddp fsdp2 hsdp] [--steps 30]

The command's own `pretrain`, with its default settings: the same global batch, one seed. For each run of several
processes: the largest difference of a weight from the run of one process (of its norm, over all weights), of low-bit
ones the share of codes that are others (in the log), the largest of a step's loss (relative), tokens a second beside
one process's, bytes of weights and optimizer state of the leading process beside all, and the peak of every process.
The processes share the machine's cores, so tokens a second say what the engine costs, not what more machines gain.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from apollo_optim import list_optimizers
from apollo_optim.cli.words import Parser
from apollo_optim.report import read_events
from apollo_optim.rules import RULES
from apollo_optim.train.config import RunConfig, load_config, save_config
from apollo_optim.train.pretrain import pretrain
from benchmarks import kit
from benchmarks.kit import Line
from benchmarks.table import markdown

LOG = Path("results/processes/processes.jsonl")


def config_of(name: str, args: Any, mode: str, out: Path) -> RunConfig:
    """A small LLaMA on Python's own source, everything else as it is by default."""
    cfg = RunConfig()
    cfg.model.name, cfg.data.vocab_size, cfg.data.seq_len = args.model, 1024, 64
    cfg.optim.name, cfg.optim.lr = name, 1e-3
    cfg.parallel.mode = mode  # type: ignore[assignment]
    cfg.train.steps, cfg.train.batch_size, cfg.train.micro_batch, cfg.train.threads = args.steps, 8, 2, 1
    cfg.eval.every, cfg.eval.tokens = None, 2048
    cfg.checkpoint.every, cfg.checkpoint.keep = None, 1
    cfg.log.every, cfg.log.display = 1, "none"
    cfg.out = str(out)
    return cfg


def meet(rank: int, size: int, port: int) -> None:
    """One process of several, of one thread: it meets the others."""
    meeting = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in meeting.items()}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")


def spawned(size: int, work: Callable[..., None], *args: Any) -> None:
    """`work(rank, size, port, *args)` in `size` new processes. An exception in one of them is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(work, args=(size, port, *args), nprocs=size)  # type: ignore[no-untyped-call]


def rank_for(rule: str, rank: int) -> dict[str, Any]:
    """The rank as a knob, for a rule that must be given one."""
    cls = RULES[rule]
    return {"rank": rank} if "rank" in cls.knobs().keys() - cls.defaults().keys() else {}


def work(rank: int, size: int, port: int, jobs: Sequence[tuple[Path, bool]]) -> None:
    """One process of several, which have to meet only once: it trains (or resumes) one run file after the other."""
    meet(rank, size, port)
    for file, resume in jobs:
        pretrain(load_config(file), resume=resume)
    torch.distributed.destroy_process_group()


def train(size: int, runs: Sequence[tuple[RunConfig, bool]], work: Callable[..., None] = work) -> None:
    """Train runs (and whether to resume) in `size` new processes. An exception in one of them is raised here.

    `work`: what each of them does.
    """
    jobs = []
    for cfg, resume in runs:
        jobs.append((Path(f"{cfg.out}.yaml"), resume))
        save_config(cfg, jobs[-1][0])
    spawned(size, work, jobs)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Of the exported model."""
    return read(run / "model")


def read(folder: Path, files: str = "*") -> dict[str, torch.Tensor]:
    """The tensors of its safetensors files."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob(f"{files}.safetensors")) for name, t in load_file(file).items()}


def found(run: Path, one: Path) -> Line:
    """What a run of several processes differs in from that of one, and what both took."""
    ours, base = weights(run), weights(one)
    steps = [[e for e in read_events(path / "metrics.jsonl") if e["event"] == "step"] for path in (run, one)]
    memory = [next(e for e in read_events(path / "metrics.jsonl") if e["event"] == "memory") for path in (run, one)]
    end = next(e for e in read_events(run / "metrics.jsonl") if e["event"] == "end")
    paces = [(s[-1]["tokens"] - s[4]["tokens"]) / (s[-1]["seconds"] - s[4]["seconds"]) for s in steps]
    return {
        "weights": max(float((t - ours[name]).norm() / t.norm()) for name, t in base.items()),
        **other_codes(run, one),
        "loss": max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(*steps, strict=True)),
        "tokens_per_s": paces[0],
        "tokens_per_s_of_one": paces[1],
        "bytes": {key: memory[0][key] for key in ("weights", "gradients", "optimizer")},
        "bytes_of_one": {key: memory[1][key] for key in ("weights", "gradients", "optimizer")},
        "peak_by_rank": end["peak_by_rank"],
    }


def other_codes(run: Path, one: Path) -> Line:
    """The share of low-bit weights' codes that are others in the last checkpoint; nothing of float weights."""
    ours, its = (read(path / "checkpoints" / "latest", "weights-*") for path in (run, one))
    names = [name for name in its if name.endswith(".codes")]
    others = sum(int((ours[name] != its[name]).sum()) for name in names)
    return {"codes": others / sum(its[name].numel() for name in names)} if names else {}


def measure(args: Any) -> None:
    """One run of one process each, then all that several make, number after number of them."""
    with tempfile.TemporaryDirectory() as work_dir:
        folder = Path(work_dir)
        for name in args.optimizers:
            pretrain(config_of(name, args, "ddp", folder / f"{name}-1"))
            print(f"{name}: one process", flush=True)
        for size in args.processes:
            jobs = [(name, mode) for name in args.optimizers for mode in args.modes]
            outs = [folder / f"{name}-{mode}-{size}" for name, mode in jobs]
            cfgs = [config_of(name, args, mode, out) for (name, mode), out in zip(jobs, outs, strict=True)]
            train(size, [(cfg, False) for cfg in cfgs])
            for (name, mode), out in zip(jobs, outs, strict=True):
                line: Line = {"optimizer": name, "mode": mode, "processes": size, "model": args.model}
                line |= {"steps": args.steps, **found(out, folder / f"{name}-1"), **kit.hardware("cpu")}
                kit.append(args.log, line | {"commit": kit.commit(), "versions": kit.versions()})
                print(f"{name}, {mode} of {size}: {line['weights']:.1e}", flush=True)


def table(lines: Sequence[Line]) -> str:
    """The newest line of every case."""
    newest = {(line["optimizer"], line["mode"], line["processes"]): line for line in lines}
    rows = []
    for (name, mode, size), line in sorted(newest.items()):
        state = line["bytes"]["optimizer"] / max(line["bytes_of_one"]["optimizer"], 1)
        kept = line["bytes"]["weights"] / line["bytes_of_one"]["weights"]
        pace = line["tokens_per_s"] / line["tokens_per_s_of_one"]
        peaks = ", ".join(kit.mb(peak, ".0f") for peak in line["peak_by_rank"])
        differ = [f"{line[key]:.1e}" for key in ("weights", "loss")]
        rows.append([name, mode, str(size), *differ, f"{kept:.2f}", f"{state:.2f}", f"{pace:.2f}", peaks])
    head = ["optimizer", "mode", "processes", "weights differ", "losses differ", "weights kept", "state kept"]
    return markdown([*head, "tokens/s, x one process", "peak of each, MB"], rows, "lr")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    names = [recipe.name for recipe in list_optimizers()]
    parser = Parser("python -m benchmarks.processes", __doc__)
    parser.add_argument("--optimizers", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--modes", nargs="+", choices=("ddp", "fsdp2", "hsdp"), default=["ddp", "fsdp2"])
    parser.add_argument("--model", default="llama-1m")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--log", type=Path, default=LOG, help="a line a run; table.md lies beside it")
    parser.add_argument("--table", action="store_true", help="measure nothing, make the table of the log")
    args = parser.parse(argv)
    if not args.table:
        measure(args)
    kit.keep_table(args.log.with_name("table.md"), "One process and several", table(kit.measured(args.log)))
    return 0


if __name__ == "__main__":
    kit.command(main)
