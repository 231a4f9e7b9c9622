"""What the processes of `test_sharded.py` do: steps on shards and on plain tensors, and how far apart they end.

A gradient is drawn on every rank from the parameter's name and the step, whole, and split as its parameter is; so
whatever differs is the optimizer's doing. One process's run is made on plain tensors in the same process.
"""

import contextlib
import faulthandler
import json
import logging
import math
import multiprocessing
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from apollo_optim import AdamW, Apollo, InputError, RuleOptimizer, build_optimizer, release
from apollo_optim.core import place
from apollo_optim.core import random as hashing

SALT = 1
LONG = "SHARDED_LONG" in os.environ  # as `python tests/parallel/test_sharded.py` wants it
STEPS, GAP = (10, 4) if LONG else (5, 3)  # refreshes at the steps 1 and 5 and 9, or 1 and 4
GAMES: dict[str, tuple[str, dict[str, Any]]] = {  # name in the table -> optimizer, knobs
    **{f"apollo {proj}": ("apollo", {"rank": 3, "proj": proj}) for proj in ("gaussian", "sketch", "rademacher", "svd")},
    "apollo-mini": ("apollo-mini", {"rank": 1}),
    "adamw": ("adamw", {}),
}
RESTS: dict[str, dict[str, Any]] = {  # what every matrix is told to follow instead of a rule
    "adamw8bit": {"state_dtype": "8bit"},
    "adafactor": {"rule": "adafactor"},
    "scale rows": {"rule": "scale", "normalize": "rows", "momentum": 0.9},
    "scale columns": {"rule": "scale", "normalize": "columns"},
    "normuon": {"rule": "normuon"},
    "rmnp": {"rule": "rmnp", "nesterov": True},
    "galore": {"rule": "galore", "rank": 3, "update_proj_gap": GAP},
    "fira": {"rule": "fira", "rank": 3, "update_proj_gap": GAP},
    "adam-mini": {"rule": "adam-mini", "block_rows": 4},
    "flora": {"rule": "flora", "rank": 3, "update_proj_gap": GAP},
    "foam": {"rule": "foam"},
    "racs": {"rule": "racs"},
    "sinkgd": {"rule": "sinkgd"},
    "slimadam rows": {"rule": "slimadam"},
    "slimadam columns": {"rule": "slimadam", "share": "columns", "averaged": False},
    "swan": {"rule": "swan"},
    "q-galore": {"rule": "q-galore", "rank": 3, "update_proj_gap": GAP},
    "sumo": {"rule": "sumo", "rank": 3, "update_proj_gap": GAP},
    "dct-adamw": {"rule": "dct-adamw", "rank": 3},
    "sage": {"rule": "sage"},
    "lora-pre": {"rule": "lora-pre", "rank": 3},
}
ELSEWHERE = ("adamw8bit", "adafactor", "normuon", "fira", "flora", "foam", "racs")  # one of a kind, but for `LONG`
Row = dict[str, Any]
Found = Iterator[tuple[str, Row]]
Layout = Callable[[nn.Module], nn.Module]


