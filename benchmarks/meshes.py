"""Every rule, in one process and on meshes of several: how far apart are the weights after 30 steps?

    python -m benchmarks.meshes [--rules NAME ...] [--processes 2 4] [--steps 30]

The gradients are the same everywhere (drawn whole, from a parameter's name and the step, and cut as it is), so whatever
differs is the optimizer's doing. The rules have their default settings, but for a rank of 4 where a rule must be given
one and a new basis every 10 steps. For each case the worst parameter: ||sharded - single|| / ||single - start||, fp32.
What is in the log already is not measured again.

Layouts: `ddp`: all of it in every process. `fsdp2`: `fully_shard`. `hsdp`: the same in two groups. `tp`: every matrix
split by columns, as the second linear layer of tensor parallelism is (the first one's is fsdp2's).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from apollo_optim.cli.words import Parser
from apollo_optim.core.errors import InputError
from apollo_optim.core.place import whole
from apollo_optim.optim.loading import split_as
from apollo_optim.optim.optimizer import RuleOptimizer
from apollo_optim.rules import RULES
from benchmarks import kit
from benchmarks.kit import Line
from benchmarks.processes import meet, rank_for, spawned
from benchmarks.table import markdown

LOG = Path("results/processes/meshes.jsonl")
LAYOUTS = {2: ("ddp", "fsdp2", "tp"), 4: ("fsdp2", "hsdp")}
SHAPES = {
    "tall": (40, 24),
    "wide": (24, 40),
    "square": (32, 32),
    "uneven": (9, 37),
    "experts": (3, 12, 8),
    "norm": (13,),
}


class Holder(nn.Module):
    """One parameter of each shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5))

    def forward(self) -> None:
        """Never called. (`fully_shard` wants one.)"""


def gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    """A direction that stays, noise, and a size that grows, so that limits hold."""

    def drawn(key: str) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))

    return (drawn(name) + 0.5 * drawn(f"{name} {step}")) * (1 + 0.1 * step)


def trained(rule: str, steps: int, spread: Callable[[nn.Module], object]) -> dict[str, Tensor]:
    """Weights after so many steps, whole."""
    model = Holder()
    spread(model)
    knobs = rank_for(rule, 4)
    if "update_proj_gap" in RULES[rule].knobs():
        knobs["update_proj_gap"] = 10
    optimizer = RuleOptimizer([{"params": list(model.parameters()), "rule": rule, **knobs}], lr=1e-2, compile=False)
    for step in range(1, steps + 1):
        for name, p in model.named_parameters():
            p.grad = split_as(gradient(name, SHAPES[name], step), p)
        optimizer.step()
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def spreads(layout: str) -> Callable[[nn.Module], object]:
    """What makes a model's parameters lie so, over all processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    size = torch.distributed.get_world_size()
    if layout == "ddp":
        return lambda model: None
    if layout == "tp":
        mesh = init_device_mesh("cpu", (size,))

        def by_columns(model: nn.Module) -> None:
            for name, p in list(model.named_parameters()):
                model.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(p.ndim - 1)])))

        return by_columns
    shape, names = ((size,), ("shard",)) if layout == "fsdp2" else ((2, size // 2), ("replicate", "shard"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return lambda model: fully_shard(model, mesh=mesh)


def far(rule: str, layout: str, steps: int, one: dict[str, Tensor]) -> Line:
    """The worst parameter, as this process sees it."""
    start = {name: p.detach() for name, p in Holder().named_parameters()}
    try:
        ours = trained(rule, steps, spreads(layout))
    except InputError as error:  # the same in all processes
        return {"refused": kit.one_line(error)}
    found = {name: float((t - one[name]).norm() / (one[name] - start[name]).norm()) for name, t in ours.items()}
    worst = max(found, key=lambda name: found[name])
    return {"distance": found[worst], "parameter": worst}


def work(rank: int, size: int, port: int, cases: Sequence[tuple[str, str]], steps: int, log: Path) -> None:
    """One process of several; the first one writes."""
    meet(rank, size, port)
    singles: dict[str, dict[str, Tensor]] = {}
    for rule, layout in cases:
        if rule not in singles:
            singles = {rule: trained(rule, steps, lambda model: None)}
        line: Line = {"rule": rule, "layout": layout, "processes": size, "steps": steps}
        line |= far(rule, layout, steps, singles[rule])
        if rank == 0:
            kit.append(log, line | {"commit": kit.commit(), "versions": kit.versions()})
            print(f"{rule}, {layout} of {size}: {line.get('distance', 'refused')}", flush=True)
    torch.distributed.destroy_process_group()


def table(lines: Sequence[Line]) -> str:
    """A row a rule, a column a layout."""
    newest = {(line["rule"], line["layout"], line["processes"]): line for line in lines}
    columns = [(layout, size) for size, layouts in LAYOUTS.items() for layout in layouts]
    rows = []
    for rule in sorted({rule for rule, _, _ in newest}):
        rows.append([rule, *(told(newest.get((rule, *column))) for column in columns)])
    return markdown(["rule", *(f"{layout} of {size}" for layout, size in columns)], rows, "lr")


def told(line: Line | None) -> str:
    """One case."""
    if line is None:
        return ""
    return "refused" if "refused" in line else f"{line['distance']:.1e}"


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser("python -m benchmarks.meshes", __doc__)
    parser.add_argument("--rules", nargs="+", default=sorted(RULES), choices=sorted(RULES), metavar="NAME")
    parser.add_argument("--processes", nargs="+", type=int, choices=sorted(LAYOUTS), default=sorted(LAYOUTS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--log", type=Path, default=LOG, help="a line a case; the table lies beside it, as .md")
    parser.add_argument("--table", action="store_true", help="measure nothing, make the table of the log")
    args = parser.parse(argv)
    there = {(line["rule"], line["layout"], line["processes"], line["steps"]) for line in kit.read(args.log)}
    for size in () if args.table else args.processes:
        cases = [(rule, layout) for rule in args.rules for layout in LAYOUTS[size]]
        cases = [case for case in cases if (*case, size, args.steps) not in there]
        if cases:
            spawned(size, work, cases, args.steps, args.log)
    title = "Every rule on meshes, against one process"
    kit.keep_table(args.log.with_suffix(".md"), title, table(kit.measured(args.log)))
    return 0


if __name__ == "__main__":
    kit.command(main)
