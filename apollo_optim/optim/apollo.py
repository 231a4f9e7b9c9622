"""APOLLO: the gradient itself, each channel rescaled as Adam would have rescaled its random sketch.

"APOLLO: SGD-like Memory, AdamW-level Performance", Zhu et al., MLSys 2025, arXiv 2412.05270.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from apollo_optim.core import layout
from apollo_optim.core.moments import updated
from apollo_optim.core.project import down, random_basis, svd_basis
from apollo_optim.core.scaling import channel_norms, limit_growth, ratio, tensor_norm
from apollo_optim.optim.base import MatrixOptimizer
from apollo_optim.optim.knobs import KNOBS
from apollo_optim.optim.step import Group, Numbers, Spec, State, Step


class Apollo(MatrixOptimizer):
    """DOC"""

    knobs: ClassVar[frozenset[str]] = frozenset(KNOBS)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        scale: float | str = 1.0,
        scale_type: str = "channel",
        scale_front: bool = False,
        proj: str = "gaussian",
        proj_type: str = "std",
        update_proj_gap: int = 200,
        norm_growth: float | None = 1.01,
        state_dtype: torch.dtype = torch.float32,
        stochastic_rounding: bool = True,
        seed: int = 0,
        view: str | None = None,
        maximize: bool = False,
        compile: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank, "scale": scale,
            "scale_type": scale_type, "scale_front": scale_front, "proj": proj, "proj_type": proj_type,
            "update_proj_gap": update_proj_gap, "norm_growth": norm_growth, "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding, "seed": seed, "view": view, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults, compile=compile)

    @classmethod
    def init_rule(cls, view_ck: Tensor, group: Group) -> State:
        """Two moments of the sketch, one number for the limiter; random bases are never state, svd's is."""
        *stack, c, k = view_ck.shape
        low_cr = (*stack, c, group["rank"])
        state = {name: layout.zeros(low_cr, view_ck, group["state_dtype"]) for name in ("exp_avg", "exp_avg_sq")}
        state["prev_norm"] = layout.zeros(tuple(stack), view_ck, torch.float32)
        if group["proj"] == "svd":  # orthonormal from the start, should the first gradient be unusable
            identity = torch.eye(k, group["rank"], device=view_ck.device)
            state["basis"] = identity.expand(*stack, k, group["rank"]).clone()
        return state

    @classmethod
    def basis(cls, grad_ck: Tensor, state: State, n: Numbers, spec: Spec) -> Tensor:
        """P: drawn from the parameter's seed and the number of the refresh, or the gradient's singular vectors."""
        if spec.proj != "svd":
            return random_basis(grad_ck, spec.rank, spec.proj, n.projection)
        return svd_basis(grad_ck, spec.rank) if spec.refresh else state["basis"]

    @classmethod
    def direction(cls, grad_ck: Tensor, state: State, n: Numbers, spec: Spec) -> Step:
        """Algorithm 1 of the paper, with the limiter folded into one factor per channel (or per tensor)."""
        basis_kr = cls.basis(grad_ck, state, n, spec)
        low_cr = down(grad_ck, basis_kr, spec.rank)
        exp_avg, exp_avg_sq = updated(low_cr, state["exp_avg"], state["exp_avg_sq"], n.new1, n.new2)
        adam_cr = exp_avg / (exp_avg_sq.sqrt() + n.eps)

        grad_c1, low_c1, adam_c1 = channel_norms(grad_ck), channel_norms(low_cr), channel_norms(adam_cr)
        if spec.tensorwise:
            factor = ratio(tensor_norm(adam_c1), tensor_norm(low_c1))[..., None, None]
        else:
            factor = ratio(adam_c1, low_c1)
        norm, prev_norm = tensor_norm(factor * grad_c1), state["prev_norm"]
        if spec.limited:
            front = n.alpha if spec.scale_front else 1.0
            limit, prev_norm = limit_growth(front * norm, prev_norm, n.growth)
            factor = factor * limit[..., None, None]

        new = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "prev_norm": prev_norm}
        if spec.refresh:
            new["basis"] = basis_kr
        return Step(grad_ck, factor * (n.alpha * n.correction2 / n.correction1), tensor_norm(grad_c1), new)


class ApolloMini(Apollo):
    """One factor for the whole matrix: rank 1 is enough for it. APOLLO with other defaults (section 4.3)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        *,
        scale: float | str = 128.0,
        scale_type: str = "tensor",
        **knobs: Any,
    ) -> None:
        super().__init__(params, lr, scale=scale, scale_type=scale_type, **knobs)
