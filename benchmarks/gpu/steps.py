"""The optimizer's step alone: ours, eager and compiled, and the installed peers, beside torch's fused AdamW.

Everybody steps the same weights with the same gradients. In each round fused AdamW and one other step once, in turns;
figures are medians over the rounds, the ratio is taken round by round. The floor is what must be moved at the speed of
a copy: the gradient (twice for ours, whose write waits for something that is known of all of it), the weight read and
written, the state read and written.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import Module, Parameter
from torch.utils._pytree import tree_leaves

from apollo_optim import build_optimizer, list_optimizers
from benchmarks.cases import Running
from benchmarks.gpu.device import (
    Peak,
    Taken,
    compiler_fault,
    copy_bandwidth,
    free_bytes,
    graphs,
    launches,
    must_fit,
    open_device,
    timed,
)
from benchmarks.gpu.model import layers_of, materialise, on_meta
from benchmarks.gpu.peers import BASELINE, LR, fused_adamw, installed
from benchmarks.kit import Line, spread

Optimizer = torch.optim.Optimizer
SLOW = 0.5  # seconds: a step of more is profiled on the first layer only, or the profiler takes minutes
TIMES = 6  # steps that a contender takes at least


class Contender(NamedTuple):
    """Who steps."""

    name: str
    make: Callable[[], Optimizer]
    reads: int
    """How often it must read the gradient, at least."""
    compile: bool | None = None
    peer: bool = False


@dataclass
class Stage:
    """What is stepped: weights with gradients, and the step that everybody is compared with."""

    module: Module
    first_layer: list[Parameter]
    device: torch.device
    config: Line
    bandwidth: float
    baseline: Optimizer

    @property
    def parameters(self) -> list[Parameter]:
        return list(self.module.parameters())


def set_up(config: Line) -> tuple[Module, list[Parameter], Line]:
    """The module (all of a model, or its blocks alone), its first layer, and what is to be said about it."""
    device = open_device(config["device"])
    layers = config["layers"] or layers_of(config["size"])
    model = on_meta(config["size"], config["dtype"], layers)
    blocks = model.model.layers
    module: Module = blocks if config["blocks_only"] else model
    each = sum(p.numel() for p in blocks[0].parameters())
    rest = sum(p.numel() for p in module.parameters()) - each * layers
    # bf16 weights and gradients, fused AdamW's state, fp32 state of ours, and a dozen largest matrices in fp32
    largest = max(p.numel() for p in module.parameters())
    free = free_bytes(device)
    if free is not None:
        fits = int((0.9 * free - 48 * largest - 16 * rest) / 16 / each)
        layers = max(1, min(layers, fits))
        del blocks[layers:]
    wanted = 16 * (each * layers + rest) + 48 * largest
    must_fit(wanted, device)
    materialise(module, device)
    for p in module.parameters():
        p.grad = torch.randn_like(p).mul_(1e-3)
    said = {"layers": layers, "of": layers_of(config["size"]), "parameters": each * layers + rest}
    return module, list(blocks[0].parameters()), {**said, "wanted_bytes": wanted, "largest_bytes": 2 * largest}


def measure(case: Running) -> None:
    """Fused AdamW alone, then everybody beside it."""
    config = case.config
    module, first_layer, said = set_up(config)
    device = next(module.parameters()).device
    bandwidth = copy_bandwidth(device, config["copy_bytes"])
    stage = Stage(module, first_layer, device, config, bandwidth, baseline_of(module))
    launches(lambda: torch.ones(8, device=device).add_(1), device)  # the profiler's own first time
    fault = compiler_fault(device) if config["compile"] else "not asked for"
    _, absent = installed()
    case.write(what="stage", **said, bandwidth=stage.bandwidth, compiler_fault=fault, not_installed=absent)
    with case.attempt(contender=BASELINE, peer=True) as line:
        line.update(figures(stage, stage.baseline, reads=1, seconds=2.0))
    everybody = list(contenders(stage, compiles=fault is None))
    eager = 0.0  # seconds of the slowest eager step so far
    for i, contender in enumerate(everybody):
        about = {"contender": contender.name, "compile": contender.compile, "peer": contender.peer}
        if case.left() < 1.0 + (0.0 if contender.compile else TIMES * eager):
            case.skipped("no time left" + f", an eager step took {eager:.1f} s" * (eager > 0), **about)
            continue
        with case.attempt(**about) as line:
            line.update(one(stage, contender, case, share=1 / (len(everybody) - i)))
        if contender.compile is False:
            eager = max(eager, line.get("first_seconds", 0.0))
    case.write(what="end", finite=all(bool(p.isfinite().all()) for p in module.parameters()))


def baseline_of(module: Module) -> Optimizer:
    optimizer = fused_adamw(list(module.parameters()), [], 0)
    optimizer.step()
    return optimizer


def contenders(stage: Stage, compiles: bool) -> Iterator[Contender]:
    """In order of worth: ours, compiled and eager, the peers (some compile for long), the others of the registry."""
    rank, build = stage.config["rank"], functools.partial(build_optimizer, model=stage.module, lr=LR)
    ours: dict[str, dict[str, Any]] = {"apollo-mini": {}, "apollo": {"rank": rank, "proj": "sketch"}, "adamw": {}}
    modes = [True, False] if compiles else [False]
    for mode in modes:
        for name, knobs in ours.items():
            make = functools.partial(build, name, compile=mode, **knobs)
            yield Contender(f"{name} r={rank}" if "rank" in knobs else name, make, reads=2, compile=mode)
    yield from peers(stage)
    for info in list_optimizers() if stage.config["registry"] else []:
        if info.bits is None and info.name not in ours:
            yield Contender(info.name, functools.partial(build, info.name), reads=2)


def peers(stage: Stage) -> Iterator[Contender]:
    """Whoever is installed, on the same two halves of the model as ours."""
    named = list(stage.module.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and ("attn" in name or "mlp" in name)]
    rest = [p for name, p in named if not any(p is q for q in matrices)]
    for name, make in installed()[0].items():
        yield Contender(name, functools.partial(make, matrices, rest, stage.config["rank"]), reads=1, peer=True)


def one(stage: Stage, contender: Contender, case: Running, share: float) -> Line:
    """A contender from its making to its end, in about this share of the time that is left."""
    before = graphs()
    optimizer = contender.make()
    sample = stage.first_layer[0].detach().clone()
    taken = timed(optimizer.step, stage.device)
    made = {
        "first_seconds": taken.device,
        "graphs": graphs() - before,
        "moved": not torch.equal(sample, stage.first_layer[0]),
    }
    if not made["graphs"] and case.left() < TIMES * taken.device:
        return made | {"note": "no time for more than the first step"}
    return made | figures(stage, optimizer, contender.reads, case.left() * share / 2)


def figures(stage: Stage, optimizer: Optimizer, reads: int, seconds: float) -> Line:
    """Time, bytes and launches of a step whose state is there already; about so many seconds of rounds."""
    pairs = rounds(stage, optimizer, seconds)
    own = [mine.device for mine, _ in pairs]
    state = state_bytes(optimizer)
    weights = sum(p.numel() * p.element_size() for p in stage.parameters)
    floor = ((reads + 2) * weights + 2 * state) / stage.bandwidth
    line: Line = {
        "seconds": spread(own),
        "host_seconds": spread([mine.host for mine, _ in pairs]),
        "ratio": spread([mine.device / base.device for mine, base in pairs]),
        "floor_seconds": floor,
        "over_floor": spread(own)["median"] / floor,
        "state_bytes": state,
    }
    peak = Peak(stage.device)
    optimizer.step()
    line.update(peak.read())
    slow = spread(own)["median"] > SLOW
    with only(stage, stage.first_layer if slow else stage.parameters):
        line.update(launches(optimizer.step, stage.device))
    return line | ({"launches_of": "one layer"} if slow else {})


def rounds(stage: Stage, optimizer: Optimizer, seconds: float) -> list[tuple[Taken, Taken]]:
    """Pairs of (its step, fused AdamW's), who is first changing from round to round; at least one pair."""
    pairs: list[tuple[Taken, Taken]] = []
    once = timed(optimizer.step, stage.device).device + timed(stage.baseline.step, stage.device).device
    for number in range(max(1, min(stage.config["rounds"], int(seconds / max(once, 1e-6))))):
        order = (optimizer, stage.baseline) if number % 2 == 0 else (stage.baseline, optimizer)
        both = [timed(each.step, stage.device) for each in order]
        pairs.append((both[0], both[1]) if number % 2 == 0 else (both[1], both[0]))
    return pairs


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors in its state, those inside of other objects too."""
    found = {id(t): t for t in _tensors(list(optimizer.state.values()))}
    return sum(t.numel() * t.element_size() for t in found.values())


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    for leaf in tree_leaves(tree):
        if hasattr(leaf, "__tensor_flatten__"):
            yield from _tensors([getattr(leaf, name) for name in leaf.__tensor_flatten__()[0]])
        elif isinstance(leaf, torch.Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__"):
            yield from (value for value in vars(leaf).values() if isinstance(value, torch.Tensor))


@contextlib.contextmanager
def only(stage: Stage, chosen: Sequence[Parameter]) -> Iterator[None]:
    """Within it, these parameters alone have gradients."""
    there = {id(p) for p in chosen}
    others = [(p, p.grad) for p in stage.parameters if id(p) not in there]
    for p, _ in others:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in others:
            p.grad = grad
