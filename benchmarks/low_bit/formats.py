"""Four formats for low-bit weights: symmetric or affine, scales kept or chosen anew at every step.

They come in 8 and 4 bits; scales are bf16, steps are rounded stochastically with the library's random bits:

- symmetric-keep: what the library ships, its own functions (`quant/format.py`).
- symmetric-anew: the same codes, but every step gives a group it touches the scale of its new largest entry.
- affine-anew: 256 or 16 levels from a group's smallest entry to its largest, both found at every step.
- affine-keep: the same, but the scale is kept until the levels do not reach, as in the library. (The smallest entry may
  change by whole levels: that rounds nothing.)

The smallest entry is an fp32 number here, so that affine formats have the best case; a shipped one would round it, or
count it in levels.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apollo_optim.core.matrix import Number
from apollo_optim.core.random import Dither
from apollo_optim.quant import LowBitWeight
from apollo_optim.quant import format as library
from apollo_optim.quant.format import HEADROOM, SMALLEST, TOP, pack, padded, rounded_up, unpack


@dataclass(frozen=True)
class Format:
    """Three functions with the arguments and results of `quant.format`'s own."""

    name: str
    quantised: Callable[..., tuple[Tensor, Tensor]]
    dequantised: Callable[..., Tensor]
    stepped: Callable[..., tuple[Tensor, Tensor]]
    minimum: int = 0
    """Bytes of a group beyond its scale."""

    def bytes_per_weight(self, bits: int, group_size: int) -> float:
        return bits / 8 + (2 + self.minimum) / group_size


# --- the formats ---
#
# r rows, g groups in a row, s entries in a group, as in quant/format.py. A weight is level * scale + minimum with whole
# levels: symmetric ones from -127 or -7 on (and no minimum), affine ones from 0 on, stored less 128 or 8. Affine
# "scales" hold the scales of a row (bf16 numbers) and then its minima.


def top_of(bits: int, affine: bool) -> int:
    """How far the levels of a group may reach: from zero to either side, or from the smallest to the largest."""
    return 2**bits - 1 if affine else TOP[bits]


def reach(levels_gs: Tensor, affine: bool) -> Tensor:
    """How far they do reach."""
    if not affine:
        return levels_gs.abs().amax(-1, keepdim=True)
    return levels_gs.amax(-1, keepdim=True) - levels_gs.amin(-1, keepdim=True)


def lowest(levels_gs: Tensor, affine: bool) -> Tensor:
    """What becomes level 0."""
    low_g1 = levels_gs.amin(-1, keepdim=True)
    return low_g1 if affine else torch.zeros_like(low_g1)


def grouped(value: Tensor, group_size: int) -> Tensor:
    n = value.shape[-1]
    return F.pad(value, (0, padded(n, group_size) - n)).view(*value.shape[:-1], -1, group_size)


def stored(levels_gs: Tensor, scales_g1: Tensor, minima_g1: Tensor, bits: int, affine: bool) -> tuple[Tensor, Tensor]:
    if not affine:
        return pack(levels_gs.to(torch.int8).flatten(-2), bits), scales_g1.squeeze(-1).to(torch.bfloat16)
    codes = (levels_gs - 2 ** (bits - 1)).to(torch.int8).flatten(-2)
    return pack(codes, bits), torch.cat([scales_g1, minima_g1], -2).squeeze(-1)


