"""What a tensor is made of, and what that weighs: a low-bit weight is two plain tensors."""

from torch import Tensor


def parts(t: Tensor) -> dict[str, Tensor]:
    """The plain tensors behind ``t`` by name: ``{"": t}`` unless ``t`` says otherwise (``_parts``)."""
    own: dict[str, Tensor] = t._parts() if hasattr(t, "_parts") else {"": t}
    return own


def nbytes(t: Tensor) -> int:
    """Bytes of ``t`` as it is stored, on any device, meta too."""
    return sum(part.numel() * part.element_size() for part in parts(t).values())


def writes_itself(t: Tensor) -> bool:
    """Does ``t`` know better than ``core.write`` how a step is written into it?"""
    return hasattr(t, "_write_update_")


def is_finite(t: Tensor) -> bool:
    """No NaN, no infinity; without a temporary of ``t``'s size. Waits for the device."""
    plain = (part for part in parts(t).values() if part.is_floating_point() and part.numel())
    return all(bool(end.isfinite()) for part in plain for end in part.detach().aminmax())
