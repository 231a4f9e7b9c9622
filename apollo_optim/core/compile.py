"""The one switch for compiled functions, and the one way back where there is no compiler."""

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled as one whole graph for the shapes it is first called with.

    Every call gives a function of its own (torch counts recompilations per code object and gives up after a few: a
    model has more shapes than that), so call it once per shape and keep the result. Whatever changes from step to step
    must come in as a tensor.
    """
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    # what has taken many operations is kept by default: a full-size temporary in the middle of a write
    return torch.compile(
        own, fullgraph=True, dynamic=False, options={"realize_reads_threshold": 1000, "realize_opcount_threshold": 1000}
    )


@overload
def in_memory(value: Tensor) -> Tensor: ...
@overload
def in_memory(value: float | Tensor) -> float | Tensor: ...
def in_memory(value: float | Tensor) -> float | Tensor:
    """``value``, which a compiler would otherwise compute again for every entry that it is combined with."""
    if isinstance(value, Tensor) and torch.compiler.is_compiling():
        return value.as_strided(value.shape, value.stride())
    return value


@functools.cache
def can_compile(device_type: str) -> bool:
    """Is there a working compiler for this device? Tried once, on a tiny function; warns once if not."""
    if device_type == "meta":  # where nothing is computed
        return False
    try:
        probe = torch.ones(2, device=device_type)
        torch.compile(lambda t: t * 2 + 1, fullgraph=True, dynamic=False)(probe)
    except Exception as error:  # whatever a missing compiler raises: it differs by backend and release
        warnings.warn(
            f"compile=True, but torch.compile does not work for {device_type!r} here, so steps run eagerly "
            f"(slower, same numbers): {type(error).__name__}: {str(error).strip().splitlines()[0]}",
            stacklevel=2,
        )
        return False
    return True
