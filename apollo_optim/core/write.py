"""The only place where floats are written, of a weight or of its state: each once a step, and rounded once."""

import torch
from torch import Tensor

from apollo_optim.core.blocks import blocks, part
from apollo_optim.core.compile import in_memory
from apollo_optim.core.matrix import Number
from apollo_optim.core.random import Dither
from apollo_optim.core.rounding import round_stochastically


def write(
    weight: Tensor,
    tensor: Tensor,
    factor: Number,
    finite: Tensor,
    lr: Number,
    weight_decay: Number,
    noise: Dither | None,
    cautious: bool = False,
) -> None:
    """`W <- (1 - lr weight_decay) W - lr factor tensor`, in fp32 and rounded once, block after block.

    Args:
        weight: Plain, of `tensor`'s shape or its unflattened form.
        tensor: (.., m, n); `factor` and `finite` (bool) broadcast to it. Where not `finite`, the weight stays.
        noise: Rounds a bf16 weight stochastically; None: to nearest.
        cautious: Decay only where the step goes towards zero, too ("Cautious Weight Decay", arXiv 2510.12402).
    """
    for at in blocks(tuple(tensor.shape), tensor.device, whole=int(weight.ndim != tensor.ndim)):
        here = part(factor, at) if isinstance(factor, Tensor) else factor
        rounding = None if noise is None else noise.part(at)
        write_block(part(weight, at), part(tensor, at), here, part(finite, at), lr, weight_decay, rounding, cautious)


def write_block(
    weight: Tensor,
    tensor: Tensor,
    factor: Number,
    finite: Tensor,
    lr: Number,
    weight_decay: Number,
    noise: Dither | None,
    cautious: bool = False,
) -> None:
    """The arithmetic of `write`, of one block."""
    # in memory: a compiler would make them anew for every few entries, roots and quotients of norms included
    keep, size, finite = in_memory(1 - lr * weight_decay), in_memory(factor * lr), in_memory(finite)
    flat = weight.shape != tensor.shape
    old = weight.reshape(tensor.shape) if flat else weight
    # All in fp32, and no copy is made for it: bf16 becomes that where it meets an fp32 tensor that has dimensions.
    step = (tensor if isinstance(size, Tensor) and size.ndim else tensor.float()) * size
    if cautious:
        keep = torch.where(step * old >= 0, keep, 1.0)
    as_it_is = old.dtype.itemsize == 2 and isinstance(keep, float) and keep == 1.0  # without decay
    stepped = torch.where(finite, (old if as_it_is else old.float() * keep) - step, old)
    stepped = stepped if noise is None else round_stochastically(stepped, noise)
    weight.copy_(stepped.view(weight.shape) if flat else stepped)


def store_float(old: Tensor, value: Tensor, finite: Tensor, noise: Dither | None) -> None:
    """`old <- value` where `finite`: state, in its dtype. Without noise, to nearest."""
    if noise is None and old.dtype is value.dtype and not torch.compiler.is_compiling():
        torch.where(finite, value, old, out=old)
        return
    chosen = torch.where(finite, value, old.float())
    old.copy_(chosen if noise is None else round_stochastically(chosen, noise))
