"""The only place a weight is written."""

import torch
from torch import Tensor

from apollo_optim.core.blocks import blocks, part
from apollo_optim.core.compile import in_memory
from apollo_optim.core.layout import local, rounding_noise, spread
from apollo_optim.core.moments import Number
from apollo_optim.core.random import Key
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
    weight, own = local(p.detach()), local(tensor)
    factor = local(spread(factor, tensor)) if isinstance(factor, Tensor) else factor
    usable = local(spread(usable, tensor))
    for at in blocks(tuple(own.shape), whole=int(weight.ndim != own.ndim)):
        noise = rounding_noise(tensor, key, at) if key and p.dtype is torch.bfloat16 else None
        here = part(factor, at) if isinstance(factor, Tensor) else factor
        write_block(part(weight, at), part(own, at), here, part(usable, at), lr, weight_decay, noise)


def write_block(
    weight: Tensor,
    tensor: Tensor,
    factor: Number,
    usable: Tensor,
    lr: Number,
    weight_decay: Number,
    noise: Tensor | None,
) -> None:
    """The arithmetic of ``write``, of one block of plain tensors. ``weight`` may be ``tensor``'s unflattened form."""
    # in memory: a compiler would make them anew for every few entries, roots and quotients of norms included
    keep, size, usable = in_memory(1 - lr * weight_decay), in_memory(factor * lr), in_memory(usable)
    old = weight.reshape(tensor.shape).float()
    stepped = torch.where(usable, old * keep - tensor.float() * size, old)
    store(weight, stepped.view(weight.shape), None if noise is None else noise.view(weight.shape))
