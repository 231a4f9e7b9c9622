"""The one file that knows a tensor can be split over processes. For plain tensors all of it is a no-op.

A rule sees this rank's part of a gradient and its `Place` in the whole. A low-rank state is (.., c, r): whatever way
its weight is split, the state is split by channels (or, in a stack, by expert), so that every rank keeps its part and
sums along r stay local. `torch.distributed.tensor` is imported only once a DTensor is met: it costs a second.
"""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor

from apollo_optim.core.errors import InputError
from apollo_optim.core.lockstep import is_traced, sent, summed
from apollo_optim.core.placements import assembled, cuts, group_name, moved
from apollo_optim.core.random import Dither, Key, dither

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(t: Tensor) -> "TypeGuard[DTensor]":
    """Is `t` a DTensor? Asked without importing its module."""
    return hasattr(t, "placements")


def local(t: Tensor) -> Tensor:
    """This rank's part of `t`."""
    return t.to_local() if is_sharded(t) else t


def whole(t: Tensor) -> Tensor:
    """All of `t`, on every rank."""
    return t.full_tensor() if is_sharded(t) else t


def aligned(t: Tensor, like: Tensor) -> Tensor:
    """`t` split as `like`, of the same shape, is: a gradient may come as a sum in waiting, or split its own way."""
    if not (is_sharded(t) and is_sharded(like)) or t.placements == like.placements:
        return t
    return t.redistribute(placements=like.placements)


def lies_across(t: Tensor) -> bool:
    """Is a matrix the transpose of what lies in memory?"""
    return t.stride(-1) > t.stride(-2)


