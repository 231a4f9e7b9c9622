"""The only executor: a rule's step, taken on one parameter.

`observe` -> is the gradient finite? (of each matrix) -> block after block: `update`, write the weight, store the state.
Everything here is this rank's part; what is sharded, and how, the `Place`s of `Static` know.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from apollo_optim.core.blocks import Block, blocks, part
from apollo_optim.core.codecs import SCALE, Codec, Coding, store_codes
from apollo_optim.core.compile import in_memory
from apollo_optim.core.matrix import Number, channel_norms, full_norm
from apollo_optim.core.place import Place
from apollo_optim.core.random import Dither, Key
from apollo_optim.core.write import store_float, write, write_block
from apollo_optim.rules import Rule
from apollo_optim.rules.base import Scalars, Slot, State

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Stored:
    """How one slot is stored, and where this rank's part of it lies.

    Attributes:
        coding: Of codes; None for floats.
        stochastic: Is it rounded stochastically?
    """

    slot: Slot
    codec: Codec
    place: Place
    coding: Coding | None
    stochastic: bool


@dataclass(frozen=True)
class Static:
    """What stays from step to step: a compiled step is specialised on it.

    Attributes:
        conv: Is the gradient flattened to (out, the rest)?
        wide: Does the rule see a transpose?
        place: Of the matrix form, as it lies.
        seen: Of the rule's view.
        stochastic: Is the weight rounded stochastically?
        power: Of the gradient's entries, which keep their signs.
        cautious: Does the weight decay only where the step goes towards zero, too?
        own: Does the weight write itself? (A low-bit one does.)
        small: Is it one block?
        phase: Of the rule.
        stack: Is it a stack of parameters, each on its own (`together`)?
        codings: Of slots that are stored in codes.
        places: Of what may be rounded: the weight, and slots by name.
    """

    rule: Rule
    conv: bool
    wide: bool
    place: Place
    seen: Place
    slots: tuple[tuple[str, Stored], ...]
    stochastic: bool
    maximize: bool
    power: float
    cautious: bool
    own: bool
    small: bool
    phase: Hashable = None
    stack: bool = False
    codings: dict[str, Coding] = field(init=False, compare=False, repr=False)
    places: dict[str, Place] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        codings = {name: stored.coding for name, stored in self.slots if stored.coding is not None}
        object.__setattr__(self, "codings", codings)
        places = {"weight": self.place, **{name: stored.place for name, stored in self.slots}}
        object.__setattr__(self, "places", places)

    @property
    def full_state(self) -> bool:
        """Is there state of the weight's size?"""
        return any(stored.slot.shape == self.seen.shape for _, stored in self.slots)


class Inputs(NamedTuple):
    """What changes: Python numbers in an eager step, 0-D tensors in a compiled one.

    Attributes:
        numbers: `lr`, `weight_decay` and the rule's scalars.
        keys: Of the rule's draws, and of what is rounded: "weight", and slots by name.
        drawn: What `draw` makes of the keys, where it has been made already.
    """

    numbers: dict[str, Number]
    keys: dict[str, Key]
    drawn: Mapping[str, Any] = {}


def draw(static: Static, keys: Mapping[str, Key], device: torch.device) -> dict[str, Any]:
    """All random numbers of a step: the rule's draws by name, and a `Dither` for each thing that is rounded.

    Keys may be batches, of parameters whose steps differ in nothing else.
    """
    drawn: dict[str, Any] = {}
    for name, key in keys.items():
        place = static.places.get(name)
        drawn[name] = static.rule.draw(key, static.seen, device) if place is None else place.noise(key, device)
    return drawn


class Step(NamedTuple):
    """A step that is known, but not taken: what a weight that writes itself is given. (.., m, n), as it lies."""

    tensor: Tensor
    factor: Number
    finite: Tensor


class _Seen(NamedTuple):
    """What is known after all of a gradient was looked at."""

    matrix: Tensor
    view: Tensor
    state: State
    s: Scalars
    finite: Tensor


def apply_update(static: Static, weight: Tensor, grad: Tensor, tensors: Tensors, inputs: Inputs) -> None:
    """Take one step: `weight` and `tensors` are written in place, each once.

    A gradient whose norm is not finite leaves its matrix as it was - weight and state - and is counted in
    `tensors["skipped"]`. That is a `where`, not a branch: no value is ever read back by the host.
    """
    seen = _observe(static, grad, tensors, inputs)
    lr, weight_decay, noise = inputs.numbers["lr"], inputs.numbers["weight_decay"], seen.s.get("weight")
    for at in [()] if static.small else _cuts(static, weight, seen.matrix):
        step = _update(static, seen, tensors, at)
        here = noise.part(at) if at and noise is not None else noise
        if static.own:
            weight._write_rows_(at, *step, lr, weight_decay, here)  # type: ignore[attr-defined]
        elif at or static.small:
            write_block(part(weight, at), *step, lr, weight_decay, here, static.cautious)
        else:
            write(weight, *step, lr, weight_decay, here, static.cautious)


