"""What a tensor is made of, and what that weighs: a low-bit weight is two plain tensors."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from apollo_optim.core.place import is_sharded, local, whole
from apollo_optim.core.placements import split_alike


@torch.no_grad()
def parts(t: Tensor) -> dict[str, Tensor]:
    """The plain tensors behind `t` by name: `{"": t}` unless `t` says otherwise (`_parts`); of a shard, shards."""
    here = local(t)
    if not hasattr(here, "_parts"):
        return {"": t}
    own: dict[str, Tensor] = here._parts()
    return {name: split_alike(part, t) for name, part in own.items()} if is_sharded(t) else own


def nbytes(t: Tensor) -> int:
    """Bytes of `t` as it is stored, on any device, meta too."""
    return sum(part.numel() * part.element_size() for part in parts(t).values())


def writes_itself(t: Tensor) -> bool:
    """Does `t` know better than `core.write` how a step is written into it?"""
    return hasattr(local(t.detach()), "_write_rows_")


def rebuilt(t: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor of the same kind whose plain tensors are `make` of those of `t`."""
    if not is_traceable_wrapper_subclass(t):
        return make(t)
    names, context = t.__tensor_flatten__()
    inner = {name: rebuilt(getattr(t, name), make) for name in names}
    whole: Tensor = t.__tensor_unflatten__(inner, context, t.shape, t.stride())
    return whole


@torch.no_grad()
def unsharded(t: Tensor) -> Tensor:
    """All of `t`, on every rank, of the kind that its shards are."""
    here = local(t)
    if not (is_sharded(t) and is_traceable_wrapper_subclass(here)):
        return whole(t)
    inner = {name: whole(part) for name, part in parts(t).items()}
    everything: Tensor = here.__tensor_unflatten__(inner, here.__tensor_flatten__()[1], t.shape, t.stride())
    return everything


def is_finite(t: Tensor) -> bool:
    """No NaN, no infinity; without a temporary of `t`'s size. Waits for the device."""
    plain = (part for part in parts(t).values() if part.is_floating_point() and part.numel())
    return all(bool(end.isfinite()) for part in plain for end in part.detach().aminmax())
