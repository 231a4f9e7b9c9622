"""What torch's operations do to a low-bit weight without reading all of its float numbers: copy, move, view, set."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from apollo_optim.core.errors import InputError
from apollo_optim.quant import format
from apollo_optim.quant.weight import Handler, LowBitWeight, implements

aten = torch.ops.aten
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64  # what a low-bit weight can stand for


# --- the same weight, and copies of it ---


@implements(aten.detach.default, aten.alias.default)
def _alias(weight: LowBitWeight) -> LowBitWeight:
    same = weight.of_parts(weight.codes, weight.scales)
    same.stats = weight.stats
    return same


@implements(aten.detach_.default)
def _itself(weight: LowBitWeight) -> LowBitWeight:
    return weight


@implements(aten.clone.default)
def _clone(weight: LowBitWeight, **_: Any) -> LowBitWeight:
    return weight.of_parts(weight.codes.clone(), weight.scales.clone())


@implements(aten._to_copy.default)
def _to(weight: LowBitWeight, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any) -> Any:
    if dtype is not None and dtype not in DTYPES:
        return NotImplemented
    codes, scales = (t.to(device, non_blocking=non_blocking, copy=True) for t in (weight.codes, weight.scales))
    return weight.of_parts(codes, scales, dtype)


@implements(aten._pin_memory.default)
def _pin(weight: LowBitWeight, device: Any = None) -> LowBitWeight:
    return weight.of_parts(weight.codes.pin_memory(), weight.scales.pin_memory())


@implements(aten.is_pinned.default)
def _is_pinned(weight: LowBitWeight, device: Any = None) -> bool:
    return weight.codes.is_pinned() and weight.scales.is_pinned()


# --- what is set: rounded to nearest ---


@implements(aten.copy_.default)
def _copy(weight: Tensor, source: Tensor, *_: Any) -> Any:
    if not isinstance(weight, LowBitWeight):
        return NotImplemented
    if not isinstance(source, LowBitWeight):
        return weight.assign(source.expand(weight.shape))
    if (source.shape, source.bits, source.group_size) != (weight.shape, weight.bits, weight.group_size):
        raise InputError(f"cannot copy {source!r} into {weight!r}")
    weight.codes.copy_(source.codes)
    weight.scales.copy_(source.scales)
    return weight


@implements(aten._foreach_copy_.default)
def _copy_each(weights: Sequence[Tensor], sources: Sequence[Tensor], non_blocking: bool = False) -> None:
    for weight, source in zip(weights, sources, strict=True):
        weight.copy_(source, non_blocking)


def _initialised(fill: Any) -> Handler:
    return lambda weight, *args, **kwargs: weight.assign(fill(_empty(weight), *args, **kwargs))


def _empty(weight: LowBitWeight) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


for fill in (
    aten.normal_.default,
    aten.uniform_.default,
    aten.zero_.default,
    aten.fill_.Scalar,
    aten.fill_.Tensor,
):
    implements(fill)(_initialised(fill))


# --- new tensors in the likeness of a weight: never low-bit, or a state made by zeros_like would be ---


def _like(make: Any) -> Handler:
    return lambda weight, *args, **kwargs: make(_outline(weight), *args, **kwargs)


def _outline(weight: LowBitWeight) -> Tensor:
    """A tensor of the weight's shape, dtype and device in the memory of one number."""
    return torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)


for make in (
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
):
    implements(make)(_like(make))


@implements(aten.empty_like.default)
def _empty_like(weight: LowBitWeight, **kwargs: Any) -> Tensor:
    """But where a meta one gets memory, it stays low-bit: `Module.to_empty(device=...)` asks for that."""
    device = kwargs.get("device")
    if not weight.is_meta or device is None or kwargs.get("dtype"):
        return torch.empty_like(_outline(weight), **kwargs)
    codes, scales = (torch.empty_like(t, device=device) for t in (weight.codes, weight.scales))
    return weight.of_parts(codes, scales)


# --- parts: whole rows are low-bit themselves, and share the weight's memory; what cuts rows is read-only (view.py) ---


def _rows(cut: Any) -> Handler:
    """An operation that takes parts along `dim`, of codes and scales alike unless it is the last one."""
    position = next(i for i, a in enumerate(cut._schema.arguments) if a.name == "dim")

    def handler(weight: LowBitWeight, *args: Any, **kwargs: Any) -> Any:
        dim = kwargs.get("dim", (weight, *args)[position] if len(args) >= position else 0)
        if dim % weight.ndim == weight.ndim - 1:
            return NotImplemented
        codes, scales = (cut(t, *args, **kwargs) for t in (weight.codes, weight.scales))
        if isinstance(codes, Tensor):
            return weight.of_parts(codes, scales)
        return [weight.of_parts(*both) for both in zip(codes, scales, strict=True)]

    return handler


for cut in (
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
):
    implements(cut)(_rows(cut))


@implements(aten.view.default)
def _view(weight: LowBitWeight, size: Sequence[int]) -> Any:
    *lead, n = size
    whole_rows = n == weight.shape[-1] or (n == -1 and prod(lead) == prod(weight.shape[:-1]))
    if not whole_rows or not weight.codes.is_contiguous():
        return NotImplemented
    codes, scales = (t.view(*lead, t.shape[-1]) for t in (weight.codes, weight.scales))
    return weight.of_parts(codes, scales)


# --- picked rows: only these are dequantised ---


@implements(aten.index.Tensor)
def _index(weight: LowBitWeight, indices: Sequence[Tensor | None]) -> Any:
    taken = sum(i.ndim if i is not None and i.dtype is torch.bool else 1 for i in indices)
    return _picked(weight, aten.index.Tensor, indices) if taken < weight.ndim else NotImplemented


@implements(aten.index_select.default)
def _index_select(weight: LowBitWeight, dim: int, index: Tensor) -> Any:
    whole_rows = dim % weight.ndim < weight.ndim - 1
    return _picked(weight, aten.index_select.default, dim, index) if whole_rows else NotImplemented


def _picked(weight: LowBitWeight, pick: Any, *args: Any) -> Tensor:
    return format.dequantised(pick(weight.codes, *args), pick(weight.scales, *args), weight.shape[-1], weight.dtype)
