"""The low-bit format: how a matrix becomes codes and scales, and how a step is written into it.

Every row is cut into groups of `group_size` along the input dimension, the last one padded with zeros; a group has
one bf16 scale, and a weight is `code * scale` with codes in -127 .. 127 (8 bits) or -7 .. 7 (4 bits). Codes of 8 bits
are int8 (.., m, groups * group_size); two of 4 bits share a uint8, the first in the low nibble. A file format.

Shapes in this file: r rows of a matrix, g groups in a row, s entries in a group, n entries in a row (n <= g * s).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from apollo_optim.core.compile import in_memory
from apollo_optim.core.matrix import Number
from apollo_optim.core.random import Dither

TOP = {8: 127, 4: 7}  # the largest code
SMALLEST = 2.0**-40  # of a scale: a group of zeros must be able to leave zero
HEADROOM = 1 + 2.0**-4  # how much further than it must a scale grows


def padded(n: int, group_size: int) -> int:
    """Entries of a stored row: whole groups."""
    return -(-n // group_size) * group_size


def unpack(codes: Tensor) -> Tensor:
    """Stored codes to int8, one an entry, along the last dimension."""
    if codes.dtype is torch.int8:
        return codes
    codes = codes.view(torch.int8)
    return in_memory(torch.stack([codes << 4, codes], dim=-1).flatten(-2) >> 4)  # which brings the sign down


def pack(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack`."""
    if bits == 8:
        return codes
    codes = in_memory(codes)
    return torch.add(codes[..., 0::2] & 0xF, codes[..., 1::2], alpha=16).view(torch.uint8)


def rounded_up(scale: Tensor) -> Tensor:
    """The smallest bf16 that is no smaller than these positive fp32 numbers: no code may overflow by rounding."""
    return ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def largest(value_gs: Tensor) -> Tensor:
    """The largest magnitude of each group, (.., g, 1)."""
    if value_gs.is_cpu:  # whose norm is nine times as slow as these two operations
        return value_gs.abs().amax(-1, keepdim=True)
    return torch.linalg.vector_norm(value_gs, torch.inf, -1, keepdim=True)  # type: ignore[no-any-return]


def quantised(value: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of a float (.., n), to nearest. The largest entry of a group gets the largest code."""
    n = value.shape[-1]
    whole = F.pad(value.float(), (0, padded(n, group_size) - n))
    value_gs = whole.view(*value.shape[:-1], -1, group_size)
    scales = rounded_up(largest(value_gs).squeeze(-1) / TOP[bits]).clamp(min=SMALLEST)
    codes = (value_gs / scales.unsqueeze(-1)).round().to(torch.int8)
    return pack(codes.flatten(-2), bits), scales.to(torch.bfloat16)


def dequantised(codes: Tensor, scales: Tensor, n: int, dtype: torch.dtype, scratch: Tensor | None = None) -> Tensor:
    """The float (.., n) that codes and scales mean, rounded once; made in `scratch`, if given, 1-D of that dtype."""
    if dtype is torch.float16:  # which has no room for the smallest scales
        value = dequantised(codes, scales, n, torch.float32)
        return value.to(dtype) if scratch is None else scratch[: value.numel()].view(value.shape).copy_(value)
    codes_gs = unpack(codes).view(*scales.shape, -1)
    if scratch is None:
        value_gs = codes_gs.to(dtype)
    else:
        value_gs = scratch[: codes_gs.numel()].view(codes_gs.shape).copy_(codes_gs)
    value = value_gs.mul_(scales.to(dtype).unsqueeze(-1)).flatten(-2)
    value = in_memory(value)  # torch 2.13 compiles what cuts off the padding next to reads beyond it
    return value[..., :n] if n < value.shape[-1] else value


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
) -> tuple[Tensor, Tensor]:
    """Codes and scales of r whole rows after a step, `(1 - lr * weight_decay) * w - lr * factor * tensor`, in fp32.

    Rounded stochastically: on average it is the number. `factor` (2-D, fp32) broadcasts to r x n; where `finite`
    (bool, 1 x 1) is not, nothing changes; `noise`: of these rows.

    A scale is kept as long as it can be, since entries that a step does not touch then keep their codes: to round them
    again would be noise. It grows when a *rounded* code is too large, which is as seldom as the entry at the edge goes
    up a code (the group is then rounded once more, with other bits), and is halved when all codes are so small that
    the doubled ones fit, which rounds nothing. Scales come back as fp32: bf16 holds them exactly.
    """
    top, (r, n), g = TOP[bits], tensor_rn.shape, scales.shape[-1]
    s = codes.shape[-1] * (8 // bits) // g

    def grouped(t: Tensor) -> Tensor:
        return (F.pad(t, (0, g * s - n)) if g * s > n else t).view(r, g, s)

    old_rgs = unpack(codes).view(r, g, s)
    unit_rg1 = scales.float().unsqueeze(-1)
    update_rgs = grouped(tensor_rn * in_memory(factor * lr))  # in fp32: that has dimensions, too
    keep = in_memory(1 - lr * weight_decay)
    kept_rgs = old_rgs if isinstance(keep, float) and keep == 1.0 else old_rgs.float() * keep
    wanted = torch.addcmul(kept_rgs, update_rgs, in_memory(unit_rg1.reciprocal()), value=-1.0)
    finite_111 = finite.view(1, 1, 1)  # here and not at the end: to choose among int8 takes as long as all the rest
    wanted = torch.where(finite_111, wanted, old_rgs)

    small = ((largest(wanted) <= top / 2) & (unit_rg1 > SMALLEST) & finite_111).float()
    wanted = torch.addcmul(wanted, wanted, small)
    unit_rg1 = torch.addcmul(unit_rg1, unit_rg1, small, value=-0.5)

    noise_rgs = grouped(noise.centred())
    new = (wanted - noise_rgs).ceil()  # up with a probability equal to the fraction; a whole number stays
    peak = largest(new)
    grown_rg1 = torch.where(peak <= top, unit_rg1, rounded_up(unit_rg1 * peak * (HEADROOM / top)))
    new = (new * in_memory(unit_rg1 / grown_rg1) - (noise_rgs * 2.0**8).frac()).ceil()  # where none grew, as it is
    return pack(new.to(torch.int8).view(r, -1), bits), grown_rg1.squeeze(-1)
