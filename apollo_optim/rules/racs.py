"""RACS: "Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation with a Low-Rank Extension".

Gong et al., arXiv 2502.07752.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apollo_optim.core.compile import in_memory
from apollo_optim.core.matrix import limit_growth, reciprocal, weighted_squares
from apollo_optim.core.place import Place
from apollo_optim.rules.base import Rule, Scalars, Slot, State, Update, knob
from apollo_optim.rules.knobs import BETA, count, either, number

LEAST = 1e-30  # norm of a vector that is divided by


@dataclass(frozen=True)
class Racs(Rule):
    """Row and column scaled SGD: the gradient over the roots of q (one a row) and s (one a column).

    q s^T is the best approximation of G * G by rank one, found by power iteration from q = 1:
    `s = (G * G)^T q / ||q||^2`, `q = (G * G) s / ||s||^2`. Both are averaged over steps, and
    `W <- (1 - lr wd) W - lr alpha limit(Q^-1/2 G S^-1/2)`, whose RMS is about lr alpha.

    The averages start from the first gradient that is not zero: from zero, the first step would be 10 times too large,
    and nothing limits that one. A zero gradient leaves them as they are.

    When: Almost no state - two vectors a matrix, as APOLLO-Mini's - without a projection.

    Evidence: The paper's step, and the best approximation of rank one is found (`tests/rules/test_rivals.py`). With
    embedding and head by AdamW it ends 1.3 % above AdamW's perplexity (`llama-4m`, one seed, `docs/race.md`), and with
    averages of less than a step: a decay of 0.19, not the paper's 0.9.
    """

    name: ClassVar[str] = "racs"
    title: ClassVar[str] = "RACS"
    paper: ClassVar[str] = "arXiv 2502.07752"
    summary: ClassVar[str] = "The gradient, each row and column over the root of its scale; state m + n per matrix."
    view: ClassVar = "matrix"
    stacks: ClassVar = True
    per_step: ClassVar[frozenset[str]] = frozenset({"beta", "alpha"})
    lr: ClassVar[float] = 0.02

    beta: float = knob(BETA, "Decay of the averages of q and s.", 0.9)
    rounds: int = knob(count(1), "Of the power iteration, each a pass for s and one for q.", 5)
    alpha: float = knob(number(0, above=True), "Multiplies a step.", 0.05)
    norm_growth: float | None = knob(
        either(None, number(1), "no limit"),
        "A step's norm may be at most this times the one before (Fira's limiter).",
        1.01,
    )

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        *batch, m, n = shape
        return {
            "row": Slot((*batch, m, 1), split="rows"),
            "col": Slot((*batch, 1, n), split="columns"),
            "prev_norm": Slot(tuple(batch)),
        }

    def scalars(self, step: int, shape: tuple[int, ...]) -> dict[str, float]:
        return {"new": 1 - self.beta, "size": self.alpha}

    def observe(self, grad: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        rows, columns = place.along(-1), place.along(-2)

        def over_square(t: Tensor, vector: Tensor, of: Place, dim: int) -> Tensor:
            norm = of.sum(vector.square().sum(dim, keepdim=True), dim).sqrt().clamp(min=LEAST)
            # In memory: compiled sums of few terms are written out, each with all that went before in it.
            # In two: the fourth power of a small gradient is no number of fp32.
            return in_memory(t / norm / norm)

        row_m1 = torch.ones_like(state["row"])
        for _ in range(self.rounds):
            col_1n = over_square(weighted_squares(grad, row_m1, place, -2), row_m1, rows, -2)
            row_m1 = over_square(weighted_squares(grad, col_1n, place, -1), col_1n, columns, -1)

        total_11, first_11 = rows.sum(row_m1.sum(-2, keepdim=True), -2), (state["prev_norm"] == 0)[..., None, None]
        new = (torch.ones_like(total_11) * s["new"]).masked_fill(first_11, 1.0).masked_fill(total_11 == 0, 0.0)
        pairs, new = ((state["row"], row_m1), (state["col"], col_1n)), in_memory(new)
        row_m1, col_1n = (in_memory(old + (t - old) * new) for old, t in pairs)
        over_row_m1, over_col_1n = reciprocal(row_m1), reciprocal(col_1n)
        stepped_m1 = weighted_squares(grad, over_col_1n, place, -1) * over_row_m1
        norm = rows.sum(stepped_m1.sum(-2, keepdim=True), -2).sqrt()[..., 0, 0]
        growth = math.inf if self.norm_growth is None else self.norm_growth
        limit, prev_norm = limit_growth(norm, state["prev_norm"], growth)
        return {
            "row": row_m1,
            "col": col_1n,
            "prev_norm": prev_norm,
            "row_factor": over_row_m1.sqrt() * limit[..., None, None],
            "col_factor": over_col_1n.sqrt(),
        }

    def update(self, grad: Tensor, state: State, s: Scalars) -> Update:
        return Update(grad.float() * state["col_factor"], state["row_factor"] * s["size"])
