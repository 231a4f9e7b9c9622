"""Eight-bit moments: a format for the mean and one for the square, each with a scale for up to 256 neighbours in a row.

The *mean* is int8, the signed square root of the fraction of its group's largest entry: fine where most entries are.

The *square* is uint8, a small float: an fp32's exponent and four leading bits of its mantissa, counted from an offset
that the group shares. It stands under a root in a denominator, so a small one must not become 0 beside a large one
(fractions of the largest do that, and the update is nonsense), and it is an average of a thousand gradients: what has
not changed must be written back exactly, whatever a neighbour did. A step is 3-6 % of a number, the range within a
group 2^16; smaller squares are held at the lower end, which makes a step smaller, never larger.

Rounding is stochastic, so that the mean of what is kept is what was meant: an average that moves by 0.1 % a step would
otherwise never move.

All groups of a row are of one size, a divisor of it: filled-up short ones were compiled wrongly (torch 2.13, CPU).
"""

import torch
from torch import Tensor

LARGEST, LEAST = 256, 32  # entries that share a scale
_FINEST = 127.0**2  # codes are roots of this many parts
_DROPPED = 23 - 4  # of an fp32's mantissa bits
_LOW = (1 << _DROPPED) - 1


def groups_of(columns: int) -> int:
    """In how many groups a row falls: the fewest of one size, at most ``LARGEST``. 0: that would be below ``LEAST``."""
    size = next((size for size in range(LARGEST, LEAST - 1, -1) if columns % size == 0), 0)
    return columns // size if size else 0


def encode_mean(value: Tensor, bits: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """fp32 (.., n) -> int8 codes (.., n) and each group's largest size (.., groups), fp32.

    ``bits``: random int32 of the value's shape, of which the low 24 are used.
    """
    value, bits = (_grouped(t, groups) for t in (value, bits))
    scale = value.abs().amax(-1, keepdim=True)
    share = value.abs() / torch.where(scale > 0, scale, 1.0) * _FINEST
    code = share.sqrt().floor()
    fraction = (share - code * code) / (2 * code + 1)  # of the way to the next code's number
    up = (bits & 0xFFFFFF).float() * 2.0**-24 < fraction
    code = (code + up).clamp(max=127.0) * value.sign()
    return code.to(torch.int8).flatten(-2), scale.squeeze(-1)


def decode_mean(codes: Tensor, scale: Tensor) -> Tensor:
    code = _grouped(codes, scale.shape[-1]).float()
    return (code * code.abs() * (scale[..., None] / _FINEST)).flatten(-2)


def encode_square(value: Tensor, bits: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """fp32 >= 0, (.., n) -> uint8 codes (.., n) and each group's offset (.., groups), int16.

    ``bits``: random int32 of the value's shape, of which the low 19 are used: added to an fp32's own, they carry into
    the four bits that stay as often as they should. A positive fp32 grows with its bits, read as an integer.
    """
    value, bits = (_grouped(t, groups) for t in (value, bits))
    grown = (value.view(torch.int32) + (bits & _LOW)) >> _DROPPED
    offset = (grown.amax(-1, keepdim=True) - 255).clamp(min=0)
    code = torch.where(grown > 0, (grown - offset).clamp(1, 255), 0)
    return code.to(torch.uint8).flatten(-2), offset.squeeze(-1).to(torch.int16)


def decode_square(codes: Tensor, offset: Tensor) -> Tensor:
    code = _grouped(codes, offset.shape[-1]).to(torch.int32)
    value = ((code + offset[..., None].to(torch.int32)) << _DROPPED).view(torch.float32)
    return torch.where(code > 0, value, 0.0).flatten(-2)


def _grouped(t: Tensor, groups: int) -> Tensor:
    """(.., n) -> (.., groups, n / groups)."""
    return t.reshape(*t.shape[:-1], groups, t.shape[-1] // groups)
