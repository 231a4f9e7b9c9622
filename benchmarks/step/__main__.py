"""The time of a step: ours, the installed peers and torch's fused AdamW, interleaved in one process.

    apollo-optim bench step --sizes llama-350m
    apollo-optim bench step --sizes llama-60m --layers 2 --rounds 5 --contenders apollo-mini apollo-torch-mini
    apollo-optim bench step --table

The protocol:

1. The parameters of a LLaMA of that size, random weights and gradients, shared by everybody: each contender steps the
   same tensors, with a state of its own, through two optimizers, one of the matrices (attention and MLP) and one of the
   rest (embedding, head, norms). Everything included is the sum of both.
2. First steps, one contender after the other, compilation included and from an empty compiler cache. Every parameter
   must have moved afterwards.
3. Rounds. In each one everybody steps once, and the first of a round is the second of the one before's. The first
   `--warmup` rounds are thrown away. What does not fit in memory at once runs in batches, each with a fused AdamW of
   its own.
4. A figure is the median over the rounds; the ratio to fused AdamW is also taken round by round, in pairs. Quartiles
   say how much to believe.
5. One more step of each is profiled for the memory that it allocates beyond weights, gradients and state.
6. `--schedule-steps` steps of a small model with a cosine learning rate: how many graphs are compiled after the first.

The byte floor is what a step has to move: the gradient as often as the rule must read it, the weight read and written,
the tensors of the state read and written (projections: read). Beside it stands AdamW's.

Not seen: steps that draw a new projection (one in 200; a first step is one), scratch memory inside single kernels,
memory that a library takes past torch's allocator, and the cache: tensors that fit into it move fewer bytes.

Everything goes into `OUT/steps.jsonl`, a line for each contender, size and dtype with all of its times; `OUT/table.md`
and `OUT/steps.png` are made of its newest lines, `--table` makes them again. Exit code 1 if one of ours crashed,
recompiled or left a parameter where it was.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from apollo_optim.cli.words import Parser
from apollo_optim.core.errors import InputError
from apollo_optim.train.models import DTYPES, SIZES
from benchmarks import kit
from benchmarks.kit import Line
from benchmarks.step.contenders import BASELINE, CONTENDERS
from benchmarks.step.rounds import empty_compiler_cache, run_batch, schedule
from benchmarks.step.stage import Setting, available, in_batches, needs
from benchmarks.step.table import SHORT, draw, table

SCHEDULE_SIZE = "llama-1m"  # graphs are counted by shape, so a small one says as much


def describe(name: str, setting: Setting) -> Line:
    """What a line of the log says of the contender, the model and the machine."""
    contender = CONTENDERS[name]
    return {
        "contender": name,
        "size": setting.size,
        "dtype": setting.dtype,
        "cut": setting.cut,
        "rank": None if contender.rank is None else contender.rank or setting.rank,
        "versions": kit.versions(contender.package),
        "hardware": kit.hardware(str(setting.device)),
        "commit": kit.commit(),
    }


def rank_for(size: str, rank: int) -> int:
    """The rank of the run, or a quarter of a small side that is no larger."""
    small = SIZES[size].hidden
    return rank if rank < small else small // 4


def measure_steps(setting: Setting, names: Sequence[str], args: argparse.Namespace, log: Path) -> None:
    """All contenders on one model: the lines of the log are written batch by batch."""
    limit = args.memory * 1e9 if args.memory else available(setting.device)
    chosen = [name for name in names if setting.dtype in CONTENDERS[name].dtypes]
    absent = {name: "not installed" for name in chosen if CONTENDERS[name].missing()}
    need = needs(setting, [BASELINE, *chosen])
    batches, refused = in_batches([name for name in chosen if name not in absent], need, limit)
    for name, error in (absent | refused).items():
        kit.append(log, {"kind": "step", "batch": None, **describe(name, setting), "error": error})
    for number, batch in enumerate(batches, 1):
        print(f"{setting.size} {SHORT[setting.dtype]} {setting.cut}: batch {number} of {len(batches)}", flush=True)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S") + f"-{time.time_ns() % 10**9:09d}"
        entries = run_batch(batch, setting, args.warmup, args.rounds)
        common = {"batch": stamp, "rounds": args.rounds, "warmup": args.warmup, "load": os.getloadavg()[0]}
        for e in entries:
            kit.append(log, {"kind": "step", **describe(e.name, setting), **common, **e.found})
        del entries
        gc.collect()


def at_fault(rows: Sequence[Line]) -> list[str]:
    """What must not happen to ours, one line each."""
    lines = []
    for row in rows:
        c = CONTENDERS[row["contender"]]
        if c.package != "apollo-optim":
            continue
        where = f"{row['contender']}, {row['size']} {SHORT[row['dtype']]}"
        if "error" in row and not row["error"].startswith("does not fit"):
            lines.append(f"{where}: {row['error']}")
        if row.get("recompiled"):
            lines.append(f"{where}: {row['recompiled']} graphs compiled after the first step of a schedule")
        if row.get("untouched"):
            lines.append(f"{where}: {row['untouched']} parameters left as they were")
    return lines


def parser() -> Parser:
    """The command line."""
    words = Parser("apollo-optim bench step", __doc__)
    sizes = ["llama-60m", "llama-130m", "llama-350m", "llama-1b"]
    words.add_argument("--out", type=Path, default=Path("results/step"), help="where log, table and chart are kept")
    words.add_argument("--sizes", nargs="+", default=sizes, choices=list(SIZES), metavar="SIZE", help=", ".join(SIZES))
    words.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES), metavar="DTYPE")
    words.add_argument(
        "--contenders",
        nargs="+",
        default=list(CONTENDERS),
        choices=list(CONTENDERS),
        metavar="NAME",
        help=f"{BASELINE} always steps, too; of {', '.join(CONTENDERS)}",
    )
    words.add_argument("--rank", type=int, default=256, help="of APOLLO, GaLore and Fira; not of APOLLO-Mini")
    words.add_argument("--rounds", type=int, default=20, help="measured rounds")
    words.add_argument("--warmup", type=int, default=3, help="rounds before them, after the first step")
    words.add_argument("--threads", type=int, help="of torch; its default")
    words.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    words.add_argument("--memory", type=float, help="GB that may be used; 90 %% of what is free")
    words.add_argument("--layers", type=int, help="cut the models to so many layers, for a quick look")
    words.add_argument("--schedule-steps", type=int, default=1000, help="of the search for recompilations; 0: none")
    words.add_argument("--table", action="store_true", help="measure nothing, make table and chart of the log")
    return words


def check(args: argparse.Namespace) -> None:
    """Raises InputError for what cannot be measured."""
    least_of = {"rounds": 2, "warmup": 0, "rank": 1, "layers": 1, "threads": 1, "schedule_steps": 0}
    for name, least in least_of.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: it must be at least {least}")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {args.device}: torch finds no CUDA device here; leave it out for the CPU")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    args = parser().parse(argv)
    log = args.out / "steps.jsonl"
    faults: list[str] = []
    if not args.table:
        check(args)
        before = len(kit.read(log))
        threads, device = torch.get_num_threads(), torch.device(args.device)
        torch.set_num_threads(args.threads or threads)
        try:
            with empty_compiler_cache():
                measure_all(args, device, log)
        finally:
            torch.set_num_threads(threads)
        faults = at_fault(kit.read(log)[before:])
    rows = kit.measured(log)
    text = table(rows)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    draw(rows, args.out / "steps.png")
    print(text, end="")
    for line in faults:
        print(f"error: {line}", file=sys.stderr)
    return 1 if faults else 0


def measure_all(args: argparse.Namespace, device: torch.device, log: Path) -> None:
    """Recompilations, then steps."""
    for dtype in args.dtypes if args.schedule_steps else ():
        setting = Setting(SCHEDULE_SIZE, dtype, None, rank_for(SCHEDULE_SIZE, args.rank), device)
        for name in args.contenders:
            if dtype in CONTENDERS[name].dtypes and not CONTENDERS[name].missing():
                found = schedule(name, setting, args.schedule_steps)
                kit.append(log, {"kind": "schedule", **describe(name, setting), **found})
                print(f"schedule, {SHORT[dtype]}: {name}: {found}", flush=True)
    for size in args.sizes:
        for dtype in args.dtypes:
            setting = Setting(size, dtype, args.layers, rank_for(size, args.rank), device)
            measure_steps(setting, args.contenders, args, log)


if __name__ == "__main__":
    kit.command(main)
