"""What Python asks of a tensor's memory, which for a low-bit weight is that of its codes and scales.

Writers of files (`save_pretrained`, `safetensors.torch.save_model`) pack a tensor by `contiguous()` before they read
its memory: they get the float numbers, as everybody but this library wants them. To read it without that is an error.
"""

from types import FrameType
from typing import Any

import torch
from torch import Tensor

from apollo_optim.core.errors import InputError
from apollo_optim.quant.weight import LowBitWeight, called_from, implements

# --- float numbers in memory, read-only ---


@implements(Tensor.contiguous)
def _contiguous(weight: LowBitWeight, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return _readable(weight).contiguous(memory_format=memory_format)


@implements(Tensor.numpy)
def _numpy(weight: LowBitWeight, **kwargs: Any) -> Any:
    return _readable(weight).numpy(**kwargs)


@implements(Tensor.__array__)
def _array(weight: LowBitWeight, *args: Any, **kwargs: Any) -> Any:
    return _readable(weight).__array__(*args, **kwargs)  # type: ignore[no-untyped-call]


@implements(Tensor.tolist)
def _tolist(weight: LowBitWeight) -> Any:
    return _readable(weight).tolist()


def _readable(weight: LowBitWeight) -> Tensor:
    """A `ReadOnlyView` of all of the weight."""
    return weight.expand(weight.shape)


@implements(Tensor.data_ptr, Tensor.storage, Tensor.__dlpack__)
def _refused(weight: LowBitWeight, *args: Any, **kwargs: Any) -> None:
    raise InputError(
        f"the memory of {weight!r} holds no float numbers: pass on w.contiguous(), or its codes and scales, which are "
        "w.codes and w.scales"
    )


# --- codes and scales ---


@implements(Tensor.untyped_storage)
def _untyped_storage(weight: LowBitWeight) -> torch.UntypedStorage:
    """That of the codes: what is asked of it is whether two tensors share their memory."""
    return weight.codes.untyped_storage()


@called_from("torch")
def _own_storage(caller: FrameType, func: Any, args: Any, kwargs: Any) -> Any:
    """But torch, which traces and copies by it, gets what it made."""
    if func is not Tensor.untyped_storage:
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args)


@called_from("accelerate")
def _told_apart(caller: FrameType, func: Any, args: Any, kwargs: Any) -> Any:
    """It knows parameters by their address when it shards them, and reads nothing there: the codes'."""
    return args[0].codes.data_ptr() if func is Tensor.data_ptr else NotImplemented


@implements(Tensor.data.__set__)  # type: ignore[attr-defined]
def _set_data(weight: LowBitWeight, value: Tensor) -> None:
    """`w.data = value`: a low-bit value is shared, a float one rounded to nearest, but not if it is what `w` means."""
    if not isinstance(value, LowBitWeight):
        if value.dtype is weight.dtype and value.shape == weight.shape and torch.equal(value, weight.dequantize()):
            return
        value = LowBitWeight.from_float(value.detach(), weight.bits, weight.group_size)
    with torch._C.DisableTorchFunctionSubclass():
        weight.data = value
    for name in ("codes", "scales", "bits", "group_size"):
        setattr(weight, name, getattr(value, name))


@implements(Tensor.share_memory_)
def _share_memory(weight: LowBitWeight) -> LowBitWeight:
    for part in (weight.codes, weight.scales):
        part.share_memory_()  # type: ignore[no-untyped-call]
    return weight


@implements(Tensor.is_shared)
def _is_shared(weight: LowBitWeight) -> bool:
    return all(part.is_shared() for part in (weight.codes, weight.scales))  # type: ignore[no-untyped-call]
