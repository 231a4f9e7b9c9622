"""Eight-bit moments: a format for the mean and one for the square, each with a scale for up to 256 neighbours in a row.

The *mean* is int8, the signed square root of the fraction of its group's largest entry: fine where most entries are.

The *square* is uint8, a small float: four bits of exponent and four of mantissa, times a power of two that the group
shares. It stands under a root in a denominator, so a small one must not become 0 beside a large one (fractions of the
largest do that, and the update is nonsense), and it is an average of a thousand gradients: what has not changed must be
written back exactly, whatever a neighbour did. A step is 3-6 % of a number, the range within a group 2^15; smaller
squares are held at the lower end, which makes a step smaller, never larger.

Rounding is stochastic, so that the mean of what is kept is what was meant: an average that moves by 0.1 % a step would
otherwise never move.

All groups of a row are of one size, a divisor of it: filled-up short ones were compiled wrongly (torch 2.13, CPU).
Nothing here looks at the bits of a float, which that compiler does entry by entry.
"""

import torch
from torch import Tensor

from apollo_optim.core.rounding import spacing

LARGEST, LEAST = 256, 32  # entries that share a scale
_FINEST = 127.0**2  # codes are roots of this many parts
_FIRST, _LAST = 17.0, 31 * 2.0**15  # codes 1 and 255, in units of the group
_TINIEST = 2.0**-100  # as good as 0: its root is far below any eps


def groups_of(columns: int) -> int:
    """In how many groups a row falls: the fewest of one size, at most ``LARGEST``. 0: that would be below ``LEAST``."""
    size = next((size for size in range(LARGEST, LEAST - 1, -1) if columns % size == 0), 0)
    return columns // size if size else 0


def encode_mean(value: Tensor, noise: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """fp32 (.., n) -> codes (.., n), in fp32 as yet, and each group's largest size (.., groups).

    ``noise``: fp32 of the value's shape, uniform in [0, 1).
    """
    value, noise = (_grouped(t, groups) for t in (value, noise))
    scale = value.abs().amax(-1, keepdim=True)
    share = value.abs() * (_FINEST / torch.where(scale > 0, scale, 1.0))
    code = share.sqrt().floor()
    fraction = (share - code * code) / (2 * code + 1)  # of the way to the next code's number
    code = (code + (noise < fraction)).clamp(max=127.0)
    return torch.where(value < 0, -code, code).flatten(-2), scale.squeeze(-1)


def decode_mean(codes: Tensor, scale: Tensor) -> Tensor:
    code = _grouped(codes, scale.shape[-1]).float()
    return (code * code.abs() * (scale[..., None] / _FINEST)).flatten(-2)


def encode_square(value: Tensor, noise: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """fp32 >= 0, (.., n) -> codes (.., n) and each group's unit (.., groups), a power of two, both in fp32 as yet.

    ``noise``: as above. Code 16 e + m stands for (16 + m) 2^e units, code 0 for 0.
    """
    value, noise = (_grouped(t, groups) for t in (value, noise))
    largest = value.amax(-1, keepdim=True).clamp(_TINIEST, 1 / _TINIEST)
    unit = spacing(largest * (1 + 1 / 32), 4) * 2.0**-15  # with room for the largest to be rounded up
    units = (value / unit).clamp(_FIRST, _LAST)
    space = spacing(units, 4)  # 2^e
    code = (units / space + noise).floor() + 16 * (space.log2().round() - 1)
    return torch.where(value > 0, code, 0.0).flatten(-2), unit.squeeze(-1)


def decode_square(codes: Tensor, unit: Tensor) -> Tensor:
    code = _grouped(codes, unit.shape[-1]).float()  # not int32, which takes a compiled CPU step twice as long
    exponent = (code / 16).floor()
    units = (16 + code - 16 * exponent) * exponent.exp2()
    return torch.where(code > 0, units * unit[..., None], 0.0).flatten(-2)


def _grouped(t: Tensor, groups: int) -> Tensor:
    """(.., n) -> (.., groups, n / groups)."""
    return t.reshape(*t.shape[:-1], groups, t.shape[-1] // groups)
