"""What the parameters follow that do not follow their optimizer's rule: embedding, head, norms and the like.

A rule here is two pure functions: ``init`` makes the state from shapes alone, and ``step`` goes from one *block* of a
gradient and of its state to a ``Move``, so that no temporary is large. Where a step depends on all of a gradient, a
third function, ``look``, has passed over it before, and ``step`` finds what it saw among the state: small tensors, one
number per row or column (this rank's own).

Shapes in this file: (.., m, n), the matrix form of a parameter; statistics (.., m, 1) and (.., 1, n).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from apollo_optim.core.blocks import Block, blocks, part
from apollo_optim.core.compile import in_memory
from apollo_optim.core.eightbit import decode_mean, decode_square, encode_mean, encode_square, groups_of
from apollo_optim.core.errors import InputError
from apollo_optim.core.layout import aligned, local, rounding_noise, splits, summed, zeros_along, zeros_like
from apollo_optim.core.moments import Number, updated
from apollo_optim.core.scaling import TINY, full_norm
from apollo_optim.core.storage import writes_itself
from apollo_optim.core.write import write, write_block
from apollo_optim.optim.knobs import Group
from apollo_optim.optim.step import Numbers, Spec, State, as_matrix, keep


class Move(NamedTuple):
    """A block's step: ``factor * tensor`` from the weight, and the state's new values."""

    tensor: Tensor
    factor: Number
    state: dict[str, Tensor]


def see_nothing(grad: Tensor, state: State, n: Numbers, spec: Spec) -> State:
    return {}


class Rest(NamedTuple):
    init: Callable[[Tensor, Group], State]
    step: Callable[[Tensor, State, Numbers, Spec], Move]
    look: Callable[[Tensor, State, Numbers, Spec], State] = see_nothing


def advance_rest(rule: Rest, p: Tensor, grad: Tensor, state: State, n: Numbers, spec: Spec) -> None:
    """Take one step by a rule of this file, in blocks: the same promises as ``step.advance``, and one skip for all."""
    grad = as_matrix(aligned(-grad if spec.maximize else grad, p), spec.conv)
    usable = torch.isfinite(full_norm(grad))
    here = local(usable)
    own, weight = local(grad), local(p.detach())
    seen = rule.look(grad, state, n, spec)
    held = {**{name: local(t) for name, t in state.items()}, **seen}  # (the compiler of torch 2.6 has no dict | dict)
    key = n.rounding["weight"] if spec.stochastic else None
    low_bit = writes_itself(p)  # all of it at once
    for at in [()] if low_bit else blocks(tuple(own.shape), whole=int(spec.rest != "adamw")):
        move = rule.step(part(own, at), parts(held, at), n, spec)
        if low_bit:
            write(p, move.tensor, move.factor, here, n.lr, n.weight_decay, key)
        else:
            noise = rounding_noise(grad, key, at) if key and p.dtype is torch.bfloat16 else None
            write_block(part(weight, at), move.tensor, move.factor, here, n.lr, n.weight_decay, noise)
        for name, value in move.state.items():
            if name + OF_GROUP in state:
                keep_codes(state, name, value, here, n, at)
            else:
                keep(state[name], name, value, here, n, spec, at)
    for name in (name for name in seen if name in state):
        keep(state[name], name, seen[name], here, n, spec, ())
    state["skipped"].add_(~usable)


def parts(tensors: State, at: Block) -> State:
    return {name: part(t, at) for name, t in tensors.items()}


def sums(function: Callable[[Tensor, Block], Tensor], t: Tensor, *dims: int) -> Tensor:
    """``function(rows, block)`` of ``t``, summed over ``dims`` (kept, of size 1), block by block and over the ranks."""
    own = local(t)
    cuts = blocks(tuple(own.shape), whole=1)
    if len(cuts) == 1:
        return local(summed(function(own, ()).sum(dims, keepdim=True), t, dims))
    shape = [1 if d - t.ndim in dims else size for d, size in enumerate(own.shape)]
    total = torch.zeros(shape, dtype=torch.float32, device=own.device)
    for at in cuts:
        part(total, at).add_(function(part(own, at), at).sum(dims, keepdim=True))
    return local(summed(total, t, dims))


# --- AdamW ---

MOMENTS = ("exp_avg", "exp_avg_sq")


def init_adamw(matrix: Tensor, group: Group) -> State:
    return {name: zeros_like(matrix, group["state_dtype"]) for name in MOMENTS}


def adamw(grad: Tensor, state: State, n: Numbers, spec: Spec) -> Move:
    """torch.optim.AdamW's arithmetic (1711.05101): eps after the bias correction."""
    exp_avg, exp_avg_sq = updated(grad, state["exp_avg"], state["exp_avg_sq"], n.new1, n.new2)
    direction = exp_avg / (exp_avg_sq.sqrt() * in_memory(1 / n.correction2) + n.eps)
    return Move(direction, 1 / n.correction1, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq})


# --- AdamW with moments of 8 bits ---

OF_GROUP = "_scale"


def init_adamw8bit(matrix: Tensor, group: Group) -> State:
    if splits(matrix, -1):
        raise InputError(
            f"rest='adamw8bit' has no step for a parameter split as {matrix.placements}: neighbours in a row share a "  # type: ignore[attr-defined]
            "scale, so ranks must hold whole rows. Choose another rest for it"
        )
    groups = groups_of(matrix.shape[-1])
    return {
        "exp_avg": zeros_like(matrix, torch.int8),
        "exp_avg_scale": zeros_along(matrix, -1, groups, torch.float32),
        "exp_avg_sq": zeros_like(matrix, torch.uint8),
        "exp_avg_sq_scale": zeros_along(matrix, -1, groups, torch.bfloat16),
    }


