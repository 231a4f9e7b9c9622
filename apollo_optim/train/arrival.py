"""Weights of a checkpoint are quantised as they arrive, so that the float model never exists.

transformers builds a model without memory and gives it one weight after the other: renamed, put together from several
tensors of the checkpoint, cast. Here is only what happens to each when it is put into its module.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from apollo_optim.quant import LowBitWeight
from apollo_optim.quant.quantize import quantized
from apollo_optim.train.config import QuantConfig


@contextlib.contextmanager
def quantized_on_arrival(names: Collection[str], quant: QuantConfig) -> Iterator[None]:
    """Within it, the parameters of these names are quantised when `from_pretrained` puts them into its model."""
    assert quant.bits is not None
    bits = quant.bits
    parents: dict[nn.Module, tuple[nn.Module, str]] = {}

    def attached(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is not None:
            parents[module] = parent, name

    def arrived(module: nn.Module, name: str, p: nn.Parameter | None) -> nn.Parameter | None:
        # Of all that is put into a module, transformers marks what it has read: not to be drawn anew.
        if not getattr(p, "_is_hf_initialized", False) or isinstance(p, LowBitWeight):
            return None
        assert p is not None
        while module in parents:
            module, word = parents[module]
            name = f"{word}.{name}"
        if name not in names:
            return None
        low_bit = quantized(p, name, bits, quant.group_size)
        vars(low_bit).update(vars(p))  # the mark
        return low_bit

    hooks = [
        register_module_module_registration_hook(attached),
        register_module_parameter_registration_hook(arrived),  # type: ignore[arg-type]
    ]
    try:
        with one_at_a_time():
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Tell transformers to read a tensor when it is wanted, and into memory that goes when the tensor goes.

    By itself it has threads that read ahead, and maps the files: pages of theirs stay resident until all is read.
    """
    import transformers.modeling_utils

    loading: Any = transformers.modeling_utils
    key, open_file = "HF_DEACTIVATE_ASYNC_LOAD", loading.safe_open
    before = os.environ.get(key)

    def unmapped(*args: Any, **how: Any) -> Any:
        return open_file(*args, **how | ({"backend": "pread"} if "backend" in how else {}))  # older ones only map

    os.environ[key], loading.safe_open = "1", unmapped
    try:
        yield
    finally:
        loading.safe_open = open_file
        os.environ.pop(key)
        if before is not None:
            os.environ[key] = before
