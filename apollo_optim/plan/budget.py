"""The bytes of a training step: what stays, what a step takes besides, and the moment at which both are largest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apollo_optim.core.blocks import few_blocks
from apollo_optim.core.errors import InputError
from apollo_optim.core.storage import parts
from apollo_optim.optim.describe import what_follows
from apollo_optim.optim.knobs import Group
from apollo_optim.optim.optimizer import RuleOptimizer
from apollo_optim.optim.parameter import chosen_rule, init_state
from apollo_optim.optim.recipes import build_optimizer
from apollo_optim.plan import cuda
from apollo_optim.plan.shards import (
    Parallel,
    distinct_bytes,
    first_part,
    gradient_bytes,
    local_bytes,
    mesh_of,
    passes,
    rows_of,
)
from apollo_optim.plan.trace import Block, Trace, alive, largest, most_alive, recorded

PARTS = {
    "weights": "parameters, in the form they are trained in",
    "gradients": "of parameters, complete or kept",
    "state, matrices": "what the optimizer keeps for the matrices of attention and MLP (optim.targets)",
    "state, rest": "what it keeps for embedding, head and norms",
    "activations": "what the forward keeps for the backward, and what both make on the way",
    "logits": "whatever is as wide as the vocabulary",
    "buffers": "of the model",
    "float copies": "of low-bit weights, while a matmul reads them",
    "update": "what the optimizer makes while it writes one parameter",
    "parallel": "gathered blocks (FSDP2), the reducer's copy of the gradients (DDP)",
    "allocator": "what CUDA's caching allocator rounds up (plan.cuda)",
    "context": "of a process on a GPU",
}
"""The parts of a plan, in the order of its table."""


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment of a step."""

    when: str
    rows: dict[str, int]
    """Bytes by part: every key of ``PARTS``."""
    sizes: Sequence[int] = ()
    """Of the single tensors, where a GPU's allocator is planned, too."""

    @property
    def total(self) -> int:
        return sum(self.rows.values())


class Followed(NamedTuple):
    """Parameters of a group that follow one rule."""

    group: str
    rule: str
    """In the words of `describe`."""
    state: str
    """How its moments are stored."""
    size: int
    """Bytes of their state, on this device."""


@dataclass(frozen=True)
class Plan:
    """The bytes of one training step on one device, from the second step on (the state exists)."""

    optimizer: str
    batch: int
    """Rows in a micro-batch."""
    moments: list[Moment]
    """The largest moment of the forward, of the backward and of the update."""
    followed: tuple[Followed, ...] = ()
    """What the optimizer's groups follow."""

    @property
    def peak(self) -> Moment:
        """The largest of them: what the device must hold."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def rows(self) -> dict[str, int]:
        """The parts at the peak; they add up to ``total``."""
        return self.peak.rows

    @property
    def total(self) -> int:
        """Bytes at the peak. On a CPU tensors alone, without the process; on a GPU also its context and what the
        allocator rounds up, without holes."""
        return self.peak.total

    @property
    def most(self) -> dict[str, int]:
        """Each part at its own largest moment: they are not there together, and don't add up to the total."""
        return {part: max(moment.rows[part] for moment in self.moments) for part in PARTS}


def plan(
    model: nn.Module,
    optimizer: str | RuleOptimizer,
    trace: Trace,
    *,
    name: str | None = None,
    release: bool = False,
    accumulate: bool = False,
    parallel: Parallel | None = None,
    device: str = "cpu",
    **knobs: Any,
) -> Plan:
    """What ``optimizer`` (its name, or built on ``model``) takes to train ``model``, which is on the meta device.

    Weights, buffers and state are counted on the tensors that will be there, made by the code that will make them;
    ``trace`` (of the same model) says what forward and backward take besides; the temporaries of the update
    are those of the optimizer's own eager step on the meta device.

    Args:
        release: The step is made inside the backward, and every gradient freed at once.
        accumulate: The step has several micro-batches: all gradients are there before the last backward begins.
        parallel: Of several GPUs, the first one (batch: its own micro-batch).
        device: "cpu" or "cuda": where blocks are larger, and an allocator and a context take memory besides.
        **knobs: For ``build_optimizer``.

    Raises InputError for an unknown name or knob, for a model that is not on the meta device, and for a step inside
    backward together with DDP, which averages gradients after it.
    """
    if isinstance(optimizer, str):
        name, optimizer = name or optimizer, build_optimizer(optimizer, model, **knobs)
    ways: dict[str, Any] = {"release": release, "accumulate": accumulate, "parallel": parallel, "device": device}
    return Budget(model, optimizer, name=name, **ways).at(trace)


