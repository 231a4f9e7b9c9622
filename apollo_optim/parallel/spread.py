"""A module over the processes of a run: copied (DDP) or sharded (FSDP2, HSDP, tensor parallelism), by torch's own
engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import nn

from apollo_optim.parallel.tensor import split_matrices
from apollo_optim.parallel.world import World


def replicated(learner: nn.Module, *, unused: bool) -> nn.Module:
    """Every process has all weights, and gradients are averaged while backward goes on.

    `unused`: some parameters may take no part in a step, as experts that no token was sent to.
    """
    device = next(learner.parameters()).device
    ddp = nn.parallel.DistributedDataParallel
    # A language model's buffers are constants. (Newer versions of torch have another name for it.)
    sync = "forward_sync_buffers" if "forward_sync_buffers" in signature(ddp).parameters else "broadcast_buffers"
    constant: dict[str, Any] = {sync: False}
    return ddp(
        learner,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=unused,
        **constant,
    )


def sharded(
    learner: nn.Module, blocks: Iterable[nn.Module], world: World, device: torch.device, replicas: int = 1
) -> nn.Module:
    """Every process has a part of each weight, along its first dimension; `blocks` are gathered when they compute.

    To be called before there is an optimizer: the parameters become DTensors. Best of all before there are weights, on
    the meta device: no process then has more than its part of them (`draw_weights` fills them in).

    Args:
        device: That they will be on.
        replicas: Groups of processes that have all weights between them (HSDP): gradients are summed within a group,
            and then over the groups.

    Where `world.tensor` processes see the same rows, the matrices are split over them at first, and what each has then
    over those that see other rows, if there are any.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = list(blocks)
    if world.tensor > 1:
        both = init_device_mesh(device.type, (world.shares, world.tensor), mesh_dim_names=("shard", "tensor"))
        split_matrices(blocks, both["tensor"])
        if world.shares == 1:
            return learner
        mesh = both["shard"]
    elif replicas == 1:
        mesh = init_device_mesh(device.type, (world.size,))
    else:
        names = "replicate", "shard"
        mesh = init_device_mesh(device.type, (replicas, world.size // replicas), mesh_dim_names=names)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(learner, mesh=mesh)  # in place
    return learner


@contextmanager
def waiting(learner: Any) -> Iterator[None]:
    """Around a micro-batch that is not a step's last: its gradients are added up where they are made.

    `learner`: what one of the two above has returned.
    """
    if isinstance(learner, nn.parallel.DistributedDataParallel):
        with learner.no_sync():
            yield
        return
    if not hasattr(learner, "set_requires_gradient_sync"):  # one share of the rows: nothing is averaged
        yield
        return
    learner.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        learner.set_requires_gradient_sync(True)
