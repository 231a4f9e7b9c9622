"""From fp32 to a stored dtype: to nearest, or stochastically."""

import torch
from torch import Tensor

from apollo_optim.core.random import Dither


def round_stochastically(value: Tensor, noise: Dither) -> Tensor:
    """To a bf16, up with a probability equal to the part of the way up it is, so that the mean is the number.

    `value`: fp32, and so is what comes back, with a bf16's bits. A bf16 is the top half of an fp32: adding 16 random
    bits carries into the top half as often as it should. Bits are of magnitudes, and a magnitude grows downwards where
    the number is negative. NaN stays what it is, and so do infinities, whose lower half is 0.
    """
    if torch.compiler.is_compiling() and value.device.type == "cpu":
        return _on_a_grid(value, noise.uniform())
    bits = value.view(torch.int32)
    added = (noise.words() ^ (bits >> 31)) & 0xFFFF
    rounded = ((bits + added) & -0x10000).view(torch.float32)
    return torch.where(value.isnan(), value, rounded)


def _on_a_grid(value: Tensor, noise: Tensor) -> Tensor:
    """The same numbers, and -0 as 0, without looking at bits: torch's CPU compiler does that entry by entry.

    floor(value / spacing + noise) * spacing, where the floor is a rounding to the grid, by adding and subtracting a
    large number, taken a point back where it went up. No division: the write would wait for it. Values below 2^-126 are
    rounded to nearest; from 2^97 on, beyond any weight, there is no grid to be had.
    """
    space = spacing(value, 7)
    raised = value + noise * space
    rounder = space * (1.5 * 2.0**23)
    nearest = (raised + rounder) - rounder
    rounded = torch.where(nearest > raised, nearest - space, nearest)
    return torch.where(space < 2.0**90, rounded, value)


def spacing(value: Tensor, bits: int) -> Tensor:
    """Of the floats with so many bits of mantissa, at `value`: its leading power of two times 2^-bits.

    Two roundings lay that bare (Rump, 2009, "ufp").
    """
    scaled = value * ((2.0**23 + 1) * 2.0**-bits)
    return (scaled - scaled * (1 - 2.0**-24)).abs()