class Budget:
    """All of a plan but for the trace, so that many batches can be looked at. Arguments and errors: see ``plan``."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: RuleOptimizer,
        *,
        name: str | None = None,
        release: bool = False,
        accumulate: bool = False,
        parallel: Parallel | None = None,
        device: str = "cpu",
    ) -> None:
        if release and parallel and parallel.kind == "ddp":
            raise InputError(
                "release with ddp, which averages the gradients of the GPUs after the step inside backward: use fsdp2, "
                "or leave release out"
            )
        strange = next((p for p in model.parameters() if p.device.type != "meta"), None)
        if strange is not None:
            raise InputError(f"the model to plan must be on the meta device, this one is on {strange.device}")
        device = cuda.kind_of(device)
        self.name = name or type(optimizer).__name__
        self.release, self.sharded = release, parallel is not None and parallel.kind == "fsdp2"
        self.keeps = not (release or accumulate or self.sharded or (parallel and parallel.bucket_view))
        self.followed = _followed(optimizer, parallel)
        self.resting, self.sizes = resting(model, optimizer, parallel)
        self.cuda = device == "cuda"
        self.held = held(model, release, accumulate, parallel)
        each = release or self.sharded
        self.updates = _updates(optimizer, model, device) if each else {"all": _update_bytes(optimizer, device)}
        if parallel and self.sharded:
            share = {key: rows_of(model.get_parameter(key), parallel.gpus) for key in self.updates}
            self.updates = {key: math.ceil(size * share[key]) for key, size in self.updates.items()}

    def at(self, trace: Trace) -> Plan:
        """The plan of as many rows as were traced."""
        blocks = trace.blocks
        if self.sharded:  # whole gradients live as long as their block is gathered, and are counted with it
            blocks = [b for b in blocks if b.kind != "gradients"]
        if self.keeps:
            blocks = [b._replace(died=trace.end + 2) if b.kind == "gradients" else b for b in blocks]
        forward, backward, update = self.held
        moments = [
            self._moment("forward", forward, largest(blocks, 0, trace.backward)),
            self._moment("backward", backward, largest(blocks, trace.backward, trace.end)),
        ]
        when = {key: trace.complete.get(key, trace.end) if self.release else trace.end for key in self.updates}
        beside = {moment: alive(blocks, moment) for moment in set(when.values())}
        full = {moment: sum(block.size for block in there) for moment, there in beside.items()}
        fullest = sorted(self.updates, key=lambda key: full[when[key]] + self.updates[key])[-1:]
        moments += [
            self._moment(f"update of {key}", {**update, "update": self.updates[key]}, beside[when[key]])
            for key in fullest
        ]
        return Plan(self.name, trace.batch, moments, self.followed)

    def _moment(self, when: str, held: dict[str, int], there: list[Block]) -> Moment:
        rows = {part: self.resting.get(part, 0) + held.get(part, 0) for part in PARTS}
        for block in there:
            rows[block.kind] += block.size
        if not self.cuda:
            return Moment(when, rows)
        sizes = [*self.sizes, *held.values(), *(block.size for block in there)]
        return Moment(when, rows | cuda.overhead(sizes), sizes)


def resting(model: nn.Module, optimizer: RuleOptimizer, parallel: Parallel | None) -> tuple[dict[str, int], list[int]]:
    """What is there at every moment, by part and one by one: weights, state and buffers."""
    mesh, sizes = _mesh(parallel), [distinct_bytes([b]) for b in model.buffers()]
    rows = dict.fromkeys(("weights", "state, matrices", "state, rest"), 0)
    for p in {id(p): p for p in model.parameters()}.values():
        own = first_part(p, mesh)
        rows["weights"] += local_bytes(own)
        sizes += [local_bytes(t) for t in parts(own).values()]
    for group in optimizer.param_groups:
        for p in group["params"]:
            kind = "state, matrices" if _of_matrices(p, group) else "state, rest"
            every = _state_sizes(p, group, mesh)
            rows[kind] += sum(every)
            sizes += every
    return {**rows, "buffers": distinct_bytes(model.buffers())}, sizes


def _followed(optimizer: RuleOptimizer, parallel: Parallel | None) -> tuple[Followed, ...]:
    mesh = _mesh(parallel)
    sizes: dict[tuple[str, str, str], int] = {}
    for number, group in enumerate(optimizer.param_groups):
        for p in (p for p in group["params"] if p.requires_grad):
            key = str(group.get("name", number)), *what_follows(p, group)
            sizes[key] = sizes.get(key, 0) + sum(_state_sizes(p, group, mesh))
    return tuple(Followed(*key, size) for key, size in sizes.items())


def _of_matrices(p: Tensor, group: Group) -> bool:
    """The split that `param_groups` makes, so that AdamW's state is split, too; else, whether it uses the rule."""
    return str(group["name"]).startswith("matrices") if "name" in group else chosen_rule(p, group).view != "any"


