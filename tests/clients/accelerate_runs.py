"""Loops with accelerate: prepare, accumulate, save_state, load_state; on one process, DDP and FSDP2 of two.

    torchrun --nproc_per_node 2 tests/clients/accelerate_runs.py ddp|fsdp2-full|fsdp2-sharded NAME

accelerate keeps FSDP for accelerators: its state is told that it is one. Prints the differences as JSON.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import DistributedType, PartialState
from command_runs import far, on_two
from torch import Tensor, nn

from apollo_optim import RuleOptimizer, build_optimizer, release, rule_of
from apollo_optim.core.place import is_sharded, whole

STEPS, SAVED, MICRO = 6, 3, 2
KINDS = ("ddp", "fsdp2-full", "fsdp2-sharded")
TORCH_ADAMW = "torch.optim.AdamW"


def make_accelerator(kind: str) -> Accelerator:
    if not kind.startswith("fsdp2"):
        return Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    state = "FULL_STATE_DICT" if kind == "fsdp2-full" else "SHARDED_STATE_DICT"
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", state_dict_type=state)
    return Accelerator(cpu=True, gradient_accumulation_steps=MICRO, fsdp_plugin=plugin)


def train(
    accelerator: Accelerator,
    name: str,
    *,
    save: Path | None = None,
    load: Path | None = None,
    released: bool = False,
    steps: int = STEPS,
) -> tuple[dict[str, Tensor], Any]:
    """One run, its weights and state in whole, and its optimizer; saved after step SAVED, or on from there."""
    accelerator.free_memory()  # of the run before
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    torch_adamw = name == TORCH_ADAMW
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2) if torch_adamw else None
    if optimizer is None:
        optimizer = build_optimizer(name, model, targets="*", lr=1e-2, weight_decay=0.1)
    schedule: Any = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS * accelerator.num_processes)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    if load is not None:
        accelerator.load_state(str(load))
    if released:
        handle = release(model, optimizer.optimizer, ready=lambda: accelerator.sync_gradients)
    for number in range(0 if load is None else SAVED * MICRO, steps * MICRO):
        with accelerator.accumulate(model):
            words = torch.Generator().manual_seed(10 * accelerator.process_index + number)
            accelerator.backward(model(torch.randn(4, 64, generator=words)).square().mean())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if save is not None and number + 1 == SAVED * MICRO:
            accelerator.save_state(str(save))
    if released:
        handle.remove()
    tensors = {f"weight {i}": whole(p.detach()) for i, p in enumerate(model.parameters())}
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            state = optimizer.state[p].items()
            tensors |= {f"{i}.{j}.{key}": whole(v) if isinstance(v, Tensor) else torch.tensor(v) for key, v in state}
    return {key: value.detach().clone() for key, value in tensors.items()}, optimizer.optimizer


def followed(optimizer: Any, rule: str) -> str:
    """How many matrices use the rule, by the optimizer's type and what it keeps."""
    assert isinstance(optimizer, RuleOptimizer)
    pairs = [(p, group) for group in optimizer.param_groups for p in group["params"] if p.ndim == 2]
    ruled = [p for p, group in pairs if rule_of(p, group) == rule and "prev_norm" in optimizer.state[p]]
    assert {int(state["step"]) for state in optimizer.state.values()} == {STEPS}
    return f"{len(ruled)} of {len(pairs)}"


def compared(kind: str, name: str, out: Path, accelerator: Accelerator | None = None) -> dict[str, Any]:
    """A row of the table."""
    accelerator = accelerator or make_accelerator(kind)
    full, optimizer = train(accelerator, name, save=out / name)
    found = {"follows": followed(optimizer, name), "resumed": far(full, train(accelerator, name, load=out / name)[0])}
    if kind != "ddp":
        assert kind == "one" or all(map(is_sharded, optimizer.param_groups[0]["params"]))
        found["release"] = far(full, train(accelerator, name, released=True)[0])
        found["resumed_released"] = far(full, train(accelerator, name, load=out / name, released=True)[0])
    theirs = train(accelerator, TORCH_ADAMW, save=out / "adamw")[0]
    return {**found, "adamw": far(theirs, train(accelerator, TORCH_ADAMW, load=out / "adamw")[0])}


def rows(out: Path) -> Iterator[dict[str, Any]]:
    """Of the table: every figure is a largest difference, in any weight or state."""
    client = f"accelerate {version('accelerate')}"
    yield {"client": client, "case": "1 process, apollo-mini", **compared("one", "apollo-mini", out)}
    for kind in KINDS:
        yield {"client": client, "case": f"2 processes, {kind}, apollo-mini", **on_two(__file__, kind, "apollo-mini")}


def main() -> None:
    kind, name = sys.argv[1:]
    with tempfile.TemporaryDirectory() as own:
        accelerator = make_accelerator(kind)
        shared = [own]
        torch.distributed.broadcast_object_list(shared)
        row = compared(kind, name, Path(shared[0]), accelerator)
        if accelerator.process_index == 0:
            print(json.dumps(row), flush=True)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
