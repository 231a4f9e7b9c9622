"""How large a step: ratios of norms, and the limit on their growth.

Every tensor here may have leading batch axes (a stack of expert matrices); c and r are the last two.
"""

import math

import torch
from torch import Tensor
from torch.linalg import vector_norm

from apollo_optim.core.blocks import Block, blocks, by_rows, part
from apollo_optim.core.layout import is_sharded, lies_across, local, projected, settled, summed
from apollo_optim.core.moments import Number

TINY = 1e-8
_PART = 32


def channel_norms(t: Tensor) -> Tensor:
    """(.., c, k) -> (.., c, 1), fp32."""
    if torch.compiler.is_compiling():
        return channel_sums(t.float().square(), lies_across(t)).sqrt()

    def rows(block: Tensor, _: Block) -> Tensor:
        norms: Tensor = vector_norm(block, dim=-1, keepdim=True, dtype=torch.float32)
        return norms

    if not is_sharded(t):
        return by_rows(rows, t)
    return projected(t, 1, lambda own, _: by_rows(rows, own).square()).sqrt()  # ranks add up squares


def channel_sums(t: Tensor, across: bool) -> Tensor:
    """(.., c, k) -> (.., c, 1). Of what lies across in parts: the compiled loop goes down a few rows at a time.

    Fewer rows are a little faster and their sums take more memory: 8 of bf16 half of ``t``'s bytes, 32 an eighth.
    """
    *batch, k = t.shape
    rows = math.gcd(k, _PART)
    if not across or rows == 1:
        return t.sum(-1, keepdim=True)
    return t.reshape(*batch, k // rows, rows).sum(-1).sum(-1, keepdim=True)


def full_norm(t: Tensor) -> Tensor:
    """The norm of all of ``t``, of any shape: 0-D, fp32."""
    own = local(t)
    if torch.compiler.is_compiling():  # row by row: a sum of everything at once is compiled to a slow loop
        return own.float().square().sum(-1).sum().sqrt()
    norm = vector_norm(
        torch.stack([vector_norm(part(own, at), dtype=torch.float32) for at in blocks(tuple(own.shape))])
    )
    return summed(norm.square(), t).sqrt() if is_sharded(t) else norm


def tensor_norm(norms_c1: Tensor) -> Tensor:
    """The norm of a whole matrix from its channels': (.., c, 1) -> (..)."""
    return settled(vector_norm(norms_c1, dim=(-2, -1)))


def ratio(direction_norm: Tensor, grad_norm: Tensor) -> Tensor:
    """s = ||N|| / ||R||, per channel or per tensor (APOLLO, eq. 5 and section 4.2)."""
    return direction_norm / (grad_norm + TINY)


def limit_growth(norm: Tensor, prev_norm: Tensor, growth: Number) -> tuple[Tensor, Tensor]:
    """Fira's norm-growth limiter (2410.01623): a step's norm may grow by at most ``growth``.

    Returns the factor for the step and the norm to remember, both of ``norm``'s shape. A remembered norm of zero
    means "no limit yet"; a step whose norm is zero is not remembered. So neither a zero gradient at the start (torch's
    checkpoint code takes such a step to create the state) nor one in mid-run freezes the tensor or drops the limit.
    The branches are ``where``s: no host sync.
    """
    most = prev_norm * growth  # (not torch.minimum: DTensor has none in torch 2.6)
    limited = torch.where((prev_norm > 0) & (norm > most), most, norm)
    factor = torch.where(norm > 0, limited / norm, torch.ones_like(norm))
    return factor, torch.where(norm > 0, limited, prev_norm)