class Held(nn.Module):
    """A parameter that is no Linear's, such as a stack of experts."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)


class Zoo(nn.Module):
    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict(modules)

    def forward(self) -> None:
        """Never called: the gradients are made by hand. (`fully_shard` wants one.)"""


def zoo(dtype: torch.dtype = torch.float32, convolution: bool = True, only: tuple[str, ...] = ()) -> nn.Module:
    """One of each shape that may be split in a way of its own; two and four ranks get uneven and empty parts."""
    torch.manual_seed(0)
    modules: dict[str, nn.Module] = {
        "tall": nn.Linear(24, 40),
        "wide": nn.Linear(40, 24, bias=False),
        "square": nn.Linear(32, 32, bias=False),
        "uneven_tall": nn.Linear(5, 7, bias=False),
        "uneven_wide": nn.Linear(7, 5, bias=False),
        "one_row": nn.Linear(16, 1, bias=False),
        "one_column": nn.Linear(1, 16, bias=False),
        "norm": nn.RMSNorm(13),
        "experts": Held(3, 12, 8),
        "wide_experts": Held(3, 8, 12),
        "one_expert": Held(1, 12, 8),
    }
    if convolution:
        modules["conv"] = nn.Conv2d(4, 6, 3, bias=False)
    return Zoo({name: modules[name] for name in only or modules}).to(dtype)


def optimizer_for(model: nn.Module, game: str, **knobs: Any) -> RuleOptimizer:
    if game in RESTS:
        return AdamW([{"params": list(model.parameters()), **RESTS[game]}], lr=1e-2, **knobs)
    name, own = GAMES[game]
    if name != "adamw":
        knobs = {"update_proj_gap": GAP, **own, **knobs}
    return build_optimizer(name, model, targets="mlp", **{"lr": 1e-2, **knobs})


def gradient(name: str, p: Tensor, step: int) -> Tensor:
    """Whole, in the parameter's dtype: a direction that stays, noise, and a size that grows, so that the limit holds.

    (SALT is one under which no entry of a first sketch is nearly zero. With salt 0, one of the 120 of `wide` sums to
    1e-4 of the others' size: fp32 knows only three digits of it, Adam's first step is its sign, and the order of
    summation alone moves this tensor by 1.1e-5.)
    """
    g = torch.Generator().manual_seed(zlib.crc32(f"{SALT} {name}".encode()))
    lasting = torch.randn(p.shape, generator=g)
    g.manual_seed(zlib.crc32(f"{SALT} {name} {step}".encode()))
    return ((lasting + 0.5 * torch.randn(p.shape, generator=g)) * (1 + 0.2 * step)).to(p.dtype)


def split_like(full: Tensor, p: Tensor) -> Tensor:
    return distribute_tensor(full, p.device_mesh, p.placements) if isinstance(p, DTensor) else full


def whole(t: Tensor) -> Tensor:
    return t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()


def walk(
    model: nn.Module,
    optimizer: RuleOptimizer,
    steps: range = range(1, STEPS + 1),
    spoil: Callable[[str, int, Tensor], None] = lambda name, step, full: None,
) -> None:
    for step in steps:
        for name, p in model.named_parameters():
            full = gradient(name, p, step)
            spoil(name, step, full)
            p.grad = split_like(full, p)
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p).clone() for name, p in model.named_parameters()}


def distance(ours: Tensor, single: Tensor, start: Tensor) -> float:
    """||ours - single|| / ||single - start||, the worst that any rank sees."""
    worst = (ours.double() - single.double()).norm() / (single.double() - start.double()).norm()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def compare(
    split: Layout,
    game: str,
    dtype: torch.dtype = torch.float32,
    steps: int = STEPS,
    only: tuple[str, ...] = (),
    compiled: bool | None = None,
    **knobs: Any,
) -> list[Row]:
    """The same steps on shards (compiled or not) and in one process: a row per tensor."""
    start = weights(zoo(dtype, only=only))
    ends = []
    for build, compile in ((split, compiled), (lambda model: model, None)):
        model = build(zoo(dtype, only=only))
        optimizer = optimizer_for(model, game, compile=compile, **knobs)
        walk(model, optimizer, range(1, steps + 1))
        assert bool(optimizer.graphs) == bool(compile)
        ends.append(weights(model))
    sharded, single = ends
    return [
        {
            "tensor": name.removeprefix("mlp.").removesuffix(".weight"),
            "distance": distance(sharded[name], single[name], start[name]),
            "unequal": (sharded[name] != single[name]).double().mean().item(),
            "ulps": ulps(sharded[name], single[name]) if dtype is torch.bfloat16 else None,
        }
        for name in start
    ]


def ulps(a: Tensor, b: Tensor) -> int:
    """The most bf16 numbers that lie between two entries. (Both of one sign, as weights here are, give or take 0.)"""
    ordered = [torch.where(i >= 0, i, -(i & 0x7FFF)) for i in (t.view(torch.int16).int() for t in (a, b))]
    return int((ordered[0] - ordered[1]).abs().max())


# --- ways to split a model ---


def fsdp(*mesh: int) -> Layout:
    names = ("replicate", "shard")[-len(mesh) :]
    device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=names)

    def split(model: nn.Module) -> nn.Module:
        fully_shard(model, mesh=device_mesh)
        return model

    return split


def placed(mesh: DeviceMesh, place: Callable[[nn.Parameter], list[Any]]) -> Layout:
    """DTensors made by hand, as tensor parallelism makes them."""

    def split(model: nn.Module) -> nn.Module:
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                shards = distribute_tensor(p.detach(), mesh, place(p))
                setattr(module, name, nn.Parameter(shards))
        return model

    return split


def by_column(p: Tensor) -> list[Any]:
    return [Shard(min(p.ndim - 1, 1) if p.ndim == 4 else p.ndim - 1)]


def rows_and_columns(p: Tensor) -> list[Any]:
    return [Shard(0), Shard(1)] if p.ndim == 2 else [Shard(0), Replicate()]


def columns_and_rows(p: Tensor) -> list[Any]:
    return [Shard(1), Shard(0)] if p.ndim == 2 else [Shard(1), Replicate()] if p.ndim == 3 else [Replicate(), Shard(0)]


def rows_twice(p: Tensor) -> list[Any]:
    return [Shard(0), Shard(0)]


def fsdp_and_tensor_parallel(mesh: tuple[int, int]) -> Layout:
    """Megatron's columns and rows within `fully_shard`: torch calls the outcome a strided shard."""
    device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("fsdp", "tp"))

    def split(model: nn.Module) -> nn.Module:
        plan = {"mlp.tall": ColwiseParallel(), "mlp.wide": ColwiseParallel(), "mlp.square": RowwiseParallel()}
        parallelize_module(model, device_mesh["tp"], plan)
        fully_shard(model, mesh=device_mesh["fsdp"])
        return model

    return split


