"""The only place a weight is written."""

import torch
from torch import Tensor

from apollo_optim.core.layout import flat_index, local, spread
from apollo_optim.core.moments import Number
from apollo_optim.core.random import Key, hash32
from apollo_optim.core.rounding import store
from apollo_optim.core.storage import writes_itself


def write(
    p: Tensor, tensor: Tensor, factor: Number, usable: Tensor, lr: Number, weight_decay: Number, key: Key | None
) -> None:
    """``p <- (1 - lr * weight_decay) * p - lr * factor * tensor``, in fp32 and rounded once.

    ``tensor``: (.., m, n), the weight's matrix form; ``factor`` and ``usable`` (bool) broadcast to it.
    Where not ``usable`` the weight is left as it is. With a ``key``, a bf16 weight is rounded stochastically. A weight
    that knows better (low-bit) has the same step in its ``_write_update_``.
    """
    if writes_itself(p):
        p._write_update_(tensor, factor, usable, lr, weight_decay, key)  # type: ignore[attr-defined]
        return
    part, tensor_part = local(p.detach()), local(tensor).float()
    factor = local(spread(factor, tensor)) if isinstance(factor, Tensor) else factor
    usable = local(spread(usable, tensor))
    weight = part.reshape(tensor_part.shape).float()
    stepped = torch.where(usable, weight * (1 - lr * weight_decay) - tensor_part * (factor * lr), weight)
    bits = hash32(flat_index(tensor), key).view(part.shape) if key and p.dtype is torch.bfloat16 else None
    store(part, stepped.view(part.shape), bits)
