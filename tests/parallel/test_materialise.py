"""A sharded model gets its weights after it was cut: no process ever has more of them than its part and one matrix."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from apollo_optim.core.place import local
from apollo_optim.core.storage import parts as parts_of
from apollo_optim.parallel.spread import sharded
from apollo_optim.parallel.world import World
from apollo_optim.plan.shards import blocks_of
from apollo_optim.train.config import ModelConfig, QuantConfig
from apollo_optim.train.loss import Learner
from apollo_optim.train.measure import give_back_memory, peak_memory, resident_memory
from apollo_optim.train.models import build_model

SLACK = 16 << 20  # bytes that the allocator keeps


def build_of(rank: int, how: str) -> None:
    """One of two processes, which hears nothing of the other: it needs nothing of it.

    `how`: "small" (tied weights) and "8 bits" look at the numbers, "large" at the memory.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    cfg = ModelConfig("llama-60m") if how == "large" else ModelConfig("llama-1m", config={"tie_word_embeddings": True})
    quant = QuantConfig(bits=8) if how == "8 bits" else None
    before = 0
    # What is set free is not held by anybody; glibc would keep up to 29 MB of it for later, another time 3.
    give_back_memory(1 << 17)

    def spread(model) -> None:
        nonlocal before
        sharded(Learner(model, "auto"), blocks_of(model), World(rank, 2), torch.device("cpu"))
        assert all(p.is_meta for p in model.parameters())
        before = resident_memory()
        if how == "large":
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again

    torch.manual_seed(7)
    model = build_model(cfg, 1024, quant=quant, spread=spread)
    peak, drawn_next = peak_memory() - before, torch.rand(3)
    parts = plain(model)
    own = sum(part.nbytes for part in parts.values())
    torch.manual_seed(7)
    one = build_model(cfg, 1024, quant=quant)
    assert torch.equal(drawn_next, torch.rand(3))  # the generator has gone as far
    assert len(parts) == len(list(model.parameters())) + 14 * (how == "8 bits")  # codes and scales
    for name, p in plain(one).items():
        rows = -(-len(p) // 2)
        assert torch.equal(parts[name], p[rows * rank : rows * (rank + 1)]), name
    if how == "large":
        sizes = [p.numel() * 4 for p in one.parameters()]
        assert own <= 0.51 * sum(sizes)
        most = own + max(sizes) + SLACK
        assert most < 0.75 * sum(sizes)  # a process that had all of it would be noticed
        assert peak <= most, (peak, own, max(sizes), sum(sizes))
    else:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    dist.destroy_process_group()


def plain(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """This process's part of every parameter; of low-bit ones, of what they are made of."""
    return {
        f"{name}.{key}": local(t) for name, p in model.named_parameters() for key, t in parts_of(p.detach()).items()
    }


@pytest.mark.parametrize("how", ["small", "8 bits"])
def test_each_process_has_its_part_of_the_same_weights(how):
    spawn(build_of, args=(how,), nprocs=2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_process_has_the_whole_model():
    spawn(build_of, args=("large",), nprocs=1)
