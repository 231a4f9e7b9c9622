"""Large tensors go through a step in blocks of rows, so that what a step computes with stays small.

A 7B model's embedding has 131 million entries: each fp32 temporary of it would be 0.5 GB. Eager steps therefore cut
every tensor into blocks; a compiled step has no temporaries to keep small and is left whole. On a CPU a block is what
fits in a core's cache. An accelerator pays for every operation that it is sent, so there only memory asks for a cut:
a block is a few of LLaMA-1B's largest matrices, whose temporaries are 0.13 GB each.
All of this is about plain tensors: of a DTensor, each rank's own part.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod

import torch
from torch import Tensor

CPU_BLOCK = 1 << 18
BLOCK = 1 << 25
Block = tuple[slice, ...]  # an index: one slice for each of some leading dimensions; () is everything
_planned: ContextVar[str | None] = ContextVar("planned", default=None)


@contextmanager
def few_blocks(device_type: str = "cpu") -> Iterator[None]:
    """For a planner, who wants a step's bytes on such a device: the first two blocks and the last stand for all.

    So do the first and the last of the parameters that are alike (`optim.together`).
    """
    token = _planned.set(device_type)
    try:
        yield
    finally:
        _planned.reset(token)


def is_planned() -> bool:
    """Is all of this for a planner?"""
    return _planned.get() is not None


def is_cpu(device: torch.device) -> bool:
    """Is it one, or planned to be?"""
    return (_planned.get() or device.type) == "cpu"


def block_size(device: torch.device) -> int:
    """Entries of a block."""
    return CPU_BLOCK if is_cpu(device) else BLOCK


def blocks(shape: tuple[int, ...], device: torch.device, whole: int = 0, size: int | None = None) -> list[Block]:
    """Indices that cut a tensor of this shape into parts of about `size` entries, in order of memory.

    Args:
        device: Where it lies: it has a `block_size`.
        whole: So many dimensions, the last ones, are never cut.

    One index, (), where there is nothing to cut, and under torch.compile.
    """
    if torch.compiler.is_compiling() or len(shape) <= whole:  # (what a block is, a compiler cannot trace)
        return [()]
    most = size or block_size(device)
    if prod(shape) <= most:
        return [()]
    inner = [prod(shape[dim + 1 :]) for dim in range(len(shape) - whole)]
    cut = next((dim for dim, entries in enumerate(inner) if entries <= most), len(inner) - 1)
    rows = max(1, most // inner[cut])
    outer = [[slice(i, i + 1) for i in range(entries)] for entries in shape[:cut]]
    along = [slice(start, min(start + rows, shape[cut])) for start in range(0, shape[cut], rows)]
    every = list(itertools.product(*outer, along))
    return [*every[:2], *every[2:][-1:]] if is_planned() else every


def part(t: Tensor, at: Block) -> Tensor:
    """This block of `t`, a view. `t` may broadcast to what the block was cut from: its dimensions of 1 stay."""
    if not at or t.ndim == 0:
        return t
    return t[tuple(s if size > 1 else slice(None) for s, size in zip(at, t.shape, strict=False))]


def by_rows(function: Callable[[Tensor, Block], Tensor], t: Tensor) -> Tensor:
    """`function(rows, block)` of every block of whole rows, put together: (.., c, k) -> (.., c, x)."""
    if torch.compiler.is_compiling() or t.numel() <= CPU_BLOCK:  # the smaller one: nothing to cut anywhere
        return function(t, ())
    cuts = blocks(tuple(t.shape), t.device, whole=1)
    if len(cuts) == 1:
        return function(part(t, cuts[0]), cuts[0])
    first = function(part(t, cuts[0]), cuts[0])
    out = torch.empty((*t.shape[:-1], first.shape[-1]), dtype=first.dtype, device=t.device)
    out[cuts[0]] = first
    for at in cuts[1:]:
        out[at] = function(part(t, at), at)
    return out
