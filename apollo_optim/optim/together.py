"""Eager steps of many parameters that are alike, in fewer calls: an accelerator waits for each, and so does Python.

Alike are those of one group, shape, dtype and step: their steps differ in tensors and seeds alone. What they draw is
drawn for all of them at a time. Where they are small and their rule can (`Rule.stacks`), they are stepped as one stack,
too. The numbers are those of single steps, bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from apollo_optim.core.blocks import CPU_BLOCK, is_cpu, is_planned
from apollo_optim.core.lockstep import MEMBERS, side_by_side
from apollo_optim.core.place import Place, lies_across
from apollo_optim.core.random import Dither
from apollo_optim.optim.apply import Inputs, Static, Tensors, apply_update, draw
from apollo_optim.rules import Rule

DRAWN_TOGETHER = 1 << 16  # most numbers of a parameter that are drawn before its turn
STACK = 1 << 22  # most entries of a stack on an accelerator; on a CPU, a block
LITTLE = 1 << 15  # entries of a matrix from which torch has several threads sum it up, and a stack otherwise than that
ALIGNED = 16  # entries: members of a stack begin where tensors of their own would, at 64 bytes
WINDOW = 1 << 24
"""Most entries of sharded gradients whose steps are side by side on a CPU; on an accelerator four times as many."""

Drawn = dict[str, Any]
T = TypeVar("T")


class Given(NamedTuple):
    """One parameter's step before it is taken: the arguments of `apply_update`."""

    static: Static
    weight: Tensor
    grad: Tensor
    tensors: Tensors
    inputs: Inputs


Prepared = tuple[Given, Callable[[], None]]
"""Of some steps that are taken at once the last one, and what takes them."""


def alike(given: Given) -> tuple[Any, ...]:
    """Equal for steps that may be taken together."""
    static, weight, grad, _, inputs = given
    return id(static), id(inputs.numbers), weight.dtype, grad.dtype, grad.device


def take_steps(steps: list[Prepared]) -> None:
    """Take them, those of sharded parameters side by side: what they send to other processes goes together."""
    sharded = []
    for step in steps:
        given, take = step
        if given.static.place.mesh is None or is_planned():
            take()
        else:
            sharded.append(step)
    if sharded:
        device = sharded[0][0].grad.device
        for window in windows(sharded, cpu=is_cpu(device)):
            side_by_side([take for _, take in window], device)


def windows(steps: Iterable[tuple[Given, T]], *, cpu: bool) -> Iterator[list[tuple[Given, T]]]:
    """So many steps of sharded parameters at a time as keep little in memory while they wait for each other."""
    window: list[tuple[Given, T]] = []
    entries, most = 0, WINDOW if cpu else 4 * WINDOW
    for step in steps:
        place = step[0].static.place
        more = prod(place.shape) // place.mesh.size()  # (not this one's own: all of them must cut alike)
        if window and (entries + more > most or len(window) == MEMBERS):
            yield window
            window, entries = [], 0
        window.append(step)
        entries += more
    if window:
        yield window


def together(steps: list[Given]) -> list[Prepared]:
    """What is to be called to take these steps, which are `alike`."""
    if len(steps) == 1:
        return [(steps[0], partial(apply_update, *steps[0]))]
    static, _, grad, _, _ = steps[0]
    most = CPU_BLOCK if is_cpu(grad.device) else STACK
    size = most // max(1, grad.numel()) if _stacks(static, grad) else 0
    every: list[Callable[[], None]]
    if size > 1:
        every = [partial(_step_stack, steps[first : first + size]) for first in range(0, len(steps), size)]
    elif _is_little(static, tuple(steps[0].inputs.keys)):
        waiting: list[Drawn] = []
        every = [partial(_step_one, given, steps, waiting) for given in steps]
    else:
        every = [partial(apply_update, *given) for given in steps]
    if is_planned():
        every = [every[0], *every[1:][-1:]]
    return [(steps[-1], take) for take in every] if len(every) < len(steps) else list(zip(steps, every, strict=True))


