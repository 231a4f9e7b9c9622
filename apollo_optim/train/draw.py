"""New weights, module by module, on a model that has no memory yet."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from apollo_optim.core.errors import InputError
from apollo_optim.core.storage import is_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def draw_weights(model: PreTrainedModel, finish: Callable[[torch.nn.Module], None] | None = None) -> None:
    """Give a model on meta its memory and new weights on the CPU, as transformers draws them, module by module.

    `finish(module)` is called for every module once its own weights are drawn. What is tied stays tied. Raises
    InputError if the model's own code leaves something without a value: transformers' models do not.
    """
    from transformers import PreTrainedModel

    uses = Counter(t for module in model.modules() for t in (*module._parameters.values(), *module._buffers.values()))
    tied: dict[torch.Tensor, torch.Tensor] = {}  # (what is not tied must not be held: it may be quantised next)

    def drawn(tensor: torch.Tensor) -> torch.Tensor:
        memory = torch.full_like(tensor, math.nan if tensor.is_floating_point() else 0, device="cpu")
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        return torch.nn.Parameter(memory, tensor.requires_grad) if is_parameter else memory

    def visit(module: torch.nn.Module, family: PreTrainedModel) -> None:
        for child in module.children():
            visit(child, child if isinstance(child, PreTrainedModel) else family)
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                new = tied[tensor] if tensor in tied else drawn(tensor)
                if uses[tensor] > 1:
                    tied[tensor] = new
                own[name] = new  # type: ignore[assignment]
        family._init_weights(module)  # type: ignore[no-untyped-call]
        if finish is not None:
            finish(module)

    visit(model, model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not is_finite(tensor):
            raise InputError(f"{type(model).__name__} gives {name} its first value in a constructor: not supported")
