"""What the parameters follow that do not follow their optimizer's rule: embedding, head, norms and the like.

A rule here is two pure functions. ``init`` makes the state from shapes alone, and ``step`` goes from one *block* of a
gradient and of its state to a ``Step``: large tensors go through it in blocks of rows, so that no temporary is large.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from apollo_optim.core.blocks import blocks, part
from apollo_optim.core.layout import aligned, flat_index, local, zeros_like
from apollo_optim.core.moments import Number, updated
from apollo_optim.core.random import hash32
from apollo_optim.core.scaling import full_norm
from apollo_optim.core.write import write, write_block
from apollo_optim.optim.knobs import Group
from apollo_optim.optim.step import Numbers, Spec, State, as_matrix, keep


class Move(NamedTuple):
    """A block's step: ``factor * tensor`` from the weight, and the state's new values."""

    tensor: Tensor
    factor: Number
    state: dict[str, Tensor]


class Rest(NamedTuple):
    init: Callable[[Tensor, Group], State]
    step: Callable[[Tensor, State, Numbers, Spec], Move]


def advance_rest(rule: Rest, p: Tensor, grad: Tensor, state: State, n: Numbers, spec: Spec) -> None:
    """Take one step by a rule of this file, in blocks: the same promises as ``step.advance``, and one skip for all."""
    grad = as_matrix(aligned(-grad if spec.maximize else grad, p), spec.conv)
    usable = torch.isfinite(full_norm(grad))
    here = local(usable)
    own, weight = local(grad), local(p.detach())
    key = n.rounding["weight"] if spec.stochastic else None
    low_bit = hasattr(p, "_write_update_")
    for at in [()] if low_bit else blocks(tuple(own.shape), whole=int(weight.ndim != own.ndim)):
        move = rule.step(part(own, at), {name: part(local(t), at) for name, t in state.items()}, n, spec)
        if low_bit:
            write(p, move.tensor, move.factor, here, n.lr, n.weight_decay, key)
        else:
            bits = hash32(flat_index(grad, at), key) if key and p.dtype is torch.bfloat16 else None
            write_block(part(weight, at), move.tensor, move.factor, here, n.lr, n.weight_decay, bits)
        for name, value in move.state.items():
            keep(state[name], name, value, here, n, spec, at)
    state["skipped"].add_(~usable)


# --- AdamW ---


def init_adamw(matrix: Tensor, group: Group) -> State:
    return {name: zeros_like(matrix, group["state_dtype"]) for name in ("exp_avg", "exp_avg_sq")}


def adamw(grad: Tensor, state: State, n: Numbers, spec: Spec) -> Move:
    """torch.optim.AdamW's arithmetic (1711.05101): eps after the bias correction."""
    exp_avg, exp_avg_sq = updated(grad, state["exp_avg"], state["exp_avg_sq"], n.new1, n.new2)
    direction = exp_avg / (exp_avg_sq.sqrt() / n.correction2 + n.eps)
    return Move(direction, 1 / n.correction1, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq})


RULES = {"adamw": Rest(init_adamw, adamw)}
