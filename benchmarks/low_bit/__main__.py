"""What a step of low-bit weights costs, and what other formats for them would be worth.

    apollo-optim bench low-bit cost       every piece of a step at 7B's matrices, in ns per weight, and their sum
    apollo-optim bench low-bit formats    symmetric or affine, scales kept or chosen anew: errors, drift, perplexity

`--help` of each tells its protocol. Each leaves its log in OUT (`cost.jsonl`, `formats.jsonl`); `table.md` there is
made from the logs there are.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from apollo_optim.cli.words import Parser
from apollo_optim.core.errors import InputError
from apollo_optim.train.models import SIZES
from benchmarks import kit
from benchmarks.kit import Line
from benchmarks.low_bit import compare, cost, formats, tables


class Part(NamedTuple):
    """One of two."""

    says: str
    run: Callable[[argparse.Namespace, Path], None]
    table: Callable[[Sequence[Line]], str]


PARTS = {
    "cost": Part(cost.__doc__ or "", cost.run, cost.table),
    "formats": Part(f"{compare.__doc__}\n{formats.__doc__}", compare.run, tables.table),
}


def all_tables(out: Path) -> str:
    """Of everything that the logs in `out` hold."""
    logs = {name: kit.read(out / f"{name}.jsonl") for name in PARTS}
    return "\n\n".join(PARTS[name].table(rows) for name, rows in logs.items() if rows)


def parser() -> Parser:
    """The command line."""
    words = Parser("apollo-optim bench low-bit", __doc__)
    parts = words.add_subparsers(dest="part", required=True, metavar="{cost,formats}")

    def part(name: str) -> Parser:
        sub: Parser = parts.add_parser(name, description=PARTS[name].says)
        sub.add_argument("--out", type=Path, default=Path("results/low-bit"), help="where results are kept")
        sub.add_argument("--table", action="store_true", help="measure nothing, make the table of the logs there are")
        return sub

    of_cost = part("cost")
    of_cost.add_argument("--model", default="llama-7b", choices=list(SIZES), help="whose matrices")
    of_cost.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (all cores)")
    of_cost.add_argument("--rounds", type=int, default=20)
    of_cost.add_argument("--tokens", type=int, default=256, help="of a batch")

    of_formats = part("formats")
    of_formats.add_argument("--only", nargs="+", default=list(tables.KINDS), choices=list(tables.KINDS))
    of_formats.add_argument("--bits", type=int, nargs="+", default=[8, 4], choices=[8, 4])
    of_formats.add_argument("--model", default="llama-1m", choices=["llama-1m", "llama-4m", "llama-9m"])
    of_formats.add_argument("--steps", type=int, default=140)
    of_formats.add_argument("--warmup", type=float, default=0.25, help="of the steps (the race's long runs have 0.1)")
    of_formats.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    of_formats.add_argument("--work", type=Path, default=Path("out/low-bit"), help="where the run being made lives")

    return words


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    args = parser().parse(argv)
    for name in ("threads", "rounds", "tokens", "steps"):
        if getattr(args, name, 1) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: at least 1")
    if not args.table:
        PARTS[args.part].run(args, args.out / f"{args.part}.jsonl")
    text = all_tables(args.out)
    if not text:
        raise InputError(f"{args.out} holds no log yet: leave --table out")
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    kit.command(main)
