"""From fp32 to a stored dtype: to nearest, or stochastically."""

import torch
from torch import Tensor


def round_stochastically(value: Tensor, bits: Tensor) -> Tensor:
    """fp32 -> bf16, up with a probability equal to the fraction lost, so that the mean is the number.

    ``value``: fp32; ``bits``: int32 of the same shape, of which the low 16 are used. A bf16 is the top half of an
    fp32: adding 16 random bits carries into the top half as often as it should. NaN and infinities stay what they are.
    """
    carried = (value.view(torch.int32) + (bits & 0xFFFF)) & -0x10000
    rounded = carried.view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


def store(target: Tensor, value: Tensor, bits: Tensor | None) -> None:
    """``target <- value`` in the target's dtype: the one rounding. Without bits, to nearest."""
    target.copy_(value if bits is None else round_stochastically(value, bits))
