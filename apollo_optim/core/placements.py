"""Placements of DTensors, how they change, and DTensors of them, without `torch.distributed.tensor` being imported
before a DTensor is there."""

from collections.abc import Callable, Container
from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def cuts(placement: Any, dims: Container[Any]) -> bool:
    """Does it split one of these dimensions? `is_shard` says no of a strided shard, tensor parallelism under FSDP."""
    return getattr(placement, "dim", None) in dims


def moved(placement: Any, order: list[int]) -> Any:
    """A placement after a permutation: new dimension i was `order[i]`."""
    if not hasattr(placement, "dim"):
        return placement
    if hasattr(placement, "split_factor"):
        return type(placement)(order.index(placement.dim), split_factor=placement.split_factor)
    return type(placement)(order.index(placement.dim))


def assembled(
    make: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...], mesh: Any, placements: list[Any]
) -> "DTensor":
    """A DTensor of global `shape` out of each rank's part, uneven splits included."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    size = compute_local_shape_and_global_offset(shape, mesh, placements)[0]
    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        make(tuple(size)), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def split_alike(own: Tensor, like: Any) -> "DTensor":
    """A DTensor of this rank's `own`, which has the dimensions of `like` but for the last one, and is split as it is.

    Memory is shared.
    """
    shape = (*like.shape[:-1], own.shape[-1])
    return assembled(lambda _: own, shape, like.device_mesh, list(like.placements))


def held(t: Tensor) -> Tensor:
    """This rank's part of `t` itself, where `local` may give a view of it."""
    part: Tensor = getattr(t, "_local_tensor", t)
    return part


def group_name(mesh: Any, dim: int) -> str:
    """What torch calls the group of processes along a dimension of a mesh. (By its attribute: compiled, too.)"""
    names: Any = getattr(mesh, "_dim_group_names", None)
    name: str = mesh._dim_group_infos[dim][2] if names is None else names[dim]  # until torch 2.8
    return name


def sharing(t: Tensor) -> tuple[str, ...]:
    """The groups of processes that have a part of `t` each, by name; none of what is whole here."""
    split = [dim for dim, p in enumerate(getattr(t, "placements", ())) if hasattr(p, "dim")]
    return tuple(group_name(cast("DTensor", t).device_mesh, dim) for dim in split)
