"""Products with a low-bit weight, which is dequantised for each, forward and again backward: no float copy is kept."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apollo_optim.core.blocks import blocks, is_cpu
from apollo_optim.core.errors import InputError
from apollo_optim.quant import format
from apollo_optim.quant.weight import LowBitWeight, implements

PRODUCT_BLOCK = 1 << 20  # 2 MB of bf16: what a product reads comes out of the cache, and no memory has to be fetched


def _cuts(device: torch.device) -> bool:
    """Is there anything to cut? Under a compiler, which cannot trace what is planned, `blocks` says no by itself."""
    return torch.compiler.is_compiling() or is_cpu(device)


def _times_transposed(x: Tensor, weight: LowBitWeight, bias: Tensor | None) -> Tensor:
    """x W^T + b. On a CPU a block of rows of the float W lives at a time: to make all of it takes as long as a product.

    (New memory for it has to be fetched from the system page by page, and 4 bits are unpacked in several passes.)
    """
    m, n = weight.shape
    cuts = blocks((m, n), x.device, whole=1, size=PRODUCT_BLOCK) if _cuts(x.device) else [()]
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
    cuts = blocks((groups, m * size), y.device, whole=1, size=PRODUCT_BLOCK) if _cuts(y.device) else [()]
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
        if ctx.needs_input_grad[0]:  # with create_graph=True, what is differentiated again depends on the weight, too
            grad_x = grad_y @ float_copy(weight, grad_y.dtype) if torch.is_grad_enabled() else _times(grad_y, weight)
        if ctx.needs_input_grad[1]:
            grad_weight = (_rows(grad_y).mT @ _rows(x)).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = _rows(grad_y).sum(0)
        return grad_x, grad_weight, grad_bias


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _FloatCopy(torch.autograd.Function):
    """W in float, and its gradient is W's."""

    @staticmethod
    def forward(weight: LowBitWeight, dtype: torch.dtype) -> Tensor:
        return weight.dequantize(dtype).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.to(ctx.dtype), None


def float_copy(weight: LowBitWeight, dtype: torch.dtype) -> Tensor:
    """`weight.dequantize(dtype)`, contiguous and differentiable."""
    out: Tensor = _FloatCopy.apply(weight, dtype)  # type: ignore[no-untyped-call]
    return out


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
        return None, torch.ops.aten.embedding_dense_backward(grad, ids, ctx.rows, ctx.padding_idx, False), None


@implements(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if isinstance(input, LowBitWeight) or not isinstance(weight, LowBitWeight) or weight.ndim != 2 or transformed():
        return NotImplemented  # read as any other operation does
    kind = input.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    dtype = torch.get_autocast_dtype(kind)  # that of the product, forward and backward, as torch's own F.linear has it
    with torch.autocast(kind, enabled=False):
        bias = None if bias is None else bias.to(dtype)
        return _Linear.apply(input.to(dtype), weight, bias)  # type: ignore[no-untyped-call]


def transformed() -> bool:
    """Within vmap, grad and the like of torch.func, which know torch's operations."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@implements(F.embedding)
def _embedding(
    input: Tensor,
    weight: LowBitWeight,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if isinstance(input, LowBitWeight) or transformed():
        return NotImplemented
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise InputError("a low-bit embedding takes no max_norm, scale_grad_by_freq or sparse")
    ignored = -1 if padding_idx is None else padding_idx % len(weight)
    return _Embedding.apply(input, weight, ignored)  # type: ignore[no-untyped-call]
