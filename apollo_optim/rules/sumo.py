"""SUMO: "Subspace-Aware Moment-Orthogonalization for Accelerating Memory-Efficient LLM Training", Refael et al., 2025,
arXiv 2505.24749."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apollo_optim.core.matrix import lerp, own_matrices, project, projected_back, whole_factors
from apollo_optim.core.place import Place
from apollo_optim.rules.base import Scalars, Slot, State, Update, knob, preset
from apollo_optim.rules.galore import Galore
from apollo_optim.rules.knobs import BETA, one_of
from apollo_optim.rules.projected import Projected


@dataclass(frozen=True)
class Sumo(Projected):
    """The paper's algorithm: a momentum in the subspace of the gradient's top singular vectors P, orthogonalised there.

    `M <- b M + (1 - b) G P`; when P changes, `M <- M P_old^T P_new` before that. `M = U S V^T`,
    `W <- (1 - lr wd) W - lr scale U V^T P^T`: exactly, where Muon iterates. (The paper adds G P unweighted, which is
    the same direction.) A step's norm is scale sqrt(r) whenever M has r singular values, so that the paper's limiter,
    which is an option there, would have nothing to limit and is not here.

    When: To compare with: Muon's step from a quarter of its momentum, and a singular value decomposition a step.

    Evidence: The paper's step in fp64; with a basis that holds everything it is exact Muon
    (`tests/rules/test_more_rivals.py`). No quality run of it is in the logs yet; the race (`docs/race.md`) has it in
    its queue.
    """

    name: ClassVar[str] = "sumo"
    title: ClassVar[str] = "SUMO"
    paper: ClassVar[str] = "arXiv 2505.24749"
    summary: ClassVar[str] = "Muon in the subspace of the gradient's top singular vectors; state nr + dr per matrix."
    per_step: ClassVar[frozenset[str]] = frozenset({"momentum", "scale"})
    lr: ClassVar[float] = 0.05

    proj: str = knob(one_of("svd"), "The gradient's top singular vectors, kept as state.", "svd")
    scale: float = preset(Galore, "scale", 0.25)
    momentum: float = knob(BETA, "Decay of the projected gradient's average.", 0.95)

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"exp_avg": Slot((*shape[:-1], self.rank), "mean", "channels"), **super().slots(shape)}

    def scalars(self, step: int, shape: tuple[int, ...]) -> dict[str, float]:
        return {"new": 1 - self.momentum, "size": self.scale}

    def observe(self, grad_ck: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        basis, average_cr = self.basis(grad_ck, state, s, place), state["exp_avg"].float()
        of_state = place.of_state((*place.shape[:-1], self.rank), "channels")
        new = {}
        if s["phase"]:
            new["basis"] = basis
            average_cr = average_cr @ own_matrices(state["basis"].mT @ basis, place)
        average_cr = lerp(average_cr, project(grad_ck, basis, self.rank, place), s["new"])
        low_c1r, basis_1kr = whole_factors(polar(of_state.whole(average_cr)), basis, grad_ck, place)
        return {**new, "exp_avg": average_cr, "low": low_c1r, "high": basis_1kr}

    def update(self, grad_ck: Tensor, state: State, s: Scalars) -> Update:
        return Update(projected_back(state["low"], state["high"]), s["size"])


def polar(matrix: Tensor) -> Tensor:
    """The orthogonal matrix U V^T that is nearest to U S V^T (.., m, n), fp32. What has no size gets no direction."""
    finite = matrix.float().nan_to_num(0.0, 0.0, 0.0)  # svd raises on others; the step is skipped
    u, size, vh = torch.linalg.svd(finite, full_matrices=False)
    nearest: Tensor = (u * (size > 1e-6 * size[..., :1]).unsqueeze(-2)) @ vh
    return nearest
