"""The only place where floats are written, of a weight or of its state: each once a step, and rounded once."""

from collections.abc import Callable

import torch
from torch import Tensor

from apollo_optim.core.blocks import Block, blocks, part
from apollo_optim.core.compile import in_memory
from apollo_optim.core.matrix import Number
from apollo_optim.core.rounding import round_stochastically

Noise = Callable[[Block], Tensor]
"""The noise of stochastic rounding for a block."""


def write(
    weight: Tensor,
    tensor: Tensor,
    factor: Number,
    finite: Tensor,
    lr: Number,
    weight_decay: Number,
    noise: Noise | None,
) -> None:
    """`W <- (1 - lr weight_decay) W - lr factor tensor`, in fp32 and rounded once, block after block.

    Args:
        weight: Plain, of `tensor`'s shape or its unflattened form.
        tensor: (.., m, n); `factor` and `finite` (bool) broadcast to it. Where not `finite`, the weight stays.
        noise: Rounds a bf16 weight stochastically; None: to nearest.
    """
    for at in blocks(tuple(tensor.shape), whole=int(weight.ndim != tensor.ndim)):
        here = part(factor, at) if isinstance(factor, Tensor) else factor
        rounding = None if noise is None else noise(at)
        write_block(part(weight, at), part(tensor, at), here, part(finite, at), lr, weight_decay, rounding)


def write_block(
    weight: Tensor,
    tensor: Tensor,
    factor: Number,
    finite: Tensor,
    lr: Number,
    weight_decay: Number,
    noise: Tensor | None,
) -> None:
    """The arithmetic of `write`, of one block."""
    # in memory: a compiler would make them anew for every few entries, roots and quotients of norms included
    keep, size, finite = in_memory(1 - lr * weight_decay), in_memory(factor * lr), in_memory(finite)
    flat = weight.shape != tensor.shape
    old = (weight.reshape(tensor.shape) if flat else weight).float()
    stepped = torch.where(finite, old * keep - tensor.float() * size, old)
    if flat:
        stepped, noise = stepped.view(weight.shape), None if noise is None else noise.view(weight.shape)
    weight.copy_(stepped if noise is None else round_stochastically(stepped, noise))


def store_float(old: Tensor, value: Tensor, finite: Tensor, noise: Tensor | None) -> None:
    """`old <- value` where `finite`: state, in its dtype. Without noise, to nearest."""
    chosen = torch.where(finite, value, old.float())
    old.copy_(chosen if noise is None else round_stochastically(chosen, noise))
