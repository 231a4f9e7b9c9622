"""What an update rule is: one frozen dataclass, its paper on top.

A rule's fields are its knobs. It says of which shapes it is a rule (`applies`), what it keeps between steps (`slots`),
what changes from step to step (`scalars`, `draws`, `phase`), what has to be known of all of a gradient before any of it
can be used (`observe`), and the step itself, of all of a gradient or of any block of its rows (`update`). Everything
else - groups, blocks, rounding, codecs, compilers, processes, low-bit weights, checkpoints, plans - is `optim`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from apollo_optim.core.blocks import Block, part
from apollo_optim.core.codecs import SCALE, Coding
from apollo_optim.core.matrix import Number
from apollo_optim.core.place import Place
from apollo_optim.core.random import Key

View = Literal["any", "matrix", "channels"]
Scalars = Mapping[str, Any]
"""Floats by name (0-D tensors in a compiled step), what was drawn by the names of `draws`, and `phase`."""


class Slot(NamedTuple):
    """One tensor of the state, complete from the first step on.

    Attributes:
        shape: Of the whole tensor, in the rule's view.
        kind: How it may be stored. "mean" and "square" (never negative, used under a root) are in the codec that the
            group asks for; "exact" in fp32; "drawn" in fp32, and it is stored even if the gradient is not finite.
        split: Over ranks, as `Place.zeros` says.
        start: Its value before the first step; "eye": the first columns of the identity (of exact slots).
        codec: How a mean or a square is always stored, whatever the group asks for.
    """

    shape: tuple[int, ...]
    kind: Literal["mean", "square", "exact", "drawn"] = "exact"
    split: Literal["same", "rows", "columns", "channels", "whole"] = "same"
    start: Literal["zeros", "eye"] = "zeros"
    codec: str | None = None


class Update(NamedTuple):
    """A step: `W <- (1 - lr wd) W - lr factor tensor`, and the new values of the state of these rows.

    Nothing of the weight's size has to be made for it: `tensor` may be the gradient itself, `factor` a number, or a
    tensor that broadcasts to `tensor`.
    """

    tensor: Tensor
    factor: Number = 1.0
    state: Mapping[str, Tensor] = {}


class State:
    """The slots of one parameter, read as floats whatever they are stored in: `state["exp_avg"]`, `"basis" in state`.

    `at(block)` is the state of a block of rows: of what has, in every dimension of the gradient's, its size or 1 (and
    maybe one dimension more). All else - a number, a basis, a sketch - is whole in each block.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], codings: Mapping[str, Coding], shape: tuple[int, ...], block: Block = ()
    ) -> None:
        self._tensors, self._codings, self._shape, self._block = tensors, codings, shape, block

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        t = self._tensors[name]
        if name not in self._codings:
            if not self._block or t.ndim < len(self._shape):
                return t
            broadcasts = all(size in (1, whole) for size, whole in zip(t.shape, self._shape, strict=False))
            return part(t, self._block) if broadcasts else t
        scale = part(self._tensors[name + SCALE], self._block[: len(self._shape) - 1])
        return self._codings[name].decode(part(t, self._block), scale)

    def at(self, block: Block) -> State:
        """The state of a block of rows."""
        if not block:
            return self
        return State(self._tensors, self._codings, self._shape, block)

    def with_seen(self, seen: Mapping[str, Tensor]) -> State:
        """What `observe` returned, before what is stored."""
        codings = {name: self._codings[name] for name in self._codings.keys() - seen.keys()}
        return State({**self._tensors, **seen}, codings, self._shape, self._block) if seen else self


class Knob(NamedTuple):
    """What a field of a rule may be: in words, and as a test."""

    wanted: str
    fits: Callable[[Any], bool]


def knob(kind: Knob, doc: str, default: Any = dataclasses.MISSING) -> Any:
    """A field of a rule: what it may be, what it means, and its default (none: a group must name it)."""
    return field(default=default, metadata={"kind": kind, "doc": doc})


def preset(cls: type[Rule], name: str, default: Any) -> Any:
    """The field `name` of another rule, with a default of its own: for a rule that is a setting of that one."""
    of = next(f for f in dataclasses.fields(cls) if f.name == name)
    return field(default=default, metadata=of.metadata)


