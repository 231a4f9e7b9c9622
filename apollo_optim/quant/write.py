"""The write of a step into codes and scales: block after block dequantised, stepped in fp32, rounded stochastically."""

import functools
import itertools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from apollo_optim.core.blocks import Block
from apollo_optim.core.compile import COMPILED_FROM, can_compile, compiled, compiled_in_place
from apollo_optim.core.matrix import Number
from apollo_optim.core.random import Key
from apollo_optim.quant import format
from apollo_optim.quant.tally import Tally, measured

BLOCK = 1 << 15  # entries that an eager step works on at a time: some ten temporaries of it fit in a core's cache
COMPILED_BLOCK = 1 << 18


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
    key: Key,
    tally: Tally | None = None,
    *,
    compile: bool,
) -> None:
    """`w[at] <- (1 - lr * weight_decay) * w[at] - lr * factor * tensor` in a weight's codes and scales (.., m, x).

    Args:
        at: Whole rows: a slice for each of some leading dimensions, m the last of them; () is all of the weight.
        tensor: (.., r, n), the update of these rows.
        factor: A number, or a tensor that broadcasts to `tensor`.
        finite: bool, (.., 1, 1): where it is not, a matrix stays as it is.
        key: Random bits are drawn for a row's position among all rows of the weight, so cuts do not change them.
        tally: Counts what rounding makes of the step.
        compile: Step by a compiled function (`is_compiled`).
    """
    r, n = tensor.shape[-2:]
    every = codes.shape[:-1]
    factor, finite = (_per_matrix(t, tensor) for t in (factor, finite))
    rates = [torch.as_tensor(number, dtype=torch.float32) for number in (lr, weight_decay)]
    words = [torch.as_tensor(word, dtype=torch.int32) for word in key]
    some = min(r, _rows_at_a_time(every[-1], n, COMPILED_BLOCK if compile else BLOCK))
    cuts = *at, *[slice(None)] * (len(every) - len(at))
    *stack, rows = (range(size)[cut] for size, cut in zip(every, cuts, strict=True))
    updates = tensor.reshape(-1, r, n)
    for own, matrix in enumerate(itertools.product(*stack)):
        position = _position((*matrix, rows.start), every)
        for first in range(0, some if codes.is_meta else r, some):  # there, one block shows what all take
            here = slice(first, min(first + some, r))
            there: tuple[int | slice, ...] = (*matrix, slice(rows.start + here.start, rows.start + here.stop))
            stored = codes[there], scales[there]
            step = updates[own, here], factor[own, here] if factor.shape[1] > 1 else factor[own], finite[own], *rates
            before = [t.clone() for t in stored] if tally is not None else []
            arguments = *stored, *step, torch.tensor(position + first, dtype=torch.int32), *words
            _ready(_writer(bits), _fused, arguments, compile)(*arguments)
            if tally is not None:
                difference = *before, *stored, *step
                tally.add(updates[own, here].numel(), *_ready(measured, compiled, difference, compile)(*difference))


def is_compiled(shape: tuple[int, ...], device: torch.device) -> bool:
    """Is the step of a weight of this shape compiled?"""
    return prod(shape) >= COMPILED_FROM and can_compile(device.type)


def warm_up(shape: tuple[int, ...], dtype: torch.dtype, bits: int, group_size: int, device: torch.device) -> None:
    """Compile the step of weights of this shape before there is one: compilers take memory, too."""
    m, n = shape[-2:]
    if is_compiled(shape, device):
        block = torch.zeros(_rows_at_a_time(m, n, COMPILED_BLOCK), n, dtype=dtype, device=device)
        finite = torch.ones(1, 1, dtype=torch.bool, device=device)
        codes, scales = format.quantised(block, bits, group_size)
        write_rows(codes, scales, bits, (), block, 1.0, finite, 0.0, 0.0, (0, 0), compile=True)


def _rows_at_a_time(rows: int, n: int, block: int) -> int:
    """Rows of a block of about this many entries; if possible so many that the last block is a whole one, too."""
    most = min(rows, max(1, block // max(1, n)))
    return next((some for some in range(most, most // 2, -1) if rows % some == 0), most)


@functools.cache
def _writer(bits: int) -> Callable[..., None]:
    """`format.stepped` in place, of a block's codes and scales, and of tensors alone."""

    def write(codes: Tensor, scales: Tensor, *others: Any) -> None:
        tensor, factor, finite, lr, weight_decay, row, *key = others
        new = format.stepped(codes, scales, tensor, factor, finite, lr, weight_decay, row, (key[0], key[1]), bits)
        codes.copy_(new[0])
        scales.copy_(new[1])

    return write


_fused = functools.partial(compiled_in_place, options={})  # a block's temporaries may be kept: they stay in the cache
_Function = Callable[..., Any]


def _ready(function: _Function, compiler: _Function, arguments: Sequence[Tensor], compile: bool) -> _Function:
    """The function itself, or compiled for arguments that look like these."""
    if not compile:
        return function
    look = [(t.shape, t.stride(), t.dtype, t.device) for t in arguments]
    return _compiled_for(function, compiler, torch.get_num_threads(), *look)


@functools.cache
def _compiled_for(function: _Function, compiler: _Function, *look: Any) -> _Function:
    """One for every look, kept as long as the process."""
    ready: _Function = compiler(function)
    return ready


def _position(row: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The place of this row, an index for each of these dimensions, in the order of memory."""
    return functools.reduce(lambda position, step: position * step[1] + step[0], zip(row, shape, strict=True), 0)


def _per_matrix(t: Number, like: Tensor) -> Tensor:
    """A number or a tensor that broadcasts to (.., m, n) as (stack, m or 1, n or 1)."""
    t = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float32, device=like.device)
    t = t.view((1,) * (like.ndim - t.ndim) + t.shape)
    return t.expand(*like.shape[:-2], *t.shape[-2:]).flatten().view(-1, *t.shape[-2:])  # strides as if new
