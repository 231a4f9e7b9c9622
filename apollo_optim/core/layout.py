"""The one file that knows a tensor can be sharded. For plain tensors all of it is a no-op.

A low-rank state is (.., c, r). Whatever way its weight is split, the state is split by channels (or, in a stack, by
expert), so every rank keeps its part and norms along r stay local. ``torch.distributed.tensor`` is imported only once a
DTensor is met: it costs a second and 500 modules.
"""

from collections.abc import Callable, Container
from math import prod
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from apollo_optim.core.blocks import Block
from apollo_optim.core.errors import InputError
from apollo_optim.core.random import Key, dither

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(t: Tensor) -> "TypeGuard[DTensor]":
    """Is ``t`` a DTensor? Asked without importing its module."""
    return hasattr(t, "placements")


def local(t: Tensor) -> Tensor:
    """This rank's part of ``t``."""
    return t.to_local() if is_sharded(t) else t


def whole(t: Tensor) -> Tensor:
    """All of ``t``, on every rank."""
    return t.full_tensor() if is_sharded(t) else t


def offsets(t: Tensor) -> tuple[int, ...]:
    """Where this rank's part starts in the whole tensor, one index per dimension."""
    if not is_sharded(t):
        return (0,) * t.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = t.device_mesh, t.placements
    for i, p in enumerate(placements):  # of a strided shard, only what later ones cut back to one block can be placed
        later = [mesh.size(j) for j, q in enumerate(placements) if j > i and _splits(q, [getattr(p, "dim", None)])]
        if getattr(p, "split_factor", prod(later)) != prod(later):
            raise InputError(f"no step for a parameter split as {placements}: a rank's part of it is not one block")
    return tuple(compute_local_shape_and_global_offset(t.shape, mesh, placements)[1])


def flat_index(t: Tensor, at: Block = (), dims: slice = slice(None)) -> Tensor:
    """The global flat position of every element of this rank's part, or of one block ``at`` of that part.

    With ``dims``: in a tensor of these dimensions of it alone.
    """
    everywhere = t.shape[dims]
    dtype = torch.int32 if prod(everywhere) < 1 << 31 else torch.int64
    cut = [(s.start, s.stop) for s in at] + [(0, size) for size in local(t).shape[len(at) :]]
    index = torch.zeros((), dtype=dtype, device=t.device)
    for start, (first, last), size in zip(offsets(t)[dims], cut[dims], everywhere, strict=True):
        index = index[..., None] * size + torch.arange(start + first, start + last, dtype=dtype, device=t.device)
    return index


def rounding_noise(t: Tensor, key: Key, at: Block = ()) -> Tensor:
    """``dither`` of this rank's part of ``t``, or of one block ``at`` of it: an entry's is its own wherever it lies."""
    noise = dither(flat_index(t, at, slice(-1)), flat_index(t, at, slice(-1, None)), key)
    return noise if t.ndim else noise.view(())


def zeros(shape: tuple[int, ...], view_ck: Tensor, dtype: torch.dtype) -> Tensor:
    """State for a weight seen as ``view_ck``: (.., c, r) split by channels, (..) split by expert.

    It lies in memory as its gradient does, across where that is a transpose: a compiled step passes over both at once.
    Never ``new_zeros``: on a DTensor that replicates, on a low-bit weight it quantises.
    """
    if not is_sharded(view_ck):
        across = len(shape) == view_ck.ndim > 1 and lies_across(view_ck)
        stored = (*shape[:-2], shape[-1], shape[-2]) if across else shape
        state = torch.zeros(stored, dtype=dtype, device=view_ck.device)
        return state.mT if across else state
    from torch.distributed.tensor import Replicate

    placements = by_channel(view_ck)
    if len(shape) < view_ck.ndim:  # one number per matrix, or one for all: an AdamW-stepped stack has no matrices
        own: tuple[Any, ...] = view_ck.placements
        placements = [p if _splits(p, range(len(shape))) else Replicate() for p in own]
    return _assembled(lambda size: torch.zeros(size, dtype=dtype, device=view_ck.device), shape, view_ck, placements)


def lies_across(view_ck: Tensor) -> bool:
    """Is it a transpose of what lies in memory?"""
    return view_ck.stride(-1) > view_ck.stride(-2)


def copied(state: Tensor, like: Tensor, device: torch.device) -> Tensor:
    """``state`` on that device, in its own dtype, and in memory as ``like`` lies there."""
    if is_sharded(state):
        return state.to(device, copy=True)
    return torch.empty_like(like, dtype=state.dtype, device=device).copy_(state)


def zeros_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    """State of the parameter's own shape and split."""
    if not is_sharded(p):
        return torch.zeros(p.shape, dtype=dtype, device=p.device)
    placements = list(p.placements)
    return _assembled(lambda size: torch.zeros(size, dtype=dtype, device=p.device), tuple(p.shape), p, placements)


