"""From fp32 to a stored dtype: to nearest, or stochastically."""

import torch
from torch import Tensor


def round_stochastically(value: Tensor, noise: Tensor) -> Tensor:
    """fp32 -> bf16, up with a probability equal to the fraction lost, so that the mean is the number.

    ``value``: fp32; ``noise``: fp32 of the same shape, uniform in [0, 1) in steps of 2^-16. A bf16 is the top half of
    an fp32: adding 16 random bits carries into the top half as often as it should. NaN and infinities stay what they
    are.
    """
    if torch.compiler.is_compiling() and value.device.type == "cpu":
        return _on_a_grid(value, noise).to(torch.bfloat16)
    carried = (value.view(torch.int32) + (noise * 2.0**16).to(torch.int32)) & -0x10000
    rounded = carried.view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


def _on_a_grid(value: Tensor, noise: Tensor) -> Tensor:
    """The same numbers, and -0 as 0, without looking at bits: torch's CPU compiler does that entry by entry.

    The grid is bf16's spacing at the value: 2^-7 of its leading power of two, which two roundings lay bare (Rump, 2009,
    "ufp"). Values below 2^-119 share one grid; from 2^97 on, beyond any weight, there is none to be had.
    """
    scaled = value * (2.0**23 + 1)
    power = (scaled - scaled * (1 - 2.0**-24)).abs()
    spacing = power.clamp(min=2.0**-119) * 2.0**-7
    rounded = (value / spacing + torch.where(value < 0, -noise, noise)).trunc() * spacing
    return torch.where(power < 2.0**97, rounded, value)


def store(target: Tensor, value: Tensor, noise: Tensor | None) -> None:
    """``target <- value`` in the target's dtype: the one rounding. Without noise, to nearest."""
    target.copy_(value if noise is None else round_stochastically(value, noise))
