"""NorMuon: "NorMuon: Making Muon more efficient and scalable", Li et al., arXiv 2510.05491."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apollo_optim.core.matrix import TINY, lerp, ratio, weighted_squares
from apollo_optim.core.place import Place
from apollo_optim.rules.base import Scalars, Slot, State, Update, knob
from apollo_optim.rules.knobs import BETA
from apollo_optim.rules.muon import Muon


@dataclass(frozen=True)
class NorMuon(Muon):
    """Muon, whose rows are brought to one size over time.

    Each row (an output) of Muon's orthogonal O is divided by the root of its mean square's running average v; then the
    matrix is brought back to O's norm, so that Muon's rates serve: `W <- (1 - lr wd) W - lr size ||O|| / ||N|| N`,
    `N = O / sqrt(v)`. v needs no bias correction, as a number that all rows share drops out.

    When: Where Muon is, for one more number a row.

    Evidence: Muon with its rows normalised, checked against that definition (`tests/rules/test_rivals.py`). Stateless,
    with a slim rest, it ends 1.6 % above Muon so (`docs/race.md`, one seed); with a momentum it is in the queue.
    """

    name: ClassVar[str] = "normuon"
    title: ClassVar[str] = "NorMuon"
    paper: ClassVar[str] = "arXiv 2510.05491"
    summary: ClassVar[str] = "Muon, each row divided by its running RMS; state dn + m per matrix."
    per_step: ClassVar[frozenset[str]] = Muon.per_step | {"beta2"}

    beta2: float = knob(BETA, "Decay of the rows' mean squares.", 0.95)

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        rows = Slot((*shape[:-1], 1), split="rows")  # fp32 whatever the group asks for: they are few
        return {**super().slots(shape), "exp_avg_sq_row": rows}

    def scalars(self, step: int, shape: tuple[int, ...]) -> dict[str, float]:
        return {**super().scalars(step, shape), "new2": 1 - self.beta2}

    def observe(self, grad: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        new = super().observe(grad, state, s, place)
        rows = place.along(-1)
        square_m1 = weighted_squares(new["orthogonal"], None, place, -1)
        mean_m1 = lerp(state["exp_avg_sq_row"], square_m1 / place.shape[-1], s["new2"])
        factor_m1 = 1 / (mean_m1.sqrt() + TINY)
        before, after = (rows.sum(t.sum(-2, keepdim=True), -2).sqrt() for t in (square_m1, square_m1 * factor_m1**2))
        return {**new, "exp_avg_sq_row": mean_m1, "factor": factor_m1 * ratio(before, after)}

    def update(self, grad: Tensor, state: State, s: Scalars) -> Update:
        return Update(state["orthogonal"], state["factor"] * s["size"])
