"""FOAM: "Blocked State Folding for Memory-Efficient LLM Training", Wen et al., arXiv 2512.07112."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apollo_optim.core.blocks import by_rows
from apollo_optim.core.errors import InputError
from apollo_optim.core.matrix import adam_moments
from apollo_optim.core.place import Place
from apollo_optim.rules.base import Rule, Scalars, Slot, State, Update, knob
from apollo_optim.rules.knobs import BETAS, EPS, count, number


@dataclass(frozen=True)
class Foam(Rule):
    """Adam's moments of the means of 2^l neighbours in a row, and what the means leave out of the gradient.

    `F = fold(G)`, a mean for each block; Adam's moments M and V of F; `R = G - unfold(F)`, and of every entry
    `W <- (1 - lr wd) W - lr scale (unfold(M) + R) / (sqrt(unfold(V) + R^2) + eps)`. The paper has no bias correction.
    A matrix whose rows blocks do not divide uses AdamW.

    When: APOLLO's memory at rank d/4 without a projection, where rows divide into blocks.

    Evidence: The paper's step (`tests/rules/test_rivals.py`). No quality run of it is in the logs yet; the race
    (`docs/race.md`) has it in its queue.
    """

    name: ClassVar[str] = "foam"
    title: ClassVar[str] = "FOAM"
    paper: ClassVar[str] = "arXiv 2512.07112"
    summary: ClassVar[str] = "Adam of the means of neighbours, and the gradient's rest; state 2dn / 4 per matrix."
    view: ClassVar = "matrix"
    stacks: ClassVar = True
    per_step: ClassVar[frozenset[str]] = frozenset({"betas", "scale"})
    lr: ClassVar[float] = 1e-2

    level: int = knob(count(0), "l: a block is 2^l neighbouring inputs.", 2)
    scale: float = knob(number(0, above=True), "Multiplies a step (the paper's alpha).", 0.25)
    betas: tuple[float, float] = knob(BETAS, "Decay of the two moments of the means.", (0.9, 0.999))
    eps: float = knob(EPS, "Added to the root of the second moment.", 1e-6)

    def applies(self, shape: tuple[int, ...]) -> bool:
        return shape[-1] % (1 << self.level) == 0

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        low = (*shape[:-1], shape[-1] >> self.level)
        return {"exp_avg": Slot(low, "mean"), "exp_avg_sq": Slot(low, "square")}

    def scalars(self, step: int, shape: tuple[int, ...]) -> dict[str, float]:
        return {"new1": 1 - self.betas[0], "new2": 1 - self.betas[1], "size": self.scale}

    def observe(self, grad: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        if place.splits(-1):
            raise InputError(
                f"no FOAM step for a parameter split as {place.placements}: neighbours in a row are averaged, so ranks "
                "must hold whole rows. Choose another rule for it"
            )
        folded = by_rows(lambda block, _: self.blocks(block).mean(-1), grad)
        m, v = adam_moments(folded, state["exp_avg"], state["exp_avg_sq"], s["new1"], s["new2"])
        return {"exp_avg": m, "exp_avg_sq": v, "mean": m.unsqueeze(-2), "square": v.unsqueeze(-2)}

    def update(self, grad: Tensor, state: State, s: Scalars) -> Update:
        blocks = self.blocks(grad)
        rest = blocks - blocks.mean(-1, keepdim=True)
        mean, square = (state[name].squeeze(-2).unsqueeze(-1) for name in ("mean", "square"))
        direction = (mean + rest) / ((square + rest.square()).sqrt() + self.eps)
        return Update(direction.flatten(-2), s["size"])

    def blocks(self, rows: Tensor) -> Tensor:
        """(.., m, n) -> (.., m, blocks, 2^l), fp32."""
        return rows.float().reshape(*rows.shape[:-1], rows.shape[-1] >> self.level, 1 << self.level)
