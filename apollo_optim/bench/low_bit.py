"""What a step of low-bit weights costs, and what other formats for them would be worth.

    apollo-optim bench low-bit cost       every piece of a step at 7B's matrices, in ns per weight, and their sum
    apollo-optim bench low-bit formats    symmetric or affine, scales kept or chosen anew: errors, drift, perplexity

The protocols are on top of `apollo_optim/bench/low_bit_cost.py` and `low_bit_formats.py`. Each leaves its log in OUT
(`cost.jsonl`, `formats.jsonl`); `table.md` there is made from the logs there are.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apollo_optim.bench import low_bit_cost, low_bit_formats
from apollo_optim.train.models import SIZES

PARTS = {"cost": low_bit_cost, "formats": low_bit_formats}


def read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def tables(out: Path) -> str:
    """Everything that the logs in `out` hold."""
    logs = {name: read(out / f"{name}.jsonl") for name in PARTS}
    return "\n\n".join(PARTS[name].table(rows) for name, rows in logs.items() if rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "apollo-optim bench low-bit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="{cost,formats}")

    def part(name: str) -> argparse.ArgumentParser:
        sub = parts.add_parser(
            name, description=PARTS[name].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.add_argument("--out", type=Path, default=Path("results/low-bit"), help="where results are kept")
        sub.add_argument("--table", action="store_true", help="measure nothing, make the table of the logs there are")
        return sub

    cost = part("cost")
    cost.add_argument("--model", default="llama-7b", choices=list(SIZES), help="whose matrices")
    cost.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (all cores)")
    cost.add_argument("--rounds", type=int, default=20)
    cost.add_argument("--tokens", type=int, default=256, help="of a batch")

    formats = part("formats")
    formats.add_argument("--only", nargs="+", default=list(low_bit_formats.KINDS), choices=list(low_bit_formats.KINDS))
    formats.add_argument("--bits", type=int, nargs="+", default=[8, 4], choices=[8, 4])
    formats.add_argument("--model", default="llama-1m", choices=["llama-1m", "llama-4m", "llama-9m"])
    formats.add_argument("--steps", type=int, default=140)
    formats.add_argument("--warmup", type=float, default=0.25, help="of the steps (the race's long runs have 0.1)")
    formats.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    formats.add_argument("--work", type=Path, default=Path("out/low-bit"), help="where the run being made lives")

    args = parser.parse_args(argv)
    for name in ("threads", "rounds", "tokens", "steps"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name} {getattr(args, name)}: at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        PARTS[args.part].run(args, args.out / f"{args.part}.jsonl")
    text = tables(args.out)
    if not text:
        parser.error(f"{args.out} holds no log yet: leave --table out")
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
