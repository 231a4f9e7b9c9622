"""New weights, module by module, on a model that has no memory yet."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from apollo_optim.core.errors import InputError
from apollo_optim.core.place import is_sharded, local, whole
from apollo_optim.core.storage import is_finite
from apollo_optim.optim.loading import split_as

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def draw_weights(model: PreTrainedModel, finish: Callable[[torch.nn.Module], None] | None = None) -> None:
    """Give a model on meta its memory and new weights on the CPU, as transformers draws them, module by module.

    `finish(module)` is called for every module once its own weights are drawn. What is tied stays tied. Of DTensors
    (a model that was sharded on meta) every process draws all, one module's at a time, and keeps its part, on the
    device of its mesh: the same weights as in one process.

    Raises InputError if the model's own code leaves something without a value: transformers' models do not.
    """
    from transformers import PreTrainedModel

    uses = Counter(t for module in model.modules() for t in (*module._parameters.values(), *module._buffers.values()))
    tied: dict[torch.Tensor, torch.Tensor] = {}  # (what is not tied must not be held: it may be quantised next)

    def drawn(tensor: torch.Tensor) -> torch.Tensor:
        nothing = math.nan if tensor.is_floating_point() else 0
        memory = torch.full(tensor.shape, nothing, dtype=tensor.dtype, device="cpu")
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        return torch.nn.Parameter(memory, tensor.requires_grad) if is_parameter else memory

    def visit(module: torch.nn.Module, family: PreTrainedModel) -> None:
        for child in module.children():
            visit(child, child if isinstance(child, PreTrainedModel) else family)
        sharded: dict[str, torch.Tensor] = {}
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                new = tied[tensor] if tensor in tied else drawn(tensor)
                if is_sharded(tensor):
                    sharded[name] = tensor
                    new = torch.nn.Parameter(whole(new)) if tensor in tied else new
                elif uses[tensor] > 1:
                    tied[tensor] = new
                own[name] = new  # type: ignore[assignment]
        family._init_weights(module)  # type: ignore[no-untyped-call]
        for name, tensor in sharded.items():
            mine = split_as(module.get_parameter(name).detach(), tensor)
            if tensor in tied:
                local(tied[tensor].detach()).copy_(local(mine))
            new = tied[tensor] if tensor in tied else torch.nn.Parameter(mine, tensor.requires_grad)
            if uses[tensor] > 1:
                tied[tensor] = new
            module._parameters[name] = new  # type: ignore[assignment]
        if finish is not None:
            finish(module)

    visit(model, model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not is_finite(local(tensor)):
            raise InputError(f"{type(model).__name__} gives {name} its first value in a constructor: not supported")
