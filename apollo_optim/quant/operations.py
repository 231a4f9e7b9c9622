"""What torch does to a low-bit weight without reading its float numbers: copy, move, initialise."""

from typing import Any

import torch
from torch import Tensor

from apollo_optim.core.errors import InputError
from apollo_optim.quant.weight import Handler, LowBitWeight, implements

aten = torch.ops.aten


@implements(aten.detach.default, aten.alias.default)
def _alias(weight: LowBitWeight) -> LowBitWeight:
    return weight.of_parts(lambda t: t)


@implements(aten.clone.default)
def _clone(weight: LowBitWeight, **_: Any) -> LowBitWeight:
    return weight.of_parts(torch.clone)


@implements(aten._to_copy.default)
def _to(
    weight: LowBitWeight, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any
) -> LowBitWeight:
    return weight.of_parts(lambda t: t.to(device, non_blocking=non_blocking, copy=True), dtype)


@implements(aten.copy_.default)
def _copy(weight: LowBitWeight, source: Tensor, *_: Any) -> LowBitWeight:
    if not isinstance(source, LowBitWeight):
        return weight.assign(source.expand(weight.shape))
    if (source.shape, source.bits, source.group_size) != (weight.shape, weight.bits, weight.group_size):
        raise InputError(f"cannot copy {source!r} into {weight!r}")
    weight.codes.copy_(source.codes)
    weight.scales.copy_(source.scales)
    return weight


def _like(make: Any) -> Handler:
    """`zeros_like` and its kin: what is made in the likeness of a weight is never low-bit."""
    return lambda weight, **kwargs: make(_empty(weight), **kwargs)


def _initialised(fill: Any) -> Handler:
    return lambda weight, *args, **kwargs: weight.assign(fill(_empty(weight), *args, **kwargs))


def _empty(weight: LowBitWeight) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


for make in (aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default):
    implements(make)(_like(make))
for fill in (
    aten.normal_.default,
    aten.uniform_.default,
    aten.zero_.default,
    aten.fill_.Scalar,
    aten.fill_.Tensor,
):
    implements(fill)(_initialised(fill))
