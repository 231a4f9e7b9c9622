"""The one switch for compiled functions, and the one way back where there is no compiler."""

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch


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
    return torch.compile(own, fullgraph=True, dynamic=False)


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
