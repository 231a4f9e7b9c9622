"""Host time: what a step costs per parameter where the tensors are small, beside torch's AdamW in the same process.

    python -m benchmarks.host [--parameters 300 8000] [--only WORD ...] [--rounds 9] [--log results/host/host.jsonl]

Matrices of 64 x 96 in fp32, one thread; seconds of the processor, so that what else runs is not counted. A round steps
every optimizer once, one after the other; a figure is the median over rounds, and a ratio the median of the ratios to
the looping AdamW (`foreach=False`) of the same round. `release` steps inside backward, of a sum of products with
constants; the backward pass without a step is taken off.

The last line is what an import costs beside torch's own, in seconds of the processor, of fresh processes in turn.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from apollo_optim import AdamW, Apollo, ApolloMini, release
from benchmarks.kit import Line, append, command, commit, hardware, spread, versions
from benchmarks.table import Table, show

SHAPE = (64, 96)
BASE = "torch AdamW, looping"
OURS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": AdamW,
    "APOLLO-Mini": partial(ApolloMini, rank=1),
    "APOLLO r=16": partial(Apollo, rank=16),
}
Step = Callable[[], object]
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def parameters(n: int) -> list[nn.Parameter]:
    """`n` matrices, each with a gradient."""
    made = [nn.Parameter(torch.randn(SHAPE)) for _ in range(n)]
    for p in made:
        p.grad = torch.randn(SHAPE)
    return made


def stepping(make: Make, n: int) -> Step:
    """A plain step."""
    return make(parameters(n)).step


def backward(n: int, make: Make | None) -> Step:
    """A backward pass that steps every parameter, or (None) sets the gradients free."""
    weights = parameters(n)
    for p in weights:
        p.grad = None
    handle = None if make is None else release(nn.ParameterList(weights), make(weights))
    constant = torch.randn(SHAPE)

    def step() -> None:
        loss: Tensor = torch.stack([(p * constant).sum() for p in weights]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        for p in weights if handle is None else ():
            p.grad = None

    return step


def cases(n: int) -> dict[str, Step]:
    """What is timed; `(released)` less `backward alone` is a step."""
    found = {
        BASE: stepping(partial(torch.optim.AdamW, foreach=False), n),
        "torch AdamW, foreach": stepping(partial(torch.optim.AdamW, foreach=True), n),
        "backward alone": backward(n, None),
    }
    for name, make in OURS.items():
        for kind, choice in (("eager", False), ("compiled", True)):
            found[f"{name}, {kind}"] = stepping(partial(make, compile=choice), n)
            found[f"{name}, {kind} (released)"] = backward(n, partial(make, compile=choice))
    return found


def measure(n: int, rounds: int, only: list[str]) -> dict[str, dict[str, list[float]]]:
    """Microseconds a parameter of every round, and ratios to the base of the same round."""
    words = [BASE, "backward alone", *only]
    steps = {name: step for name, step in cases(n).items() if not only or any(word in name for word in words)}
    for name in [*steps, *steps]:  # what is compiled, what is allocated
        steps[name]()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds):
        print(f"\r{n} parameters, round {i + 1} of {rounds}", end="", file=sys.stderr, flush=True)
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append((time.process_time() - start) / n * 1e6)
    print(file=sys.stderr)
    for name, taken in times.items():
        if name.endswith("(released)"):
            times[name] = [t - alone for t, alone in zip(taken, times["backward alone"], strict=True)]
    return {
        name: {"us": taken, "ratio": [t / base for t, base in zip(taken, times[BASE], strict=True)]}
        for name, taken in times.items()
    }


IMPORTING = "import apollo_optim"
IMPORT = "import time; start = time.process_time(); {}; print(time.process_time() - start)"
OURS_AFTER_TORCH = "import torch; start = time.process_time(); import apollo_optim; apollo_optim.build_optimizer"


def imports(rounds: int) -> dict[str, list[float]]:
    """Seconds that `import apollo_optim` takes after torch, and ratios to torch's own import of the same round."""

    def seconds(words: str) -> float:
        call = [sys.executable, "-c", IMPORT.format(words)]
        return float(subprocess.run(call, check=True, capture_output=True, text=True).stdout)

    taken = [(seconds(OURS_AFTER_TORCH), seconds("import torch")) for _ in range(rounds)]
    return {"seconds": [ours for ours, _ in taken], "ratio": [ours / torch for ours, torch in taken]}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print a table, write the log. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--parameters", type=int, nargs="+", default=[300], help="how many (default: 300; 8000 of all take an hour)"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases with one of these in their names")
    parser.add_argument("--rounds", type=int, default=9, help="steps that are timed, of each (default: 9)")
    parser.add_argument("--log", type=Path, help="append a JSON line for each case to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    def log(line: Line) -> None:
        if args.log is not None:
            append(args.log, {**line, "commit": commit(), **hardware("cpu"), **versions()})

    for n in args.parameters:
        rows: list[Sequence[str]] = []
        for name, found in measure(n, args.rounds, args.only).items():
            us, ratio = spread(found["us"]), spread(found["ratio"])
            log({"case": name, "parameters": n, "shape": SHAPE, "us": us, "ratio": ratio})
            rows.append([name, f"{us['median']:.1f}", *(f"{ratio[key]:.2f}" for key in ("median", "low", "high"))])
        head = ["", "us a parameter", "ratio", "low", "high"]
        show([Table(f"{n} matrices of {SHAPE[0]} x {SHAPE[1]}, one thread", head, rows)])
    if not args.only or any(word in IMPORTING for word in args.only):
        found = imports(args.rounds)
        seconds, ratio = spread(found["seconds"]), spread(found["ratio"])
        log({"case": IMPORTING, "seconds": seconds, "ratio": ratio})
        print(f"{IMPORTING}: {seconds['median']:.2f} s, {ratio['median']:.3f} of what `import torch` takes")
    return 0


if __name__ == "__main__":
    command(main)
