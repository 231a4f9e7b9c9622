"""FSDP2 on several processes: torchrun --nproc-per-node 2 examples/fsdp2.py [STEPS]

Shard first, build the optimizer then: it takes DTensors as they are, and the numbers are those of one process.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from apollo_optim import build_optimizer, release

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
on_gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if on_gpu else "gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")

torch.manual_seed(0)  # the same weights everywhere
model = nn.Sequential(nn.Embedding(64, 32), nn.Flatten(), nn.Linear(8 * 32, 128), nn.GELU(), nn.Linear(128, 64))
model.to(device)
for layer in model:
    if isinstance(layer, nn.Linear):
        fully_shard(layer, mesh=dist.device_mesh.init_device_mesh(device.type, (processes,)))
fully_shard(model, mesh=dist.device_mesh.init_device_mesh(device.type, (processes,)))
optimizer = build_optimizer("apollo", model, lr=0.01, rank=8, targets="all-linear")
handle = release(model, optimizer)  # the step inside backward, for each gradient after its reduce-scatter
torch.manual_seed(1 + rank)  # other words in each process
for step in range(steps):
    words = torch.randint(64, (64 // processes, 8), device=device)
    loss = nn.functional.cross_entropy(model(words), words[:, 0])
    loss.backward()
    optimizer.step()
    if step in (0, steps - 1):
        dist.all_reduce(loss.detach())
        if rank == 0:
            print(f"step {step + 1}: loss {loss.item() / processes:.3f}")
dist.destroy_process_group()
