"""Two processes, FSDP2 by accelerate: `ReleaseCallback` against the same without, accumulated. Exits 1 if not bitwise.

    torchrun --nproc_per_node 2 tests/clients/fsdp2.py

accelerate keeps FSDP for accelerators: its state is told that it is one.
"""

import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import DistributedType, PartialState
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from apollo_optim import build_optimizer
from apollo_optim.core.place import whole
from apollo_optim.integrations.transformers import ReleaseCallback

ARGS: Any = SimpleNamespace(max_grad_norm=0.0, fp16=False, auto_find_batch_size=False, world_size=2)


def train(accelerator: Accelerator, released: bool) -> tuple[list[Tensor], list[float]]:
    """Weights, and the gradients' norm of every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    model, optimizer = accelerator.prepare(model, build_optimizer("apollo-mini", model, targets="*"))
    callback = ReleaseCallback()
    if released:
        callback.on_train_begin(ARGS, None, None, model=model, optimizer=optimizer)
        callback.handle.track_norm = True
    norms = []
    for micro_batch in range(8):
        with accelerator.accumulate(model):
            words = torch.Generator().manual_seed(10 * accelerator.process_index + micro_batch)
            accelerator.backward(model(torch.randn(4, 64, generator=words)).square().mean())
            if accelerator.sync_gradients:
                left = [p.grad for p in model.parameters() if p.grad is not None]
                assert bool(left) != released
                norms.append(callback.handle.grad_norm().item() if released else whole(get_total_norm(left)).item())
            optimizer.step()
            optimizer.zero_grad()
    assert {int(state["step"]) for state in optimizer.state.values()} == {4}
    return [whole(p.detach()) for p in model.parameters()], norms


def main() -> bool:
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, fsdp_plugin=plugin)
    (weights, norms), (others, other_norms) = (train(accelerator, released) for released in (False, True))
    dist.destroy_process_group()
    return norms == other_norms and all(map(torch.equal, weights, others))


if __name__ == "__main__":
    sys.exit(not main())
