"""DCT-AdamW: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models",
Modoranu et al., 2025, arXiv 2505.17967."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apollo_optim.core.matrix import adam_moments, bias_corrections, factors, own_matrices, project, projected_back
from apollo_optim.core.place import Place
from apollo_optim.rules.base import Scalars, Slot, State, Update, knob, preset
from apollo_optim.rules.knobs import BETAS, EPS
from apollo_optim.rules.projected import Projected, Ranked


@dataclass(frozen=True)
class DctAdamW(Ranked):
    """Adam within r columns P of a fixed basis, the discrete cosine transform: those that hold most of the gradient.

    `R = G P`, `W <- (1 - lr wd) W - lr M' / (sqrt(V') + eps) P^T`, Adam's moments of R with their bias corrections.
    Every `update_proj_gap` steps the r columns of G Q with the largest norms are chosen anew; the moments of a column
    that stays are kept, those of a new one begin at zero (M P_old^T P_new: the basis is orthonormal). The numbers of
    the columns are all that is kept of P. The paper's error feedback, an option there that keeps dn more, is not here.

    When: To compare with: GaLore's step without a decomposition and without a basis to keep.

    Evidence: The paper's step in fp64; with all columns it is AdamW in another basis
    (`tests/rules/test_more_rivals.py`). No quality run of it is in the logs yet; the race (`docs/race.md`) has it in
    its queue.
    """

    name: ClassVar[str] = "dct-adamw"
    title: ClassVar[str] = "DCT-AdamW"
    paper: ClassVar[str] = "arXiv 2505.17967"
    summary: ClassVar[str] = "Adam in the cosines that hold most of the gradient; state 2nr + r per matrix."
    per_step: ClassVar[frozenset[str]] = frozenset({"betas"})
    lr: ClassVar[float] = 1e-3

    update_proj_gap: int = preset(Projected, "update_proj_gap", 1)
    betas: tuple[float, float] = knob(BETAS, "Decay of the two moments of the projected gradient.", (0.9, 0.999))
    eps: float = knob(EPS, "Added to the root of the second moment.", 1e-8)

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        low_cr = (*shape[:-1], self.rank)
        return {
            "exp_avg": Slot(low_cr, "mean", "channels"),
            "exp_avg_sq": Slot(low_cr, "square", "channels"),
            "columns": Slot((*shape[:-2], 1, self.rank), split="whole"),
        }

    def scalars(self, step: int, shape: tuple[int, ...]) -> dict[str, float]:
        correction1, correction2 = bias_corrections(step, self.betas)
        new1, new2 = (1 - beta for beta in self.betas)
        return {"new1": new1, "new2": new2, "c1": correction1, "c2": correction2}

    def phase(self, step: int) -> bool:
        """Are columns chosen anew?"""
        return (step - 1) % self.update_proj_gap == 0

    def observe(self, grad_ck: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        *stack, c, k = place.shape
        columns_1r = state["columns"]
        exp_avg, exp_avg_sq, new = state["exp_avg"].float(), state["exp_avg_sq"].float(), {}
        if s["phase"]:
            every = torch.arange(k, device=grad_ck.device, dtype=torch.float32).expand(*stack, k)
            of_every = place.of_state((*stack, c, k), "channels")
            every_ck = project(grad_ck, cosines(every, k), k, place)
            sizes_1k = of_every.sum(every_ck.square().sum(-2, keepdim=True), -2)
            chosen_1r = of_every.along(-2).whole(sizes_1k).topk(self.rank).indices.sort().values
            stays_rr = own_matrices((columns_1r.mT == chosen_1r).float(), place)
            exp_avg, exp_avg_sq = exp_avg @ stays_rr, exp_avg_sq @ stays_rr
            low_cr = every_ck.gather(-1, own_matrices(chosen_1r, place).expand(*every_ck.shape[:-1], self.rank))
            new["columns"] = columns_1r = chosen_1r.float()
        basis = cosines(columns_1r.squeeze(-2), k)
        if not s["phase"]:
            low_cr = project(grad_ck, basis, self.rank, place)
        exp_avg, exp_avg_sq = adam_moments(low_cr, exp_avg, exp_avg_sq, s["new1"], s["new2"])
        adam_cr = exp_avg / s["c1"] / (exp_avg_sq.sqrt() / s["c2"] + self.eps)
        low_c1r, basis_1kr = factors(adam_cr, basis, grad_ck, place)
        return {**new, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "low": low_c1r, "high": basis_1kr}

    def update(self, grad_ck: Tensor, state: State, s: Scalars) -> Update:
        return Update(projected_back(state["low"], state["high"]))


def cosines(columns: Tensor, k: int) -> Tensor:
    """These columns (.., r) of the orthonormal DCT-II of k points: (.., k, r), `sqrt(2/k) cos(pi (2 j + 1) i / 2k)`."""
    odd = 2 * torch.arange(k, device=columns.device, dtype=torch.int64) + 1
    turns = (odd[:, None] * columns.long().unsqueeze(-2)) % (4 * k)  # whole numbers: a product is beyond fp32's
    root = math.sqrt(2 / k)
    size = torch.full_like(columns, root).masked_fill(columns == 0, root * math.sqrt(0.5)).unsqueeze(-2)
    return (turns.float() * (math.pi / (2 * k))).cos() * size
