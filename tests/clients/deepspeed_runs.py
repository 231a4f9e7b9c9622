"""DeepSpeed's engine with optimizers of ours, on two processes of a CPU; the table's rows of it.

    python tests/clients/deepspeed_runs.py
    torchrun --nproc_per_node 2 tests/clients/deepspeed_runs.py STAGE float32|bfloat16

The latter prints the differences as JSON, or with what the engine's first step was refused.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from command_runs import far, on_two
from torch import Tensor, nn

from apollo_optim import InputError, RuleOptimizer, build_optimizer, rule_of

STEPS, SAVED, MICRO = 6, 3, 2
DTYPES = ("float32", "bfloat16")
TORCH_ADAMW = "torch.optim.AdamW"


def make_engine(name: str, stage: int, dtype: str) -> Any:
    """Two matrices and their biases in an engine of DeepSpeed's."""
    import deepspeed

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    torch_adamw = name == TORCH_ADAMW
    own = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer: Any = torch.optim.AdamW(model.parameters(), **own) if torch_adamw else None
    config = {
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": MICRO, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": dtype == "bfloat16"},
    }  # fmt: skip
    optimizer = optimizer or build_optimizer(name, model, targets="*", **own)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def train(
    name: str, stage: int, dtype: str, *, save: Path | None = None, load: Path | None = None
) -> tuple[dict[str, Tensor], Any]:
    """One run, its weights and state, and its optimizer; saved after step SAVED, or on from there."""
    engine = make_engine(name, stage, dtype)
    if load is not None:
        engine.load_checkpoint(str(load))
    for number in range(0 if load is None else SAVED * MICRO, STEPS * MICRO):
        words = torch.Generator().manual_seed(10 * engine.global_rank + number)
        rows = torch.randn(4, 64, generator=words).to(getattr(torch, dtype))
        engine.backward(engine(rows).float().square().mean())
        engine.step()
        if save is not None and number + 1 == SAVED * MICRO:
            engine.save_checkpoint(str(save))
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # bfloat16 wraps it, with weights in float32
    tensors = {f"weight {i}": p.detach().clone() for i, p in enumerate(engine.module.parameters())}
    for i, state in enumerate(optimizer.state.values()):
        tensors |= {f"{i}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return tensors, optimizer


def followed(optimizer: Any, rule: str, dtype: str) -> str:
    """How many matrices use the rule, by the optimizer's type and what it keeps.

    What keeps float32 copies of low-precision weights there takes a step with gradients of zero when it is made.
    """
    assert isinstance(optimizer, RuleOptimizer)
    pairs = [(p, group) for group in optimizer.param_groups for p in group["params"] if p.ndim == 2]
    ruled = [p for p, group in pairs if rule_of(p, group) == rule and "prev_norm" in optimizer.state[p]]
    assert {int(state["step"]) for state in optimizer.state.values()} == {STEPS + (dtype == "bfloat16")}
    return f"{len(ruled)} of {len(pairs)}"


def compared(stage: int, dtype: str, out: Path, name: str = "apollo-mini") -> dict[str, Any]:
    """A row of the table, or what was said instead."""
    try:
        full, optimizer = train(name, stage, dtype, save=out / name)
    except InputError as error:
        return {"refused": str(error)}
    found = {
        "follows": followed(optimizer, name, dtype),
        "resumed": far(full, train(name, stage, dtype, load=out / name)[0]),
    }
    theirs = train(TORCH_ADAMW, stage, dtype, save=out / "adamw")[0]
    return {**found, "adamw": far(theirs, train(TORCH_ADAMW, stage, dtype, load=out / "adamw")[0])}


def rows() -> Iterator[dict[str, Any]]:
    """Of the table: every figure is a largest difference, in any weight or state."""
    for dtype in DTYPES:
        case = f"2 processes, stage 0, {dtype}, apollo-mini"
        yield {"client": f"DeepSpeed {version('deepspeed')}", "case": case, **on_two(__file__, "0", dtype)}


def main() -> None:
    if not sys.argv[1:]:
        for row in rows():
            print(json.dumps(row), flush=True)
        return
    stage, dtype = sys.argv[1:]
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed("gloo")
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        torch.distributed.broadcast_object_list(shared)
        row = compared(int(stage), dtype, Path(shared[0]))
        torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        print(json.dumps(row), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
