"""Launches: how many kernels a step of a whole model asks a GPU for, without a compiler. Needs no GPU, no memory.

    python -m benchmarks.launches [--size llama-1b] [--dtype bfloat16] [--bits 8] [--optimizers NAME ...] [--by-kind]
                                  [--log results/launches/launches.jsonl]

The real optimizer steps the real model on torch's meta device, as on an accelerator, and everything that would be
computed there is counted: all of torch's operations but views, empty allocations and what is computed on the host. An
operation is one launch or a few (a norm is two). The second step is counted, so that nothing of the first is in it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apollo_optim import build_optimizer, list_optimizers, quantize_weights
from benchmarks.gpu.model import on_meta
from benchmarks.kit import Line, append, command, commit, versions
from benchmarks.table import Table, show

ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations on the meta device, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in ALLOCATIONS:
            there = any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves((out, args)))
            self.by_name[name] += there
        return out


def counted(step: Callable[[], object]) -> Counter[str]:
    """What the second call launches, by operation."""
    step()
    launches = Launches()
    with launches:
        step()
    return +launches.by_name


def model_of(size: str, dtype: str, bits: int | None, layers: int | None = None) -> nn.Module:
    """A LLaMA on the meta device, every parameter with a gradient."""
    model: nn.Module = on_meta(size, dtype, layers)
    if bits is not None:
        quantize_weights(model, bits)
    for p in model.parameters():
        p.grad = torch.empty(p.shape, dtype=p.dtype, device="meta")
    return model


def measure(name: str, model: nn.Module) -> Line:
    """Launches of a step of one optimizer."""
    optimizer = build_optimizer(name, model, lr=1e-3)
    matrices = sum(p.ndim > 1 for p in model.parameters())
    by_name = counted(optimizer.step)
    return {
        "optimizer": name, "launches": by_name.total(), "parameters": len(list(model.parameters())),
        "matrices": matrices, "by_name": dict(by_name.most_common()),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, count, print a table, write the log. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", default="llama-1b", help="of the model (default: llama-1b)")
    parser.add_argument("--dtype", default="bfloat16", help="of its weights (default: bfloat16)")
    parser.add_argument("--bits", type=int, choices=[8, 4], help="of attention and MLP, if they are low-bit")
    parser.add_argument("--layers", type=int, help="cut the model")
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help="(default: all)")
    parser.add_argument("--by-kind", action="store_true", help="say which operations they are")
    parser.add_argument("--log", type=Path, help="append a JSON line for each optimizer to this file")
    args = parser.parse_args(argv)
    model = model_of(args.size, args.dtype, args.bits, args.layers)
    rows: list[Sequence[str]] = []
    for name in args.optimizers or [info.name for info in list_optimizers() if info.bits is None]:
        line = measure(name, model)
        about = {"size": args.size, "dtype": args.dtype, "bits": args.bits, "layers": args.layers}
        if args.log is not None:
            append(args.log, {**about, **line, "commit": commit(), **versions()})
        each = line["launches"] / line["parameters"]
        rows.append([name, f"{line['launches']:,}", f"{line['parameters']}", f"{each:.1f}"])
        if args.by_kind:
            print(name, *(f"{count} {kind}" for kind, count in line["by_name"].items()), sep="\n  ")
    what = f"{args.size}, {args.dtype}" + (f", {args.bits} bits" if args.bits else "")
    show([Table(f"A step of {what}, without a compiler", ["", "launches", "parameters", "a parameter"], rows)])
    return 0


if __name__ == "__main__":
    command(main)
