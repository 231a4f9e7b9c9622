"""The write of a step into codes and scales: block after block dequantised, stepped in fp32, rounded stochastically."""

import functools
import itertools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from apollo_optim.core.blocks import Block, block_size, is_cpu
from apollo_optim.core.compile import COMPILED_FROM, COMPILED_ON, can_compile, compiled, compiled_directly, number_on
from apollo_optim.core.matrix import Number
from apollo_optim.core.place import Place
from apollo_optim.core.random import Dither
from apollo_optim.quant import format
from apollo_optim.quant.stats import RoundingStats, measured

CPU_BLOCK = 1 << 15  # entries that an eager step works on at a time: some ten temporaries of it fit in a core's cache
COMPILED_CPU_BLOCK = 1 << 18


def write_rows(
    codes: Tensor,
    scales: Tensor,
    bits: int,
    at: Block,
    tensor: Tensor,
    factor: Number,
    finite: Tensor,
    lr: Number,
    weight_decay: Number,
    noise: Dither,
    stats: RoundingStats | None = None,
    *,
    compile: bool,
) -> None:
    """`w[at] <- (1 - lr * weight_decay) * w[at] - lr * factor * tensor` in a weight's codes and scales (.., m, x).

    Args:
        at: Whole rows: a slice for each of some leading dimensions, m the last of them; () is all of the weight.
        tensor: (.., r, n), the update of these rows.
        factor: A number, or a tensor that broadcasts to `tensor`.
        finite: bool, (.., 1, 1): where it is not, a matrix stays as it is.
        noise: Of rounding, for these rows.
        stats: Counts what rounding makes of the step.
        compile: Step by a compiled function (`is_compiled`).
    """
    if not tensor.numel():  # a process has no row of it
        return
    r, n = tensor.shape[-2:]
    every = codes.shape[:-1]
    factor, finite = (_per_matrix(t, tensor) for t in (factor, finite))
    rates: Sequence[Number] = [lr, weight_decay]
    if compile:
        rates = [torch.as_tensor(number, dtype=torch.float32) for number in rates]
    some = min(r, _rows_at_a_time(every[-1], n, _block_size(codes.device, compile)))
    cuts = *at, *[slice(None)] * (len(every) - len(at))
    *stack, rows = (range(size)[cut] for size, cut in zip(every, cuts, strict=True))
    updates = tensor.reshape(-1, r, n)
    a_br1, b_br1 = (t.reshape(-1, r, 1) for t in noise[1:])
    for own, matrix in enumerate(itertools.product(*stack)):
        for first in range(0, some if codes.is_meta else r, some):  # there, one block shows what all take
            here = slice(first, min(first + some, r))
            there: tuple[int | slice, ...] = (*matrix, slice(rows.start + here.start, rows.start + here.stop))
            stored = codes[there], scales[there]
            step = updates[own, here], factor[own, here] if factor.shape[1] > 1 else factor[own], finite[own], *rates
            before = [t.clone() for t in stored] if stats is not None else []
            arguments = *stored, *step, noise.t_n, a_br1[own, here], b_br1[own, here]
            _ready(_writer(bits), _fused, arguments, compile)(*arguments)
            if stats is not None:
                difference = *before, *stored, *step
                stats.add(updates[own, here].numel(), *_ready(measured, compiled, difference, compile)(*difference))


def is_compiled(shape: tuple[int, ...], device: torch.device) -> bool:
    """Is the step of a weight of this shape compiled? As other weights' is: with a CPU or CUDA."""
    return device.type in COMPILED_ON and prod(shape) >= COMPILED_FROM and can_compile(device.type)


def precompile(shape: tuple[int, ...], dtype: torch.dtype, bits: int, group_size: int, device: torch.device) -> None:
    """Compile the step of weights of this shape before there is one: compilers take memory, too."""
    m, n = shape[-2:]
    if is_compiled(shape, device):
        block = torch.zeros(_rows_at_a_time(m, n, _block_size(device, True)), n, dtype=dtype, device=device)
        finite = torch.ones(1, 1, dtype=torch.bool, device=device)
        codes, scales = format.quantised(block, bits, group_size)
        noise = Place.of(block).noise((0, 0), device)
        write_rows(codes, scales, bits, (), block, 1.0, finite, 0.0, 0.0, noise, compile=True)


def _block_size(device: torch.device, compile: bool) -> int:
    if not is_cpu(device):
        return block_size(device)
    return COMPILED_CPU_BLOCK if compile else CPU_BLOCK


def _rows_at_a_time(rows: int, n: int, block: int) -> int:
    """Rows of a block of about this many entries; if possible so many that the last block is a whole one, too."""
    most = min(rows, max(1, block // max(1, n)))
    return next((some for some in range(most, most // 2, -1) if rows % some == 0), most)


@functools.cache
def _writer(bits: int) -> Callable[..., None]:
    """`format.stepped` in place, of a block's codes and scales, and of tensors alone."""

    def write(codes: Tensor, scales: Tensor, *others: Any) -> None:
        tensor, factor, finite, lr, weight_decay, *noise = others
        lr, weight_decay = (number_on(codes.device, rate) for rate in (lr, weight_decay))
        new = format.stepped(codes, scales, tensor, factor, finite, lr, weight_decay, Dither(*noise), bits)
        codes.copy_(new[0])
        scales.copy_(new[1])

    return write


_fused = functools.partial(compiled_directly, options={})  # a block's temporaries may be kept: they stay in the cache
_Function = Callable[..., Any]


def _ready(function: _Function, compiler: _Function, arguments: Sequence[Any], compile: bool) -> _Function:
    """The function itself, or compiled for arguments that look like these."""
    if not compile:
        return function
    signature = [(t.shape, t.stride(), t.dtype, t.device) for t in arguments]
    return _compiled_for(function, compiler, torch.get_num_threads(), *signature)


@functools.cache
def _compiled_for(function: _Function, compiler: _Function, *signature: Any) -> _Function:
    """One for every signature, kept as long as the process."""
    ready: _Function = compiler(function)
    return ready


def _per_matrix(t: Number, like: Tensor) -> Tensor:
    """A number or a tensor that broadcasts to (.., m, n) as (stack, m or 1, n or 1)."""
    # filled there: a copy of a number from the host would wait for the device
    t = t if isinstance(t, Tensor) else torch.full((), t, dtype=torch.float32, device=like.device)
    t = t.view((1,) * (like.ndim - t.ndim) + t.shape)
    return t.expand(*like.shape[:-2], *t.shape[-2:]).flatten().view(-1, *t.shape[-2:])  # strides as if new
