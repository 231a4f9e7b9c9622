"""LoRA-Pre: "Taming Momentum: Rethinking Optimizer States Through Low-Rank Approximation", Wang et al., ICLR 2026,
arXiv 2602.24283."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apollo_optim.core.matrix import bias_corrections, lerp, projected_back, whole_factors
from apollo_optim.core.place import Place
from apollo_optim.rules.base import Scalars, Slot, State, Update, knob
from apollo_optim.rules.knobs import BETAS, EPS
from apollo_optim.rules.projected import Ranked


@dataclass(frozen=True)
class LoraPre(Ranked):
    """Adam with each moment a product B A of low rank, which follows the gradient by least squares.

    For the first moment, of G, and for the root of the second, of |G|, with `c = 1 - sqrt(beta1)` and
    `1 - beta2^(1/4)`:
    `B <- (1 - c) B + c G A^T (A A^T)^-1`, `A <- (1 - c) A + c (B^T B)^-1 B^T G` (both from what was there before),
    `M = beta1 B A + (1 - beta1) G`, `V = beta2 (B' A')^2 + (1 - beta2) G^2`, and Adam's step of M and V with its bias
    corrections: of full rank through this gradient. The paper does not say where B and A begin; here B is zero and A
    the first r unit vectors, and what is inverted has a millionth of its mean diagonal added. Of a sharded weight every
    rank has all of A and B, and the gradient is gathered at each step.

    When: To compare with: a moment of full rank at APOLLO's state.

    Evidence: The paper's step in fp64; a gradient of low rank that stays is found and kept
    (`tests/rules/test_more_rivals.py`). No quality run of it is in the logs yet; the race (`docs/race.md`) has it in
    its queue.
    """

    name: ClassVar[str] = "lora-pre"
    title: ClassVar[str] = "LoRA-Pre"
    paper: ClassVar[str] = "arXiv 2602.24283"
    summary: ClassVar[str] = "Adam with moments of low rank, fitted by least squares; state 2(d + n)r per matrix."
    per_step: ClassVar[frozenset[str]] = frozenset({"betas"})
    lr: ClassVar[float] = 1e-3

    betas: tuple[float, float] = knob(BETAS, "Decay of the two moments.", (0.9, 0.999))
    eps: float = knob(EPS, "Added to the root of the second moment.", 1e-8)

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        *stack, c, k = shape
        left = Slot((*stack, c, self.rank), "mean", "whole")
        right = Slot((*stack, k, self.rank), split="whole", start="eye")
        return {"exp_avg_left": left, "exp_avg_right": right, "exp_abs_left": left, "exp_abs_right": right}

    def scalars(self, step: int, shape: tuple[int, ...]) -> dict[str, float]:
        beta1, beta2 = self.betas
        correction1, correction2 = bias_corrections(step, self.betas)
        fit = {"fit_avg": 1 - beta1**0.5, "fit_abs": 1 - beta2**0.25}
        return {
            **fit,
            "beta1": beta1,
            "new1": 1 - beta1,
            "root2": beta2**0.5,
            "new2": 1 - beta2,
            "c1": correction1,
            "c2": correction2,
        }

    def observe(self, grad_ck: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        whole_ck = place.whole(grad_ck).float()
        new: dict[str, Tensor] = {}
        for name, target_ck in (("avg", whole_ck), ("abs", whole_ck.abs())):
            left_cr, right_kr = state[f"exp_{name}_left"].float(), state[f"exp_{name}_right"]
            onto_left_cr, onto_right_kr = target_ck @ over_gram(right_kr), target_ck.mT @ over_gram(left_cr)
            fit = s[f"fit_{name}"]
            left_cr, right_kr = lerp(left_cr, onto_left_cr, fit), lerp(right_kr, onto_right_kr, fit)
            new |= {f"exp_{name}_left": left_cr, f"exp_{name}_right": right_kr}
            new[f"{name}_low"], new[f"{name}_high"] = whole_factors(left_cr, right_kr, grad_ck, place)
        return new

    def update(self, grad_ck: Tensor, state: State, s: Scalars) -> Update:
        grad = grad_ck.float()
        mean, size = (projected_back(state[f"{name}_low"], state[f"{name}_high"]) for name in ("avg", "abs"))
        m = s["beta1"] * mean + s["new1"] * grad
        v = (s["root2"] * size).square() + s["new2"] * grad.square()
        return Update(m / s["c1"] / (v.sqrt() / s["c2"] + self.eps))


def over_gram(t_nr: Tensor) -> Tensor:
    """`T (T^T T)^-1`, (.., n, r), with a millionth of the mean diagonal added to what is inverted: zero of zero."""
    gram_rr = t_nr.mT @ t_nr
    mean = gram_rr.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    damped_rr = gram_rr + torch.eye(t_nr.shape[-1], dtype=torch.float32, device=t_nr.device) * (1e-6 * mean + 1e-30)
    solved: Tensor = torch.linalg.solve(damped_rr, t_nr.mT).mT
    return solved
