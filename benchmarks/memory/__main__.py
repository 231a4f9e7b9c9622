"""Peak memory of training: a fresh process for every optimizer, each beside its plan.

    apollo-optim bench memory --sizes llama-60m llama-130m
    apollo-optim bench memory --sizes llama-350m --cases adamw apollo-mini-release --table
    apollo-optim bench memory --run out/llama-7b/metrics.jsonl

The protocol:

1. Every case is a process of its own. It imports everything, notes what it has resident (the import baseline), builds
   the model and the optimizer, and trains some steps on random tokens: no corpus, no checkpoint, no evaluation. Model,
   loss, gradients and step are those of `pretrain`; a peer's optimizer takes the place of ours, on the same matrices.
2. The peak is the most that the process ever had resident (VmHWM), from its start to the end of its last step, less
   the baseline. Weights, gradients and optimizer state are counted tensor by tensor.
3. The plan of the same run, which is made without any of that, is held against it. What is left is named by what was
   measured: pages of the libraries that are loaded on first use (RssFile), blocks that are free and that glibc keeps
   (mallinfo2), the compiler of the step, what else the process keeps between steps beyond weights and
   state (scratch and caches of the libraries), and what was there at the peak alone. They add up to the difference;
   nothing is fitted.
4. glibc is told to give blocks of 128 KiB and more back at once, for all cases alike: what is measured is what training
   takes, not what an allocator has learnt to keep. `--malloc pretrain` leaves it as `pretrain` does: blocks of
   2 MB and more with `release`, glibc's own rule (up to 32 MiB are kept) without.

A peer that is not installed, or that crashes, is a row that says so. Rows are added to `OUT/memory.jsonl`; of the same
measurement the last one counts. The exit code is 1 if a case of ours has other weights or another state than planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from apollo_optim.cli.words import Parser
from apollo_optim.train.config import check
from apollo_optim.train.models import SIZES
from benchmarks import kit
from benchmarks.memory.cases import CASES, config_of
from benchmarks.memory.rows import run_case
from benchmarks.memory.run import in_bytes, of_run
from benchmarks.memory.table import line, newest, table, write


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser("apollo-optim bench memory", __doc__)
    parser.add_argument("--sizes", nargs="+", default=["llama-60m", "llama-130m"], choices=list(SIZES), metavar="SIZE")
    parser.add_argument(
        "--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2, help="everything is there from the second on")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--malloc", choices=["trimmed", "pretrain"], default="trimmed", help="see the protocol")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that a case may take")
    parser.add_argument("--out", type=Path, default=Path("results/memory"), help="where results are kept")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table of what there is")
    parser.add_argument("--run", type=Path, metavar="LOG", help="measure nothing: hold a pretrain run against its plan")
    parser.add_argument("--peak", type=in_bytes, metavar="SIZE", help="of --run, where it was stopped before its end")
    parser.add_argument("--baseline", type=in_bytes, metavar="SIZE", help="of --run, where the log has none")
    args = parser.parse(argv)
    if args.run:
        print(of_run(args.run, args.peak, args.baseline))
        return 0
    shape = {key: getattr(args, key) for key in ("dtype", "batch", "seq", "steps", "checkpointing", "threads")}
    configs = [(name, config_of(CASES[name], size, **shape)) for size in args.sizes for name in args.cases]
    for _, cfg in configs:
        check(cfg)
    log = args.out / "memory.jsonl"
    if args.table:
        print(table(newest(kit.measured(log))))
        return 0
    rows = []
    for name, cfg in configs:
        rows.append(run_case(name, cfg, args.malloc, args.timeout))
        kit.append(log, rows[-1])
        print(line(rows[-1]), flush=True)
    print("\n" + write(newest(kit.read(log)), args.out))
    return 0 if all(row.get("equal", True) for row in rows) else 1


if __name__ == "__main__":
    kit.command(main)
