"""APOLLO: the gradient itself, each channel rescaled as Adam would have rescaled its random sketch.

"APOLLO: SGD-like Memory, AdamW-level Performance", Zhu et al., MLSys 2025, arXiv 2412.05270.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from apollo_optim.core import layout
from apollo_optim.core.moments import updated
from apollo_optim.core.project import down_and_norms, random_basis, svd_basis
from apollo_optim.core.scaling import channel_norms, limit_growth, ratio, tensor_norm
from apollo_optim.optim.base import MatrixOptimizer
from apollo_optim.optim.knobs import KNOBS, Group
from apollo_optim.optim.step import Numbers, Spec, State, Step


class Apollo(MatrixOptimizer):
    """APOLLO (Algorithm 1): AdamW's quality with two rank-r moments per matrix instead of two full ones.

    The moments of Adam are kept for R = G P alone, the gradient's random sketch of r columns. What they say about each
    channel (a row or a column, along the longer side) - how much Adam would have stretched it, s = ||N|| / ||R||
    (eq. 5) - is applied to the gradient itself: ``W <- (1 - lr wd) W - lr sqrt(scale) c_t limit(s G)``, where c_t is
    Adam's bias correction. Nothing is projected back, so a step has full rank.

    Args:
        params: ``param_groups(model, rank=...)``, groups written for apollo-torch, or bare parameters with ``rank``.
            A group that *names* ``rank`` follows the rule with its 2-D parameters, convolutions (as ``(out, -1)``) and
            3-D stacks of matrices (each with its own projection, ratios and limiter). Everything else - groups without
            a rank, 0-D and 1-D parameters, matrices whose small side is no larger than the rank - follows AdamW at the
            same ``lr`` inside this optimizer.
        lr: The papers use 0.01 at every size from 60M to 7B, with a cosine to 10 %, 10 % of warm-up and no clipping.
            It is not AdamW's: an AdamW step has entries near +-lr, an APOLLO step only the same norm per channel before
            ``scale``, so it takes about ten times AdamW's lr. The rest, AdamW, gets this lr too unless its groups name
            another; for embedding and head 0.01 is right as well (see ``rest_lr`` of ``param_groups``).
        betas, eps: Adam's, of the sketch and of the rest. ``eps`` is added to uncorrected moments for the matrices and
            to corrected ones for the rest, as in the papers' code and in torch.optim.AdamW.
        weight_decay: Decoupled, and applied to the weight before the step, as in torch.optim.AdamW.
        rank: r, columns of the sketch: a quarter of the small side (the papers' choice; 256 at 7B), or an eighth. Only
            applies where no group names one. State per matrix of m x n: 2 r max(m, n) numbers.
        scale: Multiplies a step by its *square root* (the paper's alpha = sqrt(scale)), as in apollo-torch. A sketch of
            r columns underestimates s by sqrt(r / d) (theorem 4.2); "auto" undoes that with d / r.
        scale_type: "channel", one s for each channel; "tensor", one for the whole matrix (APOLLO-Mini).
        scale_front: Scale before the limiter instead of after it. The limiter is homogeneous, so this changes rounding
            only; kept for groups written for apollo-torch.
        proj: "sketch" (CountSketch: signs and sums, no matrix product), "gaussian" (the paper's, also "random": the
            same perplexity in several times the time), "rademacher", or "svd" (the gradient's top singular vectors,
            kept as state: APOLLO-SVD).
        proj_type: "std", nothing else: the side to compress is always the smaller one.
        update_proj_gap: Steps between two projections.
        keep_proj: Keep a random projection from one refresh to the next, as state: small side x r fp32 numbers per
            matrix. Otherwise every step draws it again, the same numbers.
        norm_growth: A step's norm may be at most this times the one before (Fira's limiter); None for no limit.
        state_dtype: Of the moments. bf16 halves them and needs stochastic rounding: 0.999 v rounds back to v.
        stochastic_rounding: Of bf16 weights and bf16 moments at their one write per step. fp32 ones are not affected.
        seed: Every parameter draws its own from this and its position, at its first step, and keeps it in its state.
        view: How a 3-D parameter is to be seen: as a "stack" of matrices (default) or as a "conv" weight.
        maximize: Step up the gradient, as in torch.optim.
        compile: Step a parameter by one compiled function, made once for each shape; None: on a CPU, those of 262,144
            entries and more, which take a quarter to a tenth of the time then. Sharded ones (DTensor) step eagerly.

    Raises InputError (a ValueError) for unknown keys and wrong values, naming the key, and where nothing names a rank.
    """

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
        proj: str = "sketch",
        proj_type: str = "std",
        update_proj_gap: int = 200,
        keep_proj: bool = False,
        norm_growth: float | None = 1.01,
        state_dtype: torch.dtype = torch.float32,
        stochastic_rounding: bool = True,
        seed: int = 0,
        view: str | None = None,
        maximize: bool = False,
        compile: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank, "scale": scale,
            "scale_type": scale_type, "scale_front": scale_front, "proj": proj, "proj_type": proj_type,
            "update_proj_gap": update_proj_gap, "keep_proj": keep_proj, "norm_growth": norm_growth,
            "state_dtype": state_dtype, "stochastic_rounding": stochastic_rounding, "seed": seed, "view": view,
            "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults, compile=compile)

    @classmethod
    def init_rule(cls, view_ck: Tensor, group: Group) -> State:
        """Two moments of the sketch, one number for the limiter; svd's basis, and a random one that is to be kept."""
        *stack, c, k = view_ck.shape
        low_cr = (*stack, c, group["rank"])
        state = {name: layout.zeros(low_cr, view_ck, group["state_dtype"]) for name in ("exp_avg", "exp_avg_sq")}
        state["prev_norm"] = layout.zeros(tuple(stack), view_ck, torch.float32)
        if group["keep_proj"] and group["proj"] != "svd":
            shape = (*stack, k) if group["proj"] == "sketch" else (*stack, k, group["rank"])
            state["basis"] = torch.zeros(shape, dtype=torch.float32, device=view_ck.device)
        if group["proj"] == "svd":  # orthonormal from the start, should the first gradient be unusable
            identity = torch.eye(k, group["rank"], dtype=torch.float32, device=view_ck.device)
            state["basis"] = identity.expand(*stack, k, group["rank"]).clone()
        return state

    @classmethod
    def basis(cls, grad_ck: Tensor, state: State, n: Numbers, spec: Spec) -> Tensor:
        """P: drawn from the parameter's seed and the number of the refresh, or the gradient's singular vectors."""
        if spec.proj != "svd" and (spec.refresh or not spec.kept):
            return random_basis(grad_ck, spec.rank, spec.proj, n.projection)
        return svd_basis(grad_ck, spec.rank) if spec.refresh else state["basis"]

    @classmethod
    def direction(cls, grad_ck: Tensor, state: State, n: Numbers, spec: Spec) -> Step:
        """Algorithm 1 of the paper, with the limiter folded into one factor per channel (or per tensor)."""
        basis_kr = cls.basis(grad_ck, state, n, spec)
        low_cr, low_c1, grad_c1 = down_and_norms(grad_ck, basis_kr, spec.rank)
        exp_avg, exp_avg_sq = updated(low_cr, state["exp_avg"], state["exp_avg_sq"], n.new1, n.new2)
        adam_cr = exp_avg / (exp_avg_sq.sqrt() + n.eps)

        adam_c1 = channel_norms(adam_cr)
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
    """APOLLO-Mini: one factor for the whole matrix, for which a sketch of one column is enough (section 4.3).

    ``Apollo`` with ``scale_type="tensor"``, ``scale=128`` (the papers' for 60M and 130M and all fine-tuning) and, as
    one column is cheap, ``proj="gaussian"``; use it with ``rank=1``: ``ApolloMini(param_groups(model, rank=1))``. State
    per matrix of m x n: 2 max(m, n) + 1 numbers.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        *,
        scale: float | str = 128.0,
        scale_type: str = "tensor",
        proj: str = "gaussian",
        **knobs: Any,
    ) -> None:
        super().__init__(params, lr, scale=scale, scale_type=scale_type, proj=proj, **knobs)