# --- what the tests ask for ---


ON_TWO = {  # layout -> optimizers (all of them on plain `fully_shard`)
    "fsdp 2": tuple(GAMES),
    "columns 2": ("apollo gaussian", "apollo sketch", "apollo svd", "apollo-mini"),
    "hsdp 2x1": ("apollo gaussian",),
    "hsdp 1x2": ("apollo gaussian", "apollo-mini"),
}
ON_THREE = {"fsdp 3": tuple(GAMES), "columns 3": ("apollo gaussian", "apollo sketch", "apollo-mini")}  # nothing divides
UNDECAYED = ("fsdp 2", "apollo gaussian"), ("fsdp 2", "adamw")  # besides, without weight decay
ON_FOUR = {  # two refreshes
    "hsdp 2x2": ("apollo gaussian",),
    "rows x columns": ("apollo gaussian", "apollo-mini"),
    "columns x rows": ("apollo sketch",),
    "rows x rows": ("apollo gaussian",),
    "fsdp x tp": ("apollo gaussian", "adamw"),
}


def layouts() -> dict[str, Layout]:
    if dist.get_world_size() == 2:
        columns = placed(init_device_mesh("cpu", (2,)), by_column)
        return {"fsdp 2": fsdp(2), "columns 2": columns, "hsdp 2x1": fsdp(2, 1), "hsdp 1x2": fsdp(1, 2)}
    if dist.get_world_size() == 3:
        # (a convolution's inputs cannot be cut in three: `uneven_convolution`)
        columns = placed(init_device_mesh("cpu", (3,)), lambda p: by_column(p) if p.ndim != 4 else [Shard(0)])
        return {"fsdp 3": fsdp(3), "columns 3": columns}
    mesh = init_device_mesh("cpu", (2, 2))
    return {
        "hsdp 2x2": fsdp(2, 2),
        "rows x columns": placed(mesh, rows_and_columns),
        "columns x rows": placed(mesh, columns_and_rows),
        "rows x rows": placed(mesh, lambda p: [Shard(0), Shard(0)]),
        "fsdp x tp": fsdp_and_tensor_parallel((2, 2)),
    }


def parity() -> Found:
    """The optimizers on the layouts of this many processes."""
    games, steps = {2: (ON_TWO, STEPS), 3: (ON_THREE, STEPS), 4: (ON_FOUR, GAP + 2)}[dist.get_world_size()]
    for where, split in layouts().items():
        for game in games[where]:
            for weight_decay in (0.0, 0.1) if (where, game) in UNDECAYED or (LONG and where == "fsdp 2") else (0.1,):
                try:
                    rows = compare(split, game, steps=steps, weight_decay=weight_decay)
                except InputError as error:  # a torch that is too old for this layout, on all ranks
                    yield "refused", {"layout": where, "said": str(error)}
                    continue
                for row in rows:
                    yield "parity", {"layout": where, "game": game, "decay": weight_decay, "steps": steps, **row}


FEW = ("tall", "wide", "uneven_tall", "one_row", "norm", "experts", "conv")  # a tensor of each kind