def _stacks(static: Static, grad: Tensor) -> bool:
    """May many be one? On an accelerator, whose sums have an order for every shape, only of what has no sums."""
    rule = static.rule
    if static.place.mesh is not None or static.own or static.conv:
        return False
    if rule.view == "any":
        return type(rule).observe is Rule.observe
    return rule.stacks and is_cpu(grad.device) and grad.numel() < LITTLE and grad.numel() % ALIGNED == 0


def _step_one(given: Given, steps: list[Given], waiting: list[Drawn]) -> None:
    """Of all of them in turn; the first one draws for all, and the last one leaves nothing of it."""
    if not waiting:
        waiting += reversed(_members(_draw(steps)))
    own = waiting.pop()
    if given is steps[-1]:
        waiting.clear()  # a planner takes but the first and the last
    apply_update(*given[:-1], given.inputs._replace(drawn=own))


def _step_stack(steps: list[Given]) -> None:
    """All of them as one, and back."""
    if len(steps) == 1:
        apply_update(*steps[0])
        return
    static, _, _, tensors, inputs = steps[0]
    drawn = {name: _of_stack(batch) for name, batch in (_draw(steps) if inputs.keys else {}).items()}
    stacks = [_stack([given.weight for given in steps])]
    stacks += [_stack([given.tensors[name] for given in steps]) for name in tensors]
    grads = _stack([given.grad for given in steps])
    of_names = dict(zip(tensors, stacks[1:], strict=True))
    apply_update(_stacked(static, len(steps)), stacks[0], grads, of_names, Inputs(inputs.numbers, {}, drawn))
    places = [given.weight for given in steps] + [given.tensors[name] for name in tensors for given in steps]
    torch._foreach_copy_(places, [t for stack in stacks for t in stack.unbind()])


def _stack(members: list[Tensor]) -> Tensor:
    """As they lie: sums along what lies across have an order of their own."""
    if members[0].ndim > 1 and lies_across(members[0]):
        return torch.stack([t.mT for t in members]).mT
    return torch.stack(members)


@lru_cache(1 << 10)
def _stacked(static: Static, size: int) -> Static:
    def place(of: Place) -> Place:
        return Place.plain((size, *of.shape), stack=True)

    slots = tuple(
        (name, replace(stored, slot=stored.slot._replace(shape=(size, *stored.slot.shape)), place=place(stored.place)))
        for name, stored in static.slots
    )
    return replace(static, place=place(static.place), seen=place(static.seen), slots=slots, small=True, stack=True)


def _of_stack(batch: Dither | Tensor) -> Dither | Tensor:
    """The noise of a stack, from that of its members: columns have no rows. What a rule draws is one already."""
    if not isinstance(batch, Dither):
        return batch
    missing = batch.a_m1.ndim - batch.t_n.ndim
    return batch._replace(t_n=batch.t_n[(slice(None), *[None] * missing)])


# --- random numbers ---


def _draw(steps: list[Given]) -> Drawn:
    """What all of these draw, each a batch; one copy of the keys to where they are."""
    static, _, grad, _, inputs = steps[0]
    words = torch.tensor([[given.inputs.keys[name] for given in steps] for name in inputs.keys], dtype=torch.int32)
    words = words.to(grad.device, non_blocking=True).unsqueeze(-1)  # (names, b, 2, 1)
    keys = {name: (of[:, 0], of[:, 1]) for name, of in zip(inputs.keys, words, strict=True)}
    return draw(static, keys, grad.device)


@lru_cache(1 << 10)
def _is_little(static: Static, names: tuple[str, ...]) -> bool:
    """Else - a dense basis of many columns - each step draws its own, and it is gone when that is over."""
    drawn = static.rule.draw_size(static.seen.shape)
    sizes = (static.places[name].noise_size if name in static.places else drawn for name in names)
    return 0 < sum(sizes) <= DRAWN_TOGETHER


def _tensors(drawn: Dither | Tensor) -> tuple[Tensor, ...]:
    return tuple(drawn) if isinstance(drawn, Dither) else (drawn,)


def _members(batch: Drawn) -> list[Drawn]:
    """Of every parameter its own."""
    of_names = []
    for one in batch.values():
        parts = zip(*(t.unbind() for t in _tensors(one)), strict=True)
        of_names.append([Dither(*part) if isinstance(one, Dither) else part[0] for part in parts])
    return [dict(zip(batch, own, strict=True)) for own in zip(*of_names, strict=True)]