def zeros_along(like: Tensor, dim: int, size: int, dtype: torch.dtype) -> Tensor:
    """State of ``like``'s shape but for ``size`` along ``dim``, where every rank keeps all of it."""
    dim %= like.ndim
    shape = tuple(size if i == dim else n for i, n in enumerate(like.shape))
    if not is_sharded(like):
        return torch.zeros(shape, dtype=dtype, device=like.device)
    from torch.distributed.tensor import Replicate

    placements = [Replicate() if _splits(p, [dim]) else p for p in like.placements]
    return _assembled(lambda part: torch.zeros(part, dtype=dtype, device=like.device), shape, like, placements)


def splits(t: Tensor, dim: int) -> bool:
    """Does a rank hold only a part along ``dim``?"""
    return is_sharded(t) and any(_splits(p, [dim % t.ndim]) for p in t.placements)


def by_channel(view_ck: "DTensor") -> list[Any]:
    """The view's own placements, with a split of the compressed side turned into one of the channels."""
    from torch.distributed.tensor import Shard

    channels = view_ck.ndim - 2
    placements: tuple[Any, ...] = view_ck.placements
    return [Shard(channels) if _splits(p, [channels + 1]) else p for p in placements]


def projected(view_ck: Tensor, rank: int, product: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Tensor:
    """``product(part, offsets)`` of every rank's part of (.., c, k), put together to (.., c, r) split by channels.

    On a split compressed side a rank's product is a sum in waiting: one reduce-scatter hands each rank its channels.
    """
    if not is_sharded(view_ck):
        return product(view_ck, offsets(view_ck))
    from torch.distributed.tensor import Partial

    compressed = view_ck.ndim - 1
    placements: tuple[Any, ...] = view_ck.placements
    waiting = [Partial() if _splits(p, [compressed]) else p for p in placements]
    part = product(local(view_ck), offsets(view_ck))
    return settled(_assembled(lambda _: part, (*view_ck.shape[:-1], rank), view_ck, waiting))


def summed(own: Tensor, t: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """Every rank's ``own`` sums over ``dims`` of its part of ``t`` (kept, of size 1), added up over the ranks.

    The outcome is whole along ``dims`` and split as ``t`` is elsewhere. Without ``dims``: 0-D, the sum of everything.
    """
    if not is_sharded(t):
        return own
    from torch.distributed.tensor import Partial, Replicate

    over = range(t.ndim) if dims is None else [dim % t.ndim for dim in dims]
    shape = () if dims is None else tuple(1 if dim in over else size for dim, size in enumerate(t.shape))
    waiting = [Partial() if _splits(p, over) else p for p in t.placements]
    total: Any = _assembled(lambda _: own, shape, t, waiting)
    final = [Replicate() if p.is_partial() else p for p in waiting]
    summed_up: Tensor = total.redistribute(placements=final)
    return summed_up


def settled(t: Tensor) -> Tensor:
    """No sums in waiting: (.., c, x) goes back to its channels, what has no channels is made whole on every rank."""
    if not is_sharded(t):
        return t
    from torch.distributed.tensor import Replicate, Shard

    channels = t.ndim - 2
    final = Shard(channels) if channels >= 0 and t.shape[channels] > 1 else Replicate()
    placements = [final if p.is_partial() else p for p in t.placements]
    return t.redistribute(placements=placements)


def spread(factor: Tensor, like: Tensor) -> Tensor:
    """A factor (a bool too) split so that each rank holds what its part of ``like`` is to be combined with."""
    if not is_sharded(factor):
        return factor
    if not is_sharded(like):
        return whole(factor)
    from torch.distributed.tensor import Replicate

    def place(p: Any) -> Any:
        return p if _splits(p, [dim for dim, size in enumerate(factor.shape) if size > 1]) else Replicate()

    placements = [place(p) for p in like.placements]
    return factor.redistribute(placements=placements)


def transposed(t: Tensor) -> Tensor:
    """``t.mT``. Old torch forgets there that a shard is strided, and where a part belongs with it: that is refused."""
    flipped = t.mT
    if is_sharded(t) and _strided(t) != _strided(flipped):
        raise InputError(
            f"this torch cannot transpose a parameter split as {t.placements}; a newer torch can (2.13 does)"
        )
    return flipped


def _strided(t: Any) -> list[bool]:
    return [hasattr(p, "split_factor") for p in t.placements]


def aligned(t: Tensor, like: Tensor) -> Tensor:
    """``t`` split as ``like``, of the same shape, is: a gradient may come as a sum in waiting, or split its own way."""
    if not (is_sharded(t) and is_sharded(like)) or t.placements == like.placements:
        return t
    return t.redistribute(placements=like.placements)


def _splits(placement: Any, dims: Container[Any]) -> bool:
    """Does it split one of these dimensions? ``is_shard`` says no of a strided shard, tensor parallelism under FSDP."""
    return getattr(placement, "dim", None) in dims


def _assembled(
    make: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...], like: "DTensor", placements: list[Any]
) -> Tensor:
    """A DTensor of global ``shape`` on the mesh of ``like`` out of each rank's part, uneven splits included."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = like.device_mesh
    size = compute_local_shape_and_global_offset(shape, mesh, placements)[0]
    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        make(tuple(size)), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
