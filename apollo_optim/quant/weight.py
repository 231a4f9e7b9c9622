"""A weight of 8 or 4 bits as a kind of tensor: products read it, optimizers write it, nothing keeps a float copy.

Q-APOLLO (2412.05270, section 5.3, after Q-GaLore, 2407.08296) is such weights and APOLLO, nothing else.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from apollo_optim.core.blocks import blocks
from apollo_optim.core.compile import COMPILED_FROM, can_compile, compiled, compiled_in_place
from apollo_optim.core.errors import InputError
from apollo_optim.core.matrix import Number
from apollo_optim.core.random import Key
from apollo_optim.quant import format
from apollo_optim.quant.tally import Tally, measured
from apollo_optim.quant.view import read_only, written

BLOCK = 1 << 15  # entries that an eager step works on at a time: some ten temporaries of it fit in a core's cache
COMPILED_BLOCK = 1 << 18
PRODUCT_BLOCK = 1 << 20  # 2 MB of bf16: what a product reads comes out of the cache, and no memory has to be fetched

aten = torch.ops.aten


class LowBitWeight(Tensor):
    """A matrix (.., m, n) stored as ``codes`` and ``scales`` (see ``quant.format``) that looks like a float one.

    ``shape`` and ``dtype`` are those of the float weight it stands for, and so are its gradients'. ``F.linear`` and
    ``F.embedding`` dequantise it forward and once more backward; any other operation reads ``dequantize()``. It is
    written by the optimizers of this library (``_write_update_``), by ``copy_`` and by initialisers, the last two
    rounding to nearest.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int
    tally: Tally | None = None  # counts the steps while there is one (``tallied``)

    @staticmethod
    def __new__(
        cls, codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype, bits: int, group_size: int
    ) -> "LowBitWeight":
        self: LowBitWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)
        self.codes, self.scales, self.bits, self.group_size = codes, scales, bits, group_size
        return self

    @classmethod
    def from_float(cls, value: Tensor, bits: int = 8, group_size: int = 128) -> "LowBitWeight":
        """Quantise a float (.., m, n) to nearest, a block of rows at a time."""
        n = value.shape[-1]
        shape = (*value.shape[:-1], format.padded(n, group_size))
        code_dtype, share = (torch.int8, 1) if bits == 8 else (torch.uint8, 2)
        codes = torch.empty((*shape[:-1], shape[-1] // share), dtype=code_dtype, device=value.device)
        scales = torch.empty((*shape[:-1], shape[-1] // group_size), dtype=torch.bfloat16, device=value.device)
        self = cls(codes, scales, value.shape, value.dtype, bits, group_size)
        return self._assign(value) if value.device.type != "meta" else self

    def dequantize(self, dtype: torch.dtype | None = None, rows: slice = slice(None)) -> Tensor:
        """The float matrix, or only these rows of it (of a stack: matrices); not differentiable."""
        return format.dequantised(self.codes[rows], self.scales[rows], self.shape[-1], dtype or self.dtype)

    @torch.no_grad()
    def _assign(self, value: Tensor) -> "LowBitWeight":
        for at in blocks(tuple(value.shape), whole=1):
            self.codes[at], self.scales[at] = format.quantised(value[at], self.bits, self.group_size)
        return self

    def _parts(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scales": self.scales}

    @torch.no_grad()
    def _write_update_(
        self, tensor: Tensor, factor: Number, usable: Tensor, lr: Number, weight_decay: Number, key: Key | None
    ) -> None:
        """``core.write`` for this weight: block after block dequantised, stepped in fp32, and rounded stochastically.

        Raises InputError without a key: rounded to nearest, a step smaller than half a code would be lost.
        """
        if key is None:
            raise InputError(
                "a low-bit weight needs stochastic_rounding=True: to nearest, steps smaller than half a code are lost"
            )
        self._write(tensor, factor, usable, lr, weight_decay, key, self.numel() >= COMPILED_FROM)

    def _write(
        self, tensor: Tensor, factor: Number, usable: Tensor, lr: Number, weight_decay: Number, key: Key, big: bool
    ) -> None:
        rows, n = tensor.shape[-2:]
        big = big and can_compile(self.device.type)
        factor, usable = (_per_matrix(t, tensor) for t in (factor, usable))
        codes, scales = (t.view(-1, rows, t.shape[-1]) for t in (self.codes, self.scales))
        rates = [torch.as_tensor(number, dtype=torch.float32) for number in (lr, weight_decay)]
        words = [torch.as_tensor(word, dtype=torch.int32) for word in key]
        some = _rows_at_a_time(rows, n, COMPILED_BLOCK if big else BLOCK)
        for matrix, update in enumerate(tensor.reshape(-1, rows, n)):
            for first in range(0, some if self.is_meta else rows, some):  # there, one block shows what all take
                here = slice(first, min(first + some, rows))
                stored = codes[matrix, here], scales[matrix, here]
                step = (
                    update[here],
                    factor[matrix, here] if factor.shape[1] > 1 else factor[matrix],
                    usable[matrix],
                    *rates,
                )
                before = [t.clone() for t in stored] if self.tally is not None else []
                position = torch.tensor(matrix * rows + first, dtype=torch.int32)
                arguments = *stored, *step, position, *words
                _ready(_writer(self.bits), _fused, arguments, big)(*arguments)
                if self.tally is not None:
                    difference = *before, *stored, *step
                    self.tally.add(update[here].numel(), *_ready(measured, compiled, difference, big)(*difference))

    # --- as a tensor ---

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["codes", "scales"], (self.dtype, self.bits, self.group_size)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> "LowBitWeight":
        dtype, bits, group_size = context
        return cls(inner["codes"], inner["scales"], outer_size, dtype, bits, group_size)

    def _with(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> "LowBitWeight":
        codes, scales = change(self.codes), change(self.scales)
        return LowBitWeight(codes, scales, self.shape, dtype or self.dtype, self.bits, self.group_size)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = " x ".join(map(str, self.shape))
        return f"LowBitWeight({shape}, {self.bits} bits in groups of {self.group_size}, as {self.dtype}, {self.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not isinstance(args[0], LowBitWeight):
            return _linear(*args, **kwargs)
        if func is F.embedding:
            return _embedding(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _OWN and isinstance(args[0], LowBitWeight):
            return _OWN[func](args[0], *args[1:], **kwargs)
        if any(isinstance(x, LowBitWeight) for x in written(func, args, kwargs)):
            raise InputError(
                f"{func} cannot write to a low-bit weight: rounded to nearest, a small step would be lost. Its "
                "optimizers are those of apollo_optim; copy_ and the functions of torch.nn.init may set it"
            )

        def plain(x: Any) -> Any:
            if not isinstance(x, LowBitWeight):
                return x
            return x.dequantize().contiguous() if func.is_view else x.dequantize()  # as the weight says it lies

        out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        return read_only(out) if func.is_view else out

    def _empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def _copy_from(self, source: Tensor) -> "LowBitWeight":
        if not isinstance(source, LowBitWeight):
            return self._assign(source.expand(self.shape))
        if (source.shape, source.bits, source.group_size) != (self.shape, self.bits, self.group_size):
            raise InputError(f"cannot copy {source!r} into {self!r}")
        self.codes.copy_(source.codes)
        self.scales.copy_(source.scales)
        return self


def _to(weight: LowBitWeight, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any) -> Any:
    return weight._with(lambda t: t.to(device, non_blocking=non_blocking, copy=True), dtype)


def _like(make: Any) -> Callable[..., Tensor]:
    """``zeros_like`` and its kin: what is made in the likeness of a weight is never low-bit."""
    return lambda weight, **kwargs: make(weight._empty(), **kwargs)


def _initialised(fill: Any) -> Callable[..., LowBitWeight]:
    def run(weight: LowBitWeight, *args: Any, **kwargs: Any) -> LowBitWeight:
        return weight._assign(fill(weight._empty(), *args, **kwargs))

    return run


_OWN: dict[Any, Callable[..., Any]] = {
    aten.detach.default: lambda weight: weight._with(lambda t: t),
    aten.alias.default: lambda weight: weight._with(lambda t: t),
    aten.clone.default: lambda weight, **_: weight._with(torch.clone),
    aten._to_copy.default: _to,
    aten.copy_.default: lambda weight, source, *_: weight._copy_from(source),
    **{make: _like(make) for make in (aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default)},
    **{
        fill: _initialised(fill)
        for fill in (
            aten.normal_.default,
            aten.uniform_.default,
            aten.zero_.default,
            aten.fill_.Scalar,
            aten.fill_.Tensor,
        )
    },
}


def warm_up(shape: tuple[int, ...], dtype: torch.dtype, bits: int, group_size: int, device: torch.device) -> None:
    """Compile the step of weights of this shape before there is one: compilers take memory, too."""
    rows, n = shape[-2:]
    if torch.Size(shape).numel() >= COMPILED_FROM and can_compile(device.type):
        block = torch.zeros(_rows_at_a_time(rows, n, COMPILED_BLOCK), n, dtype=dtype, device=device)
        weight = LowBitWeight.from_float(block, bits, group_size)
        weight._write(block, 1.0, torch.ones(1, 1, dtype=torch.bool, device=device), 0.0, 0.0, (0, 0), big=True)


def _rows_at_a_time(rows: int, n: int, block: int) -> int:
    """Rows of a block of about this many entries; if possible so many that the last block is a whole one, too."""
    most = min(rows, max(1, block // max(1, n)))
    return next((some for some in range(most, most // 2, -1) if rows % some == 0), most)


@functools.cache
def _writer(bits: int) -> Callable[..., None]:
    """``format.stepped`` in place, of a block's codes and scales, and of tensors alone."""

    def write(codes: Tensor, scales: Tensor, *others: Any) -> None:
        tensor, factor, usable, lr, weight_decay, row, *key = others
        new = format.stepped(codes, scales, tensor, factor, usable, lr, weight_decay, row, (key[0], key[1]), bits)
        codes.copy_(new[0])
        scales.copy_(new[1])

    return write


_fused = functools.partial(compiled_in_place, options={})  # a block's temporaries may be kept: they stay in the cache
_Function = Callable[..., Any]


def _ready(function: _Function, compiler: _Function, arguments: Sequence[Tensor], big: bool) -> _Function:
    """The function itself, or compiled for arguments that look like these."""
    if not big:
        return function
    look = [(t.shape, t.stride(), t.dtype, t.device) for t in arguments]
    return _compiled_for(function, compiler, torch.get_num_threads(), *look)


@functools.cache
def _compiled_for(function: _Function, compiler: _Function, *look: Any) -> _Function:
    """One for every look, kept as long as the process."""
    ready: _Function = compiler(function)
    return ready


def _per_matrix(t: "Number", like: Tensor) -> Tensor:
    """A number or a tensor that broadcasts to (.., m, n) as (stack, m or 1, n or 1)."""
    t = torch.as_tensor(t, device=like.device)
    t = t if t.ndim else t.view((1,) * like.ndim)
    return t.expand(*like.shape[:-2], *t.shape[-2:]).flatten().view(-1, *t.shape[-2:])  # strides as if new


def _times_transposed(x: Tensor, weight: LowBitWeight, bias: Tensor | None) -> Tensor:
    """x W^T + b. On a CPU a block of rows of the float W lives at a time: to make all of it takes as long as a product.

    (New memory for it has to be fetched from the system page by page, and 4 bits are unpacked in several passes.)
    """
    m, n = weight.shape
    cuts = blocks((m, n), whole=1, size=PRODUCT_BLOCK) if x.device.type == "cpu" else [()]
    if len(cuts) == 1:
        return F.linear(x, weight.dequantize(x.dtype), bias)
    y, scratch = x.new_empty(*x.shape[:-1], m), _scratch(weight.scales[cuts[0]], weight, x.dtype)
    for (rows,) in cuts:
        part = format.dequantised(weight.codes[rows], weight.scales[rows], n, x.dtype, scratch)
        y[..., rows] = F.linear(x, part, None if bias is None else bias[rows])
    return y


def _times(y: Tensor, weight: LowBitWeight) -> Tensor:
    """y W, likewise, in blocks of columns, whole groups: each number comes out of one product, as it would of W."""
    m, n = weight.shape
    groups, size, share = weight.scales.shape[-1], weight.group_size, 8 // weight.bits
    cuts = blocks((groups, m * size), whole=1, size=PRODUCT_BLOCK) if y.device.type == "cpu" else [()]
    if len(cuts) == 1:
        return y @ weight.dequantize(y.dtype)
    x, scratch = y.new_empty(*y.shape[:-1], n), _scratch(weight.scales[:, cuts[0][0]], weight, y.dtype)
    for (some,) in cuts:
        here = slice(some.start * size, min(some.stop * size, n))
        codes = weight.codes[:, some.start * size // share : some.stop * size // share]
        part = format.dequantised(codes, weight.scales[:, some], here.stop - here.start, y.dtype, scratch)
        x[..., here] = y @ part
    return x


def _scratch(scales: Tensor, weight: LowBitWeight, dtype: torch.dtype) -> Tensor:
    """Memory for the float form of a block with these scales, and of all that follow it."""
    return scales.new_empty(scales.numel() * weight.group_size, dtype=dtype)


class _Linear(torch.autograd.Function):
    """x W^T + b. The float W lives during the product, forward, and again backward; what is kept are its codes."""

    @staticmethod
    def forward(x: Tensor, weight: LowBitWeight, bias: Tensor | None) -> Tensor:
        return _times_transposed(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _times(grad_y, weight)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_y.flatten(0, -2).mT @ x.flatten(0, -2)).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad_y.flatten(0, -2).sum(0)
        return grad_x, grad_weight, grad_bias


class _Embedding(torch.autograd.Function):
    """Rows of W: only those that are asked for are dequantised. The gradient is dense."""

    @staticmethod
    def forward(ids: Tensor, weight: LowBitWeight, padding_idx: int) -> Tensor:
        return format.dequantised(weight.codes[ids], weight.scales[ids], weight.shape[-1], weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ids, weight, ctx.padding_idx = inputs
        ctx.save_for_backward(ids)
        ctx.rows = weight.shape[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        return None, aten.embedding_dense_backward(grad, ids, ctx.rows, ctx.padding_idx, False), None


def _linear(input: Tensor, weight: LowBitWeight, bias: Tensor | None = None) -> Tensor:
    out: Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return out


def _embedding(
    input: Tensor,
    weight: LowBitWeight,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise InputError("a low-bit embedding takes no max_norm, scale_grad_by_freq or sparse")
    ignored = -1 if padding_idx is None else padding_idx % len(weight)
    out: Tensor = _Embedding.apply(input, weight, ignored)  # type: ignore[no-untyped-call]
    return out


torch.serialization.add_safe_globals([LowBitWeight])  # so that torch.load(weights_only=True) takes it
