"""Adafactor: "Adaptive Learning Rates with Sublinear Memory Cost", Shazeer & Stern, ICML 2018, arXiv 1804.04235."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apollo_optim.core.blocks import Block, part
from apollo_optim.core.matrix import lerp, sum_blocks, weighted_squares
from apollo_optim.core.place import Place
from apollo_optim.rules.base import Rule, Scalars, Slot, State, Update

FLOOR = 1e-30  # the paper's eps_1: of a squared gradient
CLIP = 1.0  # the paper's d: the largest RMS of a step before lr


@dataclass(frozen=True)
class Adafactor(Rule):
    """Algorithm 4 of the paper, without its relative step sizes and without a first moment.

    U = G / sqrt(R C / mean(R)), clipped to an RMS of 1, where R and C average the squared gradient over rows and over
    columns with the paper's decay 1 - t^-0.8. A step's RMS is at most lr, so that lr means what it means to AdamW.

    When: Embedding and head where memory is short (`rest="adafactor"`).

    Evidence: As the rule of embedding and head together with APOLLO: +3.3 % perplexity against AdamW's there, one seed,
    for 3.6 instead of 16.1 MB (`docs/rest.md`). The step is the paper's (`tests/optim/test_rest.py`).
    """

    name: ClassVar[str] = "adafactor"
    title: ClassVar[str] = "Adafactor"
    paper: ClassVar[str] = "arXiv 1804.04235"
    summary: ClassVar[str] = "The gradient over the root of a factored second moment; state m + n per matrix."
    view: ClassVar = "matrix"
    stacks: ClassVar = True

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        *batch, m, n = shape  # fp32 whatever the group asks for: they decay by less than bf16 can see
        return {
            "exp_avg_sq_row": Slot((*batch, m, 1), split="rows"),
            "exp_avg_sq_col": Slot((*batch, 1, n), split="columns"),
        }

    def scalars(self, step: int, shape: tuple[int, ...]) -> dict[str, float]:
        return {"new": step**-0.8}

    def observe(self, grad: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        """The two factors after this gradient, and by how much the step must shrink to an RMS of 1."""
        m, n = place.shape[-2:]

        row = lerp(state["exp_avg_sq_row"], weighted_squares(grad, None, place, -1) / n + FLOOR, s["new"])
        col = lerp(state["exp_avg_sq_col"], weighted_squares(grad, None, place, -2) / m + FLOOR, s["new"])
        mean = place.along(-1).sum(row.sum(-2, keepdim=True), -2) / m
        row_factor, col_factor = (row / mean).rsqrt(), col.rsqrt()

        def stepped(block: Tensor, at: Block) -> Tensor:
            step: Tensor = block.float() * part(col_factor, at) * part(row_factor, at)
            return step.square()

        rms = (sum_blocks(stepped, grad, place, -1, -2) / (m * n)).sqrt()
        row_factor = row_factor / (rms / CLIP).clamp(min=1.0)
        return {"exp_avg_sq_row": row, "exp_avg_sq_col": col, "row_factor": row_factor, "col_factor": col_factor}

    def update(self, grad: Tensor, state: State, s: Scalars) -> Update:
        return Update(grad.float() * state["col_factor"], state["row_factor"])
