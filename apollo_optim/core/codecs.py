"""How a tensor of the state is stored: in fp32, in bf16, or in 8 or 4 bits. Rules compute in fp32 and know none of it.

8 and 4 bits: a format for a *mean* and one for a *square*, each with a scale for some neighbours in a row.

The *mean* is a signed integer, the square root of the fraction of its group's largest entry: fine where most entries
are. (4 bits: the fraction itself.)

The *square* is a small float without a sign: 8 bits have four of exponent and four of mantissa, 4 bits are exponent
alone, times a power of two that the group shares. It stands under a root in a denominator, so a small one must not
become 0 beside a large one (fractions of the largest do that, and the update is nonsense), and it is an average of a
thousand gradients: what has not changed must be written back exactly, whatever a neighbour did. A step of 8 bits is
3-6 % of a number, the range within a group 2^15; smaller squares are held at the lower end, which makes a step smaller,
never larger.

Rounding is stochastic, so that the mean of what is kept is what was meant: an average that moves by 0.1 % a step would
otherwise never move.

All groups of a row are of one size, a divisor of it: filled-up short ones were compiled wrongly (torch 2.13, CPU).
Nothing here looks at the bits of a float, which that compiler does entry by entry.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from apollo_optim.core.random import Dither
from apollo_optim.core.rounding import spacing

SCALE = "_scale"  # what the second tensor of a coded slot is called, after the slot
LEAST_GROUP = 32  # entries that share a scale, at least
LEAST_ENTRIES = 4096  # tensors of fewer entries stay in fp32: there is nothing to save
_FINEST = 127.0**2  # codes of 8 bits are roots of this many parts
_FIRST, _LAST = 17.0, 31 * 2.0**15  # codes 1 and 255, in units of the group
_TINIEST = 2.0**-100  # as good as 0: its root is far below any eps

Encode = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(fp32 (.., n), noise in [0, 1) of its shape, groups) -> codes and each group's scale (.., groups), in fp32 as yet."""


class Coding(NamedTuple):
    """One way to store a mean or a square in few bits."""

    codes: torch.dtype
    scale: torch.dtype
    encode: Encode
    decode: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Codec:
    """A storage format, one object each.

    Attributes:
        dtype: Of a float; None where there are codes.
        largest: Most entries that share a scale.
        packed: Codes in a byte.
        coding: By the kind of slot, "mean" or "square".
    """

    name: str
    dtype: torch.dtype | None = None
    largest: int = 0
    packed: int = 1
    coding: Mapping[str, Coding] = field(default_factory=dict)

    def groups(self, columns: int) -> int:
        """In how many groups a row falls: the fewest of one size. 0: a size would be below `LEAST_GROUP`, or odd."""
        sizes = range(self.largest, LEAST_GROUP - 1, -1)
        size = next((size for size in sizes if columns % size == 0 and size % self.packed == 0), 0)
        return columns // size if size else 0

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Can a tensor of this shape be stored so, and is there anything to save?"""
        if self.dtype is not None:
            return True
        entries = torch.Size(shape).numel()
        return len(shape) > 1 and entries >= max(1, LEAST_ENTRIES) and self.groups(shape[-1]) > 0


def encode_mean(value: Tensor, noise: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Codes are signed, up to 127 in size; the scale is each group's largest size."""
    value, noise = (_grouped(t, groups) for t in (value, noise))
    scale = value.abs().amax(-1, keepdim=True)
    share = value.abs() * (_FINEST / torch.where(scale > 0, scale, 1.0))
    code = share.sqrt().floor()
    fraction = (share - code * code) / (2 * code + 1)  # of the way to the next code's number
    code = (code + (noise < fraction)).clamp(max=127.0)
    return torch.where(value < 0, -code, code).flatten(-2), scale.squeeze(-1)


def decode_mean(codes: Tensor, scale: Tensor) -> Tensor:
    """The fp32 numbers (.., n) that codes and scales mean."""
    code = _grouped(codes, scale.shape[-1]).float()
    return (code * code.abs() * (scale[..., None] / _FINEST)).flatten(-2)


