"""Low-bit weights in several processes: DistributedDataParallel keeps them as they are, FSDP2 gives whole rows to each.

FSDP2 (`fully_shard`) cuts a parameter along its first dimension, gives every process as many rows (the last ones' are
filled up), and asks a tensor of another kind what to send and how to put it together (`fsdp_pre_all_gather`,
`fsdp_post_all_gather`): codes and scales. A group of entries that share a scale is part of a row, so none is ever cut.
For what else is done to a weight, nothing of torch's says who asks: so it is the calling module that is looked at
(`weight.CALLERS`). FSDP1 and tensor parallelism, which would make a float weight of it, are refused.
"""

from collections.abc import Sequence
from math import prod
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor

from apollo_optim.core.errors import InputError
from apollo_optim.quant.weight import LowBitWeight, called_from, implements

aten = torch.ops.aten


@called_from("torch.distributed.fsdp._fully_shard")
def _fully_shard(caller: FrameType, func: Any, args: Any, kwargs: Any) -> Any:
    """FSDP2 lays a process's rows into zeros of as many rows as every process sends, and keeps a flat view of these."""
    if func is torch.chunk and kwargs.get("dim", 0) % args[0].ndim == args[0].ndim - 1:
        raise InputError("fully_shard cannot cut the rows of low-bit weights: shard their first dimension, Shard(0)")
    if func is Tensor.new_zeros:
        weight, size = args
        codes, scales = (t.new_zeros((*size[:-1], t.shape[-1])) for t in (weight.codes, weight.scales))
        zeros = weight.of_parts(codes, scales)
        zeros.rows_sent = size[0]
        return zeros
    if func is Tensor.view and args[1:] == (-1,):
        return args[0]  # never read: what is sent are codes and scales
    return NotImplemented


@implements(aten.as_strided.default)
def _first_rows(weight: LowBitWeight, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Any:
    """What FSDP2 makes of all that was gathered: the rows without those that filled it up."""
    inner = [prod(size[dim + 1 :]) for dim in range(len(size))]
    if offset or len(size) < 2 or list(stride) != inner or tuple(size[1:]) != tuple(weight.shape[1:]):
        return NotImplemented
    return weight.of_parts(weight.codes[: size[0]], weight.scales[: size[0]])


@called_from("torch.distributed.fsdp")
def _fsdp(caller: FrameType, func: Any, args: Any, kwargs: Any) -> NoReturn:
    raise InputError("FSDP1 cannot shard low-bit weights: use FSDP2 (torch.distributed.fsdp.fully_shard)")


@called_from("torch.distributed.tensor")
def _tensor_parallel(caller: FrameType, func: Any, args: Any, kwargs: Any) -> Any:
    """DTensors are what FSDP2 makes of them; they are not made of a whole weight."""
    if caller.f_code.co_name != "distribute_tensor":
        return NotImplemented
    raise InputError(
        "low-bit weights cannot be distributed (parallelize_module, distribute_tensor): use FSDP2 (fully_shard) or "
        "DistributedDataParallel, or a float model"
    )


@called_from("torch.distributed.utils")
def _data_parallel(caller: FrameType, func: Any, args: Any, kwargs: Any) -> Any:
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
