"""Weights of a checkpoint: looked at when they have arrived, and quantised before, so that no float model exists.

transformers builds a model without memory and gives it one weight after the other: renamed, put together from several
tensors of the checkpoint, cast. Here is only what happens to each when it is put into its module.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from apollo_optim.core.errors import InputError
from apollo_optim.quant import LowBitWeight
from apollo_optim.quant.quantize import quantized
from apollo_optim.train.config import QuantConfig

# Masks, positions and rotary frequencies, which older transformers saved: today's compute them.
OLD_BUFFER = re.compile(r"(?:^|\.)(?:masked_bias|position_ids|rotary_emb\.inv_freq|\w*(?:attn|attention)\.bias)$")

log = logging.getLogger(__name__)


def check_loaded(name: str, found: dict[str, Any], parameters: Collection[str]) -> None:
    """Raise InputError where the checkpoint of model `name` holds other weights than the model's `parameters`.

    transformers draws anew what a checkpoint lacks and drops what is too much: nothing to train on unawares. Buffers
    that it no longer has are dropped, and one line says so. `found`: its loading info.
    """
    found = {**found, "unexpected_keys": _without_old_buffers(name, found["unexpected_keys"], parameters)}
    for kind, problem in (
        ("mismatched_keys", "other shapes in the checkpoint than in the model"),
        ("missing_keys", "not in the checkpoint"),
        ("unexpected_keys", "in the checkpoint, but not in the model"),
    ):
        keys = sorted(key if isinstance(key, str) else key[0] for key in found[kind])
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise InputError(
                f"model.name={name}: {problem}: {', '.join(keys[:3])}{more}. Take back what you changed of the "
                "model's config; or make a checkpoint that fits (transformers: from_pretrained, then save_pretrained)"
            )


def _without_old_buffers(name: str, unexpected: Collection[str], parameters: Collection[str]) -> list[str]:
    # `attn.bias` is a mask where attn is a module of several weights, and a bias where it has one, `attn.weight`.
    old = [
        key
        for key in sorted(unexpected)
        if OLD_BUFFER.search(key) and f"{key.removesuffix('bias')}weight" not in parameters
    ]
    if old:
        more = f" and {len(old) - 1} more" if len(old) > 1 else ""
        log.warning("%s: dropped buffers of older transformers, no weights: %s%s", name, old[0], more)
    return [key for key in unexpected if key not in old]


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
