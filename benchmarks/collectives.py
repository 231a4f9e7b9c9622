"""What one step sends to other processes: collectives and their bytes, of every rule beside AdamW.

    python -m benchmarks.collectives [--rules NAME ...] [--processes 2]

A LLaMA of 24 layers and little width, sharded by `fully_shard` (each layer, then the whole, as `pretrain` does it) over
gloo processes of this machine; the gradients are random numbers that are there already. What is counted is one call of
`optimizer.step()`, in one process, where torch is asked for it: collectives, and the bytes of each (of the larger of
what goes in and what comes out), whatever an algorithm makes of them on the wire. What is in the log already is not
counted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from apollo_optim.cli.words import Parser
from apollo_optim.core.collectives import Collective, Counter
from apollo_optim.core.place import local
from apollo_optim.optim.optimizer import RuleOptimizer
from apollo_optim.rules import RULES
from benchmarks import kit
from benchmarks.kit import Line
from benchmarks.processes import meet, rank_for, spawned
from benchmarks.table import markdown

LOG = Path("results/processes/collectives.jsonl")
LAYERS, WIDTH, FFN, VOCABULARY, RANK = 24, 32, 80, 96, 4


class Block(nn.Module):
    """The matrices of a LLaMA's layer: four square ones, two tall, one wide, two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH, bias=False) for name in "qkvo"})
        self.gate, self.up = nn.Linear(WIDTH, FFN, bias=False), nn.Linear(WIDTH, FFN, bias=False)
        self.down = nn.Linear(FFN, WIDTH, bias=False)
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])

    def forward(self) -> None:
        """Never called. (`fully_shard` wants one.)"""


class Model(nn.Module):
    """Parameters in the shapes of a LLaMA."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(layers)])
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self) -> None:
        """Never called."""


def line_of(sent: Sequence[Collective]) -> Line:
    """Counts and bytes."""
    kinds = [one.kind for one in sent]
    return {
        "collectives": len(kinds),
        "bytes": sum(one.nbytes for one in sent),
        "kinds": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
    }


def counted(rule: str, layers: int = LAYERS) -> Line:
    """Of one step of a sharded model, the second."""
    model = sharded_model(layers)
    optimizer = optimizer_of(model, rule, compile=False)
    for _ in range(2):
        with_gradients(model)
        with Counter() as counter:
            optimizer.step()
    return line_of(counter.sent)


def sharded_model(layers: int) -> Model:
    """Each layer, then the whole."""
    from torch.distributed.fsdp import fully_shard

    model = Model(layers)
    for block in model.layers:
        fully_shard(block)
    fully_shard(model)
    return model


def optimizer_of(model: nn.Module, rule: str, compile: bool | None) -> RuleOptimizer:
    """`rule` for its matrices, AdamW for all else."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and name.startswith("layers")]
    others = [p for name, p in named if p.ndim != 2 or not name.startswith("layers")]
    groups = [{"params": matrices, "rule": rule, **rank_for(rule, RANK)}, {"params": others, "rule": "adamw"}]
    return RuleOptimizer(groups, compile=compile)


def with_gradients(model: nn.Module) -> None:
    """New ones, of which each process draws its part."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        local(p.grad).normal_()


def work(rank: int, size: int, port: int, rules: Sequence[str], log: Path) -> None:
    """One process of several; the first one writes."""
    meet(rank, size, port)
    torch.manual_seed(rank)
    for rule in rules:
        line: Line = {"rule": rule, "processes": size, "layers": LAYERS, **counted(rule)}
        if rank == 0:
            kit.append(log, line | {"commit": kit.commit(), "versions": kit.versions()})
    torch.distributed.destroy_process_group()


def table(lines: Sequence[Line]) -> str:
    """The newest line of every rule."""
    newest = {(line["rule"], line["processes"]): line for line in lines}
    rows = []
    for (rule, size), line in sorted(newest.items(), key=lambda item: (item[0][1], item[0][0] != "adamw", item[0][0])):
        kinds = ", ".join(f"{count} {kind}" for kind, count in line["kinds"].items())
        rows.append([rule, str(size), str(line["collectives"]), kib(line["bytes"]), kinds])
    return markdown(["rule", "processes", "collectives", "KiB", "kinds"], rows, "lr")


def kib(size: int) -> str:
    """Bytes in KiB."""
    return f"{size / 1024:,.1f}"


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser("python -m benchmarks.collectives", __doc__)
    parser.add_argument("--rules", nargs="+", default=sorted(RULES), choices=sorted(RULES), metavar="NAME")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--log", type=Path, default=LOG, help="a line a rule; the table lies beside it, as .md")
    parser.add_argument("--table", action="store_true", help="measure nothing, make the table of the log")
    args = parser.parse(argv)
    there = {(line["rule"], line["processes"], line["layers"]) for line in kit.read(args.log)}
    rules = [] if args.table else [rule for rule in args.rules if (rule, args.processes, LAYERS) not in there]
    if rules:
        spawned(args.processes, work, rules, args.log)
    kit.keep_table(args.log.with_suffix(".md"), "Collectives of one step", table(kit.measured(args.log)))
    return 0


if __name__ == "__main__":
    kit.command(main)