def rests(only: tuple[str, ...] = FEW) -> Found:
    """Rules of rows and columns, where ranks hold rows, columns, and both. (8 bits: for matrices this small, too.)"""
    least = ("apollo_optim.core.codecs.LEAST_ENTRIES", 0), ("apollo_optim.core.codecs.LEAST_GROUP", 1)
    with mock.patch(*least[0]), mock.patch(*least[1]):
        for where in ("fsdp 2", "columns 2") if dist.get_world_size() == 2 else ("rows x columns",):
            for game in RESTS if LONG or where == "fsdp 2" else ELSEWHERE:
                try:
                    for row in compare(layouts()[where], game, steps=5, only=only, weight_decay=0.1):
                        yield "rest", {"layout": where, "game": game, "refused": False, **row}
                except InputError as error:
                    yield "rest", {"layout": where, "game": game, "refused": True, "said": str(error)}


def rests_of_all() -> Found:
    """The same of every tensor."""
    return rests(())


def bf16() -> Found:
    """bf16 weights (and moments), rounded stochastically: by global position, so shards must draw the same bits."""
    for where, game, state_dtype in (
        ("fsdp 2", "apollo gaussian", torch.float32),
        ("fsdp 2", "apollo gaussian", torch.bfloat16),
        ("fsdp 2", "apollo svd", torch.bfloat16),
        ("fsdp 2", "apollo-mini", torch.float32),
        ("fsdp 2", "adamw", torch.bfloat16),
        ("columns 2", "apollo sketch", torch.bfloat16),
    ):
        for row in compare(layouts()[where], game, torch.bfloat16, weight_decay=0.1, state_dtype=state_dtype):
            yield "bf16", {"layout": where, "game": game, "state": str(state_dtype)[6:], **row}


def compiled() -> Found:
    """Steps on shards - uneven ones, empty ones - from compiled graphs, what they send to one another included."""
    least = ("apollo_optim.core.codecs.LEAST_ENTRIES", 0), ("apollo_optim.core.codecs.LEAST_GROUP", 1)
    with mock.patch(*least[0]), mock.patch(*least[1]):
        for where, game, only in (
            ("fsdp 2", "apollo gaussian", ("tall", "one_row")),
            ("fsdp 2", "apollo sketch", ("experts",)),
            ("columns 2", "apollo gaussian", ("uneven_wide",)),
            ("columns 2", "scale columns", ("square",)),
            ("fsdp 2", "adamw8bit", ("tall",)),
        ):
            for row in compare(layouts()[where], game, steps=GAP + 2, only=only, compiled=True, weight_decay=0.1):
                yield "compiled", {"layout": where, "game": game, **row}


def compiled_once() -> Found:
    """One of them: a wide matrix whose channels lie on both."""
    for row in compare(fsdp(2), "apollo gaussian", only=("wide",), compiled=True, weight_decay=0.1):
        yield "compiled", row


def mutants() -> Found:
    """What the comparisons must notice: a seed that depends on the rank, rounding bits drawn by local position."""
    rank = dist.get_rank()
    with mock.patch("apollo_optim.optim.optimizer.mix_seed", lambda seed, i: hashing.mix_seed(seed, i, rank)):
        for row in compare(fsdp(2), "apollo gaussian"):
            yield "rank in the seed", row
    with mock.patch.object(place.Place, "noise", by_local_position):
        for row in compare(fsdp(2), "apollo gaussian", torch.bfloat16):
            yield "bits by local position", row


noise = place.Place.noise


def by_local_position(self: place.Place, key: hashing.Key, device: torch.device) -> hashing.Dither:
    return noise(place.Place.plain(self.own), key, device)


