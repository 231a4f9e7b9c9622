"""Placements of DTensors, how they change, and DTensors of them, without `torch.distributed.tensor` being imported
before a DTensor is there."""

from collections.abc import Callable, Container
from math import prod
from typing import TYPE_CHECKING, Any

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