def _mesh(parallel: Parallel | None) -> Any:
    """What parameters are sharded over; None: nothing."""
    return mesh_of(parallel.gpus) if parallel and parallel.kind == "fsdp2" else None


def _state_sizes(p: Tensor, group: Group, mesh: Any) -> list[int]:
    """Bytes of each tensor of `optim.describe.state_bytes`, of this rank."""
    return [local_bytes(t) for t in init_state(first_part(p, mesh), group).values() if isinstance(t, Tensor)]


def held(model: nn.Module, release: bool, accumulate: bool, parallel: Parallel | None) -> tuple[dict[str, int], ...]:
    """What stays beside the trace during the forward, the backward and the update, by the way gradients are kept."""
    trained = [p for p in {id(p): p for p in model.parameters()}.values() if p.requires_grad]
    if parallel and parallel.kind == "fsdp2":
        return passes(model, trained, parallel.gpus, one_by_one=release and not accumulate, waiting=accumulate)
    every = sum(gradient_bytes(p) for p in trained)
    viewed = parallel is not None and parallel.bucket_view
    held = {"gradients": every} if viewed or accumulate else {}
    if parallel and not viewed:  # DDP's buckets are there from beginning to end
        held["parallel"] = every
    return held, held, held


def _updates(optimizer: RuleOptimizer, model: nn.Module, device: str = "cpu") -> dict[str, int]:
    """Bytes that each parameter's step makes and frees again, by the parameter's name: a real step on the meta device.

    Parameters of one group, shape and form take the same step: it is made once.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    sizes, found = dict[Any, int](), dict[str, int]()
    for number, group in enumerate(optimizer.param_groups):
        for p in (p for p in group["params"] if p.requires_grad):
            key = number, p.shape, p.dtype, type(p)
            if key not in sizes:
                sizes[key] = _update_bytes(optimizer, device, p)
            found[names[id(p)]] = sizes[key]
    return found


def _update_bytes(optimizer: RuleOptimizer, device: str, *only: Tensor) -> int:
    """Of a step of these parameters, or of all together."""
    params = only or [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for p in params:
        optimizer.state[p] = init_state(p, optimizer.locate(p)[0])
        p.grad = torch.empty(p.shape, dtype=p.dtype, device="meta")
    try:
        with few_blocks(device), recorded() as recorder:
            optimizer.step()
        return most_alive(recorder.finished())
    finally:
        for p in params:
            p.grad = None
            del optimizer.state[p]
