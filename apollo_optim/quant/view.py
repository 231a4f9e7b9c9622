"""What a view of a low-bit weight is: float numbers that can be read, and that refuse to be written."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from apollo_optim.core.errors import InputError

# what looks at memory, and is no operation of torch
READ = {Tensor.data_ptr, Tensor.untyped_storage, Tensor.tolist, Tensor.numpy, Tensor.__array__}
COPIED = {Tensor.__deepcopy__, Tensor.__reduce_ex__}
REFUSED = {Tensor.storage, Tensor.__dlpack__, Tensor.share_memory_}


class ReadOnlyView(Tensor):
    """The float numbers that `w.t()`, `w.view(-1)` and the like read of a low-bit weight `w`.

    They are no part of the weight's memory, so that a write to them would be lost. Writing to them, or to any view of
    them, raises InputError; whatever is computed from them is a plain tensor.
    """

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> "ReadOnlyView":
        self: ReadOnlyView = Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=value.device,
        )
        self.value = value
        return self

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["value"], None

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: None, outer_size: Any, outer_stride: Any
    ) -> "ReadOnlyView":
        return cls(inner["value"])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ReadOnlyView({self.value!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in REFUSED:
            raise InputError(f"{func.__name__}: the float numbers of a view of a low-bit weight are no memory to share")
        with torch._C.DisableTorchFunctionSubclass():
            if func not in READ | COPIED:
                return func(*args, **kwargs)
            value = args[0].value.detach().requires_grad_(args[0].requires_grad)  # numpy() refuses those that do
            out = func(value, *args[1:], **kwargs)
        if func in (Tensor.numpy, Tensor.__array__):
            out.flags.writeable = False
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            raise InputError(f"{func} of a view of a low-bit weight: communicate a clone() of it")
        if any(isinstance(t, ReadOnlyView) for t in written(func, args, kwargs)):
            raise InputError(
                f"{func} cannot write to a view of a low-bit weight: its float numbers are no part of the weight's "
                "memory. Set all of the weight: w.copy_(value)"
            )

        if (out := func.decompose(*args, **kwargs)) is not NotImplemented:  # in inference mode nobody did so before
            return out

        def plain(x: Any) -> Any:
            return x.value if isinstance(x, ReadOnlyView) else x

        with as_the_base_is(func, args):
            out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
            return read_only(out) if func.is_view else out


def read_only(out: Any) -> Any:
    """What a view operation gave, a tensor or a list of them, as `ReadOnlyView`s."""
    return tree_map(lambda x: ReadOnlyView(x) if isinstance(x, Tensor) else x, out)


def as_the_base_is(func: Any, args: Any) -> contextlib.AbstractContextManager[Any]:
    """Inference mode is left for a view of a tensor made outside of it: torch wants both to be of one kind."""
    ordinary = func.is_view and torch.is_inference_mode_enabled() and not args[0].is_inference()
    return torch.inference_mode(False) if ordinary else contextlib.nullcontext()


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """The tensors that an operation of torch writes: in place, as `out=`, or one by one in its lists."""
    if not func._schema.is_mutable:
        return
    values = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    for a in func._schema.arguments:
        if a.alias_info is not None and a.alias_info.is_write:
            yield from tree_leaves(values.get(a.name))
