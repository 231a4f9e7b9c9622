"""Lion: "Symbolic Discovery of Optimization Algorithms", Chen et al., NeurIPS 2023, arXiv 2302.06675."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apollo_optim.core.matrix import lerp
from apollo_optim.rules.base import Rule, Scalars, Slot, State, Update, knob
from apollo_optim.rules.knobs import BETA


@dataclass(frozen=True)
class Lion(Rule):
    """Program 1 of the paper: `W <- (1 - lr wd) W - lr sign(beta1 M + (1 - beta1) G)`, `M <- beta2 M + (1 - beta2) G`.

    Every entry moves by lr at every step, so the paper takes a third to a tenth of AdamW's rate, and as many times its
    weight decay. Its betas are two knobs, not `betas`: that key goes wherever Adam is, and means other numbers there.

    When: Half of AdamW's state, without a second moment. Start at a third to a tenth of AdamW's rate.

    Evidence: The paper's step (`tests/rules/test_rivals.py`). No quality run of it is in the logs yet; the race
    (`docs/race.md`) has it in its queue.
    """

    name: ClassVar[str] = "lion"
    title: ClassVar[str] = "Lion"
    paper: ClassVar[str] = "arXiv 2302.06675"
    summary: ClassVar[str] = "The sign of the gradient mixed into its average; state dn per matrix."
    per_step: ClassVar[frozenset[str]] = frozenset({"beta1", "beta2"})
    lr: ClassVar[float] = 1e-4

    beta1: float = knob(BETA, "How much of what the sign is taken of is the average; the rest is this gradient.", 0.9)
    beta2: float = knob(BETA, "Decay of the gradient's average.", 0.99)

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"exp_avg": Slot(shape, "mean")}

    def scalars(self, step: int, shape: tuple[int, ...]) -> dict[str, float]:
        return {"mix": 1 - self.beta1, "new": 1 - self.beta2}

    def update(self, grad: Tensor, state: State, s: Scalars) -> Update:
        average = state["exp_avg"]
        return Update(lerp(average, grad, s["mix"]).sign(), 1.0, {"exp_avg": lerp(average, grad, s["new"])})
