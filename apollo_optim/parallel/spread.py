"""A module over the processes of a run: copied (DDP) or sharded (FSDP2), by torch's own engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import nn

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


def sharded(learner: nn.Module, blocks: Iterable[nn.Module], world: World) -> nn.Module:
    """Every process has a part of each weight, along its first dimension; `blocks` are gathered when they compute.

    To be called before there is an optimizer: the parameters become DTensors.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(learner.parameters()).device.type, (world.size,))
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
    learner.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        learner.set_requires_gradient_sync(True)
