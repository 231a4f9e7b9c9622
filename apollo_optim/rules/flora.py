"""Flora: "Low-Rank Adapters Are Secretly Gradient Compressors", Hao et al., ICML 2024, arXiv 2402.03293."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apollo_optim.core.matrix import factors, lerp, own_matrices, project, projected_back
from apollo_optim.core.place import Place
from apollo_optim.rules.adafactor import CLIP, FLOOR
from apollo_optim.rules.base import Scalars, Slot, State, Update, knob, preset
from apollo_optim.rules.knobs import BETA, one_of
from apollo_optim.rules.projected import Projected


@dataclass(frozen=True)
class Flora(Projected):
    """Algorithm 2 of the paper: a momentum kept in a random subspace, and Adafactor of what it is in the whole space.

    `M <- b M + (1 - b) G P`; when P changes, `M <- M P_old^T P_new` before that, so that it keeps its meaning - in the
    mean: each change is noise of sqrt(d / r) times its size, and has to be rarer than the momentum is long. The step is
    Adafactor's of `U = M P^T`: `W <- (1 - lr wd) W - lr U / sqrt(R C / mean(R))`, clipped to an RMS of 1, where R
    and C average the squares of U over rows and over columns. U is made for the weight alone: sums over its squares
    are those of M and P (R = diag(M (P^T P) M^T), C = diag(P (M^T M) P^T)).

    When: Adafactor's memory and a momentum in a subspace besides.

    Evidence: The paper's step; with a basis that holds everything it is Adafactor on a momentum
    (`tests/rules/test_rivals.py`). No quality run of it is in the logs yet; the race (`docs/race.md`) has it in its
    queue.
    """

    name: ClassVar[str] = "flora"
    title: ClassVar[str] = "Flora"
    paper: ClassVar[str] = "arXiv 2402.03293"
    summary: ClassVar[str] = "Adafactor on a momentum in a random subspace; state nr + d + n per matrix."
    per_step: ClassVar[frozenset[str]] = frozenset({"momentum"})

    proj: str = knob(one_of("gaussian", "rademacher"), "What the subspace is drawn from.", "gaussian")
    update_proj_gap: int = preset(Projected, "update_proj_gap", 1000)
    momentum: float = knob(BETA, "Decay of the gradient's average.", 0.9)

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        *stack, c, k = shape
        return {
            "exp_avg": Slot((*stack, c, self.rank), "mean", "channels"),
            "exp_avg_sq_row": Slot((*stack, c, 1), split="channels"),
            "exp_avg_sq_col": Slot((*stack, 1, k), split="columns"),
            **super().slots(shape),
        }

    def scalars(self, step: int, shape: tuple[int, ...]) -> dict[str, float]:
        return {"new": 1 - self.momentum, "new2": step**-0.8}

    def draws(self, step: int) -> dict[str, int]:
        new = super().draws(step)
        return {**new, "projection.old": new["projection"] - 1} if self.phase(step) and not self.keep_proj else new

    def phase(self, step: int) -> bool:
        """Does the momentum move into another subspace?"""
        return (step - 1) % self.update_proj_gap == 0

    def observe(self, grad_ck: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        basis, average_cr, new = self.basis(grad_ck, state, s, place), state["exp_avg"].float(), {}
        of_stack = own_matrices(basis, place)
        if s["phase"]:
            old = own_matrices(state["basis"] if self.keep_proj else s["projection.old"], place)
            average_cr = average_cr @ (old.mT @ of_stack)
            new = {"basis": basis} if self.keep_proj else {}
        average_cr = lerp(average_cr, project(grad_ck, basis, self.rank, place), s["new"])
        *stack, c, k = place.shape
        _, high_1kr = factors(average_cr, basis, grad_ck, place)
        over_channels = place.of_state((*stack, c, self.rank**2), "channels")

        def column_squares(t_cr: Tensor) -> Tensor:
            """The squares of t P^T, summed over all channels: (.., 1, k)."""
            gram_1rr = over_channels.sum((t_cr.mT @ t_cr).flatten(-2).unsqueeze(-2), -2)
            gram_rr, own_kr = gram_1rr.reshape(*gram_1rr.shape[:-2], self.rank, self.rank), high_1kr.squeeze(-3)
            return ((own_kr @ gram_rr) * own_kr).sum(-1).unsqueeze(-2).clamp(min=0.0)

        row_squares = ((average_cr @ (of_stack.mT @ of_stack)) * average_cr).sum(-1, keepdim=True).clamp(min=0.0)
        row_c1 = lerp(state["exp_avg_sq_row"], row_squares / k + FLOOR, s["new2"])
        col_1k = lerp(state["exp_avg_sq_col"], column_squares(average_cr) / c + FLOOR, s["new2"])
        mean = place.channels.sum(row_c1.sum(-2, keepdim=True), -2) / c
        row_factor, col_factor = (row_c1 / mean).rsqrt(), col_1k.rsqrt()
        stepped = (column_squares(average_cr * row_factor) * col_factor.square()).sum(-1, keepdim=True)
        rms = (place.along(-2).sum(stepped, -1) / (c * k)).sqrt()
        low_c1r, _ = factors(average_cr * row_factor / (rms / CLIP).clamp(min=1.0), basis, grad_ck, place)
        new |= {"exp_avg": average_cr, "exp_avg_sq_row": row_c1, "exp_avg_sq_col": col_1k}
        return {**new, "low": low_c1r, "high": high_1kr * col_factor.mT.unsqueeze(-3)}

    def update(self, grad_ck: Tensor, state: State, s: Scalars) -> Update:
        return Update(projected_back(state["low"], state["high"]))
