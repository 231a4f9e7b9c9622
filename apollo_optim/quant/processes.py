"""Low-bit weights in several processes: DistributedDataParallel keeps them as they are, FSDP and DTensors are refused.

The last two cut a weight by operations that make a float one of it, and nothing of torch's says who asks: so it is the
calling module that is looked at (`weight.CALLERS`).
"""

from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor

from apollo_optim.core.errors import InputError
from apollo_optim.quant.weight import LowBitWeight, called_from

aten = torch.ops.aten


@called_from("torch.distributed.fsdp")
def _fsdp(caller: FrameType, func: Any, args: Any) -> NoReturn:
    raise InputError(
        "FSDP (fully_shard) cannot shard low-bit weights: use DistributedDataParallel, or shard a float model, or name "
        "them in ignored_params"
    )


@called_from("torch.distributed.tensor")
def _tensor_parallel(caller: FrameType, func: Any, args: Any) -> NoReturn:
    raise InputError(
        "low-bit weights cannot be DTensors (parallelize_module, distribute_tensor): use DistributedDataParallel, or a "
        "float model"
    )


@called_from("torch.distributed.utils")
def _data_parallel(caller: FrameType, func: Any, args: Any) -> Any:
    """DistributedDataParallel broadcasts what `detach()` gives it: codes and scales, so that no process rounds."""
    wanted = func is Tensor.detach and caller.f_code.co_name == "_sync_module_states"
    return _Bytes(args[0]) if wanted else NotImplemented


class _Bytes(Tensor):
    """Codes and scales of a weight as one vector of bytes, which can be read as a whole and be copied into."""

    weight: LowBitWeight

    @staticmethod
    def __new__(cls, weight: LowBitWeight) -> "_Bytes":
        size = weight.codes.nbytes + weight.scales.nbytes
        self: _Bytes = Tensor._make_wrapper_subclass(cls, (size,), dtype=torch.uint8, device=weight.device)
        self.weight = weight
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        parts = args[0].weight.codes, args[0].weight.scales
        if func is aten.view.default:
            return torch.cat([part.detach().flatten().view(torch.uint8) for part in parts])
        if func is not aten.copy_.default:
            raise NotImplementedError(f"{func} of a low-bit weight's bytes")
        for part, source in zip(parts, args[1].split([part.nbytes for part in parts]), strict=True):
            part.copy_(source.clone().view(part.dtype).view(part.shape))  # cloned: bf16 starts at an even byte
        return args[0]