def non_finite() -> Found:
    """One rank's part of a gradient has an inf, in the first step and in a later one: nobody may take that step."""

    def spoil(name: str, step: int, full: Tensor) -> None:
        if step in (1, 3):
            full.view(-1)[-1] = math.inf  # the last entry: the last rank's alone, or the last expert's

    for game in ("apollo gaussian", "apollo svd", "apollo-mini", "adamw"):
        model, single, clean = fsdp(2)(zoo()), zoo(), zoo()
        start = weights(model)
        optimizers = [optimizer_for(m, game) for m in (model, single)]
        for m, optimizer in zip((model, single), optimizers, strict=True):
            walk(m, optimizer, range(1, 2), spoil)
        untouched = {name: bool(torch.equal(w, start[name])) for name, w in weights(model).items()}
        for m, optimizer in zip((model, single), optimizers, strict=True):
            walk(m, optimizer, range(2, STEPS + 1), spoil)
        walk(clean, optimizer_for(clean, game))
        for (name, p), (_, q) in zip(model.named_parameters(), single.named_parameters(), strict=True):
            ours, theirs = (whole(o.state[t]["skipped"]) for o, t in zip(optimizers, (p, q), strict=True))
            yield (
                "non-finite",
                {
                    "game": game,
                    "tensor": name,
                    "distance": distance(whole(p), whole(q), start[name]),
                    "from clean": distance(whole(p), weights(clean)[name], start[name]),
                    "untouched": untouched[name],
                    "skipped": ours.tolist(),
                    "skipped single": theirs.tolist(),
                },
            )


def checkpoints() -> Found:
    """Two steps, saved; three more from the file, in a new model and optimizer, and three more without it."""
    folder = os.environ["SHARDED_FOLDER"]
    for number, (where, game, flatten, dtype) in enumerate(
        [
            ("fsdp 2", "apollo gaussian", True, torch.float32),
            ("fsdp 2", "apollo gaussian", False, torch.bfloat16),
            ("fsdp 2", "apollo svd", False, torch.float32),
            ("fsdp 2", "apollo-mini", True, torch.bfloat16),
            ("fsdp 2", "adamw", True, torch.float32),
            ("columns 2", "apollo gaussian", True, torch.float32),
        ]
    ):
        options, path = StateDictOptions(flatten_optimizer_state_dict=flatten), f"{folder}/dcp-{number}"
        model = layouts()[where](zoo(dtype))
        optimizer = optimizer_for(model, game)
        walk(model, optimizer, range(1, 3))
        dcp.save(as_saved(model, optimizer, options), checkpoint_id=path)
        walk(model, optimizer, range(3, 6))

        again = layouts()[where](zoo(dtype))
        for p in again.parameters():
            p.detach().mul_(3.0)
        resumed = optimizer_for(again, game, seed=99)  # a parameter's seed is in its state, or the test fails
        saved = as_saved(again, resumed, options)
        dcp.load(saved, checkpoint_id=path)
        set_model_state_dict(again, saved["model"], options=options)
        set_optimizer_state_dict(again, resumed, saved["optimizer"], options=options)
        walk(again, resumed, range(3, 6))
        for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
            yield (
                "checkpoint",
                {
                    "layout": where,
                    "game": game,
                    "flat": flatten,
                    "dtype": str(dtype)[6:],
                    "tensor": name,
                    "equal": everywhere(torch.equal(whole(p), whole(q))),
                    "state": [
                        key
                        for key, value in optimizer.state[p].items()
                        if not everywhere(same(value, resumed.state[q].get(key)))
                    ],
                },
            )


def as_saved(model: nn.Module, optimizer: RuleOptimizer, options: StateDictOptions) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and torch.equal(place.local(a), place.local(b))
    return bool(a == b)


def everywhere(holds: bool) -> bool:
    votes = torch.tensor(int(holds))
    dist.all_reduce(votes, dist.ReduceOp.MIN)
    return bool(votes)


def swapped() -> Found:
    """accelerate's way with FSDP2: the optimizer is built first, and its parameters are exchanged for the shards.

    In between, it puts one-element tensors in their place, so that the whole ones can go.
    """
    for game in ("apollo gaussian", "adamw"):
        model, single = zoo(), zoo()
        start = weights(single)
        optimizer = optimizer_for(model, game)
        names = {p: name for name, p in model.named_parameters()}
        order = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = [torch.empty(1, dtype=p.dtype) for p in group["params"]]
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        shards = dict(model.named_parameters())
        for group, these in zip(optimizer.param_groups, order, strict=True):
            group["params"] = [shards[name] for name in these]
        walk(model, optimizer)
        walk(single, optimizer_for(single, game))
        for name, p in model.named_parameters():
            yield (
                "swapped",
                {
                    "game": game,
                    "tensor": name,
                    "distance": distance(whole(p), weights(single)[name], start[name]),
                },
            )