def encode_square(value: Tensor, noise: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Of numbers >= 0; the scale is each group's unit, a power of two.

    Code 16 e + m stands for (16 + m) 2^e units, code 0 for 0.
    """
    value, noise = (_grouped(t, groups) for t in (value, noise))
    largest = value.amax(-1, keepdim=True).clamp(_TINIEST, 1 / _TINIEST)
    unit = spacing(largest * (1 + 1 / 32), 4) * 2.0**-15  # with room for the largest to be rounded up
    units = (value / unit).clamp(_FIRST, _LAST)
    space = spacing(units, 4)  # 2^e
    code = (units / space + noise).floor() + 16 * (space.log2().round() - 1)
    return torch.where(value > 0, code, 0.0).flatten(-2), unit.squeeze(-1)


def decode_square(codes: Tensor, unit: Tensor) -> Tensor:
    """The fp32 numbers (.., n) that codes and units mean."""
    code = _grouped(codes, unit.shape[-1]).float()  # not int32, which takes a compiled CPU step twice as long
    exponent = (code / 16).floor()
    units = (16 + code - 16 * exponent) * exponent.exp2()
    return torch.where(code > 0, units * unit[..., None], 0.0).flatten(-2)


def encode_mean4(value: Tensor, noise: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Two codes in a byte, the first in the low half; each is 8 + a signed number up to 7 in size.

    The scale is each group's largest size, rounded up to what bf16 can hold: codes are taken by what is stored.
    """
    value, noise = (_grouped(t, groups) for t in (value, noise))
    largest = value.abs().amax(-1, keepdim=True)
    space = torch.where(largest > 0, spacing(largest, 7), 1.0)
    scale = (largest / space).ceil() * space
    code = (value * (7.0 / torch.where(scale > 0, scale, 1.0)) + noise).floor().clamp(-7.0, 7.0)
    return _pack(code.flatten(-2) + 8), scale.squeeze(-1)


def decode_mean4(codes: Tensor, scale: Tensor) -> Tensor:
    """The fp32 numbers (.., n) that codes and scales mean."""
    code = _grouped(_unpack(codes) - 8, scale.shape[-1])
    return (code * (scale[..., None].float() / 7.0)).flatten(-2)


def encode_square4(value: Tensor, noise: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Of numbers >= 0, two codes in a byte: code c > 0 stands for 2^(c - 1) units, code 0 for 0."""
    value, noise = (_grouped(t, groups) for t in (value, noise))
    largest = value.amax(-1, keepdim=True).clamp(_TINIEST, 1 / _TINIEST)
    unit = spacing(largest, 0) * 2.0**-13  # with room for the largest to be rounded up
    units = (value / unit).clamp(min=1.0)
    power = spacing(units, 0)
    code = power.log2().round() + 1 + (noise < units / power - 1)
    return _pack(torch.where(value > 0, code, 0.0).flatten(-2)), unit.squeeze(-1)


def decode_square4(codes: Tensor, unit: Tensor) -> Tensor:
    """The fp32 numbers (.., n) that codes and units mean."""
    code = _grouped(_unpack(codes), unit.shape[-1])
    return torch.where(code > 0, (code - 1).exp2() * unit[..., None], 0.0).flatten(-2)


def _grouped(t: Tensor, groups: int) -> Tensor:
    """(.., n) -> (.., groups, n / groups)."""
    return t.reshape(*t.shape[:-1], groups, t.shape[-1] // groups)


def _pack(codes: Tensor) -> Tensor:
    """Numbers 0 .. 15 (.., n) in floats -> bytes (.., n / 2) in floats."""
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return pairs[..., 0] + 16 * pairs[..., 1]


def _unpack(codes: Tensor) -> Tensor:
    """The inverse of `_pack`, from uint8."""
    byte = codes.float()
    high = (byte / 16).floor()
    return torch.stack([byte - 16 * high, high], -1).flatten(-2)


FP32 = Codec("float32", torch.float32)
BF16 = Codec("bfloat16", torch.bfloat16)
EIGHT_BITS = Codec(
    "8bit",
    largest=256,
    coding={
        "mean": Coding(torch.int8, torch.float32, encode_mean, decode_mean),
        "square": Coding(torch.uint8, torch.bfloat16, encode_square, decode_square),
    },
)
FOUR_BITS = Codec(
    "4bit",
    largest=128,
    packed=2,
    coding={
        "mean": Coding(torch.uint8, torch.bfloat16, encode_mean4, decode_mean4),
        "square": Coding(torch.uint8, torch.bfloat16, encode_square4, decode_square4),
    },
)
CODECS = {codec.name: codec for codec in (FP32, BF16, EIGHT_BITS, FOUR_BITS)}


def store_codes(old: Tensor, scale: Tensor, value: Tensor, finite: Tensor, noise: Dither, coding: Coding) -> None:
    """`core.write.store_float` for a slot of codes: whole rows of `value` (.., n), fp32."""
    new = coding.encode(value, noise.uniform(), scale.shape[-1])
    for here, fresh in zip((old, scale), new, strict=True):
        here.copy_(torch.where(finite, fresh, here.float()))  # a choice between integers is slow when compiled
