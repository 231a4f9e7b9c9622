"""One parameter's step as a pure function of tensors: the definition, and what is compiled."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apollo_optim.core.blocks import Block, blocks, part
from apollo_optim.core.compile import in_memory
from apollo_optim.core.eightbit import groups_of
from apollo_optim.core.layout import aligned, local, rounding_noise, spread
from apollo_optim.core.moments import Number, bias_corrections
from apollo_optim.core.project import channel_view
from apollo_optim.core.random import Key, Purpose, key_at
from apollo_optim.core.rounding import store
from apollo_optim.core.write import write
from apollo_optim.optim.knobs import Group

State = dict[str, Any]
LEAST_8BIT = 4096  # matrices of fewer entries keep fp32 moments
ROUNDED: tuple[Purpose, ...] = ("weight", "exp_avg", "exp_avg_sq")
_KEYS = ("projection", "rounding")


class Numbers(NamedTuple):
    """What changes from step to step. Python numbers in an eager step, 0-D tensors in a compiled one."""

    lr: Number
    weight_decay: Number
    new1: Number  # 1 - beta1: a new gradient's weight in the first average
    new2: Number  # 1 - beta2; Adafactor's t^-0.8
    eps: Number
    correction1: Number  # 1 - beta1^t
    correction2: Number  # sqrt(1 - beta2^t)
    alpha: Number  # sqrt(scale)
    growth: Number
    projection: Key
    rounding: dict[str, Key]

    def as_inputs(self, device: torch.device) -> list[Tensor]:
        """All of them as tensors, so that no value is compiled in: ``from_inputs`` goes back.

        For a CPU two tensors, fp32 and int32. The kernels of a GPU take numbers of the host one by one, so that
        nothing has to be copied there.
        """
        plain = [value for name, value in self._asdict().items() if name not in _KEYS]
        keys = [self.projection, *(self.rounding[purpose] for purpose in ROUNDED)]
        if device.type == "cpu":
            return [torch.tensor(plain, dtype=torch.float32), torch.tensor(keys, dtype=torch.int32)]
        words = [torch.tensor(word, dtype=torch.int32) for key in keys for word in key]
        return [*(torch.as_tensor(value, dtype=torch.float32) for value in plain), *words]

    @classmethod
    def from_inputs(cls, inputs: Sequence[Tensor]) -> "Numbers":
        names = [name for name in cls._fields if name not in _KEYS]
        plain, words = (inputs[0], inputs[1].flatten()) if len(inputs) == 2 else (inputs, inputs[len(names) :])
        projection, *rounding = [(words[2 * i], words[2 * i + 1]) for i in range(1 + len(ROUNDED))]
        of_purpose: dict[str, Key] = dict(zip(ROUNDED, rounding, strict=True))
        values = {name: plain[i] for i, name in enumerate(names)}
        return cls(**values, projection=projection, rounding=of_purpose)


class Spec(NamedTuple):
    """What stays: the constants that a compiled step is specialised on."""

    rule: bool  # the optimizer's rule, or one of rest.py
    rest: str  # which of them
    normalize: str  # SCALE's: "rows" or "columns"
    conv: bool
    rank: int
    proj: str
    tensorwise: bool
    scale_front: bool
    limited: bool
    kept: bool  # the basis is state, though it could be drawn again
    refresh: bool  # this step draws a basis that is state (svd's, or a kept one)
    stochastic: bool
    maximize: bool


class Step(NamedTuple):
    """What a rule returns. A step is a pair, ``factor * tensor``: nothing full-size is built before the write."""

    tensor: Tensor
    factor: Number
    norm: Tensor  # the gradient's, one per matrix: is it finite, so that the step may be taken?
    state: dict[str, Tensor]  # the new values; the caller stores them


Rule = Callable[[Tensor, State, Numbers, Spec], Step]


def matrix_shape(shape: tuple[int, ...], view: str | None) -> tuple[int, ...]:
    """(.., m, n): 2-D as it is, 3-D a stack of matrices unless viewed as "conv", convolutions (out, the rest)."""
    if len(shape) == 2 or (len(shape) == 3 and view != "conv"):
        return shape
    return shape[0], torch.Size(shape[1:]).numel()


def follows_rule(p: Tensor, group: Group) -> bool:
    """Does ``p`` follow the rule of its optimizer? Decided by the group and the *global* shape alone.

    A matrix whose small side is no larger than the rank does not: there would be nothing to compress.
    """
    if group.get("rank") is None or p.ndim < 2 or p.numel() == 0:
        return False
    return min(matrix_shape(tuple(p.shape), group["view"])[-2:]) > int(group["rank"])


def rest_of(p: Tensor, group: Group) -> str:
    """Which rule of rest.py ``p`` follows, where it does not follow its optimizer's: a matrix, what its group says.

    What has no rows to normalise or to factor follows AdamW, and so does what is too small for 8-bit moments to save,
    or has rows that fall into no groups of one size.
    """
    rest: str = group.get("rest", "adamw")
    if rest == "apollo" or p.ndim < 2 or p.numel() == 0:
        return "adamw"
    columns = matrix_shape(tuple(p.shape), group.get("view"))[-1]
    return "adamw" if rest == "adamw8bit" and (p.numel() < LEAST_8BIT or not groups_of(columns)) else rest


def as_matrix(t: Tensor, conv: bool) -> Tensor:
    return t.flatten(1) if conv else t


def spec_of(p: Tensor, group: Group, step: int) -> Spec:
    rule = follows_rule(p, group)
    rest = "" if rule else rest_of(p, group)
    proj = group["proj"] if rule else ""
    kept = rule and group["keep_proj"] and proj != "svd"
    return Spec(
        rule=rule,
        rest=rest,
        normalize=group.get("normalize", "rows") if rest == "scale" else "",
        conv=rest != "adamw" and len(matrix_shape(tuple(p.shape), group.get("view"))) != p.ndim,
        rank=group["rank"] if rule else 0,
        proj=proj,
        tensorwise=rule and group["scale_type"] == "tensor",
        scale_front=rule and group["scale_front"],
        limited=rule and group["norm_growth"] is not None,
        kept=kept,
        refresh=(kept or proj == "svd") and (step - 1) % group["update_proj_gap"] == 0,
        stochastic=group["stochastic_rounding"],
        maximize=group.get("maximize", False),
    )


def numbers_of(p: Tensor, group: Group, step: int, seed: int, spec: Spec) -> Numbers:
    rule, rest = spec.rule, spec.rest
    scale = group["scale"] if rule else 1.0
    if scale == "auto":  # E[s^R / s] ~ sqrt(r / d): what the projection shrinks (APOLLO, theorem 4.2)
        scale = min(matrix_shape(tuple(p.shape), group["view"])[-2:]) / group["rank"]
    refresh = (step - 1) // group["update_proj_gap"] if rule else 0
    correction1, correction2 = bias_corrections(step, group["betas"])
    return Numbers(
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        new1=1 - group["betas"][0] if rest != "scale" else 1 - group.get("momentum", 0.0),
        new2=1 - group["betas"][1] if rest != "adafactor" else step**-0.8,
        eps=group["eps"],
        correction1=correction1,
        correction2=correction2,
        alpha=scale**0.5,
        growth=(group["norm_growth"] or 0.0) if rule else 0.0,
        projection=key_at(seed, "projection", refresh),
        rounding={purpose: key_at(seed, purpose, step) for purpose in ROUNDED},
    )


def advance(rule: Rule, p: Tensor, grad: Tensor, state: State, n: Numbers, spec: Spec) -> None:
    """Take one step by the rule: ``p`` and the tensors of ``state`` are written in place, each once.

    A gradient whose norm is not finite leaves its matrix as it was - weight, moments and limit - and is counted in
    ``state["skipped"]``. That is a ``where``, not a branch: no value is ever read back by the host.
    """
    step, factor, usable = settle(rule, as_matrix(aligned(grad, p), spec.conv), state, n, spec)
    write(p, step, factor, usable, n.lr, n.weight_decay, n.rounding["weight"] if spec.stochastic else None)


def settle(rule: Rule, matrix: Tensor, state: State, n: Numbers, spec: Spec) -> tuple[Tensor, Number, Tensor]:
    """All of a step but the weight: the state is written, what is to be done to the weight comes back.

    A tensor and its factor, and whether they may be used. This much is compiled for a weight that writes itself.
    """
    view_ck = channel_view(-matrix if spec.maximize else matrix)
    taken = rule(view_ck, state, n, spec)
    usable = in_memory(torch.isfinite(taken.norm))
    for name, value in taken.state.items():
        old = state[name]
        if name == "basis" and spec.kept:  # a draw has nothing to do with this gradient
            old.copy_(value)
            continue
        here = local(spread(fit(usable, old), old))
        for at in blocks(tuple(local(old).shape)):
            keep(old, name, part(local(aligned(value, old)), at), part(here, at), n, spec, at)
    state["skipped"].add_(~usable)
    usable = fit(usable, taken.tensor)
    if view_ck.shape == matrix.shape:
        return taken.tensor, taken.factor, usable
    return taken.tensor.mT, taken.factor.mT, usable  # type: ignore[union-attr]


def keep(old: Tensor, name: str, value: Tensor, usable: Tensor, n: Numbers, spec: Spec, at: Block) -> None:
    """``old``'s block ``at`` <- ``value`` where ``usable``, rounded as its dtype and the group ask for."""
    here = part(local(old), at)
    rounds = spec.stochastic and old.dtype is torch.bfloat16
    noise = rounding_noise(old, n.rounding[name], at) if rounds else None
    store(here, torch.where(usable, value, here.float()), noise)


def fit(per_matrix: Tensor, t: Tensor) -> Tensor:
    missing = t.ndim - per_matrix.ndim
    return per_matrix[(..., *[None] * missing)] if missing else per_matrix