def trained() -> Found:
    """A forward and a backward through `fully_shard`, half of the batch a rank, against one process with all of it."""

    if not hasattr(torch.cpu.Stream, "record_event"):
        return  # torch 2.6's forward needs a GPU

    def make() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 18, bias=False), nn.RMSNorm(18))

    torch.manual_seed(2)
    inputs, targets = torch.randn(STEPS, 8, 12), torch.randn(STEPS, 8, 18)
    mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    for game, (name, own) in GAMES.items():
        knobs: dict[str, Any] = {} if name == "adamw" else {"update_proj_gap": GAP, **own}
        model, single = make(), make()
        start = weights(single)
        fully_shard(model[0])
        fully_shard(model)
        for m, part in ((model, mine), (single, slice(None))):
            optimizer = build_optimizer(name, m, targets="all-linear", lr=1e-2, compile=LONG and m is model, **knobs)
            for x, y in zip(inputs, targets, strict=True):
                nn.functional.mse_loss(m(x[part]), y[part]).backward()
                optimizer.step()
                optimizer.zero_grad()
        for tensor, w in weights(model).items():
            yield (
                "trained",
                {
                    "game": game,
                    "tensor": tensor,
                    "distance": distance(w, weights(single)[tensor], start[tensor]),
                },
            )


def released() -> Found:
    """The step inside backward: FSDP2 runs the hooks after its reduce-scatter, so it is ``step()`` to the bit.

    Two micro-batches a step, added up in the shards or (not ``synced``) in whole gradients.
    """
    if not hasattr(torch.cpu.Stream, "record_event"):
        return  # torch 2.6's forward needs a GPU
    torch.manual_seed(2 + dist.get_rank())
    inputs = torch.randn(3, 2, 4, 12)

    def trained(game: str, clip: float | None, synced: bool, inside: bool) -> tuple[nn.Module, Any, list[Tensor]]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 18, bias=False), nn.RMSNorm(18))
        fully_shard(model[0])
        fully_shard(model)
        name, own = GAMES[game]
        knobs: dict[str, Any] = {} if name == "adamw" else {"update_proj_gap": 2, **own}
        optimizer = build_optimizer(name, model, targets="all-linear", lr=1e-2, **knobs)
        handle = release(model, optimizer, clip=clip, track_norm=True) if inside else None
        norms = []
        for first, last in inputs:
            model.set_requires_gradient_sync(synced)
            with handle.accumulate() if handle else contextlib.nullcontext():
                model(first).square().sum().backward()
            model.set_requires_gradient_sync(True)
            model(last).square().sum().backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            assert not (handle and gradients), "set free"
            norms.append(handle.grad_norm() if handle else whole(nn.utils.get_total_norm(gradients)))
            if handle is None:
                for p in model.parameters() if clip else ():
                    nn.utils.clip_grad_norm_([p], clip)
                optimizer.step()
                optimizer.zero_grad()
        return model, optimizer, norms

    plain = [(game, None, True) for game in GAMES]
    for how in (*plain, ("apollo gaussian", 0.1, True), ("apollo-mini", 0.1, False), ("adamw", None, False)):
        (model, ours, norms), (stepped, its, expected) = (trained(*how, inside) for inside in (True, False))
        for (tensor, p), (_, q) in zip(model.named_parameters(), stepped.named_parameters(), strict=True):
            state = [key for key, value in its.state[q].items() if not everywhere(same(value, ours.state[p][key]))]
            equal = everywhere(torch.equal(place.local(p), place.local(q)))
            yield "released", {"how": how, "tensor": tensor, "equal": equal, "state": state}
        far = max(abs(a.item() / b.item() - 1) for a, b in zip(norms, expected, strict=True))
        yield "released norm", {"how": how, "far": far}


def unreduced() -> Found:
    """DistributedDataParallel, which averages after the hooks have run: seen or not."""
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(8, 16))
    optimizer = build_optimizer("apollo-mini", wrapped, targets="all-linear")
    said = refusal(lambda: release(wrapped, optimizer))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        release(wrapped.module, optimizer).remove()
    yield "ddp", {"said": said, "warned": [str(w.message) for w in caught]}