def adamw8bit(grad: Tensor, state: State, n: Numbers, spec: Spec) -> Move:
    """AdamW on moments kept in 8 bits (core/eightbit.py), with a scale for up to 256 of a row.

    Codes are rounded stochastically whatever the group says of its weights: no average of 1,000 would move otherwise.
    """
    exp_avg = decode_mean(state["exp_avg"], state["exp_avg_scale"])
    exp_avg_sq = decode_square(state["exp_avg_sq"], state["exp_avg_sq_scale"])
    return adamw(grad, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, n, spec)


def keep_codes(state: State, name: str, value: Tensor, usable: Tensor, n: Numbers, at: Block) -> None:
    """As ``keep``, for a moment in codes; a block of whole rows."""
    codes = state[name]
    encode = encode_mean if name == "exp_avg" else encode_square
    scale = state[name + OF_GROUP]
    new = encode(value, rounding_noise(codes, n.rounding[name], at), scale.shape[-1])
    for old, fresh in zip((codes, scale), new, strict=True):
        here = part(local(old), at)
        here.copy_(torch.where(usable, fresh, here.float()))  # a choice between int8s is slow when compiled


# --- SCALE ---


def init_scale(matrix: Tensor, group: Group) -> State:
    return {"exp_avg": zeros_like(matrix, group["state_dtype"])} if group.get("momentum") else {}


def look_scale(grad: Tensor, state: State, n: Numbers, spec: Spec) -> State:
    """The mean square of every row or column of what is to be normalised."""
    dim = -1 if spec.normalize == "rows" else -2
    averages = {name: local(t) for name, t in state.items()}

    def squares(block: Tensor, at: Block) -> Tensor:
        square = averaged(block, parts(averages, at), n).square()
        # rows in two halves: torch 2.13 for CPUs cannot compile one sum over a row of what is written back, too
        halves = (*square.shape[:-1], 2, square.shape[-1] // 2)
        return square.reshape(halves).sum(-1) if dim == -1 and square.shape[-1] % 2 == 0 else square

    return {"mean_square": sums(squares, grad, dim) / grad.shape[dim]}


def scale(grad: Tensor, state: State, n: Numbers, spec: Spec) -> Move:
    """SCALE (2506.16659): the gradient, or its momentum, with every row (or every column) brought to unit RMS.

    The paper's: rows, one per output, for every matrix; the head after a momentum of 0.9; an embedding's columns, along
    its vocabulary. No bias correction: what is normalised has no size.
    """
    mean = averaged(grad, state, n)
    return Move(mean, 1 / (state["mean_square"].sqrt() + TINY), {"exp_avg": mean} if "exp_avg" in state else {})


def averaged(grad: Tensor, state: State, n: Numbers) -> Tensor:
    if "exp_avg" not in state:
        return grad.float()
    old: Tensor = state["exp_avg"].float()
    return old + (grad.float() - old) * n.new1


# --- Adafactor ---

FLOOR = 1e-30  # the paper's eps_1: of a squared gradient
CLIP = 1.0  # the paper's d: the largest RMS of a step before lr


def init_adafactor(matrix: Tensor, group: Group) -> State:
    """m + n numbers, fp32 whatever ``state_dtype`` says: they decay by less than bf16 can see."""
    return {
        "exp_avg_sq_row": zeros_along(matrix, -1, 1, torch.float32),
        "exp_avg_sq_col": zeros_along(matrix, -2, 1, torch.float32),
    }


def look_adafactor(grad: Tensor, state: State, n: Numbers, spec: Spec) -> State:
    """The two factors after this gradient, and by how much the step must shrink to an RMS of 1."""
    rows, columns = grad.shape[-2:]

    def square(block: Tensor, _: Block) -> Tensor:
        return block.float().square()

    def updated_factor(name: str, dim: int, size: int) -> Tensor:
        old: Tensor = local(state[name])
        new: Tensor = old + (sums(square, grad, dim) / size + FLOOR - old) * n.new2
        return new

    row, col = updated_factor("exp_avg_sq_row", -1, columns), updated_factor("exp_avg_sq_col", -2, rows)
    mean = local(summed(row.sum(-2, keepdim=True), state["exp_avg_sq_row"], (-2,))) / rows
    inverse = {"row_factor": (row / mean).rsqrt(), "col_factor": col.rsqrt()}

    def stepped(block: Tensor, at: Block) -> Tensor:
        here = parts(inverse, at)
        step: Tensor = block.float() * here["col_factor"] * here["row_factor"]
        return step.square()

    rms = (sums(stepped, grad, -1, -2) / (rows * columns)).sqrt()
    inverse["row_factor"] = inverse["row_factor"] / (rms / CLIP).clamp(min=1.0)
    return {"exp_avg_sq_row": row, "exp_avg_sq_col": col, **inverse}


def adafactor(grad: Tensor, state: State, n: Numbers, spec: Spec) -> Move:
    """Adafactor (1804.04235, algorithm 4) without its relative step sizes and without a first moment.

    U = G / sqrt(R C / mean(R)), clipped to an RMS of 1, where R and C average the squared gradient over rows and over
    columns with the paper's decay 1 - t^-0.8 (so neither ``betas`` nor ``eps`` has a say). A step's RMS is at most lr,
    so that lr means what it means to AdamW.
    """
    return Move(grad.float() * state["col_factor"], state["row_factor"], {})


RULES = {
    "adamw": Rest(init_adamw, adamw),
    "adamw8bit": Rest(init_adamw8bit, adamw8bit),
    "adafactor": Rest(init_adafactor, adafactor, look_adafactor),
    "scale": Rest(init_scale, scale, look_scale),
}
