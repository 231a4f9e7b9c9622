"""Is a step's time a fixed cost and a cost of each token? Two sizes of a batch give both; others are predicted.

    apollo-optim bench pace [--model llama-60m] [--optimizers adamw apollo-mini] [--rows 1 4 --predict 2 8]

Forward, backward and step of a new model in fp32, one thread, rows of `--seq` tokens that mean nothing. A round steps
every size once, one after the other; a figure is the median over rounds, of seconds of the processor, so that what
else runs on the machine is not counted. A GPU is measured elsewhere: `plan --fit --pace` takes two times of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from apollo_optim import build_optimizer
from apollo_optim.cli.words import Parser
from apollo_optim.plan import Pace
from apollo_optim.train.config import ModelConfig
from apollo_optim.train.loss import summed_loss
from apollo_optim.train.models import build_model
from benchmarks import kit
from benchmarks.kit import Line
from benchmarks.table import markdown

LOG = Path("results/plan/pace.jsonl")


def timed(name: str, args: Any) -> dict[int, list[float]]:
    """Seconds of the processor of each round, by rows of a step."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(args.model)).train()
    optimizer = build_optimizer(name, model, lr=1e-4)
    times: dict[int, list[float]] = {rows: [] for rows in (*args.rows, *args.predict)}

    def step(rows: int) -> float:
        ids = torch.randint(model.config.vocab_size, (rows, args.seq))
        start = time.process_time()
        (summed_loss(model, ids, ids) / ids.numel()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - start

    for rows in times:  # what is compiled, what is allocated
        step(rows)
    for _ in range(args.rounds):
        for rows, taken in times.items():
            taken.append(step(rows))
    return times


def judged(name: str, args: Any) -> Line:
    """The pace by two sizes, and by how much it misses the others."""
    times = {rows: kit.spread(taken) for rows, taken in timed(name, args).items()}
    few, many = ((rows * args.seq, times[rows]["median"]) for rows in args.rows)
    pace = Pace.of(few, many)
    predicted = {rows: pace.seconds(rows * args.seq) for rows in args.predict}
    line: Line = {"optimizer": name, "model": args.model, "seq": args.seq, "rounds": args.rounds, "rows": args.rows}
    line |= {"seconds": {str(rows): found for rows, found in times.items()}, **pace._asdict()}
    line["predicted"] = {str(rows): seconds for rows, seconds in predicted.items()}
    line["error"] = {str(rows): seconds / times[rows]["median"] - 1 for rows, seconds in predicted.items()}
    return line


def table(lines: Sequence[Line]) -> str:
    """The newest line of every optimizer and model."""
    newest = {(line["model"], line["optimizer"]): line for line in lines}
    rows = []
    for (model, name), line in sorted(newest.items()):
        for number, error in line["error"].items():
            found = line["seconds"][number]["median"]
            fitted = " and ".join(str(n) for n in line["rows"])
            cells = [model, name, fitted, f"{line['fixed']:.3f}", f"{line['per_token'] * 1e3:.3f}", number]
            rows.append([*cells, f"{line['predicted'][number]:.3f}", f"{found:.3f}", f"{error:+.1%}"])
    head = ["model", "optimizer", "rows fitted", "fixed, s", "a token, ms", "rows", "predicted, s", "measured, s"]
    return markdown([*head, "error"], rows, "lllr")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser("apollo-optim bench pace", __doc__)
    parser.add_argument("--model", default="llama-60m")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "apollo-mini"], metavar="NAME")
    parser.add_argument("--rows", nargs=2, type=int, default=[1, 4], help="of the two batches that give the pace")
    parser.add_argument("--predict", nargs="+", type=int, default=[2, 8], help="rows of the batches that are predicted")
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--log", type=Path, default=LOG, help="a line an optimizer; the table lies beside it, as .md")
    args = parser.parse(argv)
    torch.set_num_threads(1)
    for name in args.optimizers:
        line = judged(name, args)
        kit.append(args.log, line | {"commit": kit.commit(), **kit.hardware("cpu"), "versions": kit.versions()})
        told = ", ".join(f"{rows} rows {error:+.1%}" for rows, error in line["error"].items())
        print(f"{name}: {line['fixed']:.3f} s + {line['per_token'] * 1e3:.3f} ms a token; misses {told}", flush=True)
    kit.keep_table(
        args.log.with_suffix(".md"), "Time of a step, predicted from two sizes", table(kit.measured(args.log))
    )
    return 0


if __name__ == "__main__":
    kit.command(main)
