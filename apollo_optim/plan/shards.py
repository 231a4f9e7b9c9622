"""What one GPU of several keeps: DDP copies everything, FSDP2 cuts every parameter along its first dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from apollo_optim.core.errors import InputError
from apollo_optim.core.place import is_sharded, local
from apollo_optim.core.storage import nbytes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Held = dict[str, int]  # bytes of parts of a plan


@dataclass(frozen=True)
class Parallel:
    """How a run is spread over ``gpus`` GPUs; a plan is of the first one, which keeps the largest part."""

    kind: Literal["ddp", "fsdp2"]
    gpus: int
    bucket_view: bool = True
    """DDP(gradient_as_bucket_view=True): gradients live in the reducer's buckets instead of being copied there."""

    def __post_init__(self) -> None:
        if self.kind not in ("ddp", "fsdp2"):
            raise InputError(f"parallel={self.kind!r}: choose ddp or fsdp2")
        if self.gpus < 1:
            raise InputError(f"gpus={self.gpus}: at least 1")


def first_part(p: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """``p`` as ``fully_shard`` would keep it, split along its first dimension: a DTensor on the meta device.

    The first rank has ceil(rows / gpus) rows, the last ones what is left, perhaps nothing. Without a mesh, and if it is
    a single number, every rank has all of it: `p` itself.
    """
    if mesh is None or not p.ndim:
        return p
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape = compute_local_shape_and_global_offset(p.shape, mesh, [Shard(0)])[0]
    part = p.detach()[: shape[0]].clone()
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=p.shape, stride=p.stride())


def mesh_of(gpus: int) -> DeviceMesh:
    """A mesh that is only asked who has what: no process is started, nothing is sent."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh("cpu", torch.arange(gpus), _init_backend=False, _rank=0)


def local_bytes(t: Tensor) -> int:
    """Bytes on this rank."""
    return nbytes(local(t)) if is_sharded(t) else nbytes(t)


def held_weights(model: nn.Module, gpus: int) -> int:
    """Bytes of the first one's part of all weights, under ``fully_shard``."""
    mesh = mesh_of(gpus) if gpus > 1 else None
    return sum(local_bytes(first_part(p, mesh)) for p in {id(p): p for p in model.parameters()}.values())


def gradient_bytes(p: Tensor) -> int:
    """Of all of its gradient: a low-bit weight's has the size of its float weight."""
    return p.numel() * p.element_size()


def rows_of(p: Tensor, gpus: int) -> float:
    """The share of ``p`` that the first rank has."""
    return -(-p.shape[0] // gpus) / p.shape[0] if p.ndim else 1.0


def units(model: nn.Module, size: Callable[[Tensor], int] = nbytes) -> tuple[int, int]:
    """Bytes of what ``fully_shard`` of every block and the whole gathers: (what is around the blocks, the largest).

    ``size``: of a parameter, as it is gathered; or of its gradient.
    """
    sizes = [distinct_bytes(block.parameters(), size) for block in blocks_of(model)]
    return distinct_bytes(model.parameters(), size) - sum(sizes), max(sizes, default=0)


def passes(
    model: nn.Module, trained: Sequence[Tensor], gpus: int, *, one_by_one: bool, waiting: bool
) -> tuple[Held, ...]:
    """What ``fully_shard`` holds beside the trace in the forward, the backward and the update.

    ``one_by_one``: a block's gradients are set free before the next one's come; ``waiting``: earlier ones are there.
    """
    # this block and the one that is gathered ahead; what is around them stays
    gathered, on_their_way = (around + 2 * block for around, block in (units(model), units(model, gradient_bytes)))
    share = sum(math.ceil(gradient_bytes(p) * rows_of(p, gpus)) for p in trained)
    if one_by_one:
        share = math.ceil(max(units(model, gradient_bytes)) / gpus)
    return (
        {"gradients": share if waiting else 0, "parallel": gathered},
        {"gradients": share, "parallel": gathered + on_their_way},  # of gradients, to be reduced
        {"gradients": share},
    )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What is sharded as one: the elements of the outermost ``nn.ModuleList``s."""
    blocks: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                blocks.extend(child)
            else:
                walk(child)

    walk(model)
    return blocks


def distinct_bytes(tensors: Any, size: Callable[[Tensor], int] = nbytes) -> int:
    """Bytes of all of them, each counted once."""
    return sum(size(t) for t in {id(t): t for t in tensors}.values())
