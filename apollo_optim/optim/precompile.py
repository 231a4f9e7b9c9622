"""Steps compiled before there are weights: a compiler takes memory, too, and should not need it on top of theirs."""

import torch
from torch import nn

from apollo_optim.core.storage import rebuilt
from apollo_optim.optim.compiled import Graphs, is_compiled
from apollo_optim.optim.optimizer import RuleOptimizer
from apollo_optim.optim.parameter import chosen_rule, init_state, static_of


@torch.no_grad()
def precompile(planned: RuleOptimizer, device: torch.device) -> Graphs:
    """The graphs of an optimizer that was built on a model on the meta device, for weights on `device`.

    A stand-in of zeros for every signature of a parameter is stepped, twice (a basis that is state is drawn by the
    first step alone), and forgotten. The graphs fit an optimizer that is built as this one, on the model with its
    memory.
    """
    seen = set()
    for group in planned.param_groups:
        for p in group["params"]:
            signature = p.shape, p.dtype, type(p), static_of(p, group, chosen_rule(p, group))
            if signature in seen or not p.requires_grad or not is_compiled(planned.compile, p, device.type):
                continue
            seen.add(signature)
            stand_in = nn.Parameter(rebuilt(p.detach(), lambda t: torch.zeros(t.shape, dtype=t.dtype, device=device)))
            stand_in.grad = torch.zeros(p.shape, dtype=p.dtype, device=device)
            planned.state[stand_in] = init_state(stand_in, group)
            for _ in range(2):
                planned.step_one(stand_in, group)
            del planned.state[stand_in]
    return planned.graphs
