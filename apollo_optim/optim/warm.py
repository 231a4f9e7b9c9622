"""Steps compiled before there are weights: a compiler takes memory, too, and should not need it on top of theirs."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from apollo_optim.optim.base import MatrixOptimizer
from apollo_optim.optim.fast import Graphs
from apollo_optim.optim.step import spec_of


@torch.no_grad()
def warm_up(planned: MatrixOptimizer, device: torch.device) -> Graphs:
    """The graphs of an optimizer that was built, with ``compile``, on a model on the meta device.

    A stand-in of zeros for every look of a parameter is stepped, twice (a basis that is state is drawn by the first
    step alone), and forgotten. The graphs fit an optimizer that is built as this one, on the model with its memory.
    """
    seen = set()
    for group in planned.param_groups:
        for p in group["params"]:
            look = p.shape, p.dtype, type(p), spec_of(p, group, 1)
            if look in seen or not p.requires_grad:
                continue
            seen.add(look)
            stand_in = nn.Parameter(_zeros(p.detach(), device))
            stand_in.grad = torch.zeros(p.shape, dtype=p.dtype, device=device)
            planned.state[stand_in] = planned.init_state(stand_in, group)
            for _ in range(2):
                planned.step_one(stand_in, group)
            del planned.state[stand_in]
    return planned._compiled


def _zeros(like: Tensor, device: torch.device) -> Tensor:
    """With the dtype and shape of a tensor on the meta device; of a low-bit one, of its parts."""
    if not is_traceable_wrapper_subclass(like):
        return torch.zeros(like.shape, dtype=like.dtype, device=device)
    names, context = like.__tensor_flatten__()
    parts = {name: _zeros(getattr(like, name), device) for name in names}
    whole: Tensor = like.__tensor_unflatten__(parts, context, like.shape, like.stride())
    return whole
