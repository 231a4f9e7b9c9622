"""transformers' Trainer on two processes: DDP and FSDP2, saved, resumed, beside torch's AdamW.

    torchrun --nproc_per_node 2 tests/clients/trainer_processes.py ddp|fsdp2 NAME 0|8|4

accelerate keeps FSDP for accelerators: its state is told that it is one. Prints the differences as JSON.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers
from accelerate.state import DistributedType, PartialState
from command_runs import MATRICES, far, on_two
from torch import Tensor
from trainer_runs import RELEASED, TORCH_ADAMW, Run, train

from apollo_optim import RuleOptimizer, rule_of
from apollo_optim.core.place import is_sharded, whole

KINDS = ("ddp", "fsdp2")
BITS = (0, 8, 4)
SAVED = 4
FSDP2: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "SHARDED_STATE_DICT",
    },
}


def call_it_an_accelerator() -> None:
    """Each time that Trainer makes the state of the processes anew."""
    make = PartialState.__init__

    def init(self: PartialState, *args: Any, **own: Any) -> None:
        make(self, *args, **own)
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def tensors(run: Run) -> dict[str, Tensor]:
    """Weights and state, in whole."""
    state = {key: value for key, value in run.state.items() if isinstance(value, Tensor)}
    return {key: whole(value.detach()).clone() for key, value in (run.weights | state).items()}


def followed(run: Run, rule: str, kind: str) -> str:
    """How many matrices use the rule, by the optimizer's type and what it keeps; sharded where they should be."""
    assert isinstance(run.optimizer, RuleOptimizer)
    pairs = [(p, group) for group in run.optimizer.param_groups for p in group["params"]]
    assert kind == "ddp" or all(is_sharded(p) for p, _ in pairs)
    ruled = [p for p, group in pairs if rule_of(p, group) == rule and "prev_norm" in run.optimizer.state[p]]
    return f"{len(ruled)} of {MATRICES}"


def compared(kind: str, name: str, bits: int, out: Path) -> dict[str, Any]:
    """A row of the table; `bits`: of the weights, 0 for float32. Low-bit ones torch's AdamW cannot train."""
    how: dict[str, Any] = FSDP2 if kind == "fsdp2" else {}
    how = how | ({"bits": bits, "dtype": "bfloat16"} if bits else {})

    def go(folder: str, of: str = name, **own: Any) -> Run:
        return train(out / folder, of, **how, **own)

    run = go("whole")
    full, found = tensors(run), {"follows": followed(run, name, kind)}
    found["resumed"] = far(full, tensors(go("again", resume=out / "whole" / f"checkpoint-{SAVED}")))
    if kind == "fsdp2":
        found["release"] = far(full, tensors(go("released", callbacks=RELEASED)))
    if not bits:
        theirs = tensors(go("adamw", TORCH_ADAMW))
        again = go("adamw-again", TORCH_ADAMW, resume=out / "adamw" / f"checkpoint-{SAVED}")
        found["adamw"] = far(theirs, tensors(again))
    return found


def rows() -> Iterator[dict[str, Any]]:
    """Of the table: every figure is a largest difference, in any weight or state."""
    client = f"Trainer, transformers {transformers.__version__}"
    for kind in KINDS:
        for bits in BITS:
            case = f"2 processes, {kind}, weights {f'{bits}bit' if bits else 'float32'}, apollo-mini"
            yield {"client": client, "case": case, **on_two(__file__, kind, "apollo-mini", str(bits))}


def main() -> None:
    kind, name, bits = sys.argv[1:]
    with tempfile.TemporaryDirectory() as own:
        if kind == "fsdp2":
            call_it_an_accelerator()
        PartialState(cpu=True)
        shared = [own]
        dist.broadcast_object_list(shared)
        row = compared(kind, name, int(bits), Path(shared[0]))
        if dist.get_rank() == 0:
            print(json.dumps(row), flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
