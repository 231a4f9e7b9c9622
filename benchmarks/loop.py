"""What the loop of `pretrain` costs beside forward, backward and step, and tokens a second with each optimizer.

    apollo-optim bench loop --model llama-9m --optimizers adamw apollo apollo-mini

A bare loop (forward, backward, `step()`, `zero_grad()` on batches that are there; nothing drawn, logged or saved)
trains the same model with torch's fused AdamW and with each of our optimizers, and `pretrain` trains it with each of
ours. In every round all of them run once, in turn, so that another program on the machine slows down all of them;
ratios are taken round by round.

**loop**: a step of `pretrain` over a step of the bare loop with the same optimizer; 1 is no overhead at all.
**against fused AdamW**: tokens a second of `pretrain` over those of the bare loop with torch's fused AdamW.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from apollo_optim.cli.words import Parser
from apollo_optim.report import read_events
from apollo_optim.train.build import build
from apollo_optim.train.config import RunConfig
from apollo_optim.train.loss import summed_loss, targets
from apollo_optim.train.pretrain import pretrain
from benchmarks import kit
from benchmarks.kit import Line, spread, told
from benchmarks.step.contenders import BASELINE
from benchmarks.table import markdown

WARM = 5  # steps before those that count: what is compiled is compiled in them
SAME = ("model", "dtype", "batch", "seq_len", "compile")  # what rows of one table have in common
LOGGED = 5  # steps between two lines of pretrain's log, from which its times are


def config_of(args: argparse.Namespace, optimizer: str) -> RunConfig:
    """The run of one of ours."""
    cfg = RunConfig()
    cfg.model.name, cfg.model.dtype = args.model, args.dtype
    cfg.data.source, cfg.data.seq_len = "python", args.seq_len
    cfg.optim.name, cfg.optim.lr, cfg.optim.compile = optimizer, 1e-3, args.compile
    cfg.train.steps, cfg.train.batch_size, cfg.train.threads = WARM + args.steps, args.batch, args.threads
    cfg.eval.every, cfg.eval.tokens = None, args.seq_len
    cfg.checkpoint.every = None
    cfg.log.every, cfg.log.display = LOGGED, "none"
    return cfg


def bare(cfg: RunConfig, run: Path, fused: bool) -> list[float]:
    """Seconds of every step that counts, in a loop that does nothing else."""
    if fused:
        cfg.optim.compile = False  # ours is built and left alone
    job = build(cfg, run)
    ours, model = job.optimizer, job.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True) if fused else ours
    batches = [job.data.train.next(cfg.train.batch_size) for _ in range(cfg.train.steps)]
    marks = []
    for batch in batches:
        loss = summed_loss(model, batch.input_ids, batch.labels) / targets(batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.perf_counter())
    return [after - before for before, after in pairwise(marks[WARM - 1 :])]


def whole(cfg: RunConfig, run: Path) -> tuple[list[float], Line]:
    """Seconds of every step that counts as `pretrain` logs them (means of a few), and where it ran."""
    cfg.out = str(run)
    pretrain(cfg)
    events = read_events(run / "metrics.jsonl")
    marks = [(e["step"], e["seconds"]) for e in events if e["event"] == "step" and e["step"] >= WARM]
    seconds = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(marks)]
    return seconds, {key: events[0][key] for key in ("versions", "hardware")}


def measure(args: argparse.Namespace, log: Path) -> None:
    """Round after round, a line of the log each."""
    for number in range(args.rounds):
        row: Line = {
            "round": number,
            **{key: getattr(args, key) for key in SAME},
            "bare": {},
            "pretrain": {},
        }
        with tempfile.TemporaryDirectory() as work:
            row["bare"][BASELINE] = bare(config_of(args, "adamw"), Path(work), fused=True)
            for name in args.optimizers:
                row["bare"][name] = bare(config_of(args, name), Path(work), fused=False)
                row["pretrain"][name], where = whole(config_of(args, name), Path(work) / name)
                row |= where
        kit.append(log, row)
        print(f"round {number + 1} of {args.rounds}", flush=True)


def table(rows: Sequence[Line]) -> str:
    """Medians of a round's steps; of the rounds' ratios median and quartiles."""
    first = rows[-1]
    tokens = first["batch"] * first["seq_len"]
    alike = [row for row in rows if all(row[key] == first[key] for key in SAME)]
    same = [row for row in alike if row["bare"].keys() == first["bare"].keys()]
    median = statistics.median
    fused = [median(row["bare"][BASELINE]) for row in same]
    hardware = first["hardware"]
    lines = [
        "# The loop of `pretrain`",
        "",
        f"{first['model']}, {first['dtype']}, {first['batch']} x {first['seq_len']} tokens, optim.compile="
        f"{str(first['compile']).lower()}; {hardware['device']}, {hardware['threads']} threads; {len(same)} rounds.",
        "",
    ]
    head = ["optimizer", "bare loop, s a step", "pretrain, s a step", "loop, x", "tokens a second"]
    cells = [[BASELINE, f"{median(fused):.3f}", "-", "-", f"{tokens / median(fused):.0f}", "1"]]
    for name in first["pretrain"]:
        bares = [median(row["bare"][name]) for row in same]
        wholes = [median(row["pretrain"][name]) for row in same]
        loop = told(spread([a / b for a, b in zip(wholes, bares, strict=True)]), digits=3)
        against = told(spread([b / a for a, b in zip(wholes, fused, strict=True)]), digits=3)
        pace = f"{tokens / median(wholes):.0f}"
        cells.append([name, f"{median(bares):.3f}", f"{median(wholes):.3f}", loop, pace, against])
    return "\n".join([*lines, markdown([*head, "against fused AdamW, x"], cells, "lr")]) + "\n"


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser("apollo-optim bench loop", __doc__)
    parser.add_argument("--model", default="llama-9m")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "apollo", "apollo-mini"], metavar="NAME")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20, help=f"that count, after {WARM} that do not")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch (its own number)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="optim.compile of ours")
    parser.add_argument("--out", type=Path, default=Path("results/loop"), help="loop.jsonl and table.md are kept there")
    parser.add_argument("--table", action="store_true", help="measure nothing, make the table of the log")
    args = parser.parse(argv)
    log = args.out / "loop.jsonl"
    if not args.table:
        measure(args, log)
    return kit.tabled(log, args.out / "table.md", table)


if __name__ == "__main__":
    kit.command(main)