@dataclass(frozen=True)
class Rule:
    """A step, as pure functions of tensors. Subclasses are frozen dataclasses; their fields are made with `knob`.

    Shapes: a gradient comes in the rule's `view` - as the weight lies ("any"), as (.., out, in) ("matrix": convolutions
    are (out, the rest), 3-D weights stacks of matrices), or as (.., c, k), the longer side first ("channels", a
    transpose where the weight is wide). It is this rank's part; sums over rows, columns or all of it go through
    `place`, which is of the view, too.
    """

    name: ClassVar[str]
    """What groups, run files and `build_optimizer` call it."""
    title: ClassVar[str]
    """As its paper does."""
    paper: ClassVar[str]
    summary: ClassVar[str]
    """One line: the step, and the state for a matrix of m x n (d, n: its small and its large side)."""
    view: ClassVar[View] = "any"
    blockwise: ClassVar[bool] = True
    """May `update` see a block of the weight's rows at a time? (Of a transposed view that is a block of columns.)"""
    stacks: ClassVar[bool] = False
    """May small matrices of one shape be stepped as one stack, each with the very numbers of a step of its own? Only if
    no product of matrices is made but `core.matrix.project`'s: that of a stack is rounded otherwise."""
    per_step: ClassVar[frozenset[str]] = frozenset()
    """Knobs that only `scalars` reads: a compiled step is not made anew for another value of them."""
    by_kind: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})
    """Knobs that its authors set otherwise for an "embedding", a "head" or "others" than for matrices."""
    idle: ClassVar[Mapping[str, frozenset[str]]] = MappingProxyType({})
    """Knobs that mean nothing where a switch is on, by that switch: `build_optimizer` refuses them there."""
    lr: ClassVar[float] = 1e-3
    """A learning rate to begin with."""

    def applies(self, shape: tuple[int, ...]) -> bool:
        """Is it a rule for a weight of this view? Else the group's `otherwise` steps it, and `describe` says so."""
        return True

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        """The state of a weight of this view. Planned, sharded, saved and checked from here."""
        return {}

    def scalars(self, step: int, shape: tuple[int, ...]) -> dict[str, float]:
        """What changes from step to step, computed on the host in double precision. `step` counts from 1."""
        return {}

    def draws(self, step: int) -> dict[str, int]:
        """Random numbers that this step needs: a name -> the counter of the draw. `s[name]` is what `draw` gives.

        "name.other" draws what "name" does by this counter: a step may need more than one of a kind.
        """
        return {}

    def draw_size(self, shape: tuple[int, ...]) -> int:
        """Numbers of one draw for a weight of this view. What is small is drawn for many parameters at a time."""
        return 1 << 62

    def draw(self, key: Key, place: Place, device: torch.device) -> Tensor:
        """What is drawn by this key: it depends on nothing else, so that a checkpoint need not hold it.

        A key may be a batch (`core.random`): what comes back then has a leading dimension more.
        """
        raise NotImplementedError

    def phase(self, step: int) -> Hashable:
        """What of a step is compiled apart: `s["phase"]`. None for most rules."""
        return None

    def observe(self, grad: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        """All of a gradient -> small tensors that `update` finds in its `state`; new values of slots among them.

        `"grad_norm"`, if it is there - one a matrix, (..) - is taken to decide whether the gradient is finite.
        """
        return {}

    def update(self, grad: Tensor, state: State, s: Scalars) -> Update:
        """The step of these rows."""
        raise NotImplementedError

    def describe(self) -> str:
        """What `describe(optimizer)` calls it."""
        return self.title

    # --- for optim ---

    @classmethod
    def knobs(cls) -> dict[str, Knob]:
        """Its fields and what each may be."""
        return {f.name: f.metadata["kind"] for f in dataclasses.fields(cls)}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Its fields' defaults; a field without one must be named."""
        return {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}

    @property
    def static(self) -> Rule:
        """What a compiled step is specialised on."""
        held = {name: value for name, value in self.defaults().items() if name in self.per_step}
        return dataclasses.replace(self, **held) if held else self
