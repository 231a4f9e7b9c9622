"""Every rule compiled beside itself eager, on one matrix of the device: seconds of a compiler, graphs, difference."""

from __future__ import annotations

import copy

import torch
from torch import nn

from apollo_optim import Recipe
from apollo_optim.core.random import dither
from apollo_optim.core.rounding import round_stochastically
from benchmarks.cases import Running
from benchmarks.gpu.contract import KEY, bits, kinds, made, parted, plain, prepared, set_gradients
from benchmarks.gpu.device import compiler_fault, graphs, open_device, timed, wait
from benchmarks.kit import Line

LIMITS = {"float32": 1e-4, "bfloat16": 2e-2, "low-bit": 5e-2}
"""The difference after the steps that is still the same optimizer, as in `contract`."""


class OneMatrix(nn.Module):
    """`mlp`, one matrix."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.mlp = nn.Linear(columns, rows, bias=False)


def measure(case: Running) -> None:
    """The rounding, then every rule in bf16, then in fp32; what is out of time is said."""
    device = open_device(case.config["device"])
    fault = compiler_fault(device)
    if fault is not None:
        case.skipped(f"no compiler: {fault}", what="rules")
        return
    with case.attempt(what="rounding") as line:
        line.update(rounding(device))
    order, only, longest = case.config["kinds"], case.config["only"], 1.0
    wanted = [(info, kind) for info, kind in kinds() if kind in order and (only is None or info.name in only)]
    for info, kind in sorted(wanted, key=lambda pair: order.index(pair[1])):
        about = {"optimizer": info.name, "weights": kind}
        if case.left() < longest:
            case.skipped("no time left", what="rule", **about)
            continue
        with case.attempt(what="rule", **about) as line:
            line.update(rule(info, kind, case.config, device))
        longest = max(longest, 1.2 * line.get("compile_seconds", 0.0))


def rounding(device: torch.device) -> Line:
    """Stochastic rounding in a compiled function: on a GPU, bit for bit as the CPU's."""

    def rounded(value: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return round_stochastically(value, dither(rows, columns, KEY))

    rows, columns = (torch.arange(size, dtype=torch.int32) for size in (128, 256))
    value = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    here = rounded(value, rows, columns)
    there = torch.compile(rounded, fullgraph=True)(value.to(device), rows.to(device), columns.to(device)).cpu()
    equal = torch.equal(bits(here), bits(there))
    return {"equal": equal, "status": "ok" if equal else "differs"}


def rule(info: Recipe, kind: str, config: Line, device: torch.device) -> Line:
    """Some steps of both, with the same gradients; the first one of the compiled includes the compiler."""
    torch.manual_seed(0)
    start = prepared(OneMatrix(*config["shape"]), info, kind)
    after, first, made_graphs = [], 0.0, 0
    for compile in (False, True):
        model, before = copy.deepcopy(start).to(device), graphs()
        optimizer = made(info, model, compile)
        for step in range(config["steps"]):
            set_gradients(model, step, device)
            taken = timed(optimizer.step, device)
            first = taken.device if step == 0 else first
        wait(device)
        made_graphs = graphs() - before
        after.append(plain(model))
    line = parted(after[0], after[1], plain(start))
    compiled = kind == "low-bit" or made_graphs > 0
    near = line["difference"] <= LIMITS[kind] and compiled and not line["not_moved"]
    found = {"compile_seconds": first, "graphs": made_graphs, "limit": LIMITS[kind]}
    return {**line, **found, "status": "ok" if near else "differs"}
