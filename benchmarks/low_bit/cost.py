"""What every piece of a training step on low-bit weights costs, in ns per weight, and what a 7B step is the sum of.

Every matrix shape of the model, weights of 8 and of 4 bits in groups of 128, gradients and activations in bf16 with
``--tokens`` tokens. A piece is timed once per round, all pieces of all shapes after another, so that a slow moment of
the machine does not fall on one piece; first each runs twice untimed (the writes are compiled then, as in training).
What is reported is the median over the rounds, with the quartiles' distance. Freed memory goes back to the system at
once, as `pretrain` has it with `train.release`: products make large matrices, which have to be fetched again.

Products with weights of 8 and 4 bits dequantise them; what that costs is what they take more than those of a bf16 one.
The sum is a step with gradient checkpointing: two forward products and one backward, the weight's gradient,
APOLLO-Mini's step. Attention, norms, embedding and head are not in it.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apollo_optim.core.place import Place
from apollo_optim.core.random import key_at
from apollo_optim.core.storage import writes_itself
from apollo_optim.core.write import write
from apollo_optim.optim import ApolloMini
from apollo_optim.quant import LowBitWeight
from apollo_optim.train.measure import give_back_memory
from apollo_optim.train.models import SIZES, Size
from benchmarks import kit
from benchmarks.kit import Line, spread
from benchmarks.table import markdown

Shape = tuple[int, int]
Piece = tuple[str, int, Shape]  # what, at how many bits (16: bf16), of which shape

IN_A_STEP = {"forward": 2, "grad_x": 1, "grad_weight": 1, "step": 1}  # with checkpointing
FLOAT = ("grad_weight",)  # the weight is not in it: the same for all bits


def matrices(size: Size) -> dict[Shape, int]:
    """Shapes of the attention and MLP matrices, and how many there are of each."""
    h, f = size.hidden, size.ffn
    return {(h, h): 4 * size.layers, (f, h): 2 * size.layers, (h, f): size.layers}


def pieces(shape: Shape, tokens: int) -> dict[Piece, Callable[[], object]]:
    """What is timed at one shape."""
    m, n = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)

    value, grad, x, grad_y = normal(m, n), normal(m, n), normal(tokens, n), normal(tokens, m)
    found: dict[Piece, Callable[[], object]] = {("grad_weight", 16, shape): lambda: grad_y.mT @ x}
    for bits in (16, 8, 4):
        weight = value.clone() if bits == 16 else LowBitWeight.from_float(value, bits)
        found["forward", bits, shape] = lambda weight=weight: F.linear(x, weight)  # type: ignore[misc]
        found["grad_x", bits, shape] = _grad_x_of(weight.clone(), x, grad_y)
        found["write", bits, shape] = _write_of(weight, grad)
        found["step", bits, shape] = _step_of(weight.clone(), grad)
    return found


def _grad_x_of(weight: Tensor, x: Tensor, grad_y: Tensor) -> Callable[[], object]:
    x = x.clone().requires_grad_()
    y = F.linear(x, weight)
    return lambda: torch.autograd.grad(y, x, grad_y, retain_graph=True)


def _write_of(weight: Tensor, grad: Tensor) -> Callable[[], object]:
    """``core.write`` with one factor, as APOLLO-Mini calls it: of a bf16 weight, too, stochastically rounded."""
    factor, finite = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    steps = 0

    @torch.no_grad()
    def run() -> None:
        nonlocal steps
        steps += 1
        noise = Place.of(weight).noise(key_at(0, "weight", steps), grad.device)
        if writes_itself(weight):
            weight._write_rows_((), grad, factor, finite, 1e-3, 0.0, noise)  # type: ignore[attr-defined]
        else:
            write(weight, grad, factor, finite, 1e-3, 0.0, noise)

    return run


def _step_of(weight: Tensor, grad: Tensor) -> Callable[[], object]:
    p = nn.Parameter(weight)
    p.grad = grad
    optimizer = ApolloMini([p], lr=1e-3, rank=1)
    return lambda: optimizer.step_one(p, optimizer.param_groups[0])


def measure(shapes: Sequence[Shape], tokens: int, rounds: int) -> dict[Piece, list[float]]:
    """Seconds of every piece, one for each round."""
    found = {piece: run for shape in shapes for piece, run in pieces(shape, tokens).items()}
    for run in found.values():
        run()
        run()
    seconds: dict[Piece, list[float]] = {piece: [] for piece in found}
    for _ in range(rounds):
        for piece, run in found.items():
            start = time.perf_counter()
            run()
            seconds[piece].append(time.perf_counter() - start)
    return seconds


def run(args: argparse.Namespace, log: Path) -> None:
    """Measure, and write the log anew: a line for the setting, one for each piece."""
    torch.set_num_threads(args.threads)
    give_back_memory()
    shapes = matrices(SIZES[args.model])
    setting = {
        **{key: getattr(args, key) for key in ("model", "rounds", "tokens", "threads")},
        "versions": kit.versions(),
        "hardware": kit.hardware("cpu"),
        "commit": kit.commit(),
    }
    measured = measure(list(shapes), args.tokens, args.rounds)
    log.unlink(missing_ok=True)
    kit.append(log, setting)
    for (piece, bits, (m, n)), seconds in measured.items():
        ns = [s / (m * n) * 1e9 for s in seconds]
        row = {"piece": piece, "bits": bits, "shape": [m, n], "matrices": shapes[m, n], "ns_per_weight": ns}
        kit.append(log, row)


NAMES = {
    "forward": "x W^T, {tokens} tokens, bf16 (dequantise, multiply)",
    "grad_x": "gradient of x (dequantise, multiply)",
    "grad_weight": "gradient of W",
    "write": "write (dequantise, update, round, requantise)",
    "step": "APOLLO-Mini's step, write included",
}


def table(rows: Sequence[Line]) -> str:
    """Each piece by shape, and where the seconds of a step go."""
    setting, *rows = rows
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    found = {(row["piece"], row["bits"], tuple(row["shape"])): spread(row["ns_per_weight"]) for row in rows}
    weights: dict[Any, int] = {tuple(row["shape"]): row["matrices"] * row["shape"][0] * row["shape"][1] for row in rows}
    total = sum(weights.values())
    names = {piece: name.format(tokens=setting["tokens"]) for piece, name in NAMES.items()}

    def mean(piece: str, bits: int) -> float:
        """ns per weight, over all matrices of the model."""
        bits = 16 if piece in FLOAT else bits
        return float(sum(found[piece, bits, s]["median"] * weights[s] for s in shapes) / total)

    cells = []
    for piece, name in names.items():
        for bits in sorted({row["bits"] for row in rows if row["piece"] == piece}, reverse=True):
            of = [found[piece, bits, s] for s in shapes]
            figures = [f"{one['median']:.2f} ({one['high'] - one['low']:.2f})" for one in of]
            cells.append([name, str(bits), *figures, f"{mean(piece, bits):.2f}"])
    seconds = {bits: {p: k * mean(p, bits) * total * 1e-9 for p, k in IN_A_STEP.items()} for bits in (8, 4)}
    sums = {bits: sum(parts.values()) for bits, parts in seconds.items()}
    parts = []
    for piece, times in IN_A_STEP.items():
        eight, four = ([f"{s[piece]:.4g}", f"{s[piece] / sums[bits]:.0%}"] for bits, s in seconds.items())
        parts.append([names[piece], str(times), *eight, *four])
    parts.append(["**sum**", "", f"{sums[8]:.4g}", "", f"{sums[4]:.4g}", ""])
    return f"""\
## Cost of a step, {setting["model"]}

{setting["hardware"]["cpu"]}, {setting["threads"]} threads, torch {setting["versions"]["torch"]}; medians of \
{setting["rounds"]} rounds (distance of the quartiles), ns per weight.
The write of a bf16 weight is an eager one: only its whole step is compiled.

{markdown(["piece", "bits", *(f"{m} x {n}" for m, n in shapes), "mean of the model"], cells)}

Seconds of a step with checkpointing on the {total / 1e9:.3f}e9 weights of the matrices, batch of \
{setting["tokens"]} tokens:

{markdown(["piece", "times a step", "8 bits, s", "share", "4 bits, s", "share"], parts)}"""