@dataclass(frozen=True)
class Place:
    """Where this rank's part of a tensor lies in the whole, and how to sum over the ranks that hold the rest.

    Attributes:
        shape: Of the whole tensor.
        own: The shape of this rank's part.
        starts: Where it begins, one index per dimension; None where the part is not one block.
        mesh, placements: Of a DTensor; None and () of a plain tensor.
        stack: Is it a stack of parameters, stepped together, whose numbers are those of single steps?
    """

    shape: tuple[int, ...]
    own: tuple[int, ...]
    starts: tuple[int, ...] | None
    mesh: Any = None
    placements: tuple[Any, ...] = ()
    stack: bool = False

    @staticmethod
    def of(t: Tensor) -> "Place":
        """The place of a DTensor's part, or of all of a plain tensor."""
        if not is_sharded(t):
            return Place.plain(tuple(t.shape))
        return _placed(tuple(t.shape), t.device_mesh, tuple(t.placements))

    @staticmethod
    def flattened(t: "DTensor") -> "Place":
        """The place of a DTensor seen as (out, the rest). Raises InputError for a split that torch cannot say of it."""
        try:
            return Place.of(t.detach().flatten(1))
        except RuntimeError as error:
            raise InputError(
                f"no step for a parameter {tuple(t.shape)} split as {t.placements} over {t.device_mesh.size()} ranks: "
                "its rows cannot be cut so; split its first dimension, as fully_shard does"
            ) from error

    @staticmethod
    def plain(shape: tuple[int, ...], stack: bool = False) -> "Place":
        """The place of all of a plain tensor."""
        return Place(shape, shape, (0,) * len(shape), stack=stack)

    @property
    def offsets(self) -> tuple[int, ...]:
        """`starts`. Raises InputError where this rank's part is not one block of the whole."""
        if self.starts is None:
            raise InputError(f"no step for a parameter split as {self.placements}: a rank has not one block of it")
        return self.starts

    def splits(self, dim: int) -> bool:
        """Does a rank hold only a part along `dim`?"""
        return self.mesh is not None and any(cuts(p, [dim % len(self.shape)]) for p in self.placements)

    def transposed(self) -> "Place":
        """The place of the last two dimensions swapped.

        Raises InputError for what torch before 2.7 cannot say: it forgets in a transpose that a shard is strided.
        """
        *batch, m, n = range(len(self.shape))
        order = [*batch, n, m]
        starts = None if self.starts is None else tuple(self.starts[i] for i in order)
        shape, own = (tuple(of[i] for i in order) for of in (self.shape, self.own))
        return Place(shape, own, starts, self.mesh, tuple(moved(p, order) for p in self.placements))

    def noise(self, key: Key, device: torch.device) -> Dither:
        """`dither` for this rank's part: an entry's is its own wherever it lies. (Of a batch of keys, a batch.)"""
        rows, columns = (self._positions(dims, device).flatten() for dims in (slice(-1), slice(-1, None)))
        t_n, a_m1, b_m1 = dither(rows, columns, key)
        if len(self.own) > 1:
            shape: list[int] = [*a_m1.shape[:-2], *self.own[:-1], 1]
            return Dither(t_n, a_m1.view(shape), b_m1.view(shape))
        vector = t_n, a_m1.squeeze(-2), b_m1.squeeze(-2)  # which has no rows
        return Dither(*(vector if self.own else (t.squeeze(-1) for t in vector)))

    @property
    def noise_size(self) -> int:
        """Numbers that are drawn for it."""
        *rows, columns = self.own or (1,)
        return 2 * prod(rows) + columns

    def _positions(self, dims: slice, device: torch.device) -> Tensor:
        """The flat position, in the whole tensor's dimensions `dims`, of every element of this rank's part."""
        everywhere = self.shape[dims]
        dtype = torch.int32 if prod(everywhere) < 1 << 31 else torch.int64
        index = torch.zeros((), dtype=dtype, device=device)
        for start, size, of in zip(self.offsets[dims], self.own[dims], everywhere, strict=True):
            here = torch.arange(start, start + size, dtype=dtype, device=device)
            index = here if index.ndim == 0 else index[..., None] * of + here
        return index

    # --- sums over ranks: their arguments and results are this rank's parts ---

    def sum(self, own: Tensor, *dims: int) -> Tensor:
        """`own`, summed over `dims` of this rank's part (kept, of size 1), summed over the ranks, too."""
        if self.mesh is None:
            return own
        from torch.distributed.tensor import Partial, Replicate

        over = [dim % len(self.shape) for dim in dims]
        shape = tuple(1 if dim in over else size for dim, size in enumerate(self.shape))
        waiting = [Partial() if cuts(p, over) else p for p in self.placements]
        final = [Replicate() if p.is_partial() else p for p in waiting]
        return self._redistributed(own, shape, waiting, final)

    def total(self, own: Tensor) -> Tensor:
        """The sum over all ranks of a 0-D `own`, their part of a sum over everything."""
        if self.mesh is None:
            return own
        from torch.distributed.tensor import Partial, Replicate

        waiting = [Partial() if hasattr(p, "dim") else p for p in self.placements]
        return self._redistributed(own, (), waiting, [Replicate()] * len(waiting))

    def to_channels(self, own_cx: Tensor) -> Tensor:
        """Sums in waiting over a split compressed side, (.., c, x): one reduce-scatter hands each rank its channels."""
        if self.mesh is None or not self.splits(-1):
            return own_cx
        from torch.distributed.tensor import Partial

        waiting = [Partial() if cuts(p, [len(self.shape) - 1]) else p for p in self.placements]
        shape = (*self.shape[:-1], own_cx.shape[-1])
        return self._redistributed(own_cx, shape, waiting, list(self.channels.placements))

    def from_channels(self, own_cx: Tensor) -> Tensor:
        """The inverse for x numbers a channel: of every channel that this rank's part of the gradient has."""
        if self.mesh is None or not self.splits(-1):
            return own_cx
        from torch.distributed.tensor import Replicate

        channels, dims = self.channels, [dim for dim, p in enumerate(self.placements) if cuts(p, [len(self.shape) - 1])]
        final = [Replicate() if dim in dims else p for dim, p in enumerate(self.placements)]
        shape = (*self.shape[:-1], own_cx.shape[-1])
        within = all(dim < dims[0] for dim, p in enumerate(final) if cuts(p, [len(self.shape) - 2]))
        of = self if is_traced() else _placed(shape, self.mesh, tuple(final))
        if own_cx.shape[-1] > 1 or of is self or None in (channels.starts, of.starts) or not within:
            return self._redistributed(own_cx, shape, list(channels.placements), final)
        there = own_cx.new_zeros(of.own)  # what a rank has not is 0: so few are sent with all other sums
        there.narrow(-2, channels.offsets[-2] - of.offsets[-2], own_cx.shape[-2]).copy_(own_cx)
        for dim in dims:
            there = summed(there, group_name(self.mesh, dim))
        return there

    def along(self, dim: int) -> "Place":
        """The place of sums along `dim`, of size 1 there, of which every rank has all."""
        if self.mesh is None:
            return self
        from torch.distributed.tensor import Replicate

        dim %= len(self.shape)
        shape = tuple(1 if i == dim else size for i, size in enumerate(self.shape))
        placements = tuple(Replicate() if cuts(p, [dim]) else p for p in self.placements)
        return _placed(shape, self.mesh, placements)

    @property
    def channels(self) -> "Place":
        """The place of (.., c, 1): a split of the compressed side turned into one of the channels."""
        if self.mesh is None:
            return self
        from torch.distributed.tensor import Shard

        c, k = len(self.shape) - 2, len(self.shape) - 1
        placements = [Shard(c) if cuts(p, [k]) else p for p in self.placements]
        return _placed((*self.shape[:-1], 1), self.mesh, tuple(placements))

    def whole(self, own: Tensor) -> Tensor:
        """All of the tensor, on every rank."""
        if self.mesh is None:
            return own
        from torch.distributed.tensor import Replicate

        return self._redistributed(own, self.shape, list(self.placements), [Replicate()] * len(self.placements))

    def every_matrix(self, own: Tensor) -> Tensor:
        """One number a matrix, (..), of this rank's part of a stack -> of all matrices."""
        if self.mesh is None or not own.ndim:
            return own
        from torch.distributed.tensor import Replicate

        everywhere = [Replicate()] * len(self.placements)
        stacked = [p if cuts(p, range(own.ndim)) else Replicate() for p in self.placements]
        return self._redistributed(own, self.shape[: own.ndim], stacked, everywhere)

    def part_of(self, t: Tensor, own: Tensor) -> Tensor:
        """This rank's part, of `own`'s shape, of a tensor that is whole on every rank."""
        if self.mesh is None:
            return t
        part = t[tuple(slice(start, start + size) for start, size in zip(self.offsets, own.shape, strict=True))]
        return part.clone()  # or the whole one stayed in memory with it

    def _redistributed(self, own: Tensor, shape: tuple[int, ...], before: list[Any], after: list[Any]) -> Tensor:
        """This rank's part (own) of a tensor of `shape` that lies as `before` -> as `after`.

        Most are sums, or nothing at all: for these a DTensor's bookkeeping is left out.
        """
        changed = [dim for dim, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
        if not changed:
            return own
        if all(before[dim].is_partial() and after[dim].is_replicate() for dim in changed):
            for dim in changed:
                own = summed(own, group_name(self.mesh, dim), before[dim].reduce_op)
            return own

        def redistributed() -> Tensor:
            result: Any = assembled(lambda _: own, shape, self.mesh, before).redistribute(placements=after).to_local()
            return cast(Tensor, getattr(result, "wait", lambda: result)())

        return sent(redistributed)

    # --- state ---

    def of_state(self, shape: tuple[int, ...], split: str) -> "Place":
        """The place of state of this shape for a tensor that lies here.

        Args:
            split: "same": as the tensor is (dimensions that it does not have are those of a number for a matrix).
                "rows", "columns": the same, but every rank has all of a row's (a column's) numbers. "channels": by
                channels, whatever way the tensor is split. "whole": a plain tensor on every rank.
        """
        if self.mesh is None or split == "whole":
            return Place.plain(shape)
        from torch.distributed.tensor import Replicate

        if split == "channels":
            return _placed(shape, self.mesh, self.channels.placements)
        along = {"rows": len(shape) - 1, "columns": len(shape) - 2}.get(split)
        alike = [dim for dim in range(len(shape)) if dim != along]
        placements = [p if cuts(p, alike) or not hasattr(p, "dim") else Replicate() for p in self.placements]
        return _placed(shape, self.mesh, tuple(placements))

    def zeros(self, shape: tuple[int, ...], split: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """State for a tensor that lies here (see `of_state`): a DTensor where that is one.

        Never `new_zeros`: on a DTensor that replicates, on a low-bit weight it quantises.
        """
        place = self.of_state(shape, split)
        if place.mesh is None:
            return torch.zeros(shape, dtype=dtype, device=device)
        make = lambda size: torch.zeros(size, dtype=dtype, device=device)  # noqa: E731
        return assembled(make, shape, place.mesh, list(place.placements))


def _placed(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> Place:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    own, starts = compute_local_shape_and_global_offset(shape, mesh, placements)
    for i, p in enumerate(placements):  # of a strided shard, only what later ones cut back to one block can be placed
        later = [mesh.size(j) for j, q in enumerate(placements) if j > i and cuts(q, [getattr(p, "dim", None)])]
        if getattr(p, "split_factor", prod(later)) != prod(later):
            return Place(shape, tuple(own), None, mesh, placements)
    return Place(shape, tuple(own), tuple(starts), mesh, placements)
