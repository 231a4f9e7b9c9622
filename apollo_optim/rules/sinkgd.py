"""SinkGD: "Gradient Multi-Normalization for Stateless and Scalable LLM Training", Scetbon et al., arXiv 2502.06742."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apollo_optim.core.matrix import reciprocal, weighted_squares
from apollo_optim.core.place import Place
from apollo_optim.rules.base import Rule, Scalars, State, Update, knob
from apollo_optim.rules.knobs import count, either, number


@dataclass(frozen=True)
class SinkGd(Rule):
    """The gradient, its rows and its columns brought to one size by Sinkhorn's iteration.

    A round brings every row of X = G to the norm sqrt(n), then every column to sqrt(m); five of them, and
    `W <- (1 - lr wd) W - lr alpha X`, of an RMS of lr alpha. X is G with a factor for each row and each column, so
    that only these are made. Rows and columns of zeros stay.

    The paper's is the default. axolotl's has one round, and a rate that falls with the inputs: `rounds=1`,
    `base_width=` the width that `lr` was found at. (Its other rate, over an estimated spectral norm, is not here.)

    When: No state at all for the matrices.

    Evidence: The paper's step, and axolotl's rule of the width (`tests/rules/test_rivals.py`). With embedding
    and head by AdamW it ends 1.0 % above AdamW's perplexity (`llama-4m`, one seed, `docs/race.md`).
    """

    name: ClassVar[str] = "sinkgd"
    title: ClassVar[str] = "SinkGD"
    paper: ClassVar[str] = "arXiv 2502.06742"
    summary: ClassVar[str] = "The gradient, rows and columns brought to one size in turns; state 0."
    view: ClassVar = "matrix"
    stacks: ClassVar = True
    per_step: ClassVar[frozenset[str]] = frozenset({"alpha", "base_width"})
    lr: ClassVar[float] = 0.02

    rounds: int = knob(count(1), "Of rows, then columns.", 5)
    alpha: float = knob(number(0, above=True), "Multiplies a step.", 0.05)
    base_width: int | None = knob(
        either(None, count(1), "the same rate at every width"),
        "The rate of a matrix of n inputs is multiplied by this over n.",
        None,
    )

    def scalars(self, step: int, shape: tuple[int, ...]) -> dict[str, float]:
        return {"size": self.alpha * (1.0 if self.base_width is None else self.base_width / shape[-1])}

    def observe(self, grad: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        m, n = place.shape[-2:]
        # squares of the factors. Those of rows follow from the columns' alone, and the other way round
        row_m1 = reciprocal(weighted_squares(grad, None, place, -1) / n)
        col_1n = reciprocal(weighted_squares(grad, row_m1, place, -2) / m)
        for _ in range(self.rounds - 1):
            row_m1 = reciprocal(weighted_squares(grad, col_1n, place, -1) / n)
            col_1n = reciprocal(weighted_squares(grad, row_m1, place, -2) / m)
        return {"row_factor": row_m1.sqrt(), "col_factor": col_1n.sqrt()}

    def update(self, grad: Tensor, state: State, s: Scalars) -> Update:
        return Update(grad.float() * state["col_factor"], state["row_factor"] * s["size"])