def compute_update(static: Static, grad: Tensor, tensors: Tensors, inputs: Inputs) -> Step:
    """All of a step but the weight: the state is written, what is to be done to the weight comes back."""
    return _update(static, _observe(static, grad, tensors, inputs), tensors, ())


def broadcast_like(per_matrix: Tensor, t: Tensor) -> Tensor:
    """One number a matrix, (..), in a shape that broadcasts to (.., m, n)."""
    missing = t.ndim - per_matrix.ndim
    return per_matrix[(..., *[None] * missing)] if missing and per_matrix.ndim else per_matrix


def _observe(static: Static, grad: Tensor, tensors: Tensors, inputs: Inputs) -> _Seen:
    """Look at all of the gradient, and store what is known of the state after that."""
    matrix = grad.flatten(1) if static.conv else grad
    matrix = -matrix if static.maximize else matrix
    matrix = matrix if static.power == 1 else matrix.abs().pow(static.power).copysign(matrix)
    view = matrix.mT if static.wide else matrix
    state = State(tensors, static.codings, tuple(view.shape))
    drawn = inputs.drawn or draw(static, inputs.keys, grad.device)
    s: dict[str, Any] = {**inputs.numbers, **drawn, "phase": static.phase}
    found = static.rule.observe(view, state, s, static.seen)
    norm = found.pop("grad_norm") if "grad_norm" in found else _grad_norm(static, view)
    finite = in_memory(norm < math.inf)  # no norm is negative
    for name, stored in static.slots:
        if name in found:
            value = found[name]
            where = static.seen.every_matrix(finite) if stored.slot.split == "whole" else finite
            for at in [()] if static.small or stored.coding is not None else blocks(tuple(value.shape), value.device):
                _store(name, stored, part(value, at) if at else value, tensors, where, value, s.get(name), at)
    tensors["skipped"].add_(~finite)
    return _Seen(matrix, view, state.with_seen(found), s, finite)


def _update(static: Static, seen: _Seen, tensors: Tensors, at: Block) -> Step:
    """The step of one block, as it lies; its state is stored."""
    here, view, finite = at, seen.view, seen.finite
    if at:
        here = _as_seen(static, at, seen.matrix.ndim)
        view, finite = part(view, here), part(broadcast_like(finite, seen.matrix), at)
    elif finite.ndim:
        finite = broadcast_like(finite, seen.matrix)
    new = static.rule.update(view, seen.state.at(here), seen.s)
    for name, stored in static.slots:
        if name in new.state:
            _store(name, stored, new.state[name], tensors, seen.finite, seen.view, seen.s.get(name), here)
    if not static.wide:
        return Step(new.tensor, new.factor, finite)
    factor = new.factor.mT if isinstance(new.factor, Tensor) and new.factor.ndim > 1 else new.factor
    return Step(new.tensor.mT, factor, finite)


def _grad_norm(static: Static, view: Tensor) -> Tensor:
    """One number a matrix; for a rule that knows no matrices, one a parameter."""
    if static.stack and static.rule.view == "any":
        norms: Tensor = vector_norm(view.reshape(len(view), -1), dim=1, dtype=torch.float32)
        return norms
    if view.ndim < 3 or static.rule.view == "any":
        return full_norm(view, static.seen)
    square = channel_norms(view).square().sum(-2, keepdim=True)
    return static.seen.sum(square, -2, -1)[..., 0, 0]


def _cuts(static: Static, weight: Tensor, matrix: Tensor) -> list[Block]:
    """The blocks of the matrix that are stepped one after the other, so that temporaries stay small."""
    own = static.own  # it goes through blocks of its own, unless state must come along
    if not static.rule.blockwise or (own and not static.full_state):
        return [()]
    rows = own or static.rule.view != "any" or weight.ndim != matrix.ndim
    rows = rows or any(stored.coding for _, stored in static.slots)
    return blocks(tuple(matrix.shape), matrix.device, whole=int(rows))


def _as_seen(static: Static, at: Block, ndim: int) -> Block:
    """A block of the matrix as an index into the rule's view."""
    if not static.wide or not at:
        return at
    at = (*at, *[slice(None)] * (ndim - len(at)))
    return (*at[:-2], at[-1], at[-2])


def _store(
    name: str,
    stored: Stored,
    value: Tensor,
    tensors: Tensors,
    finite: Tensor,
    like: Tensor,
    noise: Dither | None,
    at: Block,
) -> None:
    """One block of one slot, where finite. `like`: of the shape of all of it, as `noise` is."""
    old = part(tensors[name], at) if at else tensors[name]
    if stored.slot.kind == "drawn":  # a draw has nothing to do with this gradient
        old.copy_(value)
        return
    if finite.ndim:
        finite = part(broadcast_like(finite, like), at)
    if at and noise is not None:
        noise = noise.part(at)
    if stored.coding is None:
        store_float(old, value, finite, noise)
        return
    assert noise is not None  # codes are always rounded stochastically
    store_codes(old, part(tensors[name + SCALE], at[: like.ndim - 1]), value, finite, noise, stored.coding)