def refusals() -> Found:
    """FSDP1, the real one: its flat parameters, with the original ones and without."""
    for use_orig_params in (True, False):
        try:
            model = FullyShardedDataParallel(
                nn.Sequential(nn.Linear(8, 16)), use_orig_params=use_orig_params, device_id=torch.device("cpu")
            )
        except RuntimeError as error:
            yield "fsdp1", {"orig": use_orig_params, "wrapped": False, "said": str(error)}
            continue
        builders: dict[str, Callable[[], object]] = {
            "build_optimizer": lambda: build_optimizer("apollo-mini", model, targets="0"),  # noqa: B023
            "Apollo": lambda: Apollo(model.parameters(), rank=1),  # noqa: B023
            "AdamW": lambda: AdamW(model.parameters()),  # noqa: B023
        }
        for game, build in builders.items():
            yield "fsdp1", {"orig": use_orig_params, "wrapped": True, "game": game, "said": refusal(build)}


def refusal(step: Callable[[], object]) -> str:
    """What it says that cannot be done; "nothing" where it can."""
    try:
        step()
    except InputError as error:
        return str(error)
    return "nothing"


def uneven_convolution() -> Found:
    """Four input channels over three processes: flattened, no cut of the rows."""
    mesh = init_device_mesh("cpu", (3,))
    p = nn.Parameter(distribute_tensor(torch.ones(6, 4, 3, 3), mesh, [Shard(1)]))
    p.grad = torch.ones_like(p)
    yield "convolution", {"said": refusal(Apollo([p], rank=2).step)}


def strange_splits() -> Found:
    """A strided shard that is not one block, and gradients that are split otherwise than their parameter."""
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(DTensor.from_local(torch.ones(4, 6), mesh, [_StridedShard(0, split_factor=2)], run_check=False))
    p.grad = torch.ones_like(p)
    yield "strided", {"said": refusal(Apollo([p], rank=2).step)}

    full = torch.randn(9, 6, generator=torch.Generator().manual_seed(3))
    for name, split, grad in (
        ("sum in waiting", [Replicate()], DTensor.from_local(full / 2, mesh, [Partial()], run_check=False)),
        ("whole", [Shard(0)], distribute_tensor(full, mesh, [Replicate()])),
        ("columns", [Shard(0)], distribute_tensor(full, mesh, [Shard(1)])),
    ):
        ends = []
        for sharded in (True, False):
            w = nn.Parameter(torch.ones(9, 6))
            w = nn.Parameter(distribute_tensor(w.detach(), mesh, split)) if sharded else w
            w.grad = grad if sharded else full
            Apollo([w], rank=2).step()
            ends.append(whole(w))
        yield "other split", {"grad": name, "distance": distance(*ends, torch.ones(9, 6))}


CHECKS: dict[int, list[Callable[[], Found]]] = {
    2: [
        parity,
        rests,
        bf16,
        compiled_once,
        mutants,
        non_finite,
        checkpoints,
        swapped,
        trained,
        released,
        unreduced,
        refusals,
        strange_splits,
    ],
    3: [parity, uneven_convolution],
    4: [parity, rests],
}
COMPILED = [compiled]  # a compiler takes minutes for it
WHOLE_ZOO = [rests_of_all]


def work(rank: int, world: int, folder: str, checks: list[Callable[[], Found]]) -> None:
    """One process of ``world``: what ``checks`` find goes to ``folder``/found.json.

    Where it was when a signal ended it is written beside that.
    """
    faulthandler.enable(Path(folder, f"process {rank}.died").open("w"))  # noqa: SIM115 - as long as it lives
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)  # what a 2-D mesh could do with fewer messages
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "SHARDED_FOLDER": folder}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=600)
    )
    found: dict[str, list[Row]] = {}
    for check in checks:
        began, cpu = time.perf_counter(), time.process_time()
        for name, row in check():
            found.setdefault(name, []).append(row)
        spent = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        found.setdefault("seconds", []).append({"check": check.__name__, **spent})
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def find(world: int, folder: Path, checks: list[Callable[[], Found]] | None = None) -> dict[str, list[Row]]:
    """Run ``work`` in ``world`` processes of one thread each. An exception in one of them is raised here, and a death.

    They are forks of one process that has imported everything and has no thread: an import takes seconds.
    """
    multiprocessing.set_forkserver_preload(
        ["apollo_optim", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo"]
    )
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        try:
            start_processes(work, (world, str(folder), checks or CHECKS[world]), world, start_method="forkserver")
        except ProcessExitedException as error:
            for place in folder.glob("*.died"):
                error.add_note(f"{place.name}: {place.read_text()}")
            raise
    found: dict[str, list[Row]] = json.loads((folder / "found.json").read_text())
    return found
