"""The optimizers that people import: signatures and docstrings; what they do is in `rules`."""

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from apollo_optim.optim.optimizer import RuleOptimizer


class Apollo(RuleOptimizer):
    """APOLLO (2412.05270, algorithm 1): AdamW's quality with two rank-r moments per matrix instead of two full ones.

    See `apollo_optim.rules.apollo` for the rule. State per matrix of m x n: 2 r max(m, n) numbers.

    Args:
        params: `param_groups(model, rank=...)`, groups written for apollo-torch, or bare parameters with `rank`.
            A group that *names* `rank` uses the rule with its 2-D parameters, convolutions (as `(out, -1)`) and
            3-D stacks of matrices (each with its own projection, ratios and limiter). Everything else - groups without
            a rank or a rule of their own, 0-D and 1-D parameters, matrices whose small side is no larger than the rank
            - uses AdamW at the same `lr` inside this optimizer.
        lr: The papers use 0.01 at every size from 60M to 7B, with a cosine to 10 %, 10 % of warm-up and no clipping.
            It is not AdamW's: an AdamW step has entries near +-lr, an APOLLO step only the same norm per channel before
            `scale`, so it takes about ten times AdamW's lr. The rest, AdamW, gets this lr too unless its groups name
            another; for embedding and head 0.01 is right as well (see `rest_lr` of `param_groups`).
        betas: Decay of Adam's two moments, of the sketch and of the rest.
        eps: Added to the root of the second moment: uncorrected for the matrices and corrected for the rest, as in the
            papers' code and in torch.optim.AdamW.
        weight_decay: Decoupled, and applied to the weight before the step, as in torch.optim.AdamW.
        rank: r, columns of the sketch: a quarter of the small side (the papers' choice; 256 at 7B), or an eighth. Only
            applies where no group names one.
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
        **general: `state_dtype`, `stochastic_rounding`, `seed`, `view`, `maximize`, `grad_power`, `cautious_decay`,
            `otherwise`, `compile`: those of `RuleOptimizer`.

    Raises InputError (a ValueError) for unknown keys and wrong values, naming the key, and where nothing names a rank.
    """

    rule: ClassVar[str] = "apollo"

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
        **general: Any,
    ) -> None:
        knobs: dict[str, Any] = {
            "betas": betas, "eps": eps, "rank": rank, "scale": scale, "scale_type": scale_type,
            "scale_front": scale_front, "proj": proj, "proj_type": proj_type, "update_proj_gap": update_proj_gap,
            "keep_proj": keep_proj, "norm_growth": norm_growth,
        }  # fmt: skip
        super().__init__(params, self.rule, lr, weight_decay, **knobs, **general)


class ApolloMini(Apollo):
    """APOLLO-Mini: one factor for the whole matrix, for which a sketch of one column is enough (section 4.3).

    `Apollo` with `scale_type="tensor"`, `scale=128` (the papers' for 60M and 130M and all fine-tuning) and, as one
    column is cheap, `proj="gaussian"`; use it with `rank=1`: `ApolloMini(param_groups(model, rank=1))`. State per
    matrix of m x n: 2 max(m, n) + 1 numbers.
    """

    rule: ClassVar[str] = "apollo-mini"

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


class ApolloSvd(Apollo):
    """APOLLO-SVD: `Apollo` on the gradient's top singular vectors, refreshed every `update_proj_gap` steps (section 5).

    State per matrix of m x n, d = min(m, n): 2 r max(m, n) + r d numbers.
    """

    rule: ClassVar[str] = "apollo-svd"

    def __init__(self, params: Iterable[Any], lr: float | Tensor = 1e-2, *, proj: str = "svd", **knobs: Any) -> None:
        super().__init__(params, lr, proj=proj, **knobs)


class AdamW(RuleOptimizer):
    """torch.optim.AdamW's arithmetic and defaults, with what this library adds to every optimizer of its own:

    fp32 moments and one stochastically rounded write for bf16 weights, a non-finite gradient skipped, a checkpoint
    that keeps its dtypes. State: two numbers per parameter.
    """

    rule: ClassVar[str] = "adamw"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **general: Any,
    ) -> None:
        super().__init__(params, self.rule, lr, weight_decay, betas=betas, eps=eps, **general)
