"""`torchtitan.train` on a CPU and with torch 2.13: what it takes for granted of a GPU and of a newer torch.

torchrun --nproc_per_node=1 torchtitan_cpu.py --module ... --config ...
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


def nothing(*_: Any) -> dict[str, Any]:
    return {}


def sum_gradients(model: nn.Module) -> None:
    """Sums over processes, as torchtitan wants them, in a way that gloo knows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def main() -> None:
    torch._utils._get_available_device_type = lambda: "cpu"  # before torchtitan is imported, which asks it then
    lacking = {
        "current_device": lambda: 0, "get_device_name": lambda _: "cpu", "memory_stats": nothing,
        "get_device_properties": lambda _: SimpleNamespace(total_memory=1), "reset_peak_memory_stats": nothing,
        "empty_cache": nothing,
    }  # fmt: skip
    vars(torch.cpu).update(lacking)
    vars(torch.distributed).setdefault("set_timeout", nothing)  # of newer releases of torch

    from torchtitan import train
    from torchtitan.distributed import fsdp

    fsdp.disable_fsdp_gradient_division = sum_gradients
    train.main()


if __name__ == "__main__":
    main()
