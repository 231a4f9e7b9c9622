"""What a view of a low-bit weight is: float numbers that can be read, and that refuse to be written."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from apollo_optim.core.errors import InputError


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

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if any(isinstance(t, ReadOnlyView) for t in written(func, args, kwargs)):
            raise InputError(
                f"{func} cannot write to a view of a low-bit weight: its float numbers are no part of the weight's "
                "memory. Set all of the weight: w.copy_(value)"
            )

        def plain(x: Any) -> Any:
            return x.value if isinstance(x, ReadOnlyView) else x

        out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        return read_only(out) if func.is_view else out


def read_only(out: Any) -> Any:
    """What a view operation gave, a tensor or a list of them, as `ReadOnlyView`s."""
    return tree_map(lambda x: ReadOnlyView(x) if isinstance(x, Tensor) else x, out)


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """The tensors that an operation of torch writes: in place, as `out=`, or one by one in its lists."""
    if not func._schema.is_mutable:
        return
    values = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    for a in func._schema.arguments:
        if a.alias_info is not None and a.alias_info.is_write:
            yield from tree_leaves(values.get(a.name))
