"""A weight of 8 or 4 bits as a kind of tensor: products read it, optimizers write it, nothing keeps a float copy.

Q-APOLLO (2412.05270, section 5.3, after Q-GaLore, 2407.08296) is such weights and APOLLO, nothing else.
"""

import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from apollo_optim.core.blocks import Block, blocks
from apollo_optim.core.errors import InputError
from apollo_optim.core.matrix import Number
from apollo_optim.core.random import Dither
from apollo_optim.quant import format
from apollo_optim.quant.stats import RoundingStats
from apollo_optim.quant.view import as_the_base_is, read_only, written
from apollo_optim.quant.write import is_compiled, write_rows

Handler = Callable[..., Any]
HANDLERS: dict[Any, Handler] = {}  # what reads or writes the codes themselves: torch's functions and operations


def implements(*functions: Any) -> Callable[[Handler], Handler]:
    """Of a function that stands for these of torch where a low-bit weight is among their arguments.

    It takes what they take. Where it returns NotImplemented, torch's own is called, on float numbers.
    """

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


CALLERS: dict[str, Handler] = {}  # module of torch or accelerate -> what is asked first where it touches a weight


def called_from(module: str) -> Callable[[Handler], Handler]:
    """Of a function that takes the caller's frame, a function that it calls on a low-bit weight, and its arguments.

    `module` or any within it; of several, the innermost. Where it returns NotImplemented, nothing is special.
    """

    def register(handler: Handler) -> Handler:
        CALLERS[module] = handler
        return handler

    return register


def _asked_by_caller(caller: FrameType, func: Any, args: Any, kwargs: Any) -> Any:
    module: str = caller.f_globals.get("__name__", "")
    if not module.startswith(("torch.", "accelerate.")):
        return NotImplemented
    while module and module not in CALLERS:
        module = module.rpartition(".")[0]
    return CALLERS[module](caller, func, args, kwargs) if module else NotImplemented