def loaded(codes: Tensor, scales: Tensor, affine: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Levels (.., g, s), scales and minima (.., g, 1), in fp32: the inverse of `stored`."""
    if not affine:
        scales_g1 = scales.float().unsqueeze(-1)
        return unpack(codes).view(*scales.shape, -1).float(), scales_g1, torch.zeros_like(scales_g1)
    scales_g1, minima_g1 = scales.unsqueeze(-1).chunk(2, -2)
    half = 128 if codes.dtype is torch.int8 else 8
    return unpack(codes).view(*scales_g1.shape[:-1], -1).float() + half, scales_g1, minima_g1


def affine_quantised(value: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """To nearest."""
    value_gs = grouped(value.float(), group_size)
    return stored(*anew(value_gs, torch.ones_like(value_gs[..., :1]), 0.5, bits, True), bits, True)


def affine_dequantised(codes: Tensor, scales: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    levels_gs, scales_g1, minima_g1 = loaded(codes, scales, True)
    return (levels_gs * scales_g1 + minima_g1).flatten(-2)[..., :n].to(dtype)


def rounded(value: Tensor, uniform: Tensor | float) -> Tensor:
    """Up with a probability equal to the fraction; to nearest if `uniform` is 0.5."""
    return (value - uniform).ceil()


def anew(
    wanted_gs: Tensor, scales_g1: Tensor, uniform: Tensor | float, bits: int, affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels and scales of `wanted * scales`, rounded with these random numbers, and what became level 0 of them.

    (In units of the old scale, in which a group that nothing changes keeps its scale to the bit.)
    """
    top, low_g1 = top_of(bits, affine), lowest(wanted_gs, affine)
    fresh_g1 = rounded_up(reach(wanted_gs, affine) * scales_g1 / top).clamp(min=SMALLEST)
    levels_gs = rounded((wanted_gs - low_g1) * scales_g1 / fresh_g1, uniform)
    # a quotient may be an ulp above the top
    return levels_gs.clamp(0 if affine else -top, top), fresh_g1, low_g1 * scales_g1


def kept(
    wanted_gs: Tensor, scales_g1: Tensor, touched_g1: Tensor, uniform: Tensor, again: Tensor, bits: int, affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, the scale changed only where it must be or that rounds nothing: as the library does it."""
    top = top_of(bits, affine)
    room = top - affine  # both ends of an affine group may be rounded outwards
    small = (reach(wanted_gs, affine) * 2 <= room) & (scales_g1 > SMALLEST) & touched_g1
    wanted_gs, scales_g1 = torch.where(small, wanted_gs * 2, wanted_gs), torch.where(small, scales_g1 / 2, scales_g1)
    levels_gs = rounded(wanted_gs, uniform)
    need, low_g1 = reach(levels_gs, affine), lowest(levels_gs, affine)
    levels_gs = levels_gs - low_g1
    grown_g1 = rounded_up(scales_g1 * need * (HEADROOM / top))
    smaller_gs = rounded(levels_gs * (scales_g1 / grown_g1), again)
    new_gs, new_g1 = torch.where(need > top, smaller_gs, levels_gs), torch.where(need > top, grown_g1, scales_g1)
    return new_gs, new_g1, low_g1 * scales_g1


def stepped(
    codes: Tensor,
    scales: Tensor,
    tensor_rn: Tensor,
    factor: Tensor,
    finite: Tensor,
    lr: Number,
    weight_decay: Number,
    noise: Dither,
    bits: int,
    *,
    affine: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """`format.stepped` for all four formats; for (symmetric, keep) the same bit-for-bit."""
    (r, n), (old_rgs, scales_rg1, minima_rg1) = tensor_rn.shape, loaded(codes, scales, affine)
    s = old_rgs.shape[-1]
    update_rgs = grouped(tensor_rn.float() * (factor * lr), s)
    used_rgs = grouped(finite.expand(r, n), s)
    touched_rg1 = used_rgs.any(-1, keepdim=True)
    decayed_rgs = old_rgs * (1 - lr * weight_decay) - minima_rg1 * (lr * weight_decay) / scales_rg1
    wanted_rgs = torch.where(used_rgs, decayed_rgs - update_rgs / scales_rg1, old_rgs)
    uniform = grouped(noise.centred(), s)
    if keep:
        again = (uniform * 2.0**8).frac()
        levels_rgs, new_rg1, low_rg1 = kept(wanted_rgs, scales_rg1, touched_rg1, uniform, again, bits, affine)
    else:
        levels_rgs, new_rg1, low_rg1 = anew(wanted_rgs, scales_rg1, uniform, bits, affine)
        levels_rgs = torch.where(touched_rg1, levels_rgs, old_rgs)
        new_rg1, low_rg1 = torch.where(touched_rg1, new_rg1, scales_rg1), torch.where(touched_rg1, low_rg1, 0)
    return stored(levels_rgs, new_rg1, minima_rg1 + low_rg1, bits, affine)


SYMMETRIC, AFFINE = (library.quantised, library.dequantised), (affine_quantised, affine_dequantised)
FORMATS = {
    f.name: f
    for f in (
        Format("symmetric-keep", *SYMMETRIC, library.stepped),
        Format("symmetric-anew", *SYMMETRIC, functools.partial(stepped, affine=False, keep=False)),
        Format("affine-keep", *AFFINE, functools.partial(stepped, affine=True, keep=True), minimum=4),
        Format("affine-anew", *AFFINE, functools.partial(stepped, affine=True, keep=False), minimum=4),
    )
}


@contextlib.contextmanager
def installed(it: Format) -> Iterator[None]:
    """`LowBitWeight` stores its weights in this format within, where it steps them eagerly (as it does small ones).

    Raises RuntimeError if none was ever stepped.
    """
    steps = 0

    def counted(*args: Any, **keys: Any) -> tuple[Tensor, Tensor]:
        nonlocal steps
        steps += 1
        return it.stepped(*args, **keys)

    def from_float(cls: type[LowBitWeight], value: Tensor, bits: int = 8, group_size: int = 128) -> LowBitWeight:
        return cls(*it.quantised(value, bits, group_size), value.shape, value.dtype, bits, group_size)

    functions = {"quantised": it.quantised, "dequantised": it.dequantised, "stepped": counted}
    with replaced(library, **functions), replaced(LowBitWeight, from_float=classmethod(from_float)):
        yield
    if not steps:
        raise RuntimeError(f"{it.name}: LowBitWeight never called format.stepped, so this run was not in that format")


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """The owner's attributes have these values within."""
    before = {name: vars(owner)[name] for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
