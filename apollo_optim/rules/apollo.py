"""APOLLO: the gradient itself, each channel rescaled as Adam would have rescaled its random sketch.

"APOLLO: SGD-like Memory, AdamW-level Performance", Zhu et al., MLSys 2025, arXiv 2412.05270.
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar, cast

import torch
from torch import Tensor

from apollo_optim.core.matrix import (
    PROJECTIONS,
    adam_moments,
    bias_corrections,
    channel_norms,
    limit_growth,
    matrix_norm,
    project_with_norms,
    random_basis,
    ratio,
    svd_basis,
)
from apollo_optim.core.place import Place
from apollo_optim.core.random import Key
from apollo_optim.rules.base import Rule, Scalars, Slot, State, Update, knob, preset
from apollo_optim.rules.knobs import BETAS, EPS, SWITCH, count, either, number, one_of


@dataclass(frozen=True)
class Apollo(Rule):
    """Algorithm 1 of the paper, with the limiter folded into one factor per channel (or per tensor).

    The moments of Adam are kept for R = G P alone, the gradient's random sketch of r columns. What they say about each
    channel (a row or a column, along the longer side) - how much Adam would have stretched it, s = ||N|| / ||R||
    (eq. 5) - is applied to the gradient itself: `W <- (1 - lr wd) W - lr sqrt(scale) c_t limit(s G)`, where c_t is
    Adam's bias correction. Nothing is projected back, so a step has full rank.
    """

    name: ClassVar[str] = "apollo"
    title: ClassVar[str] = "APOLLO"
    paper: ClassVar[str] = "arXiv 2412.05270"
    summary: ClassVar[str] = (
        "The gradient, each channel rescaled as Adam would have rescaled its random sketch; state 2nr per matrix."
    )
    view: ClassVar = "channels"
    per_step: ClassVar[frozenset[str]] = frozenset({"betas"})
    lr: ClassVar[float] = 1e-2

    rank: int = knob(
        count(1),
        "r, columns of the sketch: a quarter of the small side (the papers' choice; 256 at 7B), or an eighth.",
    )
    scale: float | str = knob(
        either("auto", number(0, above=True), "d / rank"),
        "Its square root multiplies a step (the paper's alpha). A sketch of r columns underestimates s by sqrt(r / d) "
        '(theorem 4.2); "auto" undoes that with d / r.',
        1.0,
    )
    scale_type: str = knob(
        one_of("channel", "tensor"),
        "One factor for each channel, or one for the whole matrix (APOLLO-Mini).",
        "channel",
    )
    scale_front: bool = knob(
        SWITCH,
        "Scale before the limiter instead of after it. The limiter is homogeneous: only roundings differ.",
        False,
    )
    proj: str = knob(
        one_of(*PROJECTIONS),
        '"sketch" (CountSketch: signs and sums, no matrix product), "gaussian" (the paper\'s: the same perplexity in '
        'several times the time), "rademacher", or "svd" (the gradient\'s top singular vectors, kept as state).',
        "sketch",
    )
    update_proj_gap: int = knob(count(1), "Steps between two projections.", 200)
    keep_proj: bool = knob(
        SWITCH,
        "Keep a random projection from one refresh to the next, as state: small side x r fp32 numbers per matrix. "
        "Otherwise every step draws it again, the same numbers.",
        False,
    )
    norm_growth: float | None = knob(
        either(None, number(1), "no limit"),
        "A step's norm may be at most this times the one before (Fira's limiter).",
        1.01,
    )
    betas: tuple[float, float] = knob(BETAS, "Decay of the two moments of the sketch.", (0.9, 0.999))
    eps: float = knob(EPS, "Added to the root of the uncorrected second moment, as in the papers' code.", 1e-6)

    def applies(self, shape: tuple[int, ...]) -> bool:
        return shape[-1] > self.rank  # else there is nothing to compress

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        *stack, c, k = shape
        low_cr = (*stack, c, self.rank)
        slots = {
            "exp_avg": Slot(low_cr, "mean", "channels"),
            "exp_avg_sq": Slot(low_cr, "square", "channels"),
            "prev_norm": Slot(tuple(stack)),
        }
        if self.proj == "svd":
            # orthonormal from the start, should the first gradient not be finite
            slots["basis"] = Slot((*stack, k, self.rank), split="whole", start="eye")
        elif self.keep_proj:
            slots["basis"] = Slot((*stack, k) if self.proj == "sketch" else (*stack, k, self.rank), "drawn", "whole")
        return slots

    def scalars(self, step: int, shape: tuple[int, ...]) -> dict[str, float]:
        alpha = float(shape[-1] / self.rank if self.scale == "auto" else self.scale) ** 0.5
        correction1, correction2 = bias_corrections(step, self.betas)
        return {
            "new1": 1 - self.betas[0],
            "new2": 1 - self.betas[1],
            "size": alpha * correction2 / correction1,
            "front": alpha,
        }

    def draws(self, step: int) -> dict[str, int]:
        if self.proj == "svd" or (self.keep_proj and not self.phase(step)):
            return {}
        return {"projection": (step - 1) // self.update_proj_gap}

    def draw_size(self, shape: tuple[int, ...]) -> int:
        *stack, _, k = shape
        return prod(stack) * k * (1 if self.proj == "sketch" else self.rank)

    def draw(self, key: Key, place: Place, device: torch.device) -> Tensor:
        return random_basis(place, self.rank, self.proj, key, device)

    def phase(self, step: int) -> bool:
        """Is a basis that is state made anew?"""
        return (self.keep_proj or self.proj == "svd") and (step - 1) % self.update_proj_gap == 0

    def basis(self, grad_ck: Tensor, state: State, s: Scalars, place: Place) -> Tensor:
        """P: drawn from the parameter's seed and the number of the refresh, or the gradient's singular vectors."""
        if self.proj == "svd":
            return svd_basis(place.whole(grad_ck), self.rank) if s["phase"] else state["basis"]
        if self.keep_proj and not s["phase"]:
            return state["basis"]
        return cast("Tensor", s["projection"])

    def observe(self, grad_ck: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        channels = place.channels
        basis = self.basis(grad_ck, state, s, place)
        low_cr, low_c1, grad_c1 = project_with_norms(grad_ck, basis, self.rank, place)
        exp_avg, exp_avg_sq = adam_moments(low_cr, state["exp_avg"], state["exp_avg_sq"], s["new1"], s["new2"])
        adam_c1 = channel_norms(exp_avg / (exp_avg_sq.sqrt() + self.eps))

        if self.scale_type == "tensor":
            factor = ratio(matrix_norm(adam_c1, channels), matrix_norm(low_c1, channels))[..., None, None]
        else:
            factor = ratio(adam_c1, low_c1)
        new = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "grad_norm": matrix_norm(grad_c1, channels)}
        if self.norm_growth is not None:
            norm = matrix_norm(factor * grad_c1, channels)
            norm = norm * s["front"] if self.scale_front else norm
            limit, new["prev_norm"] = limit_growth(norm, state["prev_norm"], self.norm_growth)
            factor = factor * limit[..., None, None]
        if s["phase"]:
            new["basis"] = basis
        factor = factor * s["size"]
        return {**new, "factor": factor if self.scale_type == "tensor" else place.from_channels(factor)}

    def update(self, grad_ck: Tensor, state: State, s: Scalars) -> Update:
        return Update(grad_ck, state["factor"])

    def describe(self) -> str:
        return f"{self.title} r={self.rank}"


@dataclass(frozen=True)
class ApolloMini(Apollo):
    """APOLLO-Mini (section 4.3): one factor for the whole matrix, for which a sketch of one column is enough.

    `scale` 128 is the papers' for 60M and 130M and all fine-tuning; as one column is cheap, `proj` is "gaussian".
    """

    name: ClassVar[str] = "apollo-mini"
    title: ClassVar[str] = "APOLLO-Mini"
    paper: ClassVar[str] = "arXiv 2412.05270, section 4.3"
    summary: ClassVar[str] = "APOLLO with one factor per matrix and rank 1; state 2n per matrix."

    rank: int = preset(Apollo, "rank", 1)
    scale: float | str = preset(Apollo, "scale", 128.0)
    scale_type: str = preset(Apollo, "scale_type", "tensor")
    proj: str = preset(Apollo, "proj", "gaussian")


@dataclass(frozen=True)
class ApolloSvd(Apollo):
    """APOLLO on the gradient's top singular vectors instead of random ones (section 5)."""

    name: ClassVar[str] = "apollo-svd"
    title: ClassVar[str] = "APOLLO-SVD"
    paper: ClassVar[str] = "arXiv 2412.05270, section 5"
    summary: ClassVar[str] = (
        "APOLLO on the gradient's top singular vectors, refreshed every 200 steps; state 2nr + dr per matrix."
    )

    proj: str = preset(Apollo, "proj", "svd")
