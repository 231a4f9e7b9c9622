"""Large tensors go through a step in blocks of rows, so that what a step computes with stays small.

A 7B model's embedding has 131 million entries: each fp32 temporary of it would be 0.5 GB. Eager steps therefore cut
every tensor into blocks of about `BLOCK` entries; a compiled step has no temporaries to keep small and is left whole.
All of this is about plain tensors: of a DTensor, each rank's own part.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod

import torch
from torch import Tensor

BLOCK = 1 << 18  # the fp32 temporaries of a few operations fit in a core's cache
Block = tuple[slice, ...]  # an index: one slice for each of some leading dimensions; () is everything
_few: ContextVar[bool] = ContextVar("few", default=False)


@contextmanager
def few_blocks() -> Iterator[None]:
    """The first two blocks and the last stand for all: for a planner, which wants a step's bytes, not its numbers."""
    token = _few.set(True)
    try:
        yield
    finally:
        _few.reset(token)


def blocks(shape: tuple[int, ...], whole: int = 0, size: int | None = None) -> list[Block]:
    """Indices that cut a tensor of this shape into parts of about `size` (`BLOCK`) entries, in order of memory.

    The last `whole` dimensions are never cut. One index, (), where there is nothing to cut, and under torch.compile.
    """
    most = size or BLOCK
    if torch.compiler.is_compiling() or prod(shape) <= most or len(shape) <= whole:
        return [()]
    inner = [prod(shape[dim + 1 :]) for dim in range(len(shape) - whole)]
    cut = next((dim for dim, entries in enumerate(inner) if entries <= most), len(inner) - 1)
    rows = max(1, most // inner[cut])
    outer = [[slice(i, i + 1) for i in range(entries)] for entries in shape[:cut]]
    along = [slice(start, min(start + rows, shape[cut])) for start in range(0, shape[cut], rows)]
    every = list(itertools.product(*outer, along))
    return [*every[:2], *every[2:][-1:]] if _few.get() else every


def part(t: Tensor, at: Block) -> Tensor:
    """This block of `t`, a view. `t` may broadcast to what the block was cut from: its dimensions of 1 stay."""
    if not at or t.ndim == 0:
        return t
    return t[tuple(s if size > 1 else slice(None) for s, size in zip(at, t.shape, strict=False))]


def by_rows(function: Callable[[Tensor, Block], Tensor], t: Tensor) -> Tensor:
    """`function(rows, block)` of every block of whole rows, put together: (.., c, k) -> (.., c, x)."""
    if t.numel() <= BLOCK:
        return function(t, ())
    cuts = blocks(tuple(t.shape), whole=1)
    if len(cuts) == 1:
        return function(part(t, cuts[0]), cuts[0])
    first = function(part(t, cuts[0]), cuts[0])
    out = torch.empty((*t.shape[:-1], first.shape[-1]), dtype=first.dtype, device=t.device)
    out[cuts[0]] = first
    for at in cuts[1:]:
        out[at] = function(part(t, at), at)
    return out
