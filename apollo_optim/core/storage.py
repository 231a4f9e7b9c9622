"""What a tensor is made of, and what that weighs: a low-bit weight is two plain tensors."""

from collections.abc import Callable

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def parts(t: Tensor) -> dict[str, Tensor]:
    """The plain tensors behind `t` by name: `{"": t}` unless `t` says otherwise (`_parts`)."""
    own: dict[str, Tensor] = t._parts() if hasattr(t, "_parts") else {"": t}
    return own


def nbytes(t: Tensor) -> int:
    """Bytes of `t` as it is stored, on any device, meta too."""
    return sum(part.numel() * part.element_size() for part in parts(t).values())


def writes_itself(t: Tensor) -> bool:
    """Does `t` know better than `core.write` how a step is written into it?"""
    return hasattr(t, "_write_rows_")


def rebuilt(t: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor of the same kind whose plain tensors are `make` of those of `t`."""
    if not is_traceable_wrapper_subclass(t):
        return make(t)
    names, context = t.__tensor_flatten__()
    inner = {name: rebuilt(getattr(t, name), make) for name in names}
    whole: Tensor = t.__tensor_unflatten__(inner, context, t.shape, t.stride())
    return whole


def is_finite(t: Tensor) -> bool:
    """No NaN, no infinity; without a temporary of `t`'s size. Waits for the device."""
    plain = (part for part in parts(t).values() if part.is_floating_point() and part.numel())
    return all(bool(end.isfinite()) for part in plain for end in part.detach().aminmax())