class LowBitWeight(Tensor):
    """A matrix (.., m, n) stored as `codes` and `scales` (see `quant.format`) that looks like a float one.

    `shape` and `dtype` are those of the float weight it stands for, and so are its gradients'. `F.linear` and
    `F.embedding` dequantise it forward and once more backward; any other operation reads `dequantize()`. It is
    written by the optimizers of this library (`_write_rows_`), by `copy_` and by initialisers, the last two
    rounding to nearest.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int
    stats: RoundingStats | None = None  # counts the steps while there is one (`rounding_stats`)
    rows_sent: int | None = None  # of a process's part under FSDP2, where all of them have to send as many

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
        return self.assign(value) if value.device.type != "meta" else self

    def dequantize(self, dtype: torch.dtype | None = None, rows: slice | Block = ()) -> Tensor:
        """The float matrix, or only these rows of it (of a stack: matrices, or a `Block`); not differentiable."""
        return format.dequantised(self.codes[rows], self.scales[rows], self.shape[-1], dtype or self.dtype)

    @torch.no_grad()
    def assign(self, value: Tensor) -> "LowBitWeight":
        """Take on these float numbers, rounded to nearest."""
        for at in blocks(tuple(value.shape), value.device, whole=1):
            self.codes[at], self.scales[at] = format.quantised(value[at], self.bits, self.group_size)
        return self

    def _parts(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scales": self.scales}

    @torch.no_grad()
    def _write_rows_(
        self,
        at: Block,
        tensor: Tensor,
        factor: Number,
        finite: Tensor,
        lr: Number,
        weight_decay: Number,
        noise: Dither | None,
    ) -> None:
        """`w[at] <- (1 - lr * weight_decay) * w[at] - lr * factor * tensor`, block by block, rounded stochastically.

        The same bits come out however the weight is cut: a row's random bits are those of its position in it.

        Args:
            at: Whole rows (`core.blocks`): a slice for each of some leading dimensions, of (.., m, n) never the last.
            tensor: (.., r, n), the update of these rows.
            factor: A number, or a tensor that broadcasts to `tensor`.
            finite: bool, (.., 1, 1): a matrix for which it is False stays as it is.
            noise: Of these rows.

        Raises:
            InputError: Without noise: rounded to nearest, a step smaller than half a code would be lost.
        """
        if noise is None:
            raise InputError(
                "a low-bit weight needs stochastic_rounding=True: to nearest, steps smaller than half a code are lost"
            )
        write_rows(
            self.codes,
            self.scales,
            self.bits,
            at,
            tensor,
            factor,
            finite,
            lr,
            weight_decay,
            noise,
            self.stats,
            compile=is_compiled(self.shape, self.device),
        )

    # --- under FSDP2, which looks for these two (`quant.processes`) ---

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What a process sends of its part. One that is alone (a mesh of 1) sends nothing, and torch looks at the first
        tensor only: there the scales are given to `fsdp_post_all_gather` themselves.

        Torch offers this method more than the mesh, but then it takes nothing but the float shape of uneven parts.
        """
        rows = self.rows_sent or len(self)
        codes, scales = filled_up(self.codes, rows), filled_up(self.scales, rows)
        return ((codes,), scales) if mesh.size() == 1 else ((codes, scales), None)

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], own_scales: Tensor | None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """The weight that all processes' codes and scales are, and what else has to be freed; later it is `out`.

        `out` lies in the same memory, to which torch gives new contents; `own_scales` are where they always were.
        """
        if out is not None:
            return None
        codes, scales = gathered if own_scales is None else (gathered[0], own_scales)
        return self.of_parts(codes, scales, dtype), ()

    # --- as a tensor ---

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["codes", "scales"], (self.dtype, self.bits, self.group_size)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> "LowBitWeight":
        dtype, bits, group_size = context
        return cls(inner["codes"], inner["scales"], outer_size, dtype, bits, group_size)

    def _stable_hash_for_caching(self) -> str:
        """What torch.compile tells graphs apart by that it keeps on disk. They hold the arithmetic of this folder."""
        parts = [(t.shape, t.stride(), t.dtype) for t in (self.codes, self.scales)]
        return repr((self, self.requires_grad, parts, _source()))

    def of_parts(self, codes: Tensor, scales: Tensor, dtype: torch.dtype | None = None) -> "LowBitWeight":
        """A weight of this kind with these codes and scales."""
        shape = torch.Size((*codes.shape[:-1], self.shape[-1]))
        new = LowBitWeight(codes, scales, shape, dtype or self.dtype, self.bits, self.group_size)
        new.rows_sent = self.rows_sent
        return new

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape = " x ".join(map(str, self.shape))
        return f"LowBitWeight({shape}, {self.bits} bits in groups of {self.group_size}, as {self.dtype}, {self.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if not torch.compiler.is_dynamo_compiling():  # which traces all of this but the frame
            out = _asked_by_caller(sys._getframe(1), func, args, kwargs)
            if out is not NotImplemented:
                return out
            if handler is not None and "torch._dynamo" in sys.modules:
                handler = _unseen(handler)
        if handler is not None and (out := handler(*args, **kwargs)) is not NotImplemented:
            return out
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func not in HANDLERS:
            _refuse_to_write(func, args, kwargs)
        if (out := func.decompose(*args, **kwargs)) is not NotImplemented:  # in inference mode nobody did so before
            return out
        with as_the_base_is(func, args):
            return cls._operation(func, args, kwargs)

    @classmethod
    def _operation(cls, func: Any, args: Any, kwargs: Any) -> Any:
        if func in HANDLERS and (out := HANDLERS[func](*args, **kwargs)) is not NotImplemented:
            return out

        def plain(x: Any) -> Any:
            if not isinstance(x, LowBitWeight):
                return x
            return x.dequantize().contiguous() if func.is_view else x.dequantize()  # as the weight says it lies

        out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        return read_only(out) if func.is_view else out


def filled_up(t: Tensor, rows: int) -> Tensor:
    """`t` (r, ..) with zeros below, so that it has as many rows."""
    return F.pad(t, (0, 0) * (t.ndim - 1) + (0, rows - len(t))) if len(t) < rows else t


@functools.cache
def _unseen(handler: Handler) -> Handler:
    """Not looked at by torch.compile, which would, of a model whose graph breaks, and fails on parts of a weight."""
    disabled: Handler = torch.compiler.disable(handler)  # type: ignore[no-untyped-call]
    return disabled


@functools.cache
def _source() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _refuse_to_write(func: Any, args: Any, kwargs: Any) -> None:
    if func.namespace == "c10d":  # torch does not say which of its arguments a collective writes
        raise InputError(f"{func} of a low-bit weight: communicate its w.codes and w.scales, or w.dequantize()")
    if any(isinstance(x, LowBitWeight) for x in written(func, args, kwargs)):
        raise InputError(
            f"{func} cannot write to a low-bit weight: rounded to nearest, a small step would be lost. Its optimizers "
            "are those of apollo_optim; copy_ and the functions of torch.nn.init may set it"
        )


torch.serialization.add_safe_globals([LowBitWeight])  # so that torch.load(weights_only=True) takes it
